"""Plans: what is counted without storage is what a real run allocates; what does not fit is told with a remedy."""

import gc
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from fewstep import recipe as recipes
from fewstep.cli import load_recipe, main
from fewstep.data.blank import Blank
from fewstep.distributed import Process
from fewstep.errors import FewstepError
from fewstep.plan import GPUS, check_fits, plan, remedy
from fewstep.plan.meter import Meter
from fewstep.plan.shapes import Shapeless, norms_as_on_a_gpu
from fewstep.rng import Rng
from fewstep.run import build
from fewstep.teachers import load_teacher
from fewstep.teachers.skeleton import skeleton_teacher
from fewstep.teachers.tiny import write_tiny_pipeline
from fewstep.trainer import Trainer

README = Path(__file__).parent.parent / "README.md"
PLANS = README.parent / "eval" / "results" / "plans"
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
        "--train.batch_size=4",
        "--train.accumulate=1",
    ]
    options += [f"--{role}.{option}" for role in ("student", "critic") for option in ("rank=4", "ema=0.9")]
    return recipes.override(load_recipe("sdxl_dmd2_4step"), ["--teacher", str(path), *options, *words])


@pytest.fixture(scope="module")
def planned(wide):
    """A plan of each kind: adapters with recomputation and a discriminator, and full copies without."""
    few = [f"--{role}.targets=[to_q,to_v,conv1]" for role in ("student", "critic")]
    full = ["--student.kind=full", "--critic.kind=full", "--teacher.gradient_checkpointing=false"]
    return {
        "lora": plan(small(wide, "--method.num_steps=2", *few)),
        "full": plan(small(wide, "--method.num_steps=1", "--method.gan_weight=0", *full)),
    }


def real_trainer(recipe):
    teacher = load_teacher(recipe.teacher.path)
    if recipe.teacher.gradient_checkpointing:
        teacher.net.enable_gradient_checkpointing()
    roles, method = build(recipe, teacher, Process())
    trainer = Trainer(
        method,
        roles,
        Blank(teacher, recipe.train.batch_size, ("images",), last_exit),
        recipe.train,
        quiet=True,
    )
    trainer.iterate()  # moments come into being
    trainer.progress.iteration = 0
    return trainer


def last_exit(iteration, micro):
    """Rollouts of full length, as the larger of a plan's counts has them."""
    shared = Rng(1)
    shared.integer = lambda below: below - 1
    return Rng(0, iteration, micro), shared


def allocated(function) -> int:
    """Peak of what the allocator gave out and did not get back, by torch's profiler."""
    gc.collect()  # what earlier trainers held would be given back meanwhile
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        function()
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_plan_is_within_fifteen_percent_of_what_is_allocated(planned, kind):
    made = planned[kind]
    trainer = real_trainer(made.recipe)
    for part in made.parts:
        if part.name in trainer.roles:
            weights = trainer.roles[part.name].weights.values()
            assert part.trained == sum(w.numel() for w in weights)
            assert part.weights == part.gradients == 4 * part.trained
            state = trainer.optimizers[part.name].state
            assert part.optimizer == sum(m.numel() * 4 for s in state.values() for m in s.values())
    assert [p.name for p in made.parts if p.average] == ["student", "critic"]
    assert made.turns[0].phases == ("generator", "critic")
    assert made.turns[0].peak[4] == pytest.approx(allocated(trainer.iterate), rel=0.15)


@pytest.mark.slow
def test_measured_memory_is_linear_in_the_batch_with_the_planned_slope(planned):
    made = planned["lora"]
    two, eight = (
        allocated(real_trainer(recipes.override(made.recipe, [f"--train.batch_size={b}"])).iterate)
        for b in (2, 8)
    )
    assert (eight - two) / 6 == pytest.approx(made.iteration(2) - made.iteration(1), rel=0.15)
    assert made.iteration(8) == pytest.approx(eight, rel=0.15)


@pytest.mark.slow
def test_what_follows_from_a_plan(planned):
    made = planned["lora"]
    assert [t.count for t in made.turns] == [2, 8]  # ten iterations, a student's turn in every fifth
    assert made.largest_batch(made.total(5)) == 5 and made.largest_batch(made.total(1) - 1) == 0
    rows = made.text("a100-40gb")
    assert "largest micro-batch" in rows and "discriminator" in rows and "a100-40gb" in rows


