"""Trackers get what the log gets; those that are not there are refused before anything is loaded."""

import json
from pathlib import Path

import accelerate.tracking
import pytest
from test_end_to_end import tiny

from fewstep.errors import RecipeError
from fewstep.runs.session import execute
from fewstep.runs.trackers import check_trackers


class Lines(accelerate.tracking.GeneralTracker):
    """A tracker of accelerate's kind that writes lines."""

    name, requires_logging_directory = "lines", True

    def __init__(self, run_name, logging_dir):
        super().__init__()
        self.path = Path(logging_dir, run_name + ".jsonl")

    @property
    def tracker(self):
        return self.path

    def write(self, kind, value):
        self.path.parent.mkdir(exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps([kind, value]) + "\n")

    def store_init_configuration(self, values):
        self.write("config", values)

    def log(self, values, step=None, **_):
        self.write(step, values)

    def finish(self):
        self.write("end", None)


def test_a_tracker_gets_the_recipe_and_every_number_of_the_log(tiny_sd15, tmp_path, monkeypatch):
    monkeypatch.setitem(accelerate.tracking.LOGGER_TYPE_TO_CLASS, "lines", Lines)
    monkeypatch.setattr(accelerate.tracking, "_available_trackers", ["lines"])
    words = ("--train.steps", "2", "--train.sample_every", "0", "--train.trackers", "[lines]")
    folder = execute(tiny("sd15_sid_1step", tiny_sd15, tmp_path, *words))
    (_, config), *lines, end = map(json.loads, (folder / "trackers" / "run.jsonl").read_text().splitlines())
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert config["train.steps"] == 2 and config["method.name"] == "sid" and end == ["end", None]
    assert lines == [[r.pop("step"), r] for r in records] and len(lines) == 2


def test_tensorboard_reads_the_curves(tiny_sd15, tmp_path):
    pytest.importorskip("tensorboard")
    words = ("--train.steps", "2", "--train.sample_every", "0", "--train.trackers", "[tensorboard]")
    folder = execute(tiny("sd15_sid_1step", tiny_sd15, tmp_path, *words))
    assert list((folder / "trackers").rglob("events.out.tfevents.*"))


def test_unknown_and_missing_trackers_are_refused(monkeypatch):
    with pytest.raises(RecipeError, match=r"train.trackers: 'wnadb' is unknown; expected some of .*wandb"):
        check_trackers(["wnadb"])
    monkeypatch.setattr(accelerate.tracking, "_available_trackers", [])
    with pytest.raises(RecipeError, match=r"train.trackers: wandb is not installed; pip install wandb"):
        check_trackers(["wandb"])
