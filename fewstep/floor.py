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
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .cond import Cond
from .denoiser import Denoiser
from .errors import FewstepError
from .files import write_json
from .rng import Rng
from .schedules import Flow, Schedule, repeated
from .solvers import FLOOR

ORDERS = {"euler": 1, "dpm++": 2}  # of the jumps: Euler's is DDIM's on a variance-preserving path
AYS = {"StableDiffusionPipeline": "StableDiffusion", "StableDiffusionXLPipeline": "StableDiffusionXL"}
RECORD = "floor.json"


# ----------------------------------------------------------------------------------------------------------- jumps
END = 1.0, 0.0  # signal and noise of a sample


def jump(before: Any, now: Any, then: Any) -> tuple[Any, Any, Any]:
    """Coefficients of one solver step: ``x_then = a x_now + b x0_now + c x0_before``.

    With ``before`` it is DPM-Solver++(2M) (arXiv 2211.01095, algorithm 2), without it the first-order step, which
    is DDIM's; for a flow that is Euler's, and to :data:`END` it returns x0_now.

    Args:
        before, now, then: (alpha, sigma) of three times, numbers or arrays that broadcast.
    """
    a = then[1] / now[1]
    b = then[0] - now[0] * a
    if before is None:
        return a, b, 0.0 * b
    first, second, third = (np.log(alpha) - np.log(sigma) for alpha, sigma in (before, now, then))
    half = b / 2 * (third - second) / (second - first)
    return a, b + half, -half


def levels(schedule: Schedule, times: Sequence[float]) -> np.ndarray:
    """(alpha, sigma) at the times and at the end, (2, K + 1)."""
    t = torch.tensor(times, dtype=torch.float64)
    return np.stack([np.append(f(t).numpy(), end) for f, end in zip((schedule.alpha, schedule.sigma), END)])


def reference_times(schedule: Schedule, num_steps: int) -> list[float]:
    """The "trailing" grid of diffusers: integers from T-1 for a table, even before the shift for a flow."""
    even = [1 - i / num_steps for i in range(num_steps)]
    if isinstance(schedule, Flow):
        return schedule.shifted(torch.tensor(even, dtype=torch.float64)).tolist()
    steps = schedule.t_max + 1
    return [float(round(steps * u) - 1) for u in even]