def test_shapes_of_published_models_are_known_without_weights():
    counts = {
        "stabilityai/stable-diffusion-xl-base-1.0": (2_567_463_684, 83_653_863),
        "stable-diffusion-v1-5/stable-diffusion-v1-5": (859_520_964, 83_653_863),
    }
    for source, expected in counts.items():
        with Shapeless():
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
    assert meter.flops == 2 * 4 * 8 * 16 and meter.peak == 12000


def test_norms_keep_what_a_gpu_keeps():
    norm, x = torch.nn.GroupNorm(2, 4).bfloat16(), torch.randn(2, 4, 4, 4, dtype=torch.bfloat16)
    with norms_as_on_a_gpu(), torch.autocast("cpu", torch.bfloat16):
        assert norm(x).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert norm(x).dtype == torch.bfloat16


@pytest.mark.slow
def test_a_recipe_that_cannot_fit_is_named_with_what_would_make_it_fit(planned, monkeypatch):
    made = replace(
        planned["full"], recipe=recipes.override(planned["full"].recipe, ["--train.batch_size=64"])
    )
    monkeypatch.setitem(GPUS, "toy", replace(GPUS["h100-80gb"], memory=made.total(9)))
    with pytest.raises(FewstepError, match=r"do not fit toy .*train.batch_size=9 --train.accumulate=8 would"):
        check_fits(made, "toy")
    check_fits(made, "h100-80gb")
    # No micro-batch fits: what is tried then is planned anew, here all by the plan with adapters.
    monkeypatch.setattr("fewstep.plan.fit.plan", lambda *_: planned["lora"])
    monkeypatch.setitem(GPUS, "toy", replace(GPUS["h100-80gb"], memory=planned["lora"].total() + 1))
    assert remedy(made, "toy") == "--train.batch_size=1 --teacher.gradient_checkpointing=true would fit"
    monkeypatch.setitem(GPUS, "toy", replace(GPUS["h100-80gb"], memory=1e9))
    assert "even --train.batch_size=1" in remedy(made, "toy") and "h100-80gb" in remedy(made, "toy")


@pytest.mark.slow
def test_the_command_counts_a_full_copy_split_over_two_cards(tmp_path, capsys):
    teacher = write_tiny_pipeline("StableDiffusionPipeline", tmp_path / "sd")
    words = [
        "--method.gan_weight=0",
        "--method.num_steps=1",
        "--teacher.pipeline_class=null",
        "--train.shard=2",
    ]
    kinds = ["--student.kind=full", "--critic.kind=lora"]
    path = tmp_path / "recipe.yaml"
    path.write_text(recipes.dump(small(teacher, *words, *kinds)))
    assert main(["plan", str(path), "--processes", "2", "--json"]) == 0
    counted = json.loads(capsys.readouterr().out)
    parts, student = counted["parts"], counted["parts"]["student"]
    assert 0 < counted["gb_per_sample"] < counted["iteration_gb"]
    assert student["parameters"] == student["trained"]
    assert student["weights"] == pytest.approx(
        4 * student["parameters"] / 2, rel=0.02
    )  # uneven rows are padded
    assert parts["critic"]["trained"] < student["trained"]


def test_bad_words_are_refused_before_anything_is_counted(capsys):
    for words, told in (
        (["--gpu", "b9000"], "expected one of h100-80gb"),
        (["--processes", "0"], "expected at least 1"),
        (["--teacher", "./nowhere"], "nowhere"),
        (
            ["--processes", "3", "--train.shard", "2"],
            "train.shard: 2 does not divide the number of processes, 3",
        ),
    ):
        assert main(["plan", "sdxl_dmd2_4step", *words]) == 2
        assert told in capsys.readouterr().err


@pytest.mark.parametrize("path", sorted(PLANS.glob("*.json")), ids=lambda path: path.stem)
def test_stored_plans_are_labelled_and_stand_in_the_readme(path):
    stored = json.loads(path.read_text())
    assert stored["how"] == "counted by fewstep plan, not measured" and stored["command"].startswith(
        "fewstep plan"
    )
    numbers = [f"{stored[key]:.1f}" for key in ("held_gb", "iteration_gb", "total_gb")]
    assert f"| {' | '.join(numbers)} |" in README.read_text()
    assert stored["total_gb"] <= (40 if stored["processes"] == 1 else 80)
