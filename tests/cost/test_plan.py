"""Plans: what is counted without storage is what a real run allocates; what does not fit is told with a remedy."""

import gc
import json
import sys
from dataclasses import replace
from pathlib import Path

import processes
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.profiler import ProfilerActivity, profile

from fewstep import recipe as recipes
from fewstep.cli import main
from fewstep.cost import GPUS, check_fits, plan, remedy
from fewstep.cost.blank import Blank
from fewstep.cost.meter import Meter
from fewstep.cost.shapes import Shapeless, group, norms_as_on_a_gpu, products
from fewstep.cost.skeleton import skeleton_teacher
from fewstep.diffusion.rng import Rng
from fewstep.errors import FewstepError
from fewstep.process import Process, start
from fewstep.runs.build import build
from fewstep.runs.disk import on_disk
from fewstep.runs.library import load_recipe, recipe_files
from fewstep.runs.session import cache
from fewstep.teachers import load_teacher
from fewstep.teachers.tiny import write_tiny_pipeline
from fewstep.training.trainer import Trainer

EVAL = Path(__file__).parents[2] / "eval"
sys.path.insert(0, str(EVAL))
import plans  # noqa: E402

PLANS = EVAL / "results" / "plans"
# Of each kind one: a U-Net's, a transformer's with forward-mode derivatives, tokens.
AGAIN = ("emoji_dmd2_1step", "sd15_dmd2_1step", "sana_scm_2step", "var_d16_dd2_1step")
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
    return recipes.override(load_recipe("sdxl_dmd2_4step_24gb"), ["--teacher", str(path), *options, *words])


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
@pytest.mark.parametrize("kind", [pytest.param("lora", marks=pytest.mark.long), "full"])
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
        "black-forest-labs/FLUX.2-klein-base-4B": (3_875_544_576, 84_046_115),
        "black-forest-labs/FLUX.2-dev": (
            32_223_281_152,
            84_046_115,
        ),  # its processor may need what is not installed
        "krea/Krea-2-Raw": (12_820_073_036, 126_892_531),
        "HiDream-ai/HiDream-I1-Full": (17_105_733_184, 83_819_683),
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
    assert sum(meter.flops.values()) == 2 * 4 * 8 * 16 and meter.peak == 12000


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
    monkeypatch.setattr("fewstep.cost.fit.plan", lambda *_: planned["lora"])
    monkeypatch.setitem(GPUS, "toy", replace(GPUS["h100-80gb"], memory=planned["lora"].total() + 1))
    options = "--teacher.gradient_checkpointing=true --train.batch_size=4 --train.accumulate=16"
    assert remedy(made, "toy") == f"{options} would fit"
    monkeypatch.setitem(GPUS, "toy", replace(GPUS["h100-80gb"], memory=1e9))
    assert "even --train.batch_size=1" in remedy(made, "toy") and "h100-80gb" in remedy(made, "toy")


def test_the_command_counts_a_full_copy_split_over_two_cards(tmp_path, capsys):
    """Of a network that calls a part of its first block by itself."""
    teacher = write_tiny_pipeline("DiTPipeline", tmp_path / "dit")
    words = [
        "--teacher",
        str(teacher),
        "--teacher.resolution=null",
        "--train.shard=2",
        "--train.batch_size=2",
    ]
    words += ["--steps=4", "--student.kind=full", "--critic.kind=lora", "--critic.rank=4"]
    path = tmp_path / "recipe.yaml"
    path.write_text(recipes.dump(recipes.override(load_recipe("dit_sid_1step"), words)))
    assert main(["plan", str(path), "--processes", "2", "--json"]) == 0
    counted = json.loads(capsys.readouterr().out)
    parts, student = counted["parts"], counted["parts"]["student"]
    assert 0 < counted["gb_per_sample"] < counted["iteration_gb"]
    assert student["parameters"] == student["trained"] == parts["teacher"]["parameters"]
    assert student["weights"] == pytest.approx(
        4 * student["parameters"] / 2, rel=0.02
    )  # uneven rows are padded
    assert 0 < parts["critic"]["trained"] < student["trained"]


def of_accumulation(method, teacher):
    """Bytes that an iteration takes with three micro-batches, and what each further one adds; two cards share it."""

    def iteration(accumulate):
        words = ["--teacher", str(teacher), "--teacher.resolution", "null", "--train.batch_size", "2"]
        words += ["--student.kind", "full", "--critic.kind", "full", "--train.shard", "2"]
        recipe = recipes.override(load_recipe(method), [*words, "--train.accumulate", str(accumulate)])
        return plan(recipe, processes=2, quiet=True).iteration(2)

    few, many = iteration(3), iteration(9)
    return few, (many - few) / 6


@pytest.mark.slow
def test_micro_batches_share_what_is_gathered(tiny_sdxl):
    few, each = of_accumulation("sdxl_sid_4step", tiny_sdxl)
    assert 0 < each < 0.02 * few  # prompts and noise


