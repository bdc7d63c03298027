"""Whether a plan fits a card, and the cheapest options with which it does."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from .. import recipe as recipes
from ..errors import FewstepError, RecipeError
from ..recipe import Recipe
from .count import plan
from .devices import GPUS, LIBRARIES
from .table import Plan

ROUND = (["--teacher.quantization=int8"], ["--teacher.quantization=nf4"], ["--teacher.offload=true"])


class Proposal(NamedTuple):
    """Options to add to a recipe, and what it takes with them."""

    words: list[str]
    plan: Plan

    @property
    def text(self) -> str:
        return " ".join(self.words)


def _full(recipe: Recipe, name: str = "") -> list[str]:
    """Networks of a role's name that are trained as whole copies."""
    names = recipe.method_class.networks_for(recipe.method)
    return [n for n in names if n.startswith(name) and recipe.role(n).kind == "full"]


def steps(recipe: Recipe, alone: bool = True) -> Iterator[list[str]]:
    """Sets of options, from what costs least to what costs most; a micro-batch that fits goes with each.

    First what trains the same, or in half precision; then fewer bits for frozen weights, or the host's memory; whole
    copies, where there are any, become adapters last, for that is another training.

    Args:
        alone: whether there is one process; of several, moments in 8 bits and averages in the host's memory are
            refused.
    """
    words: list[str] = []
    yield words
    teacher = recipe.teacher
    families = list(dict.fromkeys(map(recipes.family, _full(recipe))))
    averaged = [name for name in families if recipe.role(name).ema and not recipe.role(name).ema_device]
    fetched = ["--teacher.compile=false"] if teacher.compile else []  # which compiled blocks do not take
    offload = ["--teacher.offload=true", *fetched]
    for applies, more in (
        (not teacher.gradient_checkpointing, ["--teacher.gradient_checkpointing=true"]),
        (teacher.dtype == "float32", ["--teacher.dtype=bfloat16"]),
        (teacher.autocast is None, ["--teacher.autocast=bfloat16"]),
        (alone and bool(families), [f"--roles.{name}.optimizer=adamw8bit" for name in families]),
        (alone and bool(averaged), [f"--roles.{name}.ema_device=cpu" for name in averaged]),
        (bool(families), offload),
    ):
        if applies:
            words = [*words, *more]
            yield words
    words = [word for word in words if word not in offload]
    for name in sorted(families, key=lambda name: name == "student"):
        words = [word for word in words if not word.startswith(f"--roles.{name}.")]
        words = [*words, f"--roles.{name}.kind=lora"]
        if name == "critic":  # which would not follow at the rate of whole weights: eval/results/lora_critic
            config = recipe.role(next(n for n in _full(recipe) if recipes.family(n) == name))
            words += [f"--roles.critic.alpha={config.rank}", f"--roles.critic.lr={10 * config.lr:g}"]
        yield words
    for more in ROUND:
        yield [*words, *fetched, *more]
    if not alone:
        return
    networks = recipe.method_class.networks_for(recipe.method)
    eight = [f"--roles.{name}.optimizer=adamw8bit" for name in dict.fromkeys(map(recipes.family, networks))]
    yield [*words, *fetched, *ROUND[-1], *eight]  # moments of adapters, which are the most that is left


def _batch(recipe: Recipe, made: Plan, memory: float) -> list[str] | None:
    """The largest micro-batch up to the recipe's that fits, as options; None where none does."""
    train = recipe.train
    best = min(made.largest_batch(memory), train.batch_size)
    if best < 1:
        return None
    if best == train.batch_size:
        return []
    return [
        f"--train.batch_size={best}",
        f"--train.accumulate={-(-train.batch_size * train.accumulate // best)}",
    ]


def _encoders(made: Plan, memory: float) -> list[str]:
    """Before training everything but moments is beside the text encoders, unless they are elsewhere."""
    before = made.held - sum(part.optimizer for part in made.parts) + made.leaving + LIBRARIES
    apart = made.recipe.data.encoder_device is not None
    return ["--data.encoder_device=cpu"] if made.leaving and before > memory and not apart else []


def proposals(
    recipe: Recipe, gpus: Sequence[str], processes: int = 1, made: Plan | None = None, quiet: bool = True
) -> dict[str, Proposal]:
    """The first of :func:`steps` that fits each card, found by planning them, which takes as long as a plan each time.

    Args:
        made: the plan of the recipe as it is. quiet: do not say what is tried.

    Returns:
        Card -> its options; a card that nothing fits is left out.
    """
    found: dict[str, Proposal] = {}
    for words in steps(recipe, processes == 1):
        if not quiet and words:
            print(f"fewstep: plan: does not fit; trying {' '.join(words)}", file=sys.stderr)
        if words or made is None:
            # Peaks are linear in the micro-batch, and the smallest is counted fastest.
            try:
                made = plan(recipes.override(recipe, [*words, "--train.batch_size=1"]), processes, quiet)
            except RecipeError:
                if not words:
                    raise
                continue  # a tangent refuses adapters on weights in half precision
        for gpu in (gpu for gpu in gpus if gpu not in found):
            memory = GPUS[gpu].memory
            batch = _batch(recipe, made, memory)
            if batch is not None:
                found[gpu] = Proposal([*words, *_encoders(made, memory), *batch], made)
        if len(found) == len(gpus):
            break
    return found


def remedy(made: Plan, gpu: str, quiet: bool = True) -> str:
    """What would make a recipe fit that does not, as one sentence with the options to add.

    Args:
        quiet: do not say what is tried.
    """
    found = proposals(made.recipe, [gpu], made.processes, made, quiet).get(gpu)
    if found:
        return f"{found.text} would fit"
    larger = [name for name, d in GPUS.items() if d.memory > GPUS[gpu].memory]
    last = list(steps(made.recipe, made.processes == 1))[-1]
    return (
        f"even --train.batch_size=1 {' '.join(last)} would not; shard full weights over more devices (--processes 8 "
        f"--train.shard=8), lower teacher.resolution, or take {' or '.join(larger) or 'a larger card'}"
    )


def check_fits(made: Plan, gpu: str, quiet: bool = True) -> None:
    """Raises FewstepError, with what would make it fit, for a recipe that is too large for a card."""
    memory = GPUS[gpu].memory
    if made.total() > memory:
        raise FewstepError(
            f"plan: {made.recipe.output}: {made.total() / 1e9:.1f} GB do not fit {gpu} ({memory / 1e9:.1f} GB); "
            + remedy(made, gpu, quiet)
        )
    if words := _encoders(made, memory):
        raise FewstepError(
            f"plan: {made.recipe.output}: fits {gpu}, but not beside its text encoders, which encode prompts first; "
            f"{' '.join(words)} would fit"
        )
