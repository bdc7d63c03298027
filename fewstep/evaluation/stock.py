"""The floor's samplers as stock diffusers has them: schedulers, their files, and the arguments of a pipeline's call."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..diffusion.schedules import EDM, Flow, Schedule, noise_table
from ..diffusion.walks import Walk, noise_at
from ..errors import FewstepError
from ..files import replacing, write_json
from ..teachers.pipelines import TELLS_SHIFT, class_of, hands_sigmas, network_of
from ..teachers.schedulers import FLOOR, for_steps, is_edm, is_flow, schedule_of

AYS = {"StableDiffusionPipeline": "StableDiffusion", "StableDiffusionXLPipeline": "StableDiffusionXL"}
RECORD = "floor.json"
FREE_U = {
    "s1": 0.9,
    "s2": 0.2,
    "b1": 1.1,
    "b2": 1.1,
}  # of arXiv 2510.02390, for Stable Diffusion 1.5 and XL alike


def ays_times(pipeline_class: str, schedule: Schedule, num_steps: int) -> list[int]:
    """Align Your Steps (Sabour et al., arXiv 2404.14507): their ten optimised steps, or as many on the same curve.

    For other numbers than ten the noise levels are interpolated log-linearly, as the authors say. Their list ends at
    0.029, the lowest level of Stable Diffusion's table, where diffusers writes 0.

    Raises:
        FewstepError: a pipeline for which there is no table.
    """
    from diffusers.schedulers import AysSchedules

    name = AYS.get(pipeline_class)
    if name is None:
        raise FewstepError(f"solver ays: no table for {pipeline_class}; there are those of {', '.join(AYS)}")
    if num_steps == 10:
        return list(AysSchedules[f"{name}Timesteps"])
    logs = np.log([*AysSchedules[f"{name}Sigmas"][:-1], 0.029])
    wanted = np.interp(np.linspace(0, 10, num_steps + 1)[:-1], np.arange(11), logs)
    times = schedule.t_from_log_snr(torch.from_numpy(-2 * wanted)).clamp(schedule.t_min, schedule.t_max)
    return [round(t) for t in times.tolist()]


def free_u(net: Any, scales: dict[str, float] | None) -> None:
    """Free-U (arXiv 2309.11497) with these scales, or none; nothing for a network that has it not."""
    if hasattr(net, "disable_freeu"):
        net.disable_freeu()
    if scales:
        net.enable_freeu(**scales)


def free_u_of(net: Any) -> dict[str, float] | None:
    """The scales that a network runs with, or None."""
    blocks = getattr(net, "up_blocks", None) or [None]
    scales: dict[str, Any] = {key: getattr(blocks[0], key, None) for key in FREE_U}
    return None if None in scales.values() else scales


def stock_call(schedule: Schedule, walk: Walk) -> dict[str, list[float]]:
    """The walk as its stock pipeline's call takes it; Euler's sigmas say where it ends, too."""
    if isinstance(schedule, (Flow, EDM)):
        return {"sigmas": list(walk.times)}
    if walk.order == 2:
        return {"timesteps": [int(t) for t in walk.times]}
    signal, noise = walk.end(schedule)
    return {"sigmas": [*noise_at(schedule, walk.times), noise / signal]}


def stock_scheduler(scheduler: Any, walk: Walk) -> Any:
    """The stock scheduler that makes exactly the jumps of a walk, given its call.

    Args:
        scheduler: the pipeline's own, whose noise table or flow is taken over.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    if is_edm(scheduler):
        return FLOOR["heun" if walk.heun else {1: "euler", 2: "dpm++"}[walk.order]](scheduler)
    if is_flow(scheduler):  # the nodes are shifted already
        return FlowMatchEulerDiscreteScheduler(scheduler.config.num_train_timesteps, shift=1.0)
    if (
        walk.order == 1
    ):  # with "leading", which its sigmas overrule, Euler scales unit noise to the first node's level
        euler = FLOOR["euler"](scheduler)
        return type(euler).from_config(euler.config, timestep_spacing="leading")
    stock = FLOOR["dpm++"](scheduler)
    if walk.stop is None:
        return stock
    # Its only end above zero is its table's lowest level, so the table is cut at the stop.
    table = noise_table(stock)
    cut = table.clamp(2**-24, walk.end(schedule_of(scheduler))[0] ** 2)
    betas = 1 - cut / torch.cat([torch.ones(1, dtype=cut.dtype), cut[:-1]])
    ends = {"final_sigmas_type": "sigma_min", "lower_order_final": False, "rescale_betas_zero_snr": False}
    return type(stock).from_config(stock.config, trained_betas=betas.tolist(), **ends)


