"""EDM2's network made smooth in time, for continuous-time consistency (sCM, arXiv 2410.11081, section 4.1)."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F

from .networks import EDM2Precond


def smoothed(
    net: EDM2Precond, turns: float, pixel_norm: bool, sigmas: tuple[float, float], steps: int = 500
) -> tuple[EDM2Precond, int]:
    """The same weights in a network that is told TrigFlow's angle by slow features, its layer on them fitted anew.

    EDM2 has no group norm, and its queries, keys and weights are normalised as they are: what else the paper changes is
    the norm of a modulation.

    Args:
        turns, pixel_norm: see :class:`EDM2Precond`. sigmas: least and largest, over which the layer is fitted, evenly
            in their logarithm. steps: of the fit.

    Returns:
        The network, fp32, and how many features turned more often over these sigmas before.
    """
    made: Any = EDM2Precond.from_config({**net.config, "turns": turns, "pixel_norm": pixel_norm})
    slow = {f"unet.emb_fourier.{name}": value for name, value in made.unet.emb_fourier.named_buffers()}
    made.load_state_dict({**net.state_dict(), **slow})
    made = made.to(next(net.parameters()).device).float().train(net.training)
    low, high = (math.log(sigma) for sigma in sigmas)
    sigma = torch.linspace(low, high, 1000, device=made.device).exp()
    with torch.no_grad():
        target = net.unet.emb_noise(net.unet.emb_fourier(net.time_of(sigma)))
    features, layer = made.unet.emb_fourier(made.time_of(sigma)), made.unet.emb_noise
    layer.requires_grad_(True)
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
    for i in range(steps):
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - i / steps)
        optimizer.zero_grad()
        F.mse_loss(layer(features), target).backward()
        optimizer.step()
    optimizer.zero_grad()
    span = (net.time_of(sigma[-1:]) - net.time_of(sigma[:1])).abs()
    return made, int((net.unet.emb_fourier.freqs.abs() * span / (2 * math.pi) > turns).sum())
