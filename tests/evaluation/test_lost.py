"""The study of where a student loses: the teacher draws anew what noise of a level has hidden."""

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from toys import NONE, SD

from fewstep import recipe as recipes
from fewstep.diffusion.rng import Rng
from fewstep.diffusion.schedules import EDM, Flow
from fewstep.errors import FewstepError
from fewstep.runs.library import load_recipe
from fewstep.teachers.analytic import GaussianMixture

EVAL = Path(__file__).parents[2] / "eval"
sys.path.insert(0, str(EVAL))

import lost  # noqa: E402


def test_the_table_is_that_of_the_rows():
    stored = json.loads((EVAL / "results" / "lost" / "lost.json").read_text())
    assert (EVAL / "results" / "lost" / "README.md").read_text() == lost.table(stored)
    assert [row["share"] for row in stored["rows"]] == list(lost.SHARES)


@pytest.mark.parametrize("schedule", [SD, Flow(), EDM()], ids=["vp", "flow", "edm"])
def test_the_teacher_mends_what_noise_of_the_level_hides_and_keeps_what_is_coarser(schedule, monkeypatch):
    """Two far modes of width 0.2; samples of one of them, beside it by 0.5."""
    monkeypatch.setattr(lost, "STEPS", 200)  # the flow itself
    teacher = GaussianMixture(schedule, torch.tensor([[-4.0], [4.0]]), torch.tensor(0.04))
    session = SimpleNamespace(method=SimpleNamespace(teacher=teacher))
    x0 = 4.5 + 0.2 * Rng("x").normal(512, 1)

    assert lost.finished(session, x0, NONE, Rng("n"), 0.0, 1.0) is x0
    for level in (0.05, 0.3, 1.0):  # sigma over alpha
        t = schedule.t_from_log_snr(torch.tensor(-2 * math.log(level), dtype=torch.float64)).item()
        made = lost.finished(session, x0, NONE, Rng("n"), schedule.fraction_above(t), 1.0)
        # The flow of a Gaussian is linear: what is left of an offset is the width of what is known to that of x_t.
        assert made.mean() == pytest.approx(4 + 0.5 * 0.2 / math.hypot(0.2, level), abs=0.04)
        assert made.min() > 2  # in the same mode
    ends = lost.finished(session, x0, NONE, Rng("n"), 1.0, 1.0)
    assert ends.equal(lost.finished(session, -x0, NONE, Rng("n"), 1.0, 1.0))  # nothing of the student is left
    assert 0.4 < (ends > 0).double().mean() < 0.6


@pytest.mark.parametrize(
    "recipe, kind, restored, said",
    [
        ("emoji_ar_dd1_2step", "autoregressive", True, "a student of tokens"),
        ("emoji_dmd2_1step", "diffusion", False, "no checkpoint; train it first"),
        ("emoji_edm_sid_1step", "diffusion", True, "has no builtin:emoji-edm, the teacher of"),
    ],
)
def test_a_run_that_it_cannot_look_at_is_refused(recipe, kind, restored, said, tmp_path, monkeypatch):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipes.to_dict(load_recipe(recipe))))
    session = SimpleNamespace(
        trainer=SimpleNamespace(restore=lambda: restored), method=SimpleNamespace(teacher_kind=kind)
    )
    monkeypatch.setattr(lost, "Session", lambda *_, **__: session)
    monkeypatch.setattr(lost, "check_data", lambda _: ())
    monkeypatch.setattr(
        sys, "argv", ["lost.py", "--run", str(tmp_path), "--of", recipe, "--out", str(tmp_path / "out")]
    )
    with pytest.raises(FewstepError, match=said):
        lost.main()
    assert not (tmp_path / "out" / "lost.json").exists()
