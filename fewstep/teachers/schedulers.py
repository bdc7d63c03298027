"""Schedulers of diffusers: the noise path of one, and its training-free solvers, which are the floor."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..device import real
from ..diffusion.cond import Cond
from ..diffusion.denoiser import NetDenoiser
from ..diffusion.schedules import EDM, VP, Flow, Schedule, noise_table
from ..errors import FewstepError

BY_STEPS = "shift_by_steps"  # of a scheduler whose shift was fixed: what it is for a number of steps, where they differ
PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0", "flow_prediction": "flow"}


def is_flow(scheduler: Any) -> bool:
    """Asked before any noise table: a DPM-Solver of a flow holds a table too, which means nothing."""
    if type(scheduler).__name__.startswith(("FlowM", "SCM")):
        return True
    return getattr(scheduler, "config", {}).get("prediction_type") == "flow_prediction"


def is_edm(scheduler: Any) -> bool:
    """Whether it is an EDM pipeline's own, by name: its class costs an import of diffusers."""
    return type(scheduler).__name__ == "EDMScheduler"


def schedule_of(scheduler: Any) -> Schedule:
    """The noise path of a diffusers scheduler; a flow's shift is the scheduler's.

    Raises:
        FewstepError: a shift that depends on the size of the image, or a path of another kind (EDM's, tokens').
    """
    config = scheduler.config
    if is_edm(scheduler):
        return EDM(config.sigma_min, config.sigma_max)
    if not is_flow(scheduler):
        return VP.from_scheduler(scheduler)
    if config.get("use_dynamic_shifting"):
        raise FewstepError(
            f"{type(scheduler).__name__}: use_dynamic_shifting: true: expected a fixed shift; set it false and shift "
            "to the value for your resolution (SD3: 3) in scheduler/scheduler_config.json"
        )
    shift = config.get("shift", config.get("flow_shift", 1.0))
    return Flow(shift, config.num_train_timesteps, getattr(scheduler, BY_STEPS, None))


def for_steps(scheduler: Any, num_steps: int) -> Any:
    """The scheduler that a stock call of so many steps has: itself, or one of the shift of these steps."""
    by_steps = getattr(scheduler, BY_STEPS, None)
    return scheduler if by_steps is None else shifted(scheduler, by_steps(num_steps))


def shifted(scheduler: Any, shift: float) -> Any:
    """The same with a shift for good, whatever it is told in a call."""
    return type(scheduler).from_config(scheduler.config, use_dynamic_shifting=False, shift=shift)


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


def _make(name: str, flow: str | None = None, edm: str | None = None, **options) -> Callable:
    """A scheduler of this class on the table of another.

    Args:
        flow: its class for a flow, where that is another. edm: what an EDM pipeline's scheduler calls it.
    """

    def build(scheduler):
        import diffusers

        if is_edm(scheduler):
            return _of_edm(scheduler, name, edm)
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
        cls = getattr(diffusers, name)
        if scheduler.config.get("rescale_betas_zero_snr"):
            table |= _rescaled(cls, scheduler)
        return cls(**table, timestep_spacing="trailing", **options)

    return build


def _of_edm(scheduler: Any, name: str, solver: str | None) -> Any:
    if solver is None:
        raise FewstepError(f"{name}: no solver of an EDM pipeline; expected ddim, euler, heun or dpm++")
    return type(scheduler).from_config(scheduler.config, solver=solver, sigmas=None)


def _rescaled(cls: type, scheduler: Any) -> dict[str, Any]:
    """A table of zero terminal SNR for a class that rescales it by itself, or else with 2^-24 at its end (Heun)."""
    if "rescale_betas_zero_snr" in inspect.signature(cls).parameters:
        return {"rescale_betas_zero_snr": True}
    table = noise_table(scheduler).clamp(min=2**-24)
    ratio = table / torch.cat([torch.ones(1, dtype=torch.float64), table[:-1]])
    return {"trained_betas": (1 - ratio).tolist()}


# Training-free samplers in diffusers; each takes a pipeline's scheduler and gives one on the same noise table or flow.
# FlowMap is Euler on an even grid before the shift; FlowMatchEuler's own grid spends its last step on 0.001.
FLOOR: dict[str, Callable] = {
    "ddim": _make(
        "DDIMScheduler", "FlowMapEulerDiscreteScheduler", "euler", clip_sample=False, set_alpha_to_one=True
    ),
    "euler": _make("EulerDiscreteScheduler", "FlowMapEulerDiscreteScheduler", "euler"),
    "heun": _make("HeunDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "heun"),
    "dpm++": _make(
        "DPMSolverMultistepScheduler", edm="dpm++", algorithm_type="dpmsolver++", lower_order_final=True
    ),
    "unipc": _make("UniPCMultistepScheduler"),
}
