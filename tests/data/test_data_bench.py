"""The command that says what sources of data sustain, on a few records."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "eval"))
import data_bench


@pytest.fixture(autouse=True)
def few(monkeypatch, tmp_path):
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(data_bench, "ROUNDS", 1)


def test_each_source_is_read_as_its_library_reads_it(tmp_path, monkeypatch):
    monkeypatch.setattr(data_bench, "SHARD", 16)
    monkeypatch.setattr("fewstep.data.store.SHARD", 16)
    found = data_bench.reading(tmp_path, 6)
    assert list(found) == [*data_bench.KINDS, "store of latents"]
    assert all(one["rows_per_second"] > 1 and one["of_library"] > 0.2 for one in found.values())


@pytest.mark.long
def test_a_step_is_timed_of_each_source(tmp_path, monkeypatch):
    monkeypatch.setattr(data_bench, "KINDS", ("shards",))
    monkeypatch.setattr(data_bench, "STEP", ["--train.batch_size=1", "--train.accumulate=1"])
    found = data_bench.stepping(tmp_path, 5)
    assert list(found) == ["cached", "prompts live", "live, shards"]
    assert all(0.8 < one["over_bare"] < 3 for one in found.values())
