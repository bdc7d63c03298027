"""Updates without a finite gradient: first a sample is left out, then the update, then the run stops or goes back.

Every rank does the same, for what is looked at is the norm of the gradient of them all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..device import Download
from ..methods.base import Phase

Failed = tuple[int, Phase]  # iteration and phase of the update with which a run gives up


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
    """What becomes of the updates that optimisers have skipped.

    Attributes:
        skipped: how often in a row nothing was left of a phase's update. last: outcome of the last iteration, which has
            not been looked at yet.

    Args:
        phases: of the run. again: takes the turn of an iteration and a phase again, without what is not finite, and
            says whether anything was left.
    """

    MAX_SKIPPED = 10  # in a row before the run gives up

    def __init__(self, phases: Sequence[Phase], again: Callable[[int, Phase], bool]):
        self.phases, self.again, self.last = phases, again, Outcome()
        self.skipped = dict.fromkeys((phase.name for phase in phases), 0)

    def note(self, iteration: int, finite: Mapping[str, Tensor]) -> Failed | None:
        """Takes down what an iteration brought, and looks back at the one before: that is known without waiting.

        Returns:
            Where the run has to give up: nothing of a phase was finite for the :data:`MAX_SKIPPED`-th time in a row.
        """
        before, self.last = self.last, Outcome.of(iteration, finite)
        return self._look_back(before)

    def settle(self) -> Failed | None:
        """Looks back at the last iteration now; returns as :meth:`note`."""
        before, self.last = self.last, Outcome()
        return self._look_back(before)

    def at_the_end(self) -> bool:
        """Whether the next look back may be the one that ends the run."""
        names = {name for name in self.last.names if self.skipped[name] == self.MAX_SKIPPED - 1}
        return bool(names and names & set(self.last.bad()))

    def _look_back(self, outcome: Outcome) -> Failed | None:
        bad = outcome.bad()
        self.skipped |= dict.fromkeys(set(outcome.names) - set(bad), 0)
        for phase in self.phases:
            if phase.name in bad:
                left = self.again(outcome.iteration, phase)
                self.skipped[phase.name] = 0 if left else self.skipped[phase.name] + 1
                if self.skipped[phase.name] >= self.MAX_SKIPPED:
                    return outcome.iteration, phase
        return None
