"""Updates without a finite gradient: first a sample is left out, then the update, then the run stops or goes back.

Every rank does the same, for what is looked at is the norm of the gradient of them all.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..device import Download
from ..diffusion.rng import Rng
from ..errors import TrainingError
from ..methods.base import Phase
from .means import Means

if TYPE_CHECKING:
    from .trainer import Trainer


class Outcome:
    """Which updates of an iteration were finite; known on the host once the device has got there."""

    def __init__(self, iteration: int = 0, names: tuple[str, ...] = (), flags: Download | None = None):
        self.iteration, self.names, self.flags = iteration, names, flags

    @classmethod
    def of(cls, iteration: int, finite: Mapping[str, Tensor | bool]) -> Outcome:
        flags = [torch.as_tensor(flag) for flag in finite.values()]
        return cls(iteration, tuple(finite), Download(torch.stack(flags)) if flags else None)

    def bad(self) -> list[str]:
        """Phases that were not; waits where the device is not there yet."""
        return [name for name, fine in self.plain()["finite"].items() if not fine]

    def plain(self) -> dict[str, Any]:
        return {
            "iteration": self.iteration,
            "finite": dict(zip(self.names, self.flags.read() if self.flags else ())),
        }


class Divergence:
    """What a trainer does about the updates that its optimisers have skipped.

    Attributes:
        skipped: how often in a row nothing was left of a phase's update. last: outcome of the last iteration, which has
            not been looked at yet.
    """

    MAX_SKIPPED = 10  # in a row before the run gives up

    def __init__(self, trainer: Trainer):
        self.trainer, self.last = trainer, Outcome()
        self.skipped = dict.fromkeys((phase.name for phase in trainer.phases), 0)

    def note(self, iteration: int, finite: Mapping[str, Tensor]) -> None:
        """Takes down what an iteration brought, and looks back at the one before: that is known without waiting.

        Raises:
            TrainingError: nothing of a phase was finite for the :data:`MAX_SKIPPED`-th time in a row.
        """
        before, self.last = self.last, Outcome.of(iteration, finite)
        self._look_back(before)

    def settle(self) -> None:
        """Looks back at the last iteration now; raises as :meth:`note`."""
        before, self.last = self.last, Outcome()
        self._look_back(before)

    def at_the_end(self) -> bool:
        """Whether the next look back may be the one that ends the run."""
        names = {name for name in self.last.names if self.skipped[name] == self.MAX_SKIPPED - 1}
        return bool(names and names & set(self.last.bad()))

    def _look_back(self, outcome: Outcome) -> None:
        bad = outcome.bad()
        self.skipped |= dict.fromkeys(set(outcome.names) - set(bad), 0)
        if not bad:
            return
        trainer = self.trainer
        now, trainer.progress.iteration = trainer.progress.iteration, outcome.iteration
        try:
            for phase in trainer.phases:
                if phase.name in bad:
                    self._count(phase, self.rescue(phase))
        finally:
            trainer.progress.iteration, trainer.finite = now, {}

    def rescue(self, phase: Phase) -> bool:
        """A turn again, one sample at a time, without those whose gradient is not finite.

        Returns:
            Whether anything was left to learn from.
        """
        trainer, step = self.trainer, self.trainer.progress.iteration
        roles = [trainer.roles[name] for name in phase.train]
        for role in trainer.roles.values():
            role.requires_grad_(role in roles)
        weights = [w for role in roles for w in role.weights.values()]
        kept: list[Tensor | None] = [None] * len(weights)
        means, lost, count = Means(), [], 0
        for k, batch in enumerate(trainer.batches(step)):
            for i in range(batch.shape[0]):
                key = (trainer.config.seed, "rescue", step, phase.name, k, i, trainer.process.rank)
                one = batch.row(i, Rng(*key, device=batch.rng.device))
                sums: dict[str, Tensor] = {}
                for before in trainer.phases[
                    : trainer.phases.index(phase)
                ]:  # leave what this phase takes over
                    if before.loss and before.due(trainer.progress):
                        before.loss(one, trainer.progress)
                one.log.clear()
                trainer.add(sums, phase, one, roles, True, 1)
                gradients = [w.grad for w in weights]
                if _finite(gradients):
                    count += 1
                    means.add(sums)
                    kept = [g if k is None else k if g is None else k + g for k, g in zip(kept, gradients)]
                else:
                    odd = [name for name, value in sums.items() if not value.isfinite()]
                    lost.append(f"micro-batch {k} sample {i}" + (f" ({', '.join(odd)})" if odd else ""))
                for role in roles:
                    trainer.optimizers[role.name].zero_grad(set_to_none=True)
        what = f"{len(lost)} of {len(lost) + count} samples left out" if count else "update left out"
        which = f"not finite: {', '.join(lost[:3])}" if lost else "each is finite alone"
        more = f" and {len(lost) - 3} more" if len(lost) > 3 else ""
        trainer.say(f"step {step}: {phase.name}: {what}, {which}{more}")
        dropped = torch.tensor(float(len(lost)), device=trainer.process.device)
        trainer.window.add({**means.means(), f"{phase.name}/dropped": dropped})
        if count:
            for weight, gradient in zip(weights, kept):
                weight.grad = None if gradient is None else gradient / count
            trainer.update(phase, roles)
        return count > 0

    def _count(self, phase: Phase, rescued: bool) -> None:
        self.skipped[phase.name] = 0 if rescued else self.skipped[phase.name] + 1
        if self.skipped[phase.name] >= self.MAX_SKIPPED:
            folder = self.trainer.folder
            where = f"; `fewstep replay {folder}` shows it again" if folder else ""
            raise TrainingError(
                f"step {self.trainer.progress.iteration}: the gradient of {' and '.join(phase.train)} was not finite "
                f"{self.MAX_SKIPPED} times in a row{where}. Resume from the last checkpoint with a lower lr or with "
                "--train.clip_norm 1, or set train.rollbacks"
            )


def _finite(gradients: list[Tensor | None]) -> bool:
    norm = torch.nn.utils.get_total_norm([g for g in gradients if g is not None])
    return bool(torch.isfinite(norm.full_tensor() if hasattr(norm, "full_tensor") else norm))
