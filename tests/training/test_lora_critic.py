"""The study of critics that are adapters: what is stored is what its script makes, and what the recipes say of it."""

import json
import sys
from pathlib import Path

import pytest

from fewstep.errors import FewstepError
from fewstep.runs.library import load_recipe

EVAL = Path(__file__).parents[2] / "eval"
sys.path.insert(0, str(EVAL))

import lora_critic  # noqa: E402

STORED = json.loads((EVAL / "results" / "lora_critic" / "lora_critic.json").read_text())


def test_the_table_is_that_of_the_rows():
    assert (EVAL / "results" / "lora_critic" / "README.md").read_text() == lora_critic.table(STORED)
    assert set(STORED["lag"]) <= set(lora_critic.PROBES) and set(STORED["train"]) <= set(
        lora_critic.TRAININGS
    )


def test_the_small_recipe_has_a_critic_that_follows_as_the_whole_one_does():
    small, whole = (
        load_recipe("sdxl_dmd2_4step_24gb").role("critic"),
        load_recipe("sdxl_dmd2_4step").role("critic"),
    )
    lag = STORED["lag"]
    ours = lag[f"LoRA {small.rank}, alpha {small.alpha:g}, {small.lr:g}"]
    assert all(ours[k] <= lag[f"full {whole.lr:g}"][k] + 0.01 for k in ("20", "50", "100"))
    assert lag["LoRA 64, alpha 8, 5e-05"]["20"] > 0.99  # what it was before


@pytest.mark.parametrize("name", ["README.md", "lora_critic.json"])
def test_files_of_others_are_left_alone(name, tmp_path, monkeypatch):
    (tmp_path / name).write_text("mine")
    monkeypatch.setattr(sys, "argv", ["lora_critic.py", "--out", str(tmp_path)])
    with pytest.raises(FewstepError, match="is not what this command writes there"):
        lora_critic.main()
    assert (tmp_path / name).read_text() == "mine"
