"""Sampling a teacher: deterministic solvers of our own."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from ..device import real
from .cond import Cond
from .denoiser import Denoiser
from .schedules import EDM, Flow, repeated


@torch.no_grad()
def ddim(
    denoiser: Denoiser,
    noise: Tensor,
    cond: Cond,
    num_steps: int,
    *,
    guidance: float = 1.0,
    start: float | None = None,
) -> Tensor:
    """Probability-flow ODE by first-order exponential steps on an even grid of times (DDIM, arXiv 2010.02502).

    For a flow this is Euler's method, on a grid that is even before the shift; EDM's grid is its own (rho 7).

    Args:
        noise: unit noise (B, ...). num_steps: network calls, doubled by guidance. start: first time, default t_max.

    Returns:
        x0 (B, ...), the last step's prediction.
    """
    schedule = denoiser.schedule.for_steps(num_steps)
    start = schedule.t_max if start is None else start
    times = torch.linspace(start, schedule.t_min, num_steps + 1, dtype=torch.float64)
    if isinstance(schedule, Flow):  # even before the shift
        times = schedule.shifted(times / start * schedule.fraction_above(start))
    elif isinstance(schedule, EDM):  # even steps of sigma would leave the image to the last of them
        times = schedule.draw_times(torch.linspace(schedule.fraction_above(start), 0, num_steps + 1).double())
        times[0], times[-1] = start, schedule.t_min
    x, last = schedule.begin(noise, times[:1]), times[-1].item()
    for now, following in pairwise(times.tolist()):
        t, s = repeated(now, x), repeated(following, x)
        x0 = denoiser.x0(x, t, cond, guidance=guidance)
        x = x0 if following == last else schedule.ddim_step(x, x0, t, s)
    return x


@torch.no_grad()
def ode(
    denoiser: Denoiser,
    noise: Tensor,
    cond: Cond,
    num_steps: int,
    *,
    solver: str = "midpoint",
    end: float,
    guidance: float = 1.0,
) -> Tensor:
    """The probability-flow ODE from ``t_max`` to ``end`` on an even grid of times: x at ``end``, not a prediction.

    Args:
        noise: unit noise (B, ...). solver: "euler" (one prediction a step), "midpoint" or "heun" (two).
        end: above ``t_min``, and above every time at which the network cannot be called.
    """
    schedule = denoiser.schedule
    times = torch.linspace(schedule.t_max, end, num_steps + 1, dtype=real(noise.device), device=noise.device)
    x = schedule.begin(noise, times[:1])

    def slope(x: Tensor, t: Tensor) -> Tensor:
        return schedule.convert(denoiser.x0(x, t, cond, guidance=guidance), x, t, "x0", "flow")

    for t, s in zip(times[:-1].repeat(len(x), 1).T, times[1:].repeat(len(x), 1).T):
        step = (s[0] - t[0]).to(x)
        first = slope(x, t)
        if solver == "midpoint":
            first = slope(x + step / 2 * first, (t + s) / 2)
        elif solver == "heun":
            first = (first + slope(x + step * first, s)) / 2
        elif solver != "euler":
            raise ValueError(f"solver {solver!r}: expected euler, midpoint or heun")
        x = x + step * first
    return x
