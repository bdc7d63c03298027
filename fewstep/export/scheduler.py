"""The stock scheduler that samples as a student was trained, and the call it needs."""

from __future__ import annotations

from typing import Any

import torch

from ..diffusion import schedules
from ..diffusion.times import start_below, uniform_times
from ..errors import RecipeError
from ..teachers.schedulers import is_flow


def student_scheduler(
    teacher_scheduler, times: list[float], noise: str = "fresh", explicit: bool = False, eta: float = 0.0
):
    """A stock scheduler that samples as the student was trained, and the call it needs.

    A flow's are in :func:`flow_scheduler`. Else fresh (and fixed) noise is ``LCMScheduler``;
    ``original_inference_steps`` and the length of the table are set such that ``num_inference_steps=K`` alone gives the
    trained times, and only an uneven grid needs ``timesteps=`` at the call. Deterministic steps are ``DDIMScheduler``,
    "tcd" ones ``TCDScheduler`` on a table without noise at time 0, where its last step ends: with the teacher's own
    table, which a user may put in its place, a sample keeps that noise (0.03 of Stable Diffusion's).

    Args:
        explicit: the call names the times even where they are an even grid, for a student of several numbers of steps,
            whose scheduler's configuration can have the defaults of one only.
        eta: of "tcd", goes into the call.

    Returns:
        (scheduler, call): call holds the arguments of the pipeline's ``__call__`` beside the prompt.

    Raises:
        RecipeError: deterministic steps on an uneven grid, which no stock scheduler takes.
    """
    from diffusers import DDIMScheduler, LCMScheduler, TCDScheduler

    if is_flow(teacher_scheduler):
        if noise == "tcd":
            raise RecipeError(
                "method.noise: tcd: no stock scheduler of a flow has such steps; use ddim or fresh"
            )
        return flow_scheduler(times, noise, teacher_scheduler.config.num_train_timesteps, explicit)
    steps, start = len(times), int(times[0])
    even = (
        (noise == "ddim" or not explicit)
        and (start + 1) % steps == 0
        and list(times) == uniform_times(steps, start)
    )
    length = start + 1 if even else len(teacher_scheduler.alphas_cumprod)
    table = noise_table(teacher_scheduler, length, clean=noise == "tcd") | {
        "prediction_type": teacher_scheduler.config.get("prediction_type", "epsilon"),
        "clip_sample": False,
        "set_alpha_to_one": True,
    }
    call: dict[str, Any] = {"num_inference_steps": steps, "guidance_scale": 0.0}
    if noise == "ddim":
        if not even:
            raise RecipeError(
                f"method.times: {list(times)}: stock schedulers take deterministic steps on an even grid only; use "
                f"num_steps and start, e.g. {uniform_times(steps, start_below(start, steps))}"
            )
        return DDIMScheduler(**table, timestep_spacing="trailing"), call
    table["original_inference_steps"] = steps if even else 50
    if not even:
        call = {"timesteps": [int(t) for t in times], "guidance_scale": 0.0}
    if noise == "tcd":
        return TCDScheduler(**table), {**call, "eta": eta}
    # LCM blends x_t into x0 with a weight of 0.25 / (scaling t)^2; students here are pure x0 predictors.
    return LCMScheduler(**table, timestep_scaling=1e6), call


def noise_table(scheduler, length: int, clean: bool) -> dict[str, Any]:
    """The first entries of a scheduler's table, as the configuration of another one has them.

    Args:
        clean: without the noise at time 0.
    """
    config = scheduler.config
    own = config.get("trained_betas") is not None or bool(config.get("rescale_betas_zero_snr")) or clean
    if length == config.num_train_timesteps and not own:
        names = ("beta_start", "beta_end", "beta_schedule", "num_train_timesteps")
        return {name: config[name] for name in names if name in config}
    cumulative = schedules.noise_table(scheduler)[:length]
    if clean:
        cumulative[0] = 1.0
    ratio = cumulative / torch.cat([torch.ones(1, dtype=torch.float64), cumulative[:-1]])
    return {"trained_betas": (1 - ratio).tolist(), "num_train_timesteps": length}


def flow_scheduler(
    times: list[float], noise: str = "fresh", num_train_timesteps: int = 1000, explicit: bool = False
):
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
    if explicit or max(abs(a - b) for a, b in zip(times, even)) > 1e-6:
        call = {"sigmas": [float(t) for t in times], "guidance_scale": 0.0}
    elif steps > 1:
        options["shift_terminal"] = last
    return cls(**options), call
