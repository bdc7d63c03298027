"""A user's own method, teacher, reward and extractor, in a folder elsewhere that is gone after training."""

import importlib
import json
import os
import re
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
from fewstep.methods import METHODS
from fewstep.teachers.sd import StableDiffusion

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
    evaluation=EvalConfig(num=4, teacher_steps=2, extractor="looking:corners"),
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
    """,
    "looking.py": """
        def corners(images):
            return images[:, ::8, ::8].flatten(1).float()
    """,
    "unused.py": "raise RuntimeError('nobody asks for this file')\n",
}
TEACHER = '''
"""An adapter of one's own, with the run beside it: it has no line that keeps it from running when it is read."""

import os
import signal
from pathlib import Path

import fewstep
from fewstep.methods.boot import BOOT
from fewstep.recipe import DataConfig, EvalConfig, Recipe, RoleConfig, SampleConfig, TeacherConfig, TrainConfig
from fewstep.teachers import register
from fewstep.teachers.sd import StableDiffusion


@register
class Mine(StableDiffusion):
    pipeline_class = "StableDiffusionPAGPipeline"

    @staticmethod
    def call(net, x_t, time, cond):
        if "DIE" in os.environ and Path("run/checkpoints/step_00000004").is_dir():
            os.kill(os.getpid(), signal.SIGKILL)
        return StableDiffusion.call(net, x_t, time, cond)


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
    code, said = fewstep(
        folder, "eval", "generate", "teacher", "--lora", "run", "--steps", "1", *some, "--out", "made"
    )
    assert code == 0 and len(list((folder / "made" / "1-step").glob("*.png"))) == 2, said
    code, said = fewstep(folder, "plan", "run/recipe.yaml")
    assert code == 0, said
    code, said = fewstep(
        folder, "floor", "run/recipe.yaml", "--steps", "2", "--out", "floor", "--device", "cpu"
    )
    assert code == 0 and (folder / "floor" / "eval" / "table.json").is_file(), said
    assert (folder / "run" / "recipe.yaml").read_text() == kept


@pytest.mark.slow
def test_a_strangers_method_with_its_reward_and_extractor_survives_its_script(tiny_sd15, tmp_path):
    folder = desk(tmp_path, METHOD, tiny_sd15, HELPERS)
    words = [sys.executable, "own/recipe.py"]  # as __main__
    env = {**os.environ, "DIE": "5"}
    done = subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    code = folder / "run" / "code"
    kept = {path.relative_to(code).as_posix() for path in code.rglob("*.*")}
    assert kept == {*HELPERS, "recipe.py", "index.json"} - {"unused.py"}
    assert json.loads((code / "index.json").read_text()) == {"scripts": ["recipe.py"], "modules": []}
    use_all(folder)
    rows = {
        row["kind"]: row for row in json.loads((folder / "run" / "eval" / "table.json").read_text())["rows"]
    }
    assert "FD(looking:corners)" in rows["student"]["metrics"] and "teacher" in rows


@pytest.mark.long
def test_a_strangers_teacher_survives_a_script_without_a_guard(tiny_sd15, tmp_path):
    folder = desk(tmp_path, TEACHER, tiny_sd15)
    index = json.loads((folder / "teacher" / "model_index.json").read_text())
    index |= {
        "_class_name": "StableDiffusionPAGPipeline",
        "image_encoder": [None, None],
        "pag_applied_layers": [],
    }
    (folder / "teacher" / "model_index.json").write_text(json.dumps(index))
    code, said = fewstep(folder, "train", "own/recipe.py", DIE="yes")
    assert code == -9, said
    use_all(folder)
    rows = json.loads((folder / "run" / "eval" / "table.json").read_text())["rows"]
    assert {row["kind"] for row in rows} >= {"teacher", "student"}


# ----------------------------------------------------------------------------------------------------------- in pieces
TINY = """
from dataclasses import dataclass

from fewstep.methods import Method, register
from fewstep.methods.base import Options
{imports}

@register("tiny")
class Tiny(Method):
    summary = "of a test"

    @dataclass
    class Config(Options):
        weight: float = {weight}
"""
RECIPE = {"output": "run", "teacher": {"path": "t"}, "data": {"prompts": "p"}, "train": {"steps": 1}}
RECIPE["method"] = {"name": "tiny"}


@pytest.fixture
def outside(monkeypatch, tmp_path):
    """A folder; what is imported and registered from there is forgotten after the test."""
    known = dict(METHODS)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(extensions, "_loaded", set())
    extensions.plugins.cache_clear()
    yield tmp_path
    METHODS.clear()
    METHODS.update(known)
    for name, module in list(sys.modules.items()):
        if Path(getattr(module, "__file__", None) or "/").is_relative_to(tmp_path):
            del sys.modules[name]
    extensions.plugins.cache_clear()


