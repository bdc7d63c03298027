"""How many entries of a first gradient are smaller than Adam's eps, at a teacher's real size, with random weights.

    python eval/gradient_sizes.py sd15_sid_1step --resolution 512      # 16 GB of memory

Adam takes steps of one size whatever a gradient's scale, but for entries below its eps: those hardly move. Nothing is
downloaded; arithmetic is fp32, a micro-batch has one sample. Weights take Adam's very first step as each gradient
arrives (``lr g / (|g| + eps)``), so neither gradients nor moments are held, and full networks fit.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any

import torch
from full_size import overridden, rounded
from torch import Tensor

from fewstep.errors import FewstepError, tell
from fewstep.files import SHARED, check_writable, write_json

RESULTS = Path(__file__).parent / "results" / "gradient_sizes"


class FirstSteps:
    """Of one role's weights, as their gradients arrive, with counts of what arrived."""

    def __init__(self, weights: list[Tensor], lr: float, eps: float, entries: int):
        self.lr, self.eps, self.entries = lr, eps, entries
        self.count, self.zero, self.small, self.as_mean = 0, 0, 0, 0
        for weight in weights:
            weight.register_post_accumulate_grad_hook(self)

    @torch.no_grad()
    def __call__(self, weight: Tensor) -> None:
        size = weight.grad.abs()
        self.count += size.numel()
        self.zero += int((size == 0).sum())
        self.small += int((size < self.eps).sum())
        self.as_mean += int((size < self.eps * self.entries).sum())
        weight.sub_(self.lr * weight.grad / size.add_(self.eps))
        weight.grad = None

    def shares(self) -> dict[str, float]:
        """Of all entries: zero, below eps, and below the eps that a loss taken for no sum would have."""
        counts = {"zero": self.zero, "below_eps": self.small, "below_eps_of_a_mean": self.as_mean}
        return {"eps": self.eps} | {name: count / self.count for name, count in counts.items()}


def run(name: str, resolution: int, words: list[str]) -> dict[str, Any]:
    """The turns of a recipe's first iteration, by role."""
    from fewstep.cost.bench import _random

    recipe = overridden(name, resolution, words)
    trainer, nets = _random(recipe)
    entries = math.prod(trainer.method.latent_shape)
    found = {}
    for phase in trainer.phases:
        if not phase.due(trainer.progress):
            continue
        for role in trainer.roles.values():
            role.requires_grad_(role.name in phase.train)
        steps = {}
        for role in (trainer.roles[role] for role in phase.train):
            eps = trainer.optimizers[role.name].param_groups[0]["eps"]
            steps[role.name] = FirstSteps(list(role.weights.values()), role.config.lr, eps, entries)
        loss = sum(phase.loss(trainer.data.batch(0, 0), trainer.progress).values())
        loss.backward()
        found |= {role: taken.shares() for role, taken in steps.items()}
        print(f"{phase.name}: {found}", flush=True)
    return {
        "parameters": sum(p.numel() for p in nets["teacher"].parameters()),
        "entries": entries,
        "roles": found,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe")
    parser.add_argument("--resolution", type=int, default=512)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args, words = parser.parse_known_args()
    check_writable(args.out, "--out", record=SHARED)
    command = f"python eval/gradient_sizes.py {args.recipe} --resolution {args.resolution} {' '.join(words)}"
    result = {
        "command": command.strip(),
        "torch": torch.__version__,
        **run(args.recipe, args.resolution, words),
    }
    path = args.out / f"{args.recipe}_{args.resolution}.json"
    write_json(path, rounded(result))
    print(path)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except FewstepError as error:
        sys.exit(tell(error))
