"""The command that measures a start on very many rows, on a few of them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "eval" / "data_start.py"


@pytest.mark.long
def test_it_times_two_starts_of_a_small_and_a_large_set(tmp_path):
    out = tmp_path / "found.json"
    words = [sys.executable, str(SCRIPT), "--prompts", "40", "--images", "24", "--out", str(out)]
    done = subprocess.run(words, cwd=tmp_path, env=os.environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(out.read_text())
    assert list(found["runs"]) == [
        f"{size}, {start} start" for size in ("small", "large") for start in ("first", "again")
    ]
    for run in found["runs"].values():
        assert run["seconds_to_first_step"] > 1 and run["peak_gb"] > 0.1
    assert abs(found["gb_more_than_the_small_set"]) < 0.1
    assert found["command"].endswith("--prompts 40 --images 24")