def script(path: Path, weight: str = "1.0", imports: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(TINY.format(weight=weight, imports=imports))
    return path


def a_run(folder: Path) -> Path:
    """A recipe.yaml with the code that belongs to it, as a run claims its folder; then nothing is known of it."""
    extensions.keep(folder / "code", [METHODS["tiny"]])
    (folder / "recipe.yaml").write_text(json.dumps(RECIPE))
    extensions._loaded.clear()
    del METHODS["tiny"]
    return folder / "recipe.yaml"


def test_code_is_executed_once_and_the_recipe_is_what_it_was(outside):
    extensions.read_script(script(outside / "own" / "my-recipe.py"))
    before = recipes.digest(recipes.from_dict(RECIPE))
    path = a_run(outside / "run")
    shutil.rmtree(outside / "own")
    assert recipes.digest(recipes.load(path)) == before
    method = METHODS["tiny"]
    recipes.load(path)
    extensions.keep(outside / "run" / "code", [method])  # a run that is resumed claims its folder again
    recipes.load(path)
    assert METHODS["tiny"] is method
    assert {p.name for p in (outside / "run" / "code").glob("*.*")} == {"my-recipe.py", "index.json"}


def test_what_this_process_trained_with_is_not_executed_again(outside):
    extensions.read_script(script(outside / "own" / "recipe.py"))
    method = METHODS["tiny"]
    extensions.keep(outside / "run" / "code", [method])
    extensions.load(outside / "run" / "code")
    assert METHODS["tiny"] is method


def test_two_runs_whose_files_have_the_same_names_keep_apart(outside):
    paths = []
    for n in (1, 2):
        own = outside / f"own{n}"
        script(own / "mine" / "methods.py", "WEIGHT", "from .numbers import WEIGHT\n")
        (own / "mine" / "__init__.py").touch()
        (own / "mine" / "numbers.py").write_text(f"WEIGHT = {n}.0\n")
        (own / "recipe.py").write_text("import mine.methods\n")
        for name in [name for name in sys.modules if name.split(".")[0] == "mine"]:
            del sys.modules[name]
        sys.path.insert(0, str(own))
        extensions.read_script(own / "recipe.py")
        paths.append(a_run(outside / f"run{n}"))
        sys.path.remove(str(own))
        shutil.rmtree(own)
    assert json.loads((outside / "run1" / "code" / "index.json").read_text()) == {
        "scripts": [],
        "modules": ["mine.methods"],
    }
    assert (outside / "run2" / "code" / "mine" / "__init__.py").is_file()
    assert [recipes.load(path).method.weight for path in paths] == [1.0, 2.0]


def test_a_module_that_runs_its_recipe_when_it_is_imported_is_refused(outside):
    (outside / "code").mkdir()
    (outside / "code" / "index.json").write_text('{"scripts": [], "modules": ["eager_run"]}')
    (outside / "code" / "eager_run.py").write_text("import fewstep\nfewstep.run(None)\n")
    with pytest.raises(
        RecipeError, match=r"eager_run\.py:2: Reached: it runs its recipe when it is imported; put"
    ):
        extensions.load(outside / "code")


def test_what_python_m_runs_is_kept_as_part_of_its_package(outside, monkeypatch):
    script(outside / "own" / "dashed" / "recipe.py", imports="from . import numbers\n")
    (outside / "own" / "dashed" / "__init__.py").touch()
    (outside / "own" / "dashed" / "numbers.py").touch()
    sys.path.insert(0, str(outside / "own"))
    monkeypatch.setitem(sys.modules, "__main__", importlib.import_module("dashed.recipe"))
    METHODS["tiny"].__module__ = "__main__"
    path = a_run(outside / "run")
    code = outside / "run" / "code"
    assert json.loads((code / "index.json").read_text()) == {"scripts": [], "modules": ["dashed.recipe"]}
    shutil.rmtree(outside / "own")
    recipes.load(path)
    assert sys.modules[METHODS["tiny"].__module__].__file__ == str(code / "dashed" / "recipe.py")


def test_a_method_that_nobody_registers_says_what_to_do(outside):
    (outside / "recipe.yaml").write_text(json.dumps(RECIPE))
    with pytest.raises(
        RecipeError, match=r"method.name: 'tiny' is unknown; .* keep the folder code/ of its run"
    ):
        recipes.load(outside / "recipe.yaml")


@pytest.mark.parametrize(
    "fault, said",
    [
        ("import not_there_at_all\n", r"code/helper\.py:1: ModuleNotFoundError: No module named 'not_there"),
        ("x = 1\nx = = 2\n", r"code/helper\.py:2: SyntaxError"),
        ("raise ValueError('two\\nlines')\n", r"code/helper\.py:1: ValueError: two lines"),
        ("raise SystemExit(3)\n", r"code/helper\.py:1: SystemExit: 3"),
    ],
)
def test_a_kept_file_that_fails_is_named_with_its_line_and_reason(outside, fault, said):
    (outside / "own").mkdir()
    (outside / "own" / "helper.py").touch()
    extensions.read_script(script(outside / "own" / "recipe.py", imports="import helper\n"))
    path = a_run(outside / "run")
    (outside / "run" / "code" / "helper.py").write_text(fault)
    with pytest.raises(RecipeError, match=said + r".*; this run was trained with this code: ") as caught:
        recipes.load(path)
    assert "\n" not in str(caught.value) and "tiny" not in METHODS


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"scripts": 3, "modules": []}', '{"scripts": [3], "modules": []}']
)
def test_an_index_that_is_none_is_refused(outside, text):
    (outside / "code").mkdir()
    (outside / "code" / "index.json").write_text(text)
    (outside / "recipe.yaml").write_text(json.dumps(RECIPE))
    with pytest.raises(RecipeError, match=r"code/index\.json: is damaged .*; expected \{\"scripts\""):
        recipes.load(outside / "recipe.yaml")


