"""The bare loop makes the very calls of the trainer; a bench says what a step takes."""

import json
import math
import random

import pytest
import torch
from test_end_to_end import tiny
from torch.utils._python_dispatch import TorchDispatchMode

from fewstep.cli import main
from fewstep.cost.bare import Bare
from fewstep.cost.bench import _random
from fewstep.cost.meter import Meter
from fewstep.diffusion.rng import Rng
from fewstep.recipe import dump
from fewstep.teachers.tiny import write_tiny_pipeline


def metered(function):
    with Meter() as meter:
        function()
    return meter


class NeverWait(TorchDispatchMode):
    """Refuses what would make the host wait for a GPU: reading a value, or a shape that depends on values."""

    WAITS = (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.masked_select)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function._overloadpacket not in self.WAITS, function
        return function(*args, **(kwargs or {}))


AS_SHIPPED = ("--teacher.gradient_checkpointing=true",)  # what is held is compared
ONE_NOISE = ("--method.one_noise=true", "--method.gan_time_range=[0.02, 0.98]")


@pytest.fixture(
    scope="module",
    params=[
        ("sdxl_dmd2_4step_24gb",),
        pytest.param(("sdxl_dmd2_4step", *ONE_NOISE), marks=pytest.mark.long),
        ("sdxl_sid_4step",),
    ],
    ids=["dmd2", "dmd2-one-noise", "sid"],
)
def trained(request, tiny_sdxl, tmp_path_factory):
    """A trainer after a cycle of its phases, its networks, and the length of a cycle."""
    name, *words = request.param
    folder = tmp_path_factory.mktemp(name)
    trainer, nets = _random(tiny(name, tiny_sdxl, folder, "--train.steps=100", *AS_SHIPPED, *words))
    cycle = math.lcm(*(phase.every for phase in trainer.phases))
    for _ in range(cycle):
        trainer.iterate()
    return trainer, nets, cycle


def test_the_bare_loop_does_the_arithmetic_of_the_trainer_and_no_more(trained):
    trainer, nets, cycle = trained
    bare, begun = Bare(trainer, nets), trainer.progress.iteration
    ours = metered(lambda: bare.record(lambda: [trainer.iterate() for _ in range(cycle)]))
    assert sum(ours.flops.values()) > 0
    assert trainer.progress.iteration == begun + cycle
    before = {name: w.clone() for name, w in trainer.roles["student"].weights.items()}
    again = metered(bare.run)
    assert again.flops == ours.flops
    # No graph of what needs none; SiD's lean way frees one network before the next.
    assert again.peak < 1.3 * ours.peak
    assert all(torch.equal(w, before[name]) for name, w in trainer.roles["student"].weights.items())


def test_the_bare_loop_counts_every_row_of_a_network_that_is_called_row_by_row(tmp_path):
    pipeline = write_tiny_pipeline("QwenImage21Pipeline", tmp_path / "teacher")
    words = ("--train.steps=100", *AS_SHIPPED, "--teacher.resolution", "64", "--train.batch_size=3")
    recipe = tiny(
        "qwen_image21_dmd2_4step",
        pipeline,
        tmp_path,
        *words,
        "--method.gan_weight=1e-3",
        "--method.taps=[transformer_blocks.0]",
    )
    trainer, nets = _random(recipe)
    bare = Bare(trainer, nets)
    ours = metered(lambda: bare.record(trainer.iterate))
    assert metered(bare.run).flops == ours.flops


def test_no_step_waits_for_the_device(trained, monkeypatch):
    trainer, _, cycle = trained
    dice = random.Random(0)
    monkeypatch.setattr(Rng, "integer", lambda _, below: dice.randrange(below))  # of the host in any case
    with NeverWait():
        with pytest.raises(AssertionError):
            torch.ones(()).item()
        for _ in range(cycle):
            trainer.iterate()


def test_bench_accounts_for_the_whole_step_beside_a_bare_loop(capsys, tiny_sdxl, tmp_path):
    path, out = tmp_path / "recipe.yaml", tmp_path / "bench.json"
    path.write_text(dump(tiny("sdxl_dmd2_4step_24gb", tiny_sdxl, tmp_path)))
    words = ["--iterations", "2", "--baseline", "bare", "--out", str(out)]
    assert main(["bench", str(path), *words]) == 0
    result = json.loads(capsys.readouterr().out)
    shares = [result[name] for name in ("forward", "backward", "optimiser", "outside")]
    assert sum(shares) == pytest.approx(1, abs=0.01) and min(shares) > 0
    assert result["over_bare"] > 0.9 and result["bare_seconds"] > 0
    assert 0 < result["of_matmul_rate"] < 1 and result["peak_memory_gb"] > 0
    assert json.loads(out.read_text())["seconds_per_iteration"] == result["seconds_per_iteration"]


def test_a_method_with_forward_mode_derivatives_has_no_bare_loop(tiny_sd15, tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    path.write_text(dump(tiny("sd3_scm_1step", tiny_sd15, tmp_path, "--teacher.pipeline_class", "null")))
    assert main(["bench", str(path), "--iterations", "1", "--baseline", "bare", "--random-weights"]) == 2
    assert "forward-mode derivatives" in capsys.readouterr().err
