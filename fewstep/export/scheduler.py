"""The stock scheduler that samples as a student was trained, and the call it needs."""

from __future__ import annotations

from typing import Any

import torch

from ..errors import RecipeError
from ..student import uniform_times
from ..teachers.base import is_flow


def student_scheduler(teacher_scheduler, times: list[float], noise: str = "fresh"):
    """A stock scheduler that samples as the student was trained, and the call it needs.

    A flow's are in :func:`flow_scheduler`. Else fresh (and fixed) noise is ``LCMScheduler``;
    ``original_inference_steps`` and the length of the table are set such that ``num_inference_steps=K`` alone gives the
    trained times, and only an uneven grid needs ``timesteps=`` at the call. Deterministic steps are ``DDIMScheduler``.

    Returns:
        (scheduler, call): call holds the arguments of the pipeline's ``__call__`` beside the prompt.

    Raises:
        RecipeError: deterministic steps on an uneven grid, which no stock scheduler takes.
    """
    from diffusers import DDIMScheduler, LCMScheduler

    if is_flow(teacher_scheduler):
        return flow_scheduler(times, noise, teacher_scheduler.config.num_train_timesteps)
    config = teacher_scheduler.config
    steps, start = len(times), int(times[0])
    even = (start + 1) % steps == 0 and list(times) == uniform_times(steps, start)
    table: dict[str, Any] = {
        key: config[key]
        for key in ("beta_start", "beta_end", "beta_schedule", "num_train_timesteps")
        if key in config
    }
    length = start + 1 if even else len(teacher_scheduler.alphas_cumprod)
    if length != config.num_train_timesteps or config.get("trained_betas") is not None or _rescaled(config):
        cumulative = teacher_scheduler.alphas_cumprod.double()[:length]
        ratio = cumulative / torch.cat([torch.ones(1, dtype=torch.float64), cumulative[:-1]])
        table = {"trained_betas": (1 - ratio).tolist(), "num_train_timesteps": length}
    table |= {
        "prediction_type": config.get("prediction_type", "epsilon"),
        "clip_sample": False,
        "set_alpha_to_one": True,
    }
    call: dict[str, Any] = {"num_inference_steps": steps, "guidance_scale": 0.0}
    if noise == "ddim":
        if not even:
            raise RecipeError(
                f"method.times: {list(times)}: stock schedulers take deterministic steps on an even grid only; use "
                f"num_steps and start, e.g. {uniform_times(steps, steps * max(1, round(start / steps)) - 1)}"
            )
        return DDIMScheduler(**table, timestep_spacing="trailing"), call
    scheduler = LCMScheduler(
        **table,
        original_inference_steps=steps if even else 50,
        # LCM blends x_t into x0 with a weight of 0.25 / (scaling t)^2; students here are pure x0 predictors.
        timestep_scaling=1e6,
    )
    if not even:
        call = {"timesteps": [int(t) for t in times], "guidance_scale": 0.0}
    return scheduler, call


def flow_scheduler(times: list[float], noise: str = "fresh", num_train_timesteps: int = 1000):
    """``FlowMatchLCMScheduler`` adds fresh (or fixed) noise, ``FlowMatchEulerDiscreteScheduler`` steps straight.

    Both would spread K steps evenly from 1 to 0.001 and shift them twice, so the last one is wasted. Here the shift is
    1, and ``shift_terminal``, the last time, stretches their grid: one step from 1, two, or any even grid from 1 come
    with ``num_inference_steps=K`` alone. Other times go in as ``sigmas=`` at the call.

    Args:
        times: (K,) in (0, 1].
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchLCMScheduler

    cls = FlowMatchEulerDiscreteScheduler if noise == "ddim" else FlowMatchLCMScheduler
    steps, last = len(times), float(times[-1])
    even = [1 - (1 - last) * k / max(1, steps - 1) for k in range(steps)]
    options: dict[str, Any] = {"num_train_timesteps": num_train_timesteps, "shift": 1.0}
    call: dict[str, Any] = {"num_inference_steps": steps, "guidance_scale": 0.0}
    if max(abs(a - b) for a, b in zip(times, even)) > 1e-6:
        call = {"sigmas": [float(t) for t in times], "guidance_scale": 0.0}
    elif steps > 1:
        options["shift_terminal"] = last
    return cls(**options), call


def _rescaled(config) -> bool:
    return bool(config.get("rescale_betas_zero_snr"))