def test_what_stands_in_no_file_is_said_at_once(outside, capsys, monkeypatch):
    extensions.read_script(script(outside / "own" / "recipe.py"))
    monkeypatch.setattr(METHODS["tiny"], "__module__", "a_notebook")
    extensions.keep(outside / "run" / "code", [METHODS["tiny"]])
    assert "fewstep: note: what a_notebook registers stands in no file" in capsys.readouterr().err
    assert not (outside / "run").exists()


def test_fewsteps_own_methods_and_teachers_leave_no_code(outside):
    extensions.keep(
        outside / "code", [METHODS["dmd2"], StableDiffusion], ["effnet-lite0", "json", "torch", ""]
    )
    assert not (outside / "code").exists()


# ------------------------------------------------------------------------------------------------------------ packages
def package(site: Path, name: str, module: str, **files: str) -> None:
    """An installed distribution, as pip leaves it."""
    about = site / f"{name.replace('-', '_')}-1.0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(f"[fewstep]\nmethods = {module}\n")
    for file, text in files.items():
        (about / file.replace("_json", ".json").replace("_txt", ".txt")).write_text(text)


def test_a_package_is_found_by_its_entry_point_when_a_name_is_unknown_and_kept_by_its_name(outside):
    site = outside / "site-packages"
    package(site, "tiny-methods", "tiny_methods")
    script(site / "tiny_methods.py")
    sys.path.insert(0, str(site))
    assert "tiny" not in METHODS
    assert recipes.from_dict(RECIPE).method.weight == 1.0
    path = a_run(outside / "run")
    assert json.loads((outside / "run" / "code" / "index.json").read_text()) == {
        "scripts": [],
        "modules": ["tiny_methods"],
    }
    sys.path.remove(str(site))
    del sys.modules["tiny_methods"]
    with pytest.raises(
        RecipeError, match=r"index\.json: ModuleNotFoundError: No module named 'tiny_methods'"
    ):
        recipes.load(path)


def test_a_package_that_is_installed_as_editable_is_kept_by_its_name(outside):
    site, project = outside / "site-packages", outside / "project"
    url = json.dumps({"url": project.as_uri(), "dir_info": {"editable": True}})
    package(site, "tiny-methods", "tiny_edited", direct_url_json=url, top_level_txt="tiny_edited\n")
    script(project / "tiny_edited.py")
    sys.path[:0] = [str(site), str(project)]
    recipes.from_dict(RECIPE)
    a_run(outside / "run")
    assert [p.name for p in (outside / "run" / "code").iterdir()] == ["index.json"]


def test_a_broken_entry_point_is_one_line_beside_the_methods_that_work(outside, capsys):
    site = outside / "site-packages"
    package(site, "broken-methods", "broken_methods")
    package(site, "tiny-methods", "tiny_methods")
    script(site / "tiny_methods.py")
    (site / "broken_methods.py").write_text("raise OSError('no\\nlibrary')\n")
    sys.path.insert(0, str(site))
    assert main(["methods"]) == 0
    said = capsys.readouterr()
    assert re.search(r"tiny +1 or more +of a test", said.out) and "dmd2 " in said.out
    assert said.err == (
        "fewstep: note: broken-methods: its entry point methods = broken_methods cannot be loaded: "
        "OSError: no library; upgrade or uninstall broken-methods\n"
    )
