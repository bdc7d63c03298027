"""Small cards: frozen weights are counted as they are kept; what a plan proposes fits, is the cheapest, and runs."""

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_plan import WIDE, allocated, last_exit, small

from fewstep import recipe as recipes
from fewstep.cli import main
from fewstep.cost import GPUS, fit, plan
from fewstep.cost.blank import Blank
from fewstep.cost.devices import LIBRARIES, named
from fewstep.cost.meter import storage_bytes
from fewstep.cost.shapes import Shapeless
from fewstep.cost.skeleton import skeleton_teacher
from fewstep.diffusion import frozen
from fewstep.errors import FewstepError, RecipeError
from fewstep.process import Process
from fewstep.runs.build import build
from fewstep.runs.checks import check_frozen
from fewstep.runs.library import load_recipe
from fewstep.runs.session import execute
from fewstep.runs.smoke import smoke
from fewstep.teachers import load_teacher
from fewstep.teachers.tiny import write_tiny_pipeline
from fewstep.training.trainer import Trainer

EVAL = Path(__file__).parents[2] / "eval"
sys.path.insert(0, str(EVAL))
import cards  # noqa: E402

WITH_NF4 = importlib.util.find_spec("bitsandbytes") is not None
needs_bnb = pytest.mark.skipif(not WITH_NF4, reason="bitsandbytes is not installed")


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    return write_tiny_pipeline("StableDiffusionXLPipeline", tmp_path_factory.mktemp("wide"), **WIDE)


