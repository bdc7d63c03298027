"""A user's own method, teacher, reward and extractor, in a folder outside the repository that is gone after training."""

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from processes import Fork

from fewstep import extensions
from fewstep import recipe as recipes
from fewstep.cli import main
from fewstep.errors import RecipeError

METHOD = '''
"""A method of one's own, with helpers in a folder beside it, a reward and an extractor."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass

from fewstep.diffusion.student import Student
from fewstep.methods import Method, Phase, register
from fewstep.methods.base import Options
from fewstep.recipe import DataConfig, EvalConfig, Recipe, RoleConfig, SampleConfig, TeacherConfig, TrainConfig
from parts import losses


@register("strange")
class Strange(Method):
    @dataclass
    class Config(Options):
        reward: str | None = "judging:brightness"
        weight: float = 1.0

    def build(self, student):
        self.student = Student(student, [999])

    @classmethod
    def wants(cls, config):
        return ("reward",)

    def phases(self):
        return [Phase("student", ("student",), self.loss)]

    def loss(self, batch, progress):
        if os.environ.get("DIE") == str(progress.iteration):
            os.kill(os.getpid(), signal.SIGKILL)
        from parts.later import scaled

        x0 = self.student.x0(batch.rng.normal(*batch.shape), 0, batch.cond)
        return {"norm": losses.norm(x0), "reward": scaled(self.reward(x0, batch.index), self.config.weight)}


recipe = Recipe(
    output="run",
    teacher=TeacherConfig(path="teacher"),
    method=Strange.Config(),
    data=DataConfig(prompts="prompts.txt", images="images"),
    roles={"student": RoleConfig(rank=4)},
    train=TrainConfig(steps=6, batch_size=2, checkpoint_every=2, sample_every=0),
    samples=SampleConfig(count=2, teacher_steps=2, columns=2),
    evaluation=EvalConfig(num=4, teacher_steps=2, extractor="judging:corners"),
)

if __name__ == "__main__":
    from fewstep import run

    run(recipe)
'''
HELPERS = {
    "parts/__init__.py": "",
    "parts/losses.py": """
        from .powers import square

        def norm(x0):
            return square(x0).mean()
    """,
    "parts/powers.py": "def square(x):\n    return x * x\n",
    "parts/later.py": "def scaled(value, weight):\n    return -weight * value.mean()\n",
    "judging.py": """
        def brightness(images, prompts):
            return images.mean((1, 2, 3))

        def corners(images):
            return images[:, ::8, ::8].flatten(1).float()
    """,
    "unused.py": "raise RuntimeError('nobody asks for this file')\n",
}
TEACHER = '''
"""An adapter of one's own, with the run beside it: it has no line that keeps it from running when it is read."""

import fewstep
from fewstep.methods.boot import BOOT
from fewstep.recipe import DataConfig, EvalConfig, Recipe, RoleConfig, SampleConfig, TeacherConfig, TrainConfig
from fewstep.teachers import register
from fewstep.teachers.sd import StableDiffusion


@register
class Mine(StableDiffusion):
    pipeline_class = "StableDiffusionPAGPipeline"


recipe = Recipe(
    output="run",
    teacher=TeacherConfig(path="teacher", pipeline_class="StableDiffusionPAGPipeline"),
    method=BOOT.Config(intervals=4),
    data=DataConfig(prompts="prompts.txt"),
    roles={"student": RoleConfig(rank=4)},
    train=TrainConfig(steps=6, batch_size=2, checkpoint_every=2, sample_every=0),
    samples=SampleConfig(count=2, teacher_steps=2, columns=2),
    evaluation=EvalConfig(num=2, teacher_steps=2),
)
fewstep.run(recipe)
'''


