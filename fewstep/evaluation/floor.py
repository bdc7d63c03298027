"""The training-free floor: what a teacher does in few steps with the best schedule that a search finds.

A student has to beat it at equal network calls. Reference paths of many steps are recorded once; then dynamic
programming chooses the nodes whose jumps stay nearest to them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..diffusion.cond import Cond
from ..diffusion.denoiser import Denoiser
from ..diffusion.few_steps import Paths, best_nodes, node_weights, reference_times, sample
from ..diffusion.rng import Rng
from ..diffusion.schedules import Flow, Schedule
from ..errors import FewstepError
from ..files import replacing, write_json
from ..teachers.base import Teacher
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
class End(NamedTuple):
    """Noise and conditions of some samples, and where the reference's paths from there end."""

    noise: Tensor
    cond: Cond
    sample: Tensor


@dataclass(frozen=True)
class Jumps:
    """How a teacher goes from node to node.

    Attributes:
        order: of the jumps. guidance: 1 for none.
    """

    denoiser: Denoiser
    order: int
    guidance: float

    def along(self, noise: Tensor, cond: Cond, nodes: Sequence[float]) -> tuple[Tensor, Tensor, Tensor]:
        """As :func:`~fewstep.diffusion.few_steps.sample`."""
        return sample(self.denoiser, noise, cond, nodes, order=self.order, guidance=self.guidance)

    def reference(self, noise: Tensor, cond: Cond, times: Sequence[float], paths: Paths | None = None) -> End:
        """Where the reference ends; its way there is added to the paths."""
        found = self.along(noise, cond, times)
        if paths is not None:
            paths.add(*found)
        return End(noise, cond, found[2])

    def error(self, nodes: Sequence[float], ends: Sequence[End]) -> float:
        """Root mean square distance of samples by these nodes to the reference's."""
        total = 0.0
        for noise, cond, end in ends:
            made = self.along(noise, cond, nodes)[2]
            total += (made - end).square().mean().item() * len(noise)
        return math.sqrt(total / sum(len(end.noise) for end in ends))


@dataclass(frozen=True)
class Search:
    """For the best nodes, among the reference's times.

    Attributes:
        costs: of every jump on the recorded paths. searched: ends of these paths. fresh: ends of others, to measure by.
    """

    jumps: Jumps
    times: list[float]
    costs: np.ndarray
    searched: list[End]
    fresh: list[End]

    def schedule(self, num_steps: int, pipeline_class: str) -> dict[str, Any]:
        """The nodes of so many steps, as a pipeline's call takes them, and the errors of these nodes and others."""
        schedule = self.jumps.denoiser.schedule
        others = {"even": reference_times(schedule, num_steps)}
        if pipeline_class in AYS:
            others["ays"] = [float(t) for t in ays_times(pipeline_class, schedule, num_steps)]
        searches = (
            best_nodes(self.costs * weights, num_steps)[0] for weights in node_weights(schedule, self.times)
        )
        options = [tuple(self.times[i] for i in nodes) for nodes in searches]
        candidates = dict.fromkeys((*options, tuple(others["even"])))
        nodes = min(candidates, key=lambda nodes: self.jumps.error(nodes, self.searched))
        tables: dict[str, Sequence[float]] = {"searched": nodes, **others}
        call = (
            {"sigmas": list(nodes)} if isinstance(schedule, Flow) else {"timesteps": [int(t) for t in nodes]}
        )
        return {
            **call,
            "error": {name: self.jumps.error(given, self.fresh) for name, given in tables.items()},
        }


def calibrate(
    teacher: Teacher,
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
        prompts: some are chosen for the paths.
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
    if not teacher.floor:
        raise FewstepError(f"{teacher.source}: a {teacher.kind} teacher has no noise schedule to search")
    schedule = teacher.denoiser.schedule
    flow = isinstance(schedule, Flow)
    solver = solver or ("euler" if flow else "dpm++")
    _check(steps, num, reference_steps, solver, flow)
    jumps = Jumps(teacher.denoiser, ORDERS[solver], guidance)
    times = reference_times(schedule, reference_steps)
    paths, batches = Paths.none(times), _batches(teacher, prompts, num, seed, batch_size)
    searched = [jumps.reference(z, cond, times, paths) for z, cond in batches[0]]
    fresh = [jumps.reference(z, cond, times) for z, cond in batches[1]]
    if not paths.gram.isfinite().all():
        raise FewstepError("the reference's paths are not finite: try --dtype float32, or another --guidance")

    search = Search(jumps, times, paths.costs(schedule, jumps.order), searched, fresh)
    return {
        "schema": 1,
        "teacher": teacher.source,
        "guidance_scale": guidance,
        "solver": solver,
        "reference_steps": reference_steps,
        "num": num,
        "seed": seed,
        "schedules": {str(n): search.schedule(n, teacher.pipeline_class) for n in steps},
    }


def _batches(
    teacher: Teacher, prompts: Sequence[str], num: int, seed: int, batch_size: int
) -> tuple[list[tuple[Tensor, Cond]], list[tuple[Tensor, Cond]]]:
    """Noise and conditions of ``num`` samples, and of a quarter as many more, on the teacher's device."""
    rows = num + max(4, num // 4)
    shuffled = Rng(seed, "floor").permutation(len(prompts)).tolist()
    chosen = [prompts[shuffled[i % len(prompts)]] for i in range(rows)]
    noise = Rng(seed, "floor noise").normal(rows, *teacher.latent_shape)

    def some(first: int, end: int) -> list[tuple[Tensor, Cond]]:
        parts = [slice(i, min(i + batch_size, end)) for i in range(first, end, batch_size)]
        return [
            (noise[part].to(teacher.device), teacher.encode(chosen[part]).to(teacher.device))
            for part in parts
        ]

    return some(0, num), some(num, rows)


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
    with replacing(folder, record=RECORD) as part:
        stock_scheduler(scheduler, record["solver"]).save_pretrained(part / "scheduler")
        write_json(part / RECORD, record)


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