# ------------------------------------------------------------------------------------------------------------- counted
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "way", [{"quantization": "int8"}, {"quantization": "fp8"}, {"offload": True},
            pytest.param({"quantization": "nf4"}, marks=needs_bnb)]
)  # fmt: skip
def test_frozen_weights_take_what_a_plan_says(wide, way, dtype):
    with Shapeless():
        planned = skeleton_teacher(str(wide), dtype=dtype, **way).net
    real, plainly = load_teacher(str(wide), dtype=dtype, **way).net, load_teacher(str(wide), dtype=dtype).net

    def size(net):
        return storage_bytes([*net.parameters(), *net.buffers()]) + frozen.held_bytes(net)

    assert size(planned) == size(real) < 0.85 * size(plainly)
    assert frozen.numel(planned) == frozen.numel(real) == sum(p.numel() for p in plainly.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("words", [["--teacher.quantization=int8"], ["--teacher.offload=true"]])
def test_a_plan_is_within_fifteen_percent_of_what_is_allocated_with_fetched_weights(wide, words):
    made = plan(small(wide, "--method.num_steps=1", "--method.gan_weight=0", *words))
    recipe = made.recipe
    teacher = load_teacher(recipe.teacher.path, **recipe.teacher.options())
    roles, method = build(recipe, teacher, Process())
    data = Blank(teacher, recipe.train.batch_size, ("images",), last_exit)
    trainer = Trainer(method, roles, data, recipe.train, quiet=True)
    trainer.iterate()  # moments come into being
    trainer.progress.iteration = 0
    assert made.turns[0].peak[4] == pytest.approx(allocated(trainer.iterate), rel=0.15)


# ------------------------------------------------------------------------------------------------------------ proposed
def test_a_card_is_named_by_what_is_its_own(capsys):
    assert (
        named("4090") == "rtx4090-24gb"
        and named("H200") == "h200-141gb"
        and named("a100-40gb") == "a100-40gb"
    )
    assert named("a100") is None and named("b9000") is None
    assert main(["plan", "demo", "--gpu", "a100"]) == 2
    assert "--gpu a100: expected one of h100-80gb" in capsys.readouterr().err


def test_sets_of_options_go_from_the_cheapest_to_another_training():
    lora = recipes.override(load_recipe("flux_dmd2_4step"), ["--teacher.gradient_checkpointing=false"])
    recomputed = "--teacher.gradient_checkpointing=true"
    last = [f"--roles.{name}.optimizer=adamw8bit" for name in ("student", "critic")]
    rounded = [*fit.ROUND, [*fit.ROUND[-1], *last]]
    assert list(fit.steps(lora)) == [[], [recomputed], *([recomputed, *more] for more in rounded)]
    whole = list(fit.steps(load_recipe("sdxl_dmd2_4step")))
    eight, off = "--roles.critic.optimizer=adamw8bit", "--teacher.offload=true"
    critic = ["--roles.critic.kind=lora", "--roles.critic.alpha=64", "--roles.critic.lr=0.0005"]
    assert whole == [[], [eight], [eight, off], critic, *([*critic, *more] for more in rounded)]
    tangent = list(fit.steps(load_recipe("sana_sprint")))
    assert tangent[2][-1] == "--roles.student.ema_device=cpu" and tangent[4] == ["--roles.student.kind=lora"]
    assert not [
        w for words in fit.steps(load_recipe("sdxl_dmd2_4step"), alone=False) for w in words if "8bit" in w
    ]
    both = recipes.override(load_recipe("sdxl_dmd2_4step"), ["--student.kind=full"])
    adapters = [[w for w in words if w.endswith("kind=lora")] for words in fit.steps(both)]
    first = [[], ["--roles.critic.kind=lora"], ["--roles.critic.kind=lora", "--roles.student.kind=lora"]]
    assert [found for n, found in enumerate(adapters) if found not in adapters[:n]] == first
    several = [w for words in fit.steps(load_recipe("sana_sprint"), alone=False) for w in words]
    assert "--teacher.offload=true" in several and not [w for w in several if "ema_device" in w]
    compiled = recipes.override(load_recipe("sdxl_dmd2_4step"), ["--teacher.compile=true"])
    for words in [*whole, *fit.steps(compiled)]:  # none of them is refused
        recipe = compiled if "--teacher.compile=false" in words else load_recipe("sdxl_dmd2_4step")
        check_frozen(recipes.override(recipe, words), here=False)
    off = [words for words in fit.steps(compiled) if any("offload" in w or "quantiz" in w for w in words)]
    assert len(off) == 5 and all("--teacher.compile=false" in words for words in off)
    lora = [words for words in fit.steps(compiled) if words[-1:] == critic[-1:]]
    assert lora == [critic]  # which may stay compiled


def test_a_plan_refuses_what_a_run_refuses_of_frozen_weights():
    words = ["--teacher.compile=true", "--teacher.offload=true"]
    with pytest.raises(RecipeError, match=r"^teacher\.compile: true: torch.compile does not take"):
        plan(recipes.override(load_recipe("sdxl_dmd2_4step"), words))


class Counted:
    """A plan whose bytes are what a test says: held, and so many for each sample."""

    def __init__(self, recipe, held, each, leaving=0, moments=0):
        self.recipe, self.held, self.each, self.leaving = recipe, held, each, leaving
        self.parts, self.processes = [type("Part", (), {"optimizer": moments})], 1

    def total(self, size=None):
        return self.held + self.each * (size or self.recipe.train.batch_size)

    def largest_batch(self, memory):
        return max(0, int((memory - self.held) // self.each))


def test_the_first_set_that_fits_is_proposed_with_the_largest_micro_batch(monkeypatch):
    recipe = recipes.override(
        load_recipe("flux_dmd2_4step"), ["--train.batch_size=6", "--train.accumulate=2"]
    )
    held = {None: 40e9, "int8": 20e9, "nf4": 12e9}
    tried = []

    def counted(recipe, processes, quiet):
        if recipe.teacher.quantization == "nf4" and recipe.role("student").rank == 3:
            raise RecipeError("roles.student.rank: 3: this method has no use for it")
        tried.append(recipe.teacher.quantization or recipe.teacher.offload)
        return Counted(
            recipe, 4e9 if recipe.teacher.offload else held[recipe.teacher.quantization], 1e9, leaving=9e9
        )

    monkeypatch.setattr(fit, "plan", counted)
    monkeypatch.setitem(GPUS, "toy", replace(GPUS["h100-80gb"], memory=14.5e9))
    monkeypatch.setitem(GPUS, "tiny", replace(GPUS["h100-80gb"], memory=4.5e9))
    found = fit.proposals(recipe, ["h100-80gb", "l40s-48gb", "rtx4090-24gb", "toy", "tiny"])
    assert {gpu: made.words for gpu, made in found.items()} == {
        "h100-80gb": [],
        "l40s-48gb": ["--data.encoder_device=cpu"],  # 40 and 9 GB, and what libraries take
        "rtx4090-24gb": ["--teacher.quantization=int8", "--data.encoder_device=cpu", "--train.batch_size=5",
                         "--train.accumulate=3"],
        "toy": ["--teacher.quantization=nf4", "--data.encoder_device=cpu", "--train.batch_size=2",
                "--train.accumulate=6"],
    }  # fmt: skip
    assert tried == [False, "int8", "nf4", True, True]
    odd = recipes.override(recipe, ["--student.rank=3"])  # a set that is refused is passed over
    assert fit.proposals(odd, ["toy"])["toy"].words[0] == "--teacher.offload=true"
    with pytest.raises(
        FewstepError, match=r"fits l40s-48gb, but not beside its text encoders.*encoder_device=cpu would"
    ):
        fit.check_fits(Counted(recipe, 40e9, 1e9, leaving=9e9), "l40s-48gb")
    beside, card = (
        [Counted(recipe, held, 1e9, leaving=9e9) for held in (36e9, 38e9)],
        GPUS["l40s-48gb"].memory,
    )
    assert 38e9 + 9e9 < card < 38e9 + 9e9 + LIBRARIES  # which count too
    assert [fit._encoders(made, card) for made in beside] == [[], ["--data.encoder_device=cpu"]]
    apart = recipes.override(recipe, ["--data.encoder_device=cpu"])
    assert fit._encoders(Counted(apart, 40e9, 1e9, leaving=9e9), card) == []  # where they are already
    fit.check_fits(
        Counted(recipe, 40e9, 1e9, leaving=9e9, moments=4e9), "l40s-48gb"
    )  # which come with training


# ---------------------------------------------------------------------------------------------------------- the table
def stored(name):
    return json.loads((cards.RESULTS / f"{name}.json").read_text())


@pytest.mark.parametrize("name", cards.RECIPES)
def test_what_is_said_of_cards_is_of_todays_recipes_and_fits(name):
    recipe, found = load_recipe(name), stored(name)
    assert found["recipe"] == recipes.digest(recipe), f"has changed: python eval/cards.py {name}"
    for gpu, one in found["cards"].items():
        assert one["total_gb"] * 1e9 <= GPUS[gpu].memory
        train = recipes.override(recipe, one["options"]).train
        assert train.batch_size == one["batch_size"]
        assert train.batch_size * train.accumulate >= recipe.train.batch_size * recipe.train.accumulate


def test_the_table_of_cards_is_that_of_the_files():
    assert (cards.RESULTS / "README.md").read_text() == cards.table(cards.RESULTS)


def test_sdxl_fits_16_gb_and_flux_80():
    assert "rtx4080-16gb" in stored("sdxl_dmd2_4step")["cards"]
    assert stored("flux_dmd2_4step")["cards"]["h100-80gb"]["options"] == []


@pytest.mark.long
@pytest.mark.parametrize("name", cards.RECIPES)
def test_what_is_said_of_cards_is_what_is_counted_now(name):
    counted, before = cards.counted(name)["cards"], stored(name)["cards"]
    assert {gpu: one["options"] for gpu, one in counted.items()} == {
        gpu: one["options"] for gpu, one in before.items()
    }
    for gpu, one in counted.items():
        assert one["total_gb"] == pytest.approx(before[gpu]["total_gb"], rel=0.01)


def cells():
    """Recipes with sets of options, each once; of each way of keeping weights one in the ordinary suite."""
    seen, ways = set(), set()
    for name in cards.RECIPES:
        path = cards.RESULTS / f"{name}.json"
        for one in stored(name)["cards"].values() if path.is_file() else ():
            words = tuple(one["options"])
            if (name, words) in seen:
                continue
            seen.add((name, words))
            way = next(
                (w for w in words if w.startswith(("--teacher.quantization", "--teacher.offload"))), ""
            )
            marks = [pytest.mark.slow] if way and way not in ways else [pytest.mark.long]
            marks += [needs_bnb] if way.endswith("nf4") else []
            if any(word.endswith("adamw8bit") for word in words) and not importlib.util.find_spec("torchao"):
                marks.append(pytest.mark.skip(reason="torchao is not installed"))
            ways.add(way)
            yield pytest.param(name, words, marks=marks, id=f"{name}-{len(seen)}")


@pytest.mark.parametrize(("name", "words"), cells())
def test_what_is_proposed_runs(name, words, tmp_path):
    words = [*words, f"--output={tmp_path / 'run'}"]
    recipe = smoke(recipes.override(load_recipe(name), words), recipes.named(words))
    with torch.compiler.set_stance("force_eager"):  # torchao compiles its step, which takes minutes
        folder = execute(recipe)
    record = json.loads((folder / "export" / "fewstep.json").read_text())
    bits = recipe.teacher.quantization
    assert record.get("trained_on", {}).get("quantization") == bits
    assert any(bits in word for word in words if "quantization" in word) == bool(bits)
