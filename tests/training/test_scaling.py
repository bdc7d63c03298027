# ruff: noqa: F811
"""Losses scaled for fp16: the rule is torch's, updates are those without, and what overflows is no divergence."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file
from test_divergence import SIZE, fitted, make, poison, ring, weights  # noqa: F401  # fixtures
from test_end_to_end import tiny
from torch import nn

from fewstep.runs.session import execute, resume
from fewstep.training import scaling
from fewstep.training.scaling import Scales

CPU = torch.device("cpu")


def scaled(trainer, first=scaling.FIRST):
    trainer.scales = Scales([phase.name for phase in trainer.phases], CPU)
    for scale, _ in trainer.scales.of.values():
        scale.fill_(first)
    return trainer


def test_the_scale_grows_and_backs_off_as_torchs_own_scaler(monkeypatch):
    monkeypatch.setattr(scaling, "INTERVAL", 3)
    theirs, layer = torch.amp.GradScaler("cpu", growth_interval=3), nn.Linear(2, 1)
    optimizer, ours = torch.optim.SGD(layer.parameters(), lr=0.0), Scales(["critic"], CPU)
    for fine in (1, 1, 1, 1, 0, 1, 1, 0, 0, 1, 1, 1, 1, 1, 1, 0, 1):
        loss = layer(torch.ones(1, 2)).sum() * (1.0 if fine else math.inf)
        assert torch.equal(ours.up("critic", loss), theirs.scale(loss)) or not fine
        theirs.scale(loss).backward()
        theirs.step(optimizer)
        theirs.update()
        optimizer.zero_grad()
        ours.judge("critic", torch.tensor(bool(fine)))
        assert ours.plain() == {"critic": [theirs.get_scale(), theirs._growth_tracker.item()]}
    assert ours.plain()["critic"][0] < scaling.FIRST
    ours.restore({"critic": [2.0**127, 2]})
    ours.judge("critic", torch.tensor(True))
    assert ours.plain() == {"critic": [2.0**127, 0]}  # twice as much would be infinite


def test_updates_of_scaled_losses_are_those_of_losses_as_they_are(ring, fitted):
    """Powers of two change no bit, clipping included."""
    plain, other = make(ring, fitted), scaled(make(ring, fitted))
    for trainer in (plain, other):
        trainer.config.clip_norm = 1e-3
        for _ in range(4):
            trainer.iterate()
    for role in ("student", "critic", "discriminator"):
        assert weights(plain, role).equal(weights(other, role))
    assert plain.window.means()["critic/grad_norm"] == other.window.means()["critic/grad_norm"]
    assert plain.scales.plain() == {} and other.scales.plain()["critic"] == [scaling.FIRST, 4]


def test_what_is_too_large_for_a_scale_is_skipped_and_no_divergence_until_the_scale_is_one(
    ring,
    fitted,
    monkeypatch,
):
    trainer = scaled(make(ring, fitted), first=8.0)
    again = []
    monkeypatch.setattr(
        trainer.divergence, "again", lambda step, phase: again.append((step, phase.name)) or True
    )
    poison(trainer, lambda i, m: range(SIZE))  # real images, which the critic's phase reads
    before = weights(trainer, "critic")
    for _ in range(5):
        trainer.iterate()
    assert trainer.scales.plain()["critic"] == [8.0 / 2**5, 0]
    assert trainer.scales.plain()["generator"][0] == 8.0 and not weights(trainer).equal(
        weights(make(ring, fitted))
    )
    assert weights(trainer, "critic").equal(before)
    assert again == [
        (3, "critic")
    ]  # 8, 4 and 2 were too large; what fails at 1 is looked at an iteration later


def test_scales_are_in_checkpoints_and_older_ones_have_none(ring, fitted, tmp_path):
    trainer = scaled(make(ring, fitted, tmp_path))
    poison(trainer, lambda i, m: range(SIZE) if i == 0 else [])
    for _ in range(3):
        trainer.iterate()
    trainer.save()
    state = json.loads(next((tmp_path / "checkpoints").glob("step_*")).joinpath("state.json").read_text())
    assert state["scales"] == {"generator": [2.0**16, 2], "critic": [2.0**15, 2]}
    other = scaled(make(ring, fitted, tmp_path))
    assert other.restore() and other.scales.plain() == state["scales"]
    other.scales.restore({})
    assert other.scales.plain() == state["scales"]


@pytest.mark.slow
def test_a_run_in_fp16_in_pieces_is_the_run_in_one(tiny_sdxl, tmp_path):
    words = ("--teacher.autocast", "float16")
    found = []
    for name, steps in (("one", 4), ("two", 2)):
        (tmp_path / name).mkdir()
        recipe = tiny("sdxl_dmd2_4step_24gb", tiny_sdxl, tmp_path / name, *words)
        recipe.train.steps = steps
        folder = execute(recipe)
        if steps == 2:
            resume(folder, ["--train.steps", "4"])
        found.append(load_file(folder / "checkpoints" / "step_00000004" / "state.safetensors"))
        state = json.loads((folder / "checkpoints" / "step_00000004" / "state.json").read_text())
        assert state["scales"]["critic"][1] == 4
    one, other = found
    assert all(one[name].equal(other[name]) for name in one)
