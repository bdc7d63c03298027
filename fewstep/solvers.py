"""Sampling a teacher: a deterministic solver of our own, and diffusers' training-free solvers as the floor."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .cond import Cond
from .denoiser import Denoiser, NetDenoiser
from .device import real
from .schedules import Flow, repeated


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

    For a flow this is Euler's method, on a grid that is even before the shift.

    Args:
        noise: unit noise (B, ...). num_steps: network calls, doubled by guidance. start: first time, default t_max.

    Returns:
        x0 (B, ...), the last step's prediction.
    """
    schedule = denoiser.schedule
    start = schedule.t_max if start is None else start
    times = torch.linspace(start, schedule.t_min, num_steps + 1, dtype=torch.float64)
    if isinstance(schedule, Flow):  # even before the shift
        times = schedule.shifted(times / start * schedule.fraction_above(start))
    x, last = noise, times[-1].item()
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
    x = noise

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


@torch.no_grad()
def scheduler_sample(
    denoiser: NetDenoiser, scheduler, noise: Tensor, cond: Cond, num_steps: int, *, guidance: float = 1.0
) -> Tensor:
    """Any deterministic diffusers scheduler around a denoiser: cached conditions, both branches in one batch.

    Args:
        noise: unit noise (B, ...), what a student is given; the scheduler's own scale is applied here.

    Returns:
        x0 (B, ...), fp32.
    """
    scheduler.set_timesteps(num_steps, device=noise.device)
    x = noise * getattr(scheduler, "init_noise_sigma", 1.0)
    for time in scheduler.timesteps:
        t = time.expand(len(x)).to(real(x.device)) / denoiser.schedule.time_scale
        scaled = scheduler.scale_model_input(x, time) if hasattr(scheduler, "scale_model_input") else x
        prediction = denoiser.predict(scaled, t, cond, guidance=guidance)
        x = scheduler.step(prediction, time, x, return_dict=False)[0]
    return x.float()


def _make(name: str, flow: str | None = None, **options) -> Callable:
    """A scheduler of this class on the table of another; ``flow`` is its class for a flow, where that is another."""

    def build(scheduler):
        import diffusers

        from .teachers.base import is_flow, schedule_of

        if is_flow(scheduler):
            flowing: Any = schedule_of(scheduler)
            steps, shift = scheduler.config.num_train_timesteps, flowing.shift
            if flow:
                return getattr(diffusers, flow)(num_train_timesteps=steps, shift=shift)
            path = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": shift}
            return getattr(diffusers, name)(num_train_timesteps=steps, **path, **options)
        # Only what defines the noise table is taken over: defaults of one scheduler are wrong for another
        # (DDIM clips samples unless told not to).
        keys = (
            "num_train_timesteps",
            "beta_start",
            "beta_end",
            "beta_schedule",
            "trained_betas",
            "prediction_type",
        )
        table = {k: scheduler.config[k] for k in keys if scheduler.config.get(k) is not None}
        return getattr(diffusers, name)(**table, timestep_spacing="trailing", **options)

    return build


# Training-free samplers in diffusers; each takes a pipeline's scheduler and gives one on the same noise table or flow.
# FlowMap is Euler on an even grid before the shift; FlowMatchEuler's own grid spends its last step on 0.001.
FLOOR: dict[str, Callable] = {
    "ddim": _make("DDIMScheduler", "FlowMapEulerDiscreteScheduler", clip_sample=False, set_alpha_to_one=True),
    "euler": _make("EulerDiscreteScheduler", "FlowMapEulerDiscreteScheduler"),
    "heun": _make("HeunDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"),
    "dpm++": _make("DPMSolverMultistepScheduler", algorithm_type="dpmsolver++", lower_order_final=True),
    "unipc": _make("UniPCMultistepScheduler"),
}
