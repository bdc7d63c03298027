"""Means of what a run logs, without waiting for the device."""

from __future__ import annotations

import torch
from torch import Tensor

from ..process import Process


class Means:
    """Means of named numbers over the iterations that have them; they stay on the device until they are read."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}

    def add(self, numbers: dict[str, Tensor]) -> None:
        values = {name: value.detach().float() for name, value in numbers.items()}
        known = [name for name in values if name in self.sums]
        if known:
            torch._foreach_add_([self.sums[name] for name in known], [values[name] for name in known])
        for name, value in values.items():
            if name not in self.sums:
                self.sums[name] = value.clone()
            self.counts[name] = self.counts.get(name, 0) + 1

    def means(self) -> dict[str, Tensor]:
        return {name: value / self.counts[name] for name, value in self.sums.items()}

    def floats(self, process: Process) -> dict[str, list[float]]:
        """Sums, averaged over the ranks, and counts, for JSON; a collective."""
        names = sorted(self.sums)
        sums = process.mean(torch.stack([self.sums[name] for name in names])).tolist() if names else []
        return {name: [value, self.counts[name]] for name, value in zip(names, sums)}

    @classmethod
    def of(cls, floats: dict[str, list[float]], device: torch.device) -> Means:
        means = cls()
        means.sums = {name: torch.tensor(value, device=device) for name, (value, _) in floats.items()}
        means.counts = {name: int(count) for name, (_, count) in floats.items()}
        return means
