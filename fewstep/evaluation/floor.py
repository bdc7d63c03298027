"""The training-free floor: what a teacher does in few steps with the best schedule that a search finds.

A student has to beat it at equal network calls. Reference paths of many steps are recorded once; then dynamic
programming chooses the nodes whose jumps stay nearest to them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..diffusion.cond import Cond
from ..diffusion.few_steps import Paths, best_nodes, node_weights, reference_times, sample
from ..diffusion.rng import Rng
from ..diffusion.schedules import Flow, Schedule
from ..errors import FewstepError
from ..files import write_json
from ..teachers.schedulers import FLOOR

ORDERS = {"euler": 1, "dpm++": 2}  # of the jumps: Euler's is DDIM's on a variance-preserving path
AYS = {"StableDiffusionPipeline": "StableDiffusion", "StableDiffusionXLPipeline": "StableDiffusionXL"}
RECORD = "floor.json"


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


# --------------------------------------------------------------------------------------------------- with a teacher
def calibrate(
    teacher,
    prompts: Sequence[str],
    steps: Sequence[int],
    *,
    guidance: float,
    num: int = 64,
    reference_steps: int = 50,
    solver: str | None = None,
    seed: int = 0,
    batch_size: int = 16,
) -> dict[str, Any]:
    """Searches a teacher's best schedule for each number of steps.

    Dynamic programming on the recorded paths gives a few candidates (:func:`node_weights`); of these and the even
    grid, the one is taken whose samples are nearest to the reference's on the same paths.

    Args:
        teacher: a :class:`~fewstep.teachers.base.Teacher`. prompts: some are chosen for the paths.
        steps: numbers of steps. guidance: of paths and samples, 1 for none.
        num: recorded paths; a quarter as many more are made to measure the result.
        reference_steps: of a path, which are also the candidates for nodes.
        solver: "dpm++" (default where the path has a noise table) or "euler" (the only one for a flow).

    Returns:
        What ``floor.json`` holds. ``schedules``: for each number of steps the nodes as ``timesteps`` or ``sigmas`` of
        a stock pipeline's call, and ``error``: root mean square distance to the reference's samples from the same
        noise, on paths that were not searched, with these nodes (``searched``) and others.

    Raises:
        FewstepError: numbers out of range, or a solver that the teacher's path cannot have.
    """
    if teacher.kind != "diffusion":
        raise FewstepError(f"{teacher.source}: a {teacher.kind} teacher has no noise schedule to search")
    denoiser, schedule = teacher.denoiser, teacher.denoiser.schedule
    flow = isinstance(schedule, Flow)
    solver = solver or ("euler" if flow else "dpm++")
    _check(steps, num, reference_steps, solver, flow)
    order, times = ORDERS[solver], reference_times(schedule, reference_steps)
    rows = num + max(4, num // 4)
    shuffled = Rng(seed, "floor").permutation(len(prompts)).tolist()
    chosen = [prompts[shuffled[i % len(prompts)]] for i in range(rows)]
    noise = Rng(seed, "floor noise").normal(rows, *teacher.latent_shape)
    paths = Paths.none(times)
    searched: list[tuple[Tensor, Cond, Tensor]] = []
    fresh: list[tuple[Tensor, Cond, Tensor]] = []
    for start in (*range(0, num, batch_size), *range(num, rows, batch_size)):
        part = slice(start, min(start + batch_size, num if start < num else rows))
        z, cond = noise[part].to(teacher.device), teacher.encode(chosen[part]).to(teacher.device)
        found = sample(denoiser, z, cond, times, order=order, guidance=guidance)
        if start < num:
            paths.add(*found)
        (searched if start < num else fresh).append((z, cond, found[2]))

    if not paths.gram.isfinite().all():
        raise FewstepError("the reference's paths are not finite: try --dtype float32, or another --guidance")

    def error(nodes: Sequence[float], batches: list[tuple[Tensor, Cond, Tensor]]) -> float:
        total = 0.0
        for z, cond, end in batches:
            made = sample(denoiser, z, cond, nodes, order=order, guidance=guidance)[2]
            total += (made - end).square().mean().item() * len(z)
        return math.sqrt(total / sum(len(z) for z, *_ in batches))

    costs, schedules = paths.costs(schedule, order), {}
    for n in steps:
        others = {"even": reference_times(schedule, n)}
        if type(teacher).pipeline_class in AYS:
            others["ays"] = [float(t) for t in ays_times(type(teacher).pipeline_class, schedule, n)]
        searches = (best_nodes(costs * weights, n)[0] for weights in node_weights(schedule, times))
        options = [tuple(times[i] for i in nodes) for nodes in searches]
        nodes = min(
            dict.fromkeys((*options, tuple(others["even"]))), key=lambda nodes: error(nodes, searched)
        )
        call = {"sigmas": list(nodes)} if flow else {"timesteps": [int(t) for t in nodes]}
        errors = {name: error(given, fresh) for name, given in {"searched": nodes, **others}.items()}
        schedules[str(n)] = {**call, "error": errors}
    return {
        "schema": 1,
        "teacher": teacher.source,
        "guidance_scale": guidance,
        "solver": solver,
        "reference_steps": reference_steps,
        "num": num,
        "seed": seed,
        "schedules": schedules,
    }


def _check(steps: Sequence[int], num: int, reference_steps: int, solver: str, flow: bool) -> None:
    if not steps or min(steps) < 1 or max(steps) > reference_steps:
        raise FewstepError(
            f"--steps {','.join(map(str, steps))}: expected numbers from 1 to {reference_steps}, the steps of the "
            "reference; raise --reference-steps, or ask for fewer"
        )
    if num < 2:
        raise FewstepError(f"--num {num}: expected at least 2 paths; 64 are enough for most teachers")
    if solver not in ORDERS:
        raise FewstepError(f"--solver {solver}: expected one of {', '.join(ORDERS)}")
    if flow and solver != "euler":
        raise FewstepError(
            f"--solver {solver}: no stock scheduler takes times of our own for a flow with it; use euler"
        )


def stock_scheduler(scheduler: Any, solver: str) -> Any:
    """The stock scheduler that makes exactly the jumps of :func:`sample`, at the times of its call."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    from ..teachers.schedulers import is_flow

    if is_flow(scheduler):  # the nodes are shifted already
        return FlowMatchEulerDiscreteScheduler(scheduler.config.num_train_timesteps, shift=1.0)
    stock = FLOOR["dpm++"](scheduler)
    return type(stock).from_config(stock.config, solver_order=ORDERS[solver])


