"""Recipes on the stand-in accelerator, one after another in one process.

    python on_standin.py recipes|commands OUT [--without-float64] [RECIPE...]

Each recipe's ``--smoke`` trains, writes checkpoints, is exported and verified; then it is resumed in the middle. ``OUT``
gets a line of JSON for each: which stages were reached, and what went wrong.
"""

from __future__ import annotations

import json
import sys
import tempfile
import traceback
from dataclasses import replace
from pathlib import Path

import standin

STAGES = ("train", "checkpoint", "resume", "export", "verify")


class Course:
    """What has happened to one recipe so far.

    Attributes:
        reached: of :data:`STAGES`. waits: of iterations. devices: kinds on which trained weights lay.
    """

    def __init__(self):
        self.reached: set[str] = set()
        self.waits: list[standin.Wait] = []
        self.devices: set[str] = set()
        from fewstep import export
        from fewstep.trainer import Trainer

        self._after(Trainer, "train", "train")
        self._after(Trainer, "save", "checkpoint")
        self._after(export, "export_student", "export")
        self._after(export, "export_routed", "export")
        self._after(export, "verify", "verify")
        iterate = Trainer.iterate

        def watched(trainer):
            with standin.waits() as found:
                iterate(trainer)
            self.waits += found
            self.devices |= {w.device.type for role in trainer.roles.values() for w in role.weights.values()}

        Trainer.iterate = watched

    def _after(self, owner, name: str, stage: str) -> None:
        function = getattr(owner, name)

        def noted(*args, **kwargs):
            result = function(*args, **kwargs)
            self.reached.add(stage)
            return result

        setattr(owner, name, noted)

    def run(self, name: str) -> dict:
        """One recipe."""
        self.reached, self.waits, self.devices, fault = set(), [], set(), None
        try:
            self._through(name)
        except (Exception, SystemExit):
            fault = traceback.format_exc()
        waits = sorted({str(wait) for wait in self.waits})
        reached = [stage for stage in STAGES if stage in self.reached]
        return {
            "recipe": name,
            "reached": reached,
            "fault": fault,
            "waits": waits,
            "devices": sorted(self.devices),
        }

    def _through(self, name: str) -> None:
        from fewstep.checks import check_data
        from fewstep.cli import load_recipe
        from fewstep.distributed import start
        from fewstep.run import Session, execute
        from fewstep.smoke import smoke

        recipe = smoke(load_recipe(name))
        recipe = replace(recipe, train=replace(recipe.train, device=standin.NAME))
        folder = execute(recipe)
        last = folder / "checkpoints" / "step_00000004"
        undisturbed = (last / "state.safetensors").read_bytes()
        last.rename(folder / "undisturbed")
        Session(recipe, *check_data(recipe), start(standin.NAME)).train(resuming=True)
        if (last / "state.safetensors").read_bytes() == undisturbed:
            self.reached.add("resume")


def main(out: str, *names: str) -> None:
    float64 = "--without-float64" not in names
    standin.install()
    course = Course()
    with Path(out).open("a") as lines, tempfile.TemporaryDirectory() as folder:
        tempfile.tempdir = folder
        for name in names:
            if not name.startswith("--"):
                print(json.dumps(course.run(name)), file=lines, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
