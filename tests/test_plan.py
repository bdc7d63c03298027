"""Plans: what is counted without storage is what a real run allocates; what does not fit is told with a remedy."""

from dataclasses import replace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from fewstep import recipe as recipes
from fewstep.cli import load_recipe, main
from fewstep.distributed import Process
from fewstep.errors import FewstepError
from fewstep.methods.base import Batch
from fewstep.plan import GPUS, Meter, _Planning, check_fits, plan, remedy
from fewstep.rng import Rng
from fewstep.run import build
from fewstep.teachers import load_teacher
from fewstep.teachers.skeleton import skeleton_teacher
from fewstep.teachers.tiny import write_tiny_pipeline
from fewstep.trainer import Trainer

WIDE = {"block_out_channels": (32, 64), "norm_num_groups": 8, "attention_head_dim": (2, 4), "sample_size": 32}


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A small SDXL whose activations are not lost among the smallest tensors."""
    return write_tiny_pipeline("StableDiffusionXLPipeline", tmp_path_factory.mktemp("wide"), **WIDE)


def small(path, *words):
    options = [
        "--teacher.dtype=float32",
        "--teacher.autocast=null",
        "--teacher.resolution=null",
        "--steps=10",
    ]
    options += ["--student.rank=4", "--critic.rank=4", "--train.batch_size=4", "--train.accumulate=1"]
    return recipes.override(load_recipe("sdxl_dmd2_4step"), ["--teacher", str(path), *options, *words])


class Real:
    """What the plan's blank micro-batches stand for."""

    def __init__(self, teacher, batch_size):
        self.teacher, self.shape = teacher, (batch_size, *teacher.latent_shape)

    def batch(self, iteration, micro):
        cond, rng = self.teacher.blank(self.shape[0]), Rng(0, iteration, micro)
        shared = Rng(1)
        shared.integer = lambda below: below - 1
        real = rng.normal(*self.shape)
        return Batch(cond=cond, shape=self.shape, rng=rng, shared=shared, real=real, real_cond=cond)


def allocated(function) -> int:
    """Peak of what the allocator gave out and did not get back, by torch's profiler."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        function()
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak


@pytest.mark.parametrize("checkpointing, kind", [("true", "lora"), ("false", "lora"), ("false", "full")])
def test_a_plan_is_within_fifteen_percent_of_what_is_allocated(wide, checkpointing, kind):
    words = (f"--student.kind={kind}", f"--critic.kind={kind}", "--student.ema=0.9")
    recipe = small(wide, f"--teacher.gradient_checkpointing={checkpointing}", *words)
    made = plan(recipe)
    teacher = load_teacher(str(wide))
    if recipe.teacher.gradient_checkpointing:
        teacher.net.enable_gradient_checkpointing()
    roles, method = build(recipe, teacher, Process())
    trainer = Trainer(method, roles, Real(teacher, 4), recipe.train, quiet=True)
    trainer.iterate()  # moments come into being
    for part in made.parts:
        if part.name in roles:
            weights = roles[part.name].weights.values()
            assert part.trained == sum(w.numel() for w in weights)
            assert part.weights == part.gradients == 4 * part.trained
            state = trainer.optimizers[part.name].state
            assert part.optimizer == sum(m.numel() * 4 for s in state.values() for m in s.values())
    assert [p.average > 0 for p in made.parts] == [p.name == "student" for p in made.parts]
    trainer.progress.iteration = 0
    measured = allocated(trainer.iterate)
    assert made.turns[0].phases == ("generator", "critic")
    assert made.turns[0].peak[4] == pytest.approx(measured, rel=0.15)


def test_memory_is_linear_in_the_batch_and_arithmetic_too(wide):
    two, eight = (plan(small(wide, f"--train.batch_size={b}")) for b in (2, 8))
    assert two.activations(8) == pytest.approx(eight.activations(8), rel=0.05)
    assert 4 * two.flops() == pytest.approx(eight.flops(), rel=0.02)
    assert two.largest_batch(two.total(5)) == 5
    assert [t.count for t in two.turns] == [2, 8]  # ten iterations, a student's turn in every fifth


def test_shapes_of_published_models_are_known_without_weights():
    counts = {
        "stabilityai/stable-diffusion-xl-base-1.0": (2_567_463_684, 83_653_863),
        "stable-diffusion-v1-5/stable-diffusion-v1-5": (859_520_964, 83_653_863),
    }
    for source, expected in counts.items():
        with _Planning():
            teacher = skeleton_teacher(source, dtype="bfloat16")
        found = [sum(p.numel() for p in m.parameters()) for m in (teacher.net, teacher.pipe.vae)]
        assert tuple(found) == expected
        assert next(teacher.net.parameters()).dtype == torch.bfloat16


def test_a_meter_counts_what_lives_and_forgets_what_dies():
    x = torch.zeros(1000)
    with Meter() as meter:
        y = x * 2
        assert meter.alive == 4000
        view = y[:10]  # no storage of its own
        y.mul_(2)
        assert meter.alive == 4000
        z = (y + 1) + 1  # the first sum is gone
        assert meter.alive == 8000 and meter.peak == 12000
        del y, z, view
        assert meter.alive == 0
        torch.zeros(4, 8) @ torch.zeros(8, 16)
    assert meter.flops == 2 * 4 * 8 * 16


def test_a_recipe_that_cannot_fit_is_named_with_what_would_make_it_fit(wide, monkeypatch):
    recipe = small(wide, "--train.batch_size=64", "--teacher.gradient_checkpointing=false")
    made = plan(recipe)
    monkeypatch.setitem(GPUS, "toy", replace(GPUS["h100-80gb"], memory=made.total(9)))
    with pytest.raises(
        FewstepError, match=r"GB do not fit toy .*train.batch_size=9 --train.accumulate=8 would fit"
    ):
        check_fits(made, "toy")
    one = plan(small(wide, "--train.batch_size=1", "--teacher.gradient_checkpointing=true"))
    monkeypatch.setitem(GPUS, "toy", replace(GPUS["h100-80gb"], memory=one.total() + 1))
    assert remedy(made, "toy") == "--train.batch_size=1 --teacher.gradient_checkpointing=true would fit"
    monkeypatch.setitem(GPUS, "toy", replace(GPUS["h100-80gb"], memory=1e9))
    assert "even --train.batch_size=1" in remedy(made, "toy") and "h100-80gb" in remedy(made, "toy")
    check_fits(made, "h100-80gb")


def test_the_command_prints_a_table_and_refuses_by_name(wide, capsys, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(recipes.dump(small(wide)))
    assert main(["plan", str(path), "--gpu", "a100-40gb", "--train.batch_size=2"]) == 0
    printed = capsys.readouterr().out
    assert "largest micro-batch" in printed and "discriminator" in printed and "a100-40gb" in printed
    assert main(["plan", str(path), "--gpu", "b9000"]) == 2
    assert "expected one of h100-80gb" in capsys.readouterr().err
    assert main(["plan", str(path), "--teacher", "./nowhere"]) == 2
    assert "nowhere" in capsys.readouterr().err
    assert main(["plan", str(path), "--processes", "3", "--train.shard", "2"]) == 2
    assert "train.shard: 2 does not divide the number of processes, 3" in capsys.readouterr().err
