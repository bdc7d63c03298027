"""Losses scaled up for fp16, whose small gradients would be zero, by the rule of ``torch.amp.GradScaler``.

A scale for each phase, for each has losses of its own. It halves when a gradient overflows, whose update is skipped,
and doubles after 2,000 updates without; the optimiser sees gradients as they are. All of it stays on the device.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

FIRST, GROWTH, BACKOFF, INTERVAL = 2.0**16, 2.0, 0.5, 2000  # as torch.amp.GradScaler
LEAST = 1.0  # what is not finite at this scale is not the scale's fault


class Scales:
    """Scale and updates since its last change, by phase.

    Args:
        phases: names; none where arithmetic has the range of fp32.
    """

    def __init__(self, phases: Iterable[str], device: torch.device):
        self.of = {
            name: (torch.tensor(FIRST, device=device), torch.tensor(0, dtype=torch.int32, device=device))
            for name in phases
        }

    def up(self, phase: str, loss: Tensor) -> Tensor:
        return loss * self.of[phase][0] if phase in self.of else loss

    def down(self, phase: str, gradients: list[Tensor]) -> None:
        """In place, to what they would be without."""
        if phase in self.of and gradients:
            torch._foreach_mul_(gradients, self.of[phase][0].reciprocal())

    def judge(self, phase: str, finite: Tensor) -> Tensor:
        """Changes the scale by whether an update's gradients were finite.

        Returns:
            Whether the update is nothing to worry about: finite, or too large for this scale only.
        """
        if phase not in self.of:
            return finite
        scale, tracker = self.of[phase]
        fine = finite | (scale > LEAST)
        more = scale * GROWTH
        due = finite & (tracker + 1 >= INTERVAL)
        scale.copy_(torch.where(finite, torch.where(due & more.isfinite(), more, scale), scale * BACKOFF))
        tracker.copy_(torch.where(finite & ~due, tracker + 1, 0))
        return fine

    def plain(self) -> dict[str, list[float]]:
        return {name: [scale.item(), tracker.item()] for name, (scale, tracker) in self.of.items()}

    def restore(self, plain: Mapping[str, Any]) -> None:
        """Of a checkpoint; one from before there were scales has none."""
        for name, (scale, tracker) in self.of.items():
            if name in plain:
                scale.fill_(plain[name][0])
                tracker.fill_(int(plain[name][1]))