def write_floor(folder: Path, scheduler: Any, record: dict[str, Any]) -> None:
    """Writes ``floor.json``, and ``N-steps/scheduler_config.json`` of each number, which stock diffusers loads."""
    with replacing(folder, record=RECORD) as part:
        for steps, entry in record["schedules"].items():
            walk = Walk(entry["family"], (), entry["order"], entry.get("stop"), heun=entry.get("heun", False))
            stock_scheduler(scheduler, walk).save_pretrained(part / f"{steps}-steps")
        write_json(part / RECORD, record)


def floor_sampler(solver: str, pipe: Any, scheduler: Any, num_steps: int) -> tuple[Any, dict[str, Any]]:
    """A training-free few-step sampler for a stock pipeline.

    Args:
        solver: a name in ``FLOOR``, "ays", or a folder that ``fewstep floor`` wrote.
        pipe: the pipeline; its network is given Free-U where the folder says so. scheduler: its own one, whose noise
            table is taken over.

    Returns:
        The scheduler to set, and the arguments that the call needs beside prompt and guidance.

    Raises:
        FewstepError: no such solver or folder, or a number of steps that was not searched.
    """
    import diffusers

    if solver in FLOOR:
        made = FLOOR[solver](for_steps(scheduler, num_steps))
        if hands_sigmas(pipe):
            made = _handed(made, solver, class_of(pipe))
        elif class_of(pipe) in TELLS_SHIFT and solver != "unipc":
            made = _handed(made, solver, class_of(pipe))
            return made, {"sigmas": np.linspace(1.0, 1 / num_steps, num_steps).tolist()}
        return made, {"num_inference_steps": num_steps}
    if solver == "ays":
        times = ays_times(type(pipe).__name__, schedule_of(scheduler), num_steps)
        return FLOOR["dpm++"](scheduler), {"timesteps": times}
    record = read_floor(solver)
    found = record["schedules"].get(str(num_steps))
    if found is None:
        raise FewstepError(
            f"{solver}: {num_steps} steps were not searched, only {', '.join(record['schedules'])}; run fewstep floor "
            f"with --steps {num_steps}"
        )
    place = Path(solver) / f"{num_steps}-steps"
    config = json.loads((place / "scheduler_config.json").read_text(encoding="utf-8"))
    free_u(network_of(pipe), found.get("free_u"))
    kind = type(scheduler) if is_edm(scheduler) else getattr(diffusers, config["_class_name"])
    return kind.from_pretrained(place), dict(found["call"])


def _handed(scheduler: Any, solver: str, pipeline: str) -> Any:
    """For a pipeline that gives every scheduler a shift, and a grid that is even before it or none."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    config = scheduler.config
    if config.get("use_flow_sigmas") and pipeline == "FluxPipeline":
        # Which hands this one no grid. It takes the pipeline's shift only where it has none of its own.
        return type(scheduler).from_config(config, use_dynamic_shifting=True, time_shift_type="exponential")
    if config.get("use_flow_sigmas") or "sigmas" not in inspect.signature(scheduler.set_timesteps).parameters:
        raise FewstepError(
            f"solver {solver}: {type(scheduler).__name__} takes no sigmas and no shift from a {pipeline}; use another "
            f"of {', '.join(FLOOR)}"
        )
    return FlowMatchEulerDiscreteScheduler(config.num_train_timesteps, shift=config.shift)


def read_floor(folder: str | Path) -> dict[str, Any]:
    """``floor.json`` of a folder; FewstepError if it holds none."""
    path = Path(folder) / RECORD
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["schema"] == 2 and isinstance(record["schedules"], dict):
            return record
        problem = f"schema {record['schema']}"
    except (OSError, ValueError, KeyError, TypeError) as error:
        problem = f"{type(error).__name__}: {error}"
    names = ", ".join((*FLOOR, "ays"))
    raise FewstepError(
        f"solver {folder}: expected one of {names}, or a folder that `fewstep floor` wrote ({problem})"
    )
