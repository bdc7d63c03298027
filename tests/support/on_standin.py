"""Recipes on the stand-in accelerator, one after another in one process.

    python on_standin.py recipes|commands OUT [--without-float64] [RECIPE...]

Each recipe's ``--smoke`` trains, writes checkpoints, is exported and verified; then it is resumed in the middle.
``OUT`` gets a line of JSON for each: which stages were reached, and what went wrong.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import sys
import tempfile
import time
import traceback
from dataclasses import replace
from pathlib import Path

import standin
import torch

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
        from fewstep.training.trainer import Trainer

        self._after(Trainer, "train", "train")
        self._after(Trainer, "save", "checkpoint")
        self._after(export, "export_student", "export")
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
        from fewstep.process import start
        from fewstep.runs.checks import check_data
        from fewstep.runs.library import load_recipe
        from fewstep.runs.session import Session, execute
        from fewstep.runs.smoke import smoke

        recipe = smoke(load_recipe(name))
        recipe = replace(recipe, train=replace(recipe.train, device=standin.NAME, sample_every=4))
        folder = execute(recipe)
        last = folder / "checkpoints" / "step_00000004"
        undisturbed = (last / "state.safetensors").read_bytes()
        last.rename(folder / "undisturbed")
        recipe = replace(recipe, train=replace(recipe.train, sample_every=0))
        Session(recipe, *check_data(recipe), start(standin.NAME)).train(resuming=True)
        if (last / "state.safetensors").read_bytes() == undisturbed:
            self.reached.add("resume")


class Commands:
    """``fewstep COMMAND`` of a day's work, each on what those before it have made."""

    def __init__(self, folder: Path):
        from fewstep.runs.smoke import _few_emoji
        from fewstep.teachers.tiny import write_tiny_pipeline

        self.folder = folder
        self.teacher = write_tiny_pipeline("StableDiffusionXLPipeline", folder / "teacher")
        few = _few_emoji(folder)
        self.images, self.prompts = few, few / "prompts.txt"

    @property
    def run_folder(self) -> Path:
        """Of ``train --smoke``, which makes one itself."""
        return next(self.folder.glob("fewstep-smoke-*/run"), self.folder)

    def words(self) -> dict[str, str]:
        """Command -> its arguments."""
        run, teacher, prompts = self.run_folder, self.teacher, self.prompts
        data = f"--teacher {teacher} --prompts {prompts} --images {self.images}"
        tiny = f"{data} --teacher.dtype float32 --teacher.resolution null --train.batch_size 2 --train.accumulate 1"
        few = f"--prompts {prompts} --num 2 --batch-size 2"
        return {
            "train": "sdxl_dmd2_4step --smoke",
            "resume": f"{run}",
            "replay": f"{run}",
            "export": f"{run} --step 2 --dtype float16",
            "sample": f"{run} --prompt apple --out {self.folder}/a.png",
            "cache": f"sdxl_dmd2_4step {tiny} --teacher.autocast null",
            "pairs": f"sdxl_dmd2_4step {tiny} --num 2 --steps 2 --out {self.folder}/pairs",
            "prepare": f"{teacher} --images {self.images} --out {self.folder}/smooth --steps 2 --check-every 1 "
            "--batch-size 2 --error 10 --stiffness 1e6",
            "bench": f"sdxl_dmd2_4step {tiny} --student.rank 4 --critic.rank 4 --method.critic_steps 2 "
            "--iterations 1 --baseline bare",
            "floor": f"{teacher} --steps 2 --reference-steps 3 {few} --out {self.folder}/floor",
            "eval generate": f"{teacher} --lora {run} --steps 4 {few} --speed-runs 1 --out {self.folder}/made",
            "eval fid": f"{self.images} {self.folder}/made/4-steps --out {self.folder}/fid.json",
        }

    def run(self, name: str) -> dict:
        """One of them; ``bytes`` is the most that it had on the device at once."""
        from fewstep.cli import main

        if name == "resume":  # as after an end in the middle
            shutil.rmtree(self.run_folder / "checkpoints" / "step_00000004")
        if name == "replay":
            shutil.copytree(self.run_folder / "checkpoints" / "step_00000002", self.run_folder / "diverged")
        torch.accelerator.reset_peak_memory_stats()
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            code = main([*name.split(), *self.words()[name].split()])
        print(name, round(time.process_time(), 1), "s so far", file=sys.stderr)
        used = torch.accelerator.max_memory_allocated()
        return {"command": name, "code": code, "bytes": used, "said": said.getvalue()[-3000:]}


def main(kind: str, out: str, *words: str) -> None:
    names = [word for word in words if not word.startswith("--")]
    standin.install(float64="--without-float64" not in words)
    with Path(out).open("a") as lines, tempfile.TemporaryDirectory() as folder:
        tempfile.tempdir = folder
        if kind == "recipes":
            task = Course()
        else:
            task = Commands(Path(folder))
            names = names or list(task.words())
        for name in names:
            print(json.dumps(task.run(name)), file=lines, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
