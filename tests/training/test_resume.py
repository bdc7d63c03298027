"""A run in pieces is the run in one piece, bit for bit, for every registered method: everything a checkpoint holds."""

import json
import random
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import test_contract
import torch
from safetensors.torch import load_file
from test_contract import STEPS, trainer_of
from toys import toy

from fewstep.methods import METHODS
from fewstep.recipe import RoleConfig

LORA = {"kind": "lora", "rank": 2, "alpha": 2, "targets": ["layers.2", "layers.4"], "ema": 0.9}
VARIANTS = {
    "full": {"accumulate": 2},
    "lora": {"student": RoleConfig(lr=1e-3, **LORA), "critic": RoleConfig(lr=2e-3, warmup=3, **LORA)},
}
NARROW = {"boot": ["layers.1", "layers.3"]}  # its network begins otherwise
CASES = [
    f"{name}/{variant}"
    for name in sorted(METHODS)
    for variant in (["full"] if METHODS[name].teacher_kind == "autoregressive" else VARIANTS)
]


@pytest.mark.parametrize("case", CASES)
def test_a_run_in_pieces_is_the_run_in_one(case, tmp_path, monkeypatch, tally):
    name, variant = case.split("/")
    tally("resume tried", case)
    options = dict(VARIANTS[variant])
    if variant == "lora" and name in NARROW:
        options = {key: replace(config, targets=NARROW[name]) for key, config in options.items()}
    monkeypatch.setattr(test_contract, "toy", partial(toy, **options))

    def run(folder, *stops):
        for stop in stops:
            # What anybody draws from the process's own generators would differ from leg to leg.
            torch.manual_seed(stop), np.random.seed(stop), random.seed(stop)
            trainer = trainer_of(name)
            trainer.folder = tmp_path / folder
            assert trainer.restore() == (stop != stops[0])
            before = torch.get_rng_state()
            while trainer.progress.iteration < stop:
                trainer.iterate()
            assert torch.get_rng_state().equal(before), "the loop draws from the process's own generator"
            trainer.save()
        saved = trainer.folder / "checkpoints" / f"step_{STEPS:08d}"
        return load_file(saved / "state.safetensors"), json.loads((saved / "state.json").read_text())

    (once, state), (twice, states) = run("once", STEPS), run("twice", 3, 5, STEPS)
    assert once.keys() == twice.keys() and not [key for key in once if not once[key].equal(twice[key])]
    kinds = {key.split("/")[1] for key in once}
    assert {"weight", "optimizer", "average"} <= kinds
    # Sums of the log are rounded to float32 once more where they were saved in between.
    windows = [
        {k: pytest.approx(v[0], rel=1e-5) for k, v in s.pop("window").items()} for s in (state, states)
    ]
    assert windows[0].keys() == windows[1].keys()
    timeless = {"seconds": 0, "cpu_seconds": 0}
    assert {**state, **timeless} == {**states, **timeless}
    tally("resumed bit-exact", case)
