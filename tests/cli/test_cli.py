"""The command line itself: quick to start, honest about what it does not know."""

import json
import subprocess
import sys

import pytest

from fewstep.cli import main
from fewstep.errors import FewstepError, tell
from fewstep.runs.library import load_recipe, recipe_files


def loaded_by(code: str) -> set[str]:
    words = [sys.executable, "-c", f"{code}\nimport sys, json; print(json.dumps(sorted(sys.modules)))"]
    return set(
        json.loads(subprocess.run(words, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
    )


def test_import_costs_no_more_than_torch():
    heavy = {
        "diffusers",
        "transformers",
        "peft",
        "accelerate",
        "torchvision",
        "xformers",
        "cleanfid",
        "scipy",
    }
    modules = loaded_by("import fewstep")
    assert not modules & (heavy | {"torch"})
    modules = loaded_by(
        "import fewstep; fewstep.VP; fewstep.Student; fewstep.NetDenoiser; fewstep.Recipe; fewstep.run"
    )
    assert not modules & heavy


def test_help_needs_no_torch():
    assert "torch" not in loaded_by("from fewstep.cli.main import parser; parser().format_help()")


def test_every_recipe_is_listed_and_can_be_copied(capsys, tmp_path):
    assert main(["recipes"]) == 0
    listed = capsys.readouterr().out
    assert len(recipe_files()) > 10 and all(name in listed for name in recipe_files())
    assert main(["recipes", "copy", "sdxl_dmd2_4step", str(tmp_path)]) == 0
    assert load_recipe(str(tmp_path / "sdxl_dmd2_4step.py")).method.num_steps == 4
    assert main(["recipes", "copy", "sdxl_dmd2_4step", str(tmp_path)]) == 2  # never overwrites
    assert main(["recipes", "copy", "sdxl", str(tmp_path)]) == 2


@pytest.mark.parametrize(
    ("to", "made"),
    [
        ("new/", "new/demo.py"),
        ("new", "new/demo.py"),
        ("new/mine.py", "new/mine.py"),
        ("odd.py/", "odd.py/demo.py"),
        ("taken", None),
        ("taken.py", None),
    ],
)
def test_a_recipe_is_copied_into_a_folder_or_to_a_file(to, made, capsys, tmp_path):
    (tmp_path / "odd.py").mkdir()
    for name in ("taken", "taken.py"):
        (tmp_path / name).write_text("mine")
    assert main(["recipes", "copy", "demo", f"{tmp_path}/{to}"]) == (0 if made else 2)
    if made:
        assert load_recipe(str(tmp_path / made)).output == "runs/demo"
    else:
        assert f"{tmp_path / to} exists already" in capsys.readouterr().err
        assert (tmp_path / to).read_text() == "mine"


@pytest.mark.parametrize("flags", [[], ["-u"]], ids=["at the end", "at once"])
def test_a_reader_that_has_enough_ends_a_command_silently(flags):
    command = [sys.executable, *flags, "-m", "fewstep", "recipes"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


def test_a_broken_pipe_that_is_not_the_output_is_told(capfd):
    assert tell(BrokenPipeError(32, "Broken pipe", "socket")) == 4
    assert "socket: Broken pipe" in capfd.readouterr().err


def test_methods_and_doctor(capsys):
    assert main(["methods"]) == 0
    assert "dmd2" in capsys.readouterr().out
    assert main(["doctor"]) == 0
    assert "torch" in capsys.readouterr().out


def test_an_unknown_recipe_is_refused_by_name():
    with pytest.raises(FewstepError, match="sdxl_dmd2_4step"):
        load_recipe("sdxl_dmd2")


def test_resume_of_no_run_is_refused(tmp_path, capsys):
    assert main(["resume", str(tmp_path)]) == 2
    assert "no recipe.yaml" in capsys.readouterr().err


def test_a_run_that_diverges_ends_with_3_and_its_snapshot_replays(tiny_sd15, tmp_path, monkeypatch, capsys):
    from test_end_to_end import tiny

    from fewstep.methods.dmd2 import DMD2
    from fewstep.runs.session import run
    from fewstep.training.divergence import Divergence

    monkeypatch.setattr(Divergence, "MAX_SKIPPED", 3)
    words = ("--train.steps", "7", "--train.sample_every", "0", "--samples.teacher_steps", "0")
    recipe, loss = tiny("sd15_dmd2_1step", tiny_sd15, tmp_path, *words), DMD2.critic_loss
    broken = lambda self, *turn: {k: v * float("nan") for k, v in loss(self, *turn).items()}  # noqa: E731
    monkeypatch.setattr(DMD2, "critic_loss", broken)
    with pytest.raises(SystemExit) as stop:
        run(recipe, [])
    said = capsys.readouterr().err
    assert stop.value.code == 3 and f"`fewstep replay {recipe.output}` shows it again" in said
    assert "critic: update left out, not finite: micro-batch 0 sample 0 (critic/denoising" in said
    assert main(["replay", recipe.output]) == 3
    assert "again: step 2: the gradient of critic and discriminator" in capsys.readouterr().out
    monkeypatch.setattr(DMD2, "critic_loss", loss)
    assert main(["replay", recipe.output]) == 0
    assert main(["replay", str(tmp_path)]) == 2
