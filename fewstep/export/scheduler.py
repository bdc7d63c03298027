"""The stock scheduler that samples as a student was trained, and the call it needs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..diffusion import schedules
from ..diffusion.times import start_below, uniform_times
from ..errors import RecipeError
from ..teachers.schedulers import is_edm, is_flow


def student_scheduler(
    teacher_scheduler,
    times: list[float],
    noise: str = "fresh",
    explicit: bool = False,
    eta: float = 0.0,
    handed: bool = False,
    grids: Sequence[Sequence[float]] = (),
):
    """A stock scheduler that samples as the student was trained, and the call it needs.

    A flow's are in :func:`flow_scheduler`, an EDM pipeline's is its own. Else fresh (and fixed) noise is
    ``LCMScheduler``; ``original_inference_steps`` and the length of the table are set such that
    ``num_inference_steps=K`` alone gives the trained times, and only an uneven grid needs ``timesteps=`` at the
    call. Deterministic steps are ``DDIMScheduler``, "tcd" ones ``TCDScheduler`` on a table without noise at time 0,
    where its last step ends: with the teacher's own table, which a user may put in its place, a sample keeps that
    noise (0.03 of Stable Diffusion's).

    Args:
        explicit: the call names the times even where they are an even grid, for a student of several numbers of steps,
            whose scheduler's configuration can have the defaults of one only.
        eta: of "tcd", goes into the call. handed: see :func:`fewstep.teachers.pipelines.hands_sigmas`.
        grids: the times at other numbers of steps, of which an EDM pipeline's keeps all.

    Returns:
        (scheduler, call): call holds the arguments of the pipeline's ``__call__`` beside the prompt.

    Raises:
        RecipeError: deterministic steps on an uneven grid, which no stock scheduler takes.
    """
    if is_edm(teacher_scheduler):
        return _edm_scheduler(teacher_scheduler, [times, *grids], noise)
    if is_flow(teacher_scheduler):
        if noise == "tcd":
            raise RecipeError(
                "method.noise: tcd: no stock scheduler of a flow has such steps; use ddim or fresh"
            )
        return flow_scheduler(times, noise, teacher_scheduler.config, explicit, handed)
    return _table_scheduler(teacher_scheduler, times, noise, explicit, eta)


def _edm_scheduler(teacher_scheduler: Any, grids: Sequence[Sequence[float]], noise: str):
    """As :func:`student_scheduler`, for an EDM pipeline."""
    if noise == "tcd":
        raise RecipeError("method.noise: tcd: an EDM pipeline has no such steps; use ddim or fresh")
    options = {"solver": "euler" if noise == "ddim" else "fresh", "sigmas": [list(grid) for grid in grids]}
    call = {"num_inference_steps": len(grids[0]), "guidance_scale": 0.0}
    return type(teacher_scheduler).from_config(teacher_scheduler.config, **options), call


def _table_scheduler(teacher_scheduler: Any, times: list[float], noise: str, explicit: bool, eta: float):
    """As :func:`student_scheduler`, on a table."""
    from diffusers import DDIMScheduler, LCMScheduler, TCDScheduler

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


def flow_scheduler(times: list[float], noise: str, config: Any, explicit: bool = False, handed: bool = False):
    """``FlowMatchLCMScheduler`` adds fresh (or fixed) noise, ``FlowMatchEulerDiscreteScheduler`` steps straight.

    Where :func:`_flow_options` has the times, ``num_inference_steps=K`` alone gives them; others go in as ``sigmas=``.

    Args:
        times: (K,) in (0, 1]. config: of the teacher's scheduler.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchLCMScheduler

    cls = FlowMatchEulerDiscreteScheduler if noise == "ddim" else FlowMatchLCMScheduler
    length = config.num_train_timesteps
    guided = {"guidance_scale": 0.0}
    for options in [] if explicit else _flow_options(times, length, config.get("shift", 1.0), handed):
        scheduler = cls(num_train_timesteps=length, **options)
        if meets(scheduler, times, handed):
            return scheduler, {"num_inference_steps": len(times), **guided}
    plain = cls(num_train_timesteps=length, shift=1.0)
    return plain, {"sigmas": [float(t) for t in times], **guided}


def _flow_options(times: Sequence[float], length: int, shift: float, handed: bool) -> list[dict[str, float]]:
    """Shift and end of a flow scheduler whose own grid of K steps may be these times; best first.

    Its grid is even, from 1 to ``1 / K`` where the pipeline hands it one, else to its own smallest sigma, about
    ``shift / length``, so that the last of K steps would be wasted. It is shifted by s, then stretched from 1 such that
    ``shift_terminal`` is its end. With c the stride of the even grid and z = 1 - t that makes
    ``1 / z_k = (s / c k - (s - 1)) / A`` for some A: a line in 1 / k, whose intercept over slope gives s. An even grid
    from 1 has none; even steps before a shift have one, and so has the shift itself where the pipeline's grid ends at
    1 / K.

    Args:
        times: (K,). length: of the table. shift: the teacher's.
    """
    steps, last = len(times), float(times[-1])
    if steps == 1:
        return [*([{"shift": shift}] if handed else []), {"shift": 1.0}]
    own = last * (steps - 1) / (1 - last)  # of an even grid that ends at 1 / K before it
    # Nothing to stretch: any other number of steps has it too.
    found = [{"shift": s} for s in (shift, own)] if handed and own > 0 else []
    found.append({"shift": 1.0, "shift_terminal": last})
    if steps == 2 or times[0] != 1:
        return found
    first, final = 1 / (1 - times[1]), 1 / (1 - last)
    slope = (first - final) / (1 - 1 / (steps - 1))
    bent = 1 - first / slope if slope else math.inf  # c (s - 1) / s
    if handed:
        shift = 1 / (1 - bent * steps) if bent * steps < 1 else 0.0
    else:  # c = (1 - smallest) / (K - 1) depends on s itself, smallest = s / (length + s - 1)
        room, total = 1 - bent * (steps - 1), length - 1
        root = (room * total) ** 2 - 4 * (1 - room) * total
        shift = 2 * total / (room * total + math.sqrt(root)) if room > 0 and root > 0 else 0.0
    return [*found, {"shift": shift, "shift_terminal": last}] if shift > 0 else found


def meets(scheduler: Any, times: Sequence[float], handed: bool = False) -> bool:
    """Whether a stock pipeline that is told nothing but the number of steps calls its network at these times.

    Args:
        times: (K,), integers of a table or in (0, 1] of a flow. handed: as in :func:`student_scheduler`.
    """
    made = own_times(scheduler, len(times), handed)
    return len(made) == len(times) and max(abs(a - b) for a, b in zip(made, times)) < 1e-6


def own_times(scheduler: Any, steps: int, handed: bool = False) -> list[float]:
    """Where a stock pipeline calls its network that is told nothing but the number of steps, as in :func:`meets`.

    None where the configuration has not so many steps.
    """
    try:
        if is_flow(scheduler) and handed:
            scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps))
        else:
            scheduler.set_timesteps(steps)
    except ValueError:
        return []
    scale = scheduler.config.num_train_timesteps if is_flow(scheduler) else 1
    return [float(t) / scale for t in scheduler.timesteps]
