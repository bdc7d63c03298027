"""What a refusal advises is accepted when it is followed, and names the field that was meant."""

import re
import subprocess
import sys

import pytest
import torch

from fewstep import recipe as recipes
from fewstep.cost.devices import GPUS
from fewstep.diffusion.schedules import VP
from fewstep.diffusion.times import check_times, chosen_times, uniform_times
from fewstep.errors import FewstepError, RecipeError
from fewstep.export.scheduler import student_scheduler
from fewstep.runs.library import load_recipe, recipe_files

TABLE = VP(torch.linspace(0.999, 0.001, 1000, dtype=torch.float64))


@pytest.mark.parametrize("steps", range(1, 9))
def test_the_start_that_is_advised_is_one_of_the_table(steps, tally):
    for start in (999, 998, 700, 401, 37, 9, 2, 999.5):
        try:
            chosen_times(TABLE, steps, start)
        except RecipeError as error:
            if "e.g." not in str(error):
                continue
            tally("inputs tried", 1)
            advised = int(re.search(r"e\.g\. start (-?\d+)", str(error))[1])
            assert advised <= max(start, 2 * steps - 1)
            check_times(uniform_times(steps, advised), TABLE)
            tally("refused with a clear error", 1)


def test_six_steps_from_the_end_of_the_table():
    recipe = load_recipe("sdxl_dmd2_4step")
    with pytest.raises(RecipeError, match=r"e\.g\. start 995") as error:
        recipes.override(recipe, ["--method.num_steps=6", "--method.start=999"])
    advised = re.search(r"e\.g\. start (\d+)", str(error.value))[1]
    recipes.override(recipe, ["--method.num_steps=6", f"--method.start={advised}"])


@pytest.mark.parametrize("times", [[999, 700, 300], [999, 800, 600, 500, 300, 100], [5, 1]])
def test_the_even_grid_that_is_advised_is_exported(times):
    import diffusers

    teacher = diffusers.DDIMScheduler()
    with pytest.raises(RecipeError) as error:
        student_scheduler(teacher, times, "ddim")
    advised = [int(t) for t in re.search(r"e\.g\. \[([\d, ]+)\]", str(error.value))[1].split(",")]
    check_times(advised, TABLE)
    student_scheduler(teacher, advised, "ddim")


@pytest.mark.parametrize(
    "name, value, meant",
    [
        ("device", "cpu", "train.device"),
        ("lr", "1e-4", "roles.student.lr"),
        ("rank", "4", "roles.student.rank"),
        ("num_steps", "1", "method.num_steps"),
        ("resolution", "null", "teacher.resolution"),
        ("checkpoint_every", "5", "train.checkpoint_every"),
        ("dtype", "bfloat16", "teacher.dtype"),
        ("column", "text", "data.column"),
        ("batch-size", "2", "train.batch_size"),
        ("stepps", "2", "train.steps"),
        ("train.stpes", "2", "train.steps"),
        ("method.lr", "1e-4", "roles.student.lr"),
        ("data.device", "cpu", "train.device"),
    ],
)
def test_the_field_that_was_meant(name, value, meant, tally):
    recipe = load_recipe("sdxl_dmd2_4step")
    tally("inputs tried", 1)
    with pytest.raises(RecipeError, match="unknown field; did you mean ") as error:
        recipes.override(recipe, [f"--{name}", value])
    message = str(error.value)
    assert "\n" not in message and message.startswith(f"{name}: ")
    hints = re.search(r"did you mean (.+)\?", message)[1].split(" or ")
    hints = [hint if "." in hint else f"{name.rpartition('.')[0]}.{hint}" for hint in hints]
    assert meant in hints
    recipes.override(recipe, [f"--{meant}", value])
    tally("refused with a clear error", 1)


@pytest.mark.parametrize("recipe", recipe_files())
def test_every_field_is_found_without_its_part(recipe):
    plain = recipes.to_dict(load_recipe(recipe))
    for part in ("teacher", "train", "samples", "export", "evaluation", "method"):
        for name in plain[part]:
            if name in recipes.SHORT or name in plain or name == "name":
                continue
            with pytest.raises(RecipeError, match="did you mean ") as error:
                recipes.override(load_recipe(recipe), [f"--{name}", "null"])
            assert f"{part}.{name}" in str(error.value)
        break


VALUES = {
    "method.end": ["[5, 1]", "5", "[[1]]", "{a: 1}"],
    "method.segments": ["[a, b]", "x", "[[4]]"],
    "student.betas": ["[1, a]", "[1]", "x"],
    "student.targets": ["[1]", "5", "{a: b}"],
    "samples.prompts": ["3", "[[a]]", "[1, 2, 3]", "{a: b}"],
    "evaluation.floor_solvers": ["[a, ddim, b]", "a"],
    "teacher.autocast": ["fp16", "3"],
    "train.device": ["[cpu]", "7"],
    "data": ["null", "3"],
    "roles.student": ["5", "[a]"],
    "export.dtype": ["int8"],
}


@pytest.mark.parametrize("name, value", [(n, v) for n, vs in VALUES.items() for v in vs])
def test_a_wrong_value_is_one_line_that_names_field_and_value(name, value, tally):
    tally("inputs tried", 1)
    with pytest.raises(RecipeError) as error:
        recipes.override(load_recipe("emoji_hyper_sd"), [f"--{name}", value])
    message = str(error.value)
    assert "\n" not in message and name in message and "literal[" not in message and "list[" not in message
    tally("refused with a clear error", 1)


def test_an_unknown_card_is_refused_before_anything_heavy_is_imported():
    code = (
        "import sys; from fewstep.cli import main; code = main(['plan', 'sdxl_dmd2_4step', '--gpu', 'nonsense']); "
        "print(code, 'torch' in sys.modules, 'diffusers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["2", "False", "False"] and all(name in done.stderr for name in GPUS)


def test_a_plan_of_what_does_not_fit_says_what_it_tries(monkeypatch, capsys):
    from fewstep.cost import fit

    class Made:
        processes, recipe = 1, recipes.override(load_recipe("sdxl_dmd2_4step"), ["--critic.kind=full"])

        def largest_batch(self, memory):
            return 0

        def total(self):
            return 200e9

    monkeypatch.setattr(fit, "plan", lambda *_: Made())
    with pytest.raises(FewstepError, match="would not; shard"):
        fit.check_fits(Made(), "rtx4090-24gb", quiet=False)
    said = capsys.readouterr().err.splitlines()
    assert len(said) > 2 and all("plan: does not fit; trying --" in line for line in said)
