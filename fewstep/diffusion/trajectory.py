"""Steps along a teacher's trajectories: bootstrapped signals (BOOT) and jumps within segments (Hyper-SD, PCM, TCD)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..device import real
from .schedules import Schedule, expand, repeated


def terminal_signal(noise: Tensor, schedule: Schedule) -> Tensor:
    """The signal y for which ``alpha y + sigma eps`` at t_max is what samplers begin with, mostly the noise eps itself.

    Then it is ``(1 - sigma)/alpha eps``: the schedules of SD and SDXL end at a non-zero SNR (alpha 0.068). On EDM's
    path it is 0.

    Args:
        noise: eps (B, ...).
    """
    t = repeated(schedule.t_max, noise)
    return expand((schedule.first_scale(t) - schedule.sigma(t)) / schedule.alpha(t), noise) * noise


def signal_gain(schedule: Schedule, t: Tensor, s: Tensor) -> Tensor:
    """How far one DDIM step from t to s < t moves the signal towards the prediction, (B,) float64 in (0, 1].

    ``1 - exp(lambda_t - lambda_s) = 1 - alpha_t sigma_s / (alpha_s sigma_t)``, lambda half the log-SNR; 1 where s is
    the clean sample. BOOT (arXiv 2306.05544) writes its first-order expansion in t - s.
    """
    return 1 - schedule.alpha(t) * schedule.sigma(s) / (schedule.alpha(s) * schedule.sigma(t))


def signal_step(signal: Tensor, x0: Tensor, gain: Tensor) -> Tensor:
    """``y_s = y_t + gain (f - y_t)``: exactly the DDIM step of ``x_t = alpha y_t + sigma eps`` with prediction f.

    Args:
        signal: y_t (B, ...). x0: the teacher's prediction at x_t. gain: (B,), see :func:`signal_gain`.
    """
    return torch.lerp(signal, x0, expand(gain, signal))


def segment_start(n: Tensor, nodes: int, segments: int) -> Tensor:
    """Fraction (B,) at which the segment of node n of ``nodes`` begins; n in 1..nodes counts from the clean end.

    Always below ``n / nodes``: a node on a boundary belongs to the segment under it. The floor of Hyper-SD (arXiv
    2404.13686, alg. 1) gives such a node, 875, 500 or 125 of 1000 with 8 segments, an empty segment.
    """
    above = torch.div(n.long() * segments + nodes - 1, nodes, rounding_mode="floor")  # ceil in integers
    return (above - 1).to(real(n.device)) / segments


def jump(schedule: Schedule, x_t: Tensor, x0: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """One deterministic jump from t down to s with a prediction of x0; of zero length it is x_t itself.

    Hyper-SD's Psi (arXiv 2404.13686, eq. 1): DDIM, for a flow Euler's step.
    """
    there = expand(t == s, x_t).bool()
    # Where t is the clean end the step divides by sigma = 0.
    return torch.where(there, x_t, schedule.ddim_step(x_t, x0, torch.where(t == s, schedule.t_max, t), s))


def pseudo_huber(made: Tensor, goal: Tensor, c: float = 1e-3) -> Tensor:
    """Mean of ``sqrt((made - goal)^2 + c^2) - c`` over all entries (PCM, arXiv 2405.18407: c = 0.001)."""
    return (((made - goal) ** 2 + c**2).sqrt() - c).mean()