def desk(folder: Path, script: str, teacher: Path, helpers=()) -> Path:
    """A folder with data, a teacher and a script in it, ``own/recipe.py``."""
    from PIL import Image

    (folder / "prompts.txt").write_text("a cat\nred apple\nblue square\ncrescent moon\n")
    (folder / "images").mkdir()
    rows = []
    for i, text in enumerate(("a cat", "red apple", "blue square", "crescent moon")):
        Image.new("RGB", (32, 32), (60 * i, 99, 250 - 60 * i)).save(folder / "images" / f"{i}.png")
        rows.append(json.dumps({"file_name": f"{i}.png", "text": text}))
    (folder / "images" / "metadata.jsonl").write_text("\n".join(rows))
    shutil.copytree(teacher, folder / "teacher")
    for place, text in {"recipe.py": script, **dict(helpers)}.items():
        (folder / "own" / place).parent.mkdir(parents=True, exist_ok=True)
        (folder / "own" / place).write_text(textwrap.dedent(text))
    return folder


def fewstep(folder: Path, *words: str, **env: str) -> tuple[int, str]:
    """Exit code and output of ``fewstep WORDS`` in a process of its own that begins in a folder."""
    said = folder / "said.txt"
    said.unlink(missing_ok=True)

    def work():
        os.chdir(folder)
        return main(list(words))

    code = Fork(work, said, env).wait()
    return code, said.read_text()


def use_all(folder: Path) -> None:
    """What is done with a run that was killed, once the script is gone."""
    shutil.rmtree(folder / "own")
    code, said = fewstep(folder, "resume", "run")
    assert code == 0 and "resuming at step 4" in said and "verified in stock diffusers" in said, said
    kept = (folder / "run" / "recipe.yaml").read_text()
    shutil.rmtree(folder / "run" / "export")
    code, said = fewstep(folder, "export", "run", "--step", "4")
    assert code == 0 and "verified in stock diffusers" in said, said
    shutil.copytree(folder / "run" / "checkpoints" / "step_00000004", folder / "run" / "diverged")
    code, said = fewstep(folder, "replay", "run")
    assert code == 0 and "step 4 went well this time" in said, said
    some = ("--prompts", "prompts.txt", "--num", "2", "--speed-runs", "0")
    code, said = fewstep(folder, "eval", "generate", "teacher", "--lora", "run", "--steps", "1", *some, "--out", "made")
    assert code == 0 and len(list((folder / "made" / "1-step").glob("*.png"))) == 2, said
    code, said = fewstep(folder, "plan", "run/recipe.yaml")
    assert code == 0, said
    code, said = fewstep(folder, "floor", "run/recipe.yaml", "--steps", "2", "--out", "floor", "--device", "cpu")
    assert code == 0 and (folder / "floor" / "eval.json").is_file(), said
    assert (folder / "run" / "recipe.yaml").read_text() == kept
    assert not list((folder / "run").rglob("__pycache__"))


def test_a_strangers_method_with_its_reward_and_extractor_survives_its_script(tiny_sd15, tmp_path):
    folder = desk(tmp_path, METHOD, tiny_sd15, HELPERS)
    words = [sys.executable, "own/recipe.py"]  # as __main__
    env = {**os.environ, "DIE": "5", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    code = folder / "run" / "code"
    kept = {path.relative_to(code).as_posix() for path in code.rglob("*") if path.is_file()}
    assert kept == {*HELPERS, "recipe.py", "index.json"} - {"unused.py"}
    assert json.loads((code / "index.json").read_text()) == {"scripts": ["recipe.py"], "modules": []}
    use_all(folder)
    rows = {row["kind"]: row for row in json.loads((folder / "run" / "eval.json").read_text())["rows"]}
    assert {"teacher", "student"} <= rows.keys() and "fd" in {key.lower() for key in rows["student"]}


def test_a_strangers_teacher_survives_a_script_without_a_guard(tiny_sd15, tmp_path):
    from diffusers import StableDiffusionPAGPipeline

    pipe = StableDiffusionPAGPipeline.from_pretrained(tiny_sd15, pag_applied_layers=[])
    pipe.save_pretrained(tmp_path / "pag")
    folder = desk(tmp_path, TEACHER, tmp_path / "pag")
    code, said = fewstep(folder, "train", "own/recipe.py", FEWSTEP_STOP="5")
    assert code == 0, said
    assert json.loads((folder / "run" / "code" / "index.json").read_text())["scripts"] == ["recipe.py"]