@torch.no_grad()
def sample(
    denoiser: Denoiser,
    noise: Tensor,
    cond: Cond,
    times: Sequence[float],
    *,
    order: int = 2,
    guidance: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """The teacher's ODE with steps at any falling times.

    Args:
        noise: unit noise (B, ...). order: of the jumps, 1 or 2; the first and the last are of order 1.

    Returns:
        states (K, B, ...) at the times, predictions x0 (K, B, ...) there, and the sample (B, ...), which is the
        last of them.
    """
    x, states, predictions, level = noise, [], [], levels(denoiser.schedule, times).T
    for k, now in enumerate(times):
        t = repeated(now, x)
        states.append(x)
        predictions.append(denoiser.x0(x, t, cond, guidance=guidance))
        second = order == 2 and 0 < k < len(times) - 1
        a, b, c = map(float, jump(level[k - 1] if second else None, level[k], level[k + 1]))
        x = a * x + b * predictions[-1] + (c * predictions[-2] if second else 0)
    return torch.stack(states), torch.stack(predictions), x


# ---------------------------------------------------------------------------------------------------------- search
@dataclass
class Paths:
    """All that the search needs of recorded reference paths: the inner products of their states and predictions.

    Attributes:
        times: (M,) falling. gram: (2M + 1, 2M + 1) float64, means over samples and coordinates of the products of
            ``[x_1 .. x_M, sample, x0_1 .. x0_M]``. It does not grow with the number of samples. count: samples.
    """

    times: list[float]
    gram: Tensor
    count: int = 0

    @classmethod
    def none(cls, times: Sequence[float]) -> Paths:
        size = 2 * len(times) + 1
        return cls(list(times), torch.zeros(size, size, dtype=torch.float64))

    def add(self, states: Tensor, predictions: Tensor, end: Tensor) -> None:
        """Takes in what :func:`sample` returned for a batch."""
        rows = torch.cat([states, end[None], predictions]).double().flatten(1)
        new = (rows @ rows.T).cpu() / end[0].numel()
        self.gram = (self.gram * self.count + new) / (self.count + len(end))
        self.count += len(end)

    def costs(self, schedule: Schedule, order: int) -> np.ndarray:
        """Mean squared errors of all jumps, (M, M, M + 1): from node i, with h before it, to node j (M is the end).

        The error of x_j is measured where ``alpha^2 + sigma^2 = 1``, so that every path has the same scale. The
        entries [i, i, j] and [h, i, M] are first-order jumps; what is no jump is infinite.
        """
        m, gram, level = len(self.times), self.gram.numpy(), levels(schedule, self.times)
        before, now, then = level[:, :m, None, None], level[:, None, :m, None], level[:, None, None, :]
        a, b, c = jump(None, now, then)
        if order == 2:
            with np.errstate(all="ignore"):  # of what is no jump
                higher = jump(before, now, then)
            h, i, j = np.ogrid[:m, :m, : m + 1]
            a, b, c = (np.where((h < i) & (i < j) & (j < m), x, y) for x, y in zip(higher, (a, b, c)))
        shape = (m, m, m + 1)
        weights = np.stack([np.broadcast_to(x, shape) for x in (a, b, c, -1.0)], -1)
        h, i, j = np.indices(shape)
        where = np.stack([i, m + 1 + i, m + 1 + h, j], -1)
        costs = np.einsum("...p,...pq,...q", weights, gram[where[..., None], where[..., None, :]], weights)
        return np.where((h <= i) & (i < j), costs.clip(0) / np.square(level).sum(0), np.inf)


def node_weights(schedule: Schedule, times: Sequence[float]) -> list[np.ndarray]:
    """Guesses of how much an error at a node, (M + 1,), matters for the sample: powers of the share of signal there.

    What becomes of an error depends on the data and the guidance: a network corrects some and amplifies others.
    """
    alpha, sigma = levels(schedule, times)
    share = alpha / np.hypot(alpha, sigma)
    share[0] = 1.0  # no jump ends at the first node, which may hold no signal at all
    return [share**power for power in (0, -2, -1, 1, 2)]


def best_nodes(costs: np.ndarray, num_steps: int) -> tuple[list[int], float]:
    """The first node and ``num_steps - 1`` others with the least sum of costs, by dynamic programming.

    Args:
        costs: (M, M, M + 1) as of :meth:`Paths.costs`; the path begins at node 0 and ends at M.

    Returns:
        Indices of the nodes, and the sum.
    """
    m = len(costs)
    if not 1 <= num_steps <= m:
        raise FewstepError(f"--steps {num_steps}: expected 1 to {m}, the steps of the reference")
    ends = costs[np.arange(m), np.arange(m)]  # (i, j), of first order
    if num_steps == 1:
        return [0], float(ends[0, m])
    # best[h, i]: least cost of a path whose last two nodes are h and i
    best = np.full((m, m), np.inf)
    best[0] = ends[0, :m]
    came: list[np.ndarray] = []
    for _ in range(2, num_steps):
        # The first jump has no node before it; every later one has.
        options = best[:, :, None] + costs[:, :, :m]
        came.append(options.argmin(0))
        best = options.min(0)
    total = best + ends[None, :, m]
    h, i = np.unravel_index(int(total.argmin()), total.shape)
    nodes = [int(i), int(h)]
    for chosen in reversed(came):
        nodes.append(int(chosen[nodes[-1], nodes[-2]]))
    return nodes[::-1], float(total[h, i])


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

    from .teachers.base import is_flow

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
        from .teachers.base import schedule_of

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
