"""The wheel holds what it should, and is enough for a user who has no checkout."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from test_hygiene import ROOT, tracked

from fewstep.methods import METHODS
from fewstep.runs.library import recipe_files

pytestmark = pytest.mark.slow
LEFT_OUT = ("assets/emoji-flow/", "assets/emoji-ar/")  # teachers that a user may take from a checkout
MOVED = {"eval/protocols/": "fewstep/protocols/", "recipes/": "fewstep/recipes/", "fewstep/": "fewstep/"}


def run(*words, **options):
    """What a command prints, once it has ended well."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    words = [str(word) for word in words]
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=600, **options)
    assert not done.returncode, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built of the files that git knows, and of nothing else."""
    copy, target = tmp_path_factory.mktemp("checkout"), tmp_path_factory.mktemp("dist")
    for path in tracked():
        to = copy / path.relative_to(ROOT)
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, to)
    options = ("--no-deps", "--no-build-isolation", "--disable-pip-version-check", "--wheel-dir", target)
    run(sys.executable, "-m", "pip", "wheel", *options, copy)
    return next(target.glob("fewstep-*.whl"))


@pytest.fixture(scope="module")
def user(wheel, tmp_path_factory):
    """``fewstep WORDS`` of an environment that has the wheel, beside the libraries of ours but not our fewstep.

    A ``.pth`` brings their folder in without the ``.pth`` of the editable install that lies there.
    """
    venv, empty = tmp_path_factory.mktemp("user") / "venv", tmp_path_factory.mktemp("empty")
    run(sys.executable, "-m", "venv", venv)
    python = venv / "bin" / "python"
    run(python, "-m", "pip", "install", "--no-deps", "--no-index", wheel)
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    folders = dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib"))
    (Path(site) / "libraries.pth").write_text("".join(f"{folder}\n" for folder in folders))
    where = run(python, "-c", "import fewstep; print(fewstep.__file__)", cwd=empty).strip()
    assert Path(where) == Path(site) / "fewstep" / "__init__.py"
    return lambda *words: run(venv / "bin" / "fewstep", *words, cwd=empty)


def test_the_wheel_has_every_file_of_the_package_but_two_teachers(wheel):
    expected = set()
    for path in tracked():
        name = path.relative_to(ROOT).as_posix()
        for folder, to in MOVED.items():
            if name.startswith(folder) and not name.removeprefix("fewstep/").startswith(LEFT_OUT):
                expected.add(to + name.removeprefix(folder))
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert held == expected


def test_the_wheel_is_small(wheel):
    assert wheel.stat().st_size < 25e6


def test_the_installed_wheel_lists_its_recipes_and_methods(user):
    recipes, methods = user("recipes"), user("methods")
    assert all(name in recipes.split() for name in recipe_files())
    assert all(re.search(rf"\b{name}\b", methods) for name in METHODS)


def test_the_demo_runs_from_the_installed_wheel(user):
    said = user("train", "emoji_dmd2_1step", "--smoke")
    report = Path(said.split()[-1])
    assert report.name == "report.html" and report.is_file()
