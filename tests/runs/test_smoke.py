"""What ``--smoke`` makes of a recipe, and says of it."""

import pytest

from fewstep import recipe as recipes
from fewstep.runs.library import load_recipe
from fewstep.runs.smoke import smoke


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--train.steps", "100"], "train.steps is 4 here, whatever is given"),
        (["--steps", "100"], "train.steps is 4 here, whatever is given"),
        (
            ["--evaluation.num", "8", "--student.rank", "99"],
            "evaluation.num is 0, roles.student.rank is 4 here, whatever is given",
        ),
        (["--train.steps", "4", "--train.seed", "7", "--critic.kind", "full"], ""),  # all of which it has
        (["--samples", "{count: 2}", "--train.seed", "7"], ""),
    ],
)
def test_options_that_a_smoke_run_decides_itself_are_said_in_one_line(
    words, said, capsys, monkeypatch, tmp_path
):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    small = smoke(recipes.override(load_recipe("demo"), words), recipes.named(words))
    assert capsys.readouterr().err == (f"fewstep: note: --smoke: {said}\n" if said else "")
    assert small.train.steps == 4 and ("--train.seed" not in words or small.train.seed == 7)
