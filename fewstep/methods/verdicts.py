"""How well a discriminator tells real from fake, behind how much noise: numbers for the log."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor

from ..diffusion.schedules import Schedule

BANDS = 4  # of noise
WEIGHT = (
    "weight of "  # in the name of a logged number: the sum of weights that the number itself is divided by
)
Value = TypeVar("Value", float, Tensor)


def verdicts(
    schedule: Schedule, real: tuple[Tensor, Tensor], fake: tuple[Tensor, Tensor], ratios: bool = True
) -> dict[str, Tensor]:
    """``discriminator_accuracy_k`` and ``density_ratio_k`` in quarter k of the noise.

    The accuracy is the share of right verdicts, 1/2 at chance. The ratio is the mean of ``exp(logit)`` over fakes: 1
    where the logit is the logarithm of real over fake density (Goodfellow et al. 2014, arXiv 1406.2661, prop. 1), and
    near 0 where the discriminator has won. Quarters are of the angle ``atan2(sigma, alpha)``, the cleanest first: sigma
    is up to 0.41, 1, 2.41 alphas, and more.

    Args:
        schedule: of the times. real, fake: logits (B, n), of whose heads or places the mean counts, and times (B,).
        ratios: of a discriminator by cross-entropies; a hinge's logits are no ratios.
    """
    logits = torch.cat([real[0], fake[0]]).detach().float().mean(1)
    t = torch.cat([real[1], fake[1]])
    is_fake = torch.arange(len(t), device=t.device) >= len(real[1])
    angle = torch.atan2(schedule.sigma(t), schedule.alpha(t)).float()
    bands = (angle * (2 * BANDS / math.pi)).long().clamp(max=BANDS - 1)
    right = torch.where(logits == 0, 0.5, ((logits < 0) == is_fake).float())
    known = torch.isfinite(logits)
    found: dict[str, Tensor] = {}
    for k in range(BANDS):
        here = known & (bands == k)
        found |= weighted(f"discriminator_accuracy_{k + 1}", right, here)
        if ratios:
            found |= weighted(f"density_ratio_{k + 1}", logits.clamp(max=10.0).exp(), here & is_fake)
    return found


def weighted(name: str, values: Tensor, chosen: Tensor) -> dict[str, Tensor]:
    """For the log: the mean of values (B,) over chosen rows (B,), of all batches together and not of each."""
    return {name: torch.where(chosen, values, 0.0).sum(), WEIGHT + name: chosen.to(values).sum()}


def weight_of(name: str) -> str:
    """The name of the weight that goes with a logged number, if it has one."""
    group, slash, rest = name.rpartition("/")
    return f"{group}{slash}{WEIGHT}{rest}"


def settled(numbers: Mapping[str, Value]) -> dict[str, Value]:
    """What was logged, with weighted numbers divided by their weights and left out where nothing was weighed."""
    plain = {name: value for name, value in numbers.items() if WEIGHT not in name}
    weights = {name: numbers.get(weight_of(name), 1.0) for name in plain}
    return {name: value / weights[name] for name, value in plain.items() if weights[name] != 0}
