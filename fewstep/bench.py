"""Where the time of an iteration goes: networks, backward passes, optimisers, and everything else."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import recipe as recipes
from .recipe import Recipe


class Clock:
    """Adds up seconds by name. Nested calls of timed things count once, for the outermost."""

    def __init__(self, device: torch.device):
        self.device, self.seconds, self.depth = device, {}, 0

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def wrap(self, name: str, function):
        def timed(*args, **kwargs):
            self.depth += 1
            begin = self.now()
            try:
                return function(*args, **kwargs)
            finally:
                self.depth -= 1
                if self.depth == 0:
                    self.seconds[name] = self.seconds.get(name, 0.0) + self.now() - begin

        return timed


def _time_forward(module: nn.Module, name: str, clock: Clock) -> None:
    module.forward = clock.wrap(name, module.forward)


def bench(
    recipe: Recipe, arguments: Sequence[str] = (), iterations: int = 30, warmup: int = 10
) -> dict[str, Any]:
    """Runs a few iterations of a recipe and says where their time went.

    Returns:
        ``seconds_per_iteration``, shares of forward, backward and optimiser, and ``outside``, the share of everything
        else: data, random numbers, losses, bookkeeping. ``iterations`` should cover whole cycles of the phases.
    """
    from .run import Session, check_data
    from .distributed import start  # isort: skip

    recipe = recipes.override(recipe, arguments)
    with tempfile.TemporaryDirectory() as folder:
        steps = iterations + warmup
        train = replace(recipe.train, steps=steps, sample_every=0, checkpoint_every=0)
        recipe = replace(recipe, output=str(Path(folder) / "run"), train=train)
        session = Session(recipe, *check_data(recipe), start(recipe.train.device))
        trainer, clock = session.trainer, Clock(session.process.device)
        for _ in range(warmup):
            trainer.iterate()
        _time_forward(session.teacher.net, "forward", clock)
        for role in session.roles.values():
            _time_forward(role.module, "forward", clock)
        trainer.backward = clock.wrap("backward", trainer.backward)
        trainer.update = clock.wrap("optimiser", trainer.update)
        begin = clock.now()
        for _ in range(iterations):
            trainer.iterate()
        total = clock.now() - begin
    shares = {name: round(seconds / total, 4) for name, seconds in sorted(clock.seconds.items())}
    return {
        "iterations": iterations,
        "seconds_per_iteration": round(total / iterations, 4),
        "images_per_second": round(recipe.train.batch_size * recipe.train.accumulate * iterations / total, 2),
        **shares,
        "outside": round(1 - sum(clock.seconds.values()) / total, 4),
    }
