"""The wheel holds what it should, and is enough for a user who has no checkout."""

import email
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
from test_hygiene import ROOT, tracked

from fewstep import __version__
from fewstep.methods import METHODS
from fewstep.runs.library import recipe_files

pytestmark = pytest.mark.slow
# Teachers that a user may take from a checkout.
LEFT_OUT = ("assets/emoji-flow/", "assets/emoji-ar/", "assets/emoji-edm/")
MOVED = {"eval/protocols/": "fewstep/protocols/", "recipes/": "fewstep/recipes/", "fewstep/": "fewstep/"}


def run(*words, **options):
    """What a command prints, once it has ended well."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    words = [str(word) for word in words]
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=600, **options)
    assert not done.returncode, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """Built of the files that git knows, and of nothing else."""
    copy, target = tmp_path_factory.mktemp("checkout"), tmp_path_factory.mktemp("dist")
    for path in tracked():
        to = copy / path.relative_to(ROOT)
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, to)
    run(
        sys.executable,
        "-c",
        f"from setuptools.build_meta import build_sdist as b; b({str(target)!r})",
        cwd=copy,
    )
    return next(target.glob("fewstep-*.tar.gz"))


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory):
    """Built of the sdist, as an index's users do who take no wheel."""
    target = tmp_path_factory.mktemp("wheels")
    options = ("--no-deps", "--no-build-isolation", "--disable-pip-version-check", "--wheel-dir", target)
    run(sys.executable, "-m", "pip", "wheel", *options, sdist)
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


def test_the_wheel_has_every_file_of_the_package_but_three_teachers(wheel):
    expected = set()
    for path in tracked():
        name = path.relative_to(ROOT).as_posix()
        for folder, to in MOVED.items():
            if name.startswith(folder) and not name.removeprefix("fewstep/").startswith(LEFT_OUT):
                expected.add(to + name.removeprefix(folder))
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert held == expected


def test_both_are_small_and_say_the_version_and_what_they_are(sdist, wheel):
    assert max(sdist.stat().st_size, wheel.stat().st_size) < 25e6
    with zipfile.ZipFile(wheel) as opened:
        wheels = opened.read(f"fewstep-{__version__}.dist-info/METADATA").decode()
    with tarfile.open(sdist) as opened:
        names = set(opened.getnames())
        sdists = opened.extractfile(f"fewstep-{__version__}/PKG-INFO").read().decode()
    for text in (wheels, sdists):
        about = email.message_from_string(text)
        assert about["Version"] == __version__ and about["License-Expression"] == "Apache-2.0"
        assert about["Summary"] and about["Description-Content-Type"] == "text/markdown"
        assert about.get_payload().startswith("# fewstep")
    assert {
        f"fewstep-{__version__}/{name}" for name in ("LICENSE", "NOTICE", "CITATION.cff", "CHANGELOG.md")
    } <= names
    assert not [name for name in names if "/tests/" in name]


def test_the_installed_wheel_lists_its_recipes_and_methods(user):
    assert user("--version").strip() == __version__
    recipes, methods = user("recipes"), user("methods")
    assert all(name in recipes.split() for name in recipe_files())
    assert all(re.search(rf"\b{name}\b", methods) for name in METHODS)


def test_the_demo_runs_from_the_installed_wheel(user):
    said = user("train", "emoji_dmd2_1step", "--smoke")
    report = Path(said.split()[-1])
    assert report.name == "report.html" and report.is_file()