def write_floor(folder: Path, scheduler: Any, record: dict[str, Any]) -> None:
    """Writes ``floor.json`` and ``scheduler/scheduler_config.json``, which stock diffusers loads."""
    stock_scheduler(scheduler, record["solver"]).save_pretrained(folder / "scheduler")
    write_json(folder / RECORD, record)


def floor_sampler(solver: str, pipe: Any, scheduler: Any, num_steps: int) -> tuple[Any, dict[str, Any]]:
    """A training-free few-step sampler for a stock pipeline.

    Args:
        solver: a name in ``FLOOR``, "ays", or a folder that ``fewstep floor`` wrote.
        pipe: the pipeline. scheduler: its own one, whose noise table is taken over.

    Returns:
        The scheduler to set, and the arguments that the call needs beside prompt and guidance.

    Raises:
        FewstepError: no such solver or folder, or a number of steps that was not searched.
    """
    import diffusers

    if solver in FLOOR:
        made = FLOOR[solver](scheduler)
        if type(pipe).__name__ == "FluxPipeline":
            made = _for_flux(made, solver)
        return made, {"num_inference_steps": num_steps}
    if solver == "ays":
        from ..teachers.schedulers import schedule_of

        times = ays_times(type(pipe).__name__, schedule_of(scheduler), num_steps)
        return FLOOR["dpm++"](scheduler), {"timesteps": times}
    record = read_floor(solver)
    found = record["schedules"].get(str(num_steps))
    if found is None:
        raise FewstepError(
            f"{solver}: {num_steps} steps were not searched, only {', '.join(record['schedules'])}; run fewstep floor "
            f"with --steps {num_steps}"
        )
    name = "FlowMatchEulerDiscreteScheduler" if "sigmas" in found else "DPMSolverMultistepScheduler"
    stock = getattr(diffusers, name).from_pretrained(Path(solver) / "scheduler")
    return stock, {key: found[key] for key in ("sigmas", "timesteps") if key in found}


def _for_flux(scheduler: Any, solver: str) -> Any:
    """Its pipeline gives every scheduler a shift, and one of flows a grid that is even before it."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    config = scheduler.config
    if config.get("use_flow_sigmas"):  # takes the pipeline's shift only where it has none of its own
        return type(scheduler).from_config(config, use_dynamic_shifting=True, time_shift_type="exponential")
    if solver == "heun":
        raise FewstepError(
            f"solver heun: {type(scheduler).__name__} takes no sigmas and no shift from a FluxPipeline; use another of "
            f"{', '.join(FLOOR)}"
        )
    return FlowMatchEulerDiscreteScheduler(config.num_train_timesteps, shift=config.shift)


def read_floor(folder: str | Path) -> dict[str, Any]:
    """``floor.json`` of a folder; FewstepError if it holds none."""
    path = Path(folder) / RECORD
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["schema"] == 1 and isinstance(record["schedules"], dict):
            return record
        problem = f"schema {record['schema']}"
    except (OSError, ValueError, KeyError, TypeError) as error:
        problem = f"{type(error).__name__}: {error}"
    names = ", ".join((*FLOOR, "ays"))
    raise FewstepError(
        f"solver {folder}: expected one of {names}, or a folder that `fewstep floor` wrote ({problem})"
    )
