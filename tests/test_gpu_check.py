"""The command for whoever has a GPU, whole, on the stand-in; and what it says where a part goes wrong."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import standin
from processes import python

TESTS = Path(__file__).parent
SCRIPT = TESTS.parent / "eval" / "gpu_check.py"
HEAD = f"""
import os, sys, time
sys.path[:0] = {[str(TESTS / "support"), str(SCRIPT.parent)]}
import gpu_check
from gpu_check import PARTS, Part
from processes import Fork

def fork(words, **options):  # another interpreter, which need not import all of that again
    def begin():
        sys.argv[:] = words[1:]
        return gpu_check.main()
    return Fork(begin, **options)

gpu_check.subprocess.Popen = fork
"""
FOOT = """
if __name__ == "__main__":
    sys.exit(gpu_check.main())
"""


def check(folder: Path, body: str, *words: str) -> tuple[int, dict, str, str]:
    """Runs a script that changes the command first: exit code, JSON, table, what was printed."""
    script, out = folder / "check.py", folder / "found"
    script.write_text(HEAD + body + FOOT)
    said = folder / "said.txt"
    code = python(script, "--tiny", "--out", str(out), *words, folder=folder, out=said, err=said)
    assert out.with_suffix(".json").is_file(), said.read_text()
    return (
        code,
        json.loads(out.with_suffix(".json").read_text()),
        out.with_suffix(".md").read_text(),
        said.read_text(),
    )


ACCELERATOR = """
from diffusers import FluxPipeline, SanaPipeline
import standin
standin.install()
"""


@pytest.mark.slow
@pytest.mark.skipif(standin.compiler() is None, reason="needs a C++ compiler")
def test_methods_run_on_an_accelerator(tmp_path):
    code, found, table, said = check(tmp_path, ACCELERATOR, "--minutes", "20", "--parts", "sid,compiled")
    assert code == 0, said
    assert found["device"] == "stand-in accelerator" and list(found["parts"]) == ["sid", "compiled"]
    assert [row["turn"] for row in found["parts"]["sid"]["rows"]] == ["critic", "generator"]
    assert "| sid | done |" in table


@pytest.mark.long
@pytest.mark.skipif(standin.compiler() is None, reason="needs a C++ compiler")
def test_every_part_runs_on_an_accelerator(tmp_path):
    code, found, table, said = check(tmp_path, ACCELERATOR, "--minutes", "20")
    assert code == 0, said
    assert found["device"] == "stand-in accelerator" and found["tiny"] and "torch" in found["versions"]
    parts = found["parts"]
    assert list(parts) == ["numerics", "sid", "sprint", "memory", "resume", "eager", "compiled"]
    assert not [name for name, part in parts.items() if "error" in part]
    rows = {name: part["rows"] for name, part in parts.items()}

    kinds = [row["what"] for row in rows["numerics"]]
    assert {"StableDiffusionXLPipeline: x0", "SanaPipeline: x0", "FluxPipeline: x0"} < set(kinds)
    assert {"dmd2: generator", "dmd2: critic", "sid: generator", "sana_sprint: student"} < set(kinds)
    assert all(row["tensors"] >= 3 and row["off"] <= 1e-4 for row in rows["numerics"])

    assert [row["turn"] for row in rows["sid"]] == ["critic", "generator"]
    assert [row["turn"] for row in rows["sprint"]] == ["student", "discriminator", "derivative"]
    for row in rows["sid"] + rows["sprint"][:2]:
        assert row["seconds"] > 0 and row["peak_gb"] > 1e-4 and row["grad_norm"] > 0
    assert rows["sprint"][2]["off"] < 0.05 and rows["sprint"][2]["size"] > 0

    (row,) = rows["memory"]
    assert 0.85 < row["plan_over_peak"] < 1.15 and row["peak_gb"] > 1e-3

    alone, killed, resumed = rows["resume"]
    assert alone["steps"] == resumed["steps"] == 6 and 3 <= killed["steps"] < 6
    assert resumed["off"] == 0 and resumed["identical"] == resumed["tensors"] > 100

    assert [row["batch"] for row in rows["eager"]] == [1]
    assert all(0.5 < row["over_bare"] < 2 and row["peak_memory_gb"] > 0 for row in rows["eager"])
    assert rows["compiled"] == [{"none": "torch writes no code for standin"}]

    assert all(f"| {name} | done |" in table for name in parts)
    assert "| resumed |" in table and "| derivative |" in table


def test_parts_that_fail_hang_or_die_do_not_take_the_others_with_them(tmp_path):
    body = """
def fails(setting):
    yield {"batch": 1}
    raise MemoryError("first line\\nout of memory")

def wrong(setting):
    yield {"off": 0.5}
    gpu_check.hold(False, "0.5 off; expected at most 0.1")

def hangs(setting):
    yield {"batch": 1}
    time.sleep(600)

def dies(setting):
    yield {"batch": 1}
    os.abort()

def works(setting):
    yield {"batch": 1, "seconds": 0.123456, "device": setting.device, "tiny": setting.tiny}

PARTS.clear()
for rows in (fails, wrong, hangs, dies, works):
    PARTS[rows.__name__] = Part("as it says", 3 if rows is hangs else 100, rows)
"""
    code, found, table, said = check(tmp_path, body, "--device", "cpu")
    assert code == 1 and said.splitlines()[-1].endswith("failed: fails, wrong, hangs, dies"), said
    parts = found["parts"]
    assert {name: part.get("error") for name, part in parts.items()} == {
        "fails": "MemoryError: out of memory",
        "wrong": "0.5 off; expected at most 0.1",
        "hangs": "cut off after 3 s, with 1 rows done",
        "dies": "its process was ended by SIGABRT",
        "works": None,
    }
    assert "in fails" in parts["fails"]["traceback"] and "traceback" not in parts["works"]
    assert all(len(part["rows"]) == 1 for part in parts.values())
    assert parts["works"]["rows"] == [{"batch": 1, "seconds": 0.123456, "device": "cpu", "tiny": True}]
    assert "| hangs | failed: cut off after 3 s, with 1 rows done |" in table
    assert "| works | done |" in table and "| 1 | 0.1235 | cpu | True |" in table


def test_what_time_does_not_allow_is_said(tmp_path):
    body = "PARTS['numerics'] = Part('', 100, lambda setting: iter(()))\n"
    code, found, _, _ = check(tmp_path, body, "--device", "cpu", "--parts", "numerics", "--minutes", "0")
    assert code == 1 and found["parts"]["numerics"]["error"] == "not begun: 0 minutes were over"


@pytest.mark.parametrize(
    "words, message",
    [
        (["--device", "cpu"], "fewstep: --device: cpu: it needs an accelerator; --tiny runs on the CPU"),
        (["--tiny", "--parts", "sid,speed"], "fewstep: --parts: 'speed' is no part; expected some of numerics,sid,"),
        (["--tiny", "--device", "gpu"], "fewstep: --device: 'gpu': expected auto, cpu, cuda"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(words, message, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *words])
    assert importlib.import_module("gpu_check").main() == 2
    error = capsys.readouterr().err
    assert error.startswith(message) and error.count("\n") == 1
