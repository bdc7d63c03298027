"""Whether a plan fits a card, and what would make it fit."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from .. import recipe as recipes
from ..errors import FewstepError
from ..recipe import Recipe
from .count import plan
from .devices import GPUS
from .table import Plan

REMEDIES: tuple[tuple[str, Callable[[Recipe], bool], Sequence[str]], ...] = (
    ("recomputation", lambda r: not r.teacher.gradient_checkpointing, ["--teacher.gradient_checkpointing=true"]),
    ("frozen weights in bf16", lambda r: r.teacher.dtype == "float32", ["--teacher.dtype=bfloat16"]),
    ("arithmetic in bf16", lambda r: r.teacher.autocast is None, ["--teacher.autocast=bfloat16"]),
    ("a LoRA critic", lambda r: _full(r, "critic"), ["--critic.kind=lora"]),
    ("a LoRA student", lambda r: _full(r, "student"), ["--student.kind=lora"]),
)  # fmt: skip


def _full(recipe: Recipe, name: str) -> bool:
    return any(
        n.startswith(name) and recipe.role(n).kind == "full"
        for n in recipe.method_class.networks_for(recipe.method)
    )


def remedy(made: Plan, gpu: str, quiet: bool = True) -> str:
    """What would make a recipe fit that does not, found by planning it, which takes as long as the plan each time.

    Args:
        quiet: do not say what is tried.

    Returns:
        One sentence with the options to add.
    """
    memory, recipe = GPUS[gpu].memory, made.recipe
    words: list[str] = []
    if best := made.largest_batch(memory):
        accumulate = -(-recipe.train.batch_size * recipe.train.accumulate // best)
        return f"--train.batch_size={best} --train.accumulate={accumulate} would fit"
    recipe = recipes.override(recipe, ["--train.batch_size=1"])
    words.append("--train.batch_size=1")
    for _, applies, change in REMEDIES:
        if applies(recipe):
            recipe = recipes.override(recipe, change)
            words += change
            if not quiet:
                print(f"fewstep: plan: does not fit; trying {' '.join(words)}", file=sys.stderr)
            if plan(recipe, made.processes, quiet).total() <= memory:
                return f"{' '.join(words)} would fit"
    larger = [name for name, d in GPUS.items() if d.memory > memory]
    return (
        f"even {' '.join(words)} would not; shard full weights over more devices (--processes 8 --train.shard=8), "
        f"lower teacher.resolution, or take {' or '.join(larger) or 'a larger card'}"
    )


def check_fits(made: Plan, gpu: str, quiet: bool = True) -> None:
    """Raises FewstepError, with what would make it fit, for a recipe that is too large for a card."""
    memory = GPUS[gpu].memory
    if made.total() > memory:
        raise FewstepError(
            f"plan: {made.recipe.output}: {made.total() / 1e9:.1f} GB do not fit {gpu} ({memory / 1e9:.1f} GB); "
            + remedy(made, gpu, quiet)
        )