@pytest.mark.long
def test_micro_batches_keep_what_they_carry(tiny_sdxl):
    plain, carried = (of_accumulation(f"sdxl_{name}_4step", tiny_sdxl)[1] for name in ("sid", "dmd2"))
    assert carried - plain >= 4 * 2 * 4 * 16 * 16  # the critic learns from the student's samples


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


def test_hours_rate_each_kind_of_arithmetic():
    card = GPUS["h100-80gb"]
    assert card.seconds({"bfloat16": 989e12, "float16": 989e12, "tf32": 494e12, "float32": 67e12}) == 4.0
    with Meter() as meter:
        x = torch.zeros(4, 4)
        with products(tf32=True):
            _ = x @ x
        with products(tf32=False):
            _ = x @ x
        _ = x.bfloat16() @ x.bfloat16()
    assert meter.flops == {"tf32": 128, "float32": 128, "bfloat16": 128}


@pytest.mark.long
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_blocks_executed_once_cost_what_they_cost_each_time(planned, kind, monkeypatch):
    monkeypatch.setattr("fewstep.cost.count.remember", lambda *_: None)
    monkeypatch.setattr("fewstep.cost.meter.described", lambda *_: None)
    plain = plan(planned[kind].recipe)
    for turn, again in zip(planned[kind].turns, plain.turns, strict=True):
        assert turn.flops == again.flops
        assert turn.peak == {size: pytest.approx(peak, rel=0.02) for size, peak in again.peak.items()}


def test_what_data_take_on_disk(planned, wide, tmp_path, monkeypatch):
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))
    (tmp_path / "prompts.txt").write_text("\n".join(f"a drawing of {i} birds" for i in range(40)))
    (tmp_path / "images").mkdir()
    for i in range(40):
        Image.new("RGB", (64, 64), (i, 0, 0)).save(tmp_path / "images" / f"{i}.png")
        (tmp_path / "images" / f"{i}.txt").write_text("a square")
    data = [f"--prompts={tmp_path / 'prompts.txt'}", f"--images={tmp_path / 'images'}"]
    recipe = recipes.override(planned["lora"].recipe, data)
    counted, stores = on_disk(recipe, load_teacher(str(wide))), cache(recipe)
    assert counted["prompts"]["rows"] == counted["images"]["rows"] == 40
    files = [file for store in stores.values() for file in store.folder.glob("*.safetensors")]
    written = sum(tensor.nbytes for file in files for tensor in load_file(file).values())
    assert sum(store["bytes"] for store in counted.values()) == written > 0


@pytest.mark.parametrize("name", sorted(recipe_files()))
def test_every_recipe_is_planned_and_fits_the_hardware_it_names(name):
    path = PLANS / f"{name}.json"
    assert path.is_file(), f"python eval/plans.py {name}"
    stored = json.loads(path.read_text())
    assert stored["recipe"] == recipes.digest(load_recipe(name)), f"has changed: python eval/plans.py {name}"
    room = plans.hardware(recipe_files()[name])
    assert stored["hardware"] == room.words and stored["total_gb"] <= room.gigabytes
    assert stored["seconds"] < 300  # of one core; networks in shards and a dozen of them take longest
    assert stored["how"] == "counted by fewstep plan, not measured"


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [AGAIN[0], *(pytest.param(name, marks=pytest.mark.long) for name in AGAIN[1:])]
)
def test_stored_plans_are_what_is_counted_now(name):
    stored = json.loads((PLANS / f"{name}.json").read_text())
    counted = plans.planned(name)
    for key in ("held_gb", "iteration_gb", "preview_gb", "total_gb", "tflop_per_iteration"):
        assert counted[key] == pytest.approx(stored[key], rel=0.01), key
    assert counted["cache"] == stored["cache"]


def test_the_table_of_plans_is_that_of_the_files():
    assert (PLANS / "README.md").read_text() == plans.table(PLANS)


def test_a_recipe_that_names_no_hardware_is_told(tmp_path):
    (tmp_path / "x.py").write_text('"""Title.\n\nHardware: a laptop."""')
    with pytest.raises(ValueError, match="names no hardware"):
        plans.hardware(tmp_path / "x.py")


def of_its_own_mesh(process):
    """Where a tensor that an operator makes of a shard believes this process to be."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    made = torch.zeros_like(distribute_tensor(torch.ones(4), process.mesh, [Replicate(), Shard(0)]))
    return made.device_mesh.get_coordinate()


def test_a_plan_leaves_nothing_of_its_processes_to_those_that_train_after_it(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "start", lambda device: start(device, shard=2))
    with group(2, 2) as process:
        assert list(of_its_own_mesh(process)) == [0, 0]
    assert [list(place) for place in processes.together(2, of_its_own_mesh, tmp_path)] == [[0, 0], [0, 1]]
