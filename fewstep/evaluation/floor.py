"""The training-free floor: what a teacher does in few steps with the best walk that a search finds.

A student has to beat it at equal network calls. Reference paths of many steps are recorded once. Dynamic programming
chooses nodes whose jumps stay nearest to some of them; these walks, those of published tables and formulas, and the
even grid are then made on the other paths, and the one that ends nearest to them is taken.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from ..diffusion.cond import Cond
from ..diffusion.denoiser import NetDenoiser
from ..diffusion.few_steps import Paths, best_nodes, node_weights, reference_times, sample
from ..diffusion.rng import Rng
from ..diffusion.schedules import EDM, Flow, Schedule
from ..diffusion.walks import Walk, known_walks, walk
from ..errors import FewstepError
from ..teachers.base import Teacher
from ..teachers.pipelines import takes
from ..teachers.references import check_references
from .stock import AYS, FREE_U, ays_times, free_u, stock_call

# Of the jumps: Euler's is DDIM's on a variance-preserving path, Heun's steps are of EDM pipelines.
ORDERS = {"euler": 1, "dpm++": 2, "heun": 2}
FAMILIES = ("even", "searched", "ays", "karras", "power", "stopped")


class End(NamedTuple):
    """Noise and conditions of some samples, and where the reference's paths from there end."""

    noise: Tensor
    cond: Cond
    sample: Tensor


@dataclass(frozen=True)
class Search:
    """For the best walk of each number of steps.

    Attributes:
        guidance: of all samples, 1 for none. families: to choose from. freed: whether Free-U is to be tried.
        times: of the reference, which are the candidates for searched nodes. costs: of every jump between them, of
            each order of jumps that may be taken. held: ends of paths that no search has seen.
        solvers: of :data:`ORDERS`, of which those without costs of their order are left out.
    """

    denoiser: NetDenoiser
    pipeline_class: str
    guidance: float
    families: Sequence[str]
    freed: bool
    times: list[float]
    costs: dict[int, np.ndarray]
    held: list[End]
    solvers: Sequence[str] = ("euler", "dpm++")

    def candidates(self, num_steps: int) -> Iterator[Walk]:
        """All of so many calls that is to be tried, the even grid first: it is measured whether or not it may be
        chosen. Heun's K steps are 2 K - 1 calls, so that it has walks of odd numbers, on nodes of the other solvers.
        """
        for solver in self.solvers:
            heun, order = solver == "heun", ORDERS[solver]
            if order not in self.costs or (heun and num_steps % 2 == 0):
                continue
            for one in self._walks((num_steps + 1) // 2 if heun else num_steps, order):
                if one.family in self.families or one.family == "even":
                    yield one._replace(heun=heun)
                    if self.freed:
                        yield one._replace(heun=heun, free_u=True)

    def _walks(self, nodes: int, order: int) -> list[Walk]:
        """Of so many nodes and jumps of this order, each once."""
        schedule = self.denoiser.schedule
        found: list[Walk | None] = list(known_walks(schedule, nodes, order))
        if self.pipeline_class in AYS:
            found.append(walk(schedule, "ays", ays_times(self.pipeline_class, schedule, nodes), order))
        for weights in node_weights(schedule, self.times):
            best = best_nodes(self.costs[order] * weights, nodes)[0]
            found.append(walk(schedule, "searched", [self.times[i] for i in best], order))
        return list(filter(None, dict.fromkeys(found)))

    def error(self, walk: Walk) -> float:
        """Root mean square distance of this walk's samples to the reference's."""
        schedule, total = self.denoiser.schedule, 0.0
        free_u(self.denoiser.net, FREE_U if walk.free_u else None)
        try:
            options: dict[str, Any] = {
                "order": walk.order,
                "heun": walk.heun,
                "guidance": self.guidance,
                "end": walk.end(schedule),
            }
            for noise, cond, end in self.held:
                made = sample(self.denoiser, noise, cond, walk.times, **options)[2]
                total += (made - end).square().mean().item() * len(noise)
        finally:
            free_u(self.denoiser.net, None)
        return math.sqrt(total / sum(len(end.noise) for end in self.held))

    def schedule(self, num_steps: int) -> dict[str, Any]:
        """The best walk as a pipeline's call takes it, and the least error of each family."""
        errors = {one: self.error(one) for one in self.candidates(num_steps)}
        best = min((one for one in errors if one.family in self.families), key=lambda one: errors[one])
        least: dict[str, float] = {}
        for one, error in errors.items():
            name = f"{one.family}, Free-U" if one.free_u else one.family
            least[name] = min(error, least.get(name, math.inf))
        entry: dict[str, Any] = {"family": best.family, "order": best.order, "times": list(best.times)}
        if best.stop is not None:
            entry["stop"] = best.stop
        if best.free_u:
            entry["free_u"] = FREE_U
        if best.heun:
            entry["heun"] = True
        return {**entry, "call": stock_call(self.denoiser.schedule, best), "error": least}


def calibrate(
    teacher: Teacher,
    prompts: Sequence[str],
    steps: Sequence[int],
    *,
    guidance: float,
    num: int = 64,
    reference_steps: int = 50,
    solver: str | None = None,
    families: Sequence[str] = FAMILIES,
    freed: bool = False,
    seed: int = 0,
    batch_size: int = 16,
) -> dict[str, Any]:
    """Finds a teacher's best walk of each number of steps.

    Args:
        prompts: some are chosen for the paths.
        steps: numbers of steps, each a call of the network. guidance: of paths and samples, 1 for none.
        num: paths that are searched; half as many more are held out, to choose by.
        reference_steps: of a path, which are also the candidates for searched nodes.
        solver: of :data:`ORDERS`; by default whichever is better. A flow has "euler" alone, and "heun" is of EDM
            pipelines, whose reference is made by it too.
        families: of :data:`FAMILIES`, to choose from; with the even grid among them nothing is worse than it.
        freed: whether Free-U is tried with each.

    Returns:
        What ``floor.json`` holds. ``schedules``: for each number of steps the best walk, with ``call`` for a stock
        pipeline and ``error``: for each family the least root mean square distance to the reference's samples from
        the same noise, on the paths that were held out.

    Raises:
        FewstepError: numbers out of range; a solver, a family, Free-U or prompts that the teacher cannot have.
    """
    _check(steps, num, reference_steps, solver)
    _check_teacher(teacher, solver, families, freed)
    schedule, denoiser = teacher.denoiser.schedule, teacher.denoiser
    solvers = [solver] if solver else solvers_of(schedule)
    times = reference_times(schedule, reference_steps)
    paths, (searched, held) = Paths.none(times), _batches(teacher, prompts, num, seed, batch_size)

    along = _along(denoiser, times, guidance)
    for noise, cond in searched:
        paths.add(*along(noise, cond))
    costs = _costs(paths, schedule, sorted({ORDERS[name] for name in solvers}))
    ends = [End(noise, cond, along(noise, cond)[2]) for noise, cond in held]
    search = Search(denoiser, teacher.pipeline_class, guidance, families, freed, times, costs, ends, solvers)
    return {
        "schema": 2,
        "teacher": teacher.source,
        "guidance_scale": guidance,
        "solver": solver,
        "families": list(families),
        "reference_steps": reference_steps,
        "num": num,
        "seed": seed,
        "schedules": {str(n): search.schedule(n) for n in steps},
    }


def _along(
    denoiser: NetDenoiser, times: list[float], guidance: float
) -> Callable[[Tensor, Cond], tuple[Tensor, Tensor, Tensor]]:
    """The reference's path from a noise, by the most exact jumps."""
    best = solvers_of(denoiser.schedule)[-1]
    return lambda noise, cond: sample(
        denoiser, noise, cond, times, order=ORDERS[best], heun=best == "heun", guidance=guidance
    )


def solvers_of(schedule: Schedule) -> list[str]:
    """Whose jumps stock pipelines of this path make at times of our own, the most exact last."""
    if isinstance(schedule, Flow):
        return ["euler"]
    return ["euler", "dpm++", "heun"] if isinstance(schedule, EDM) else ["euler", "dpm++"]


def _costs(paths: Paths, schedule: Schedule, orders: Sequence[int]) -> dict[int, np.ndarray]:
    if not paths.gram.isfinite().all():
        raise FewstepError("the reference's paths are not finite: try --dtype float32, or another --guidance")
    return {order: paths.costs(schedule, order) for order in orders}


def _batches(
    teacher: Teacher, prompts: Sequence[str], num: int, seed: int, batch_size: int
) -> tuple[list[tuple[Tensor, Cond]], list[tuple[Tensor, Cond]]]:
    """Noise and conditions of ``num`` samples, and of half as many more, on the teacher's device."""
    check_references(teacher, prompts)
    rows = num + max(4, num // 2)
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


def _check(steps: Sequence[int], num: int, reference_steps: int, solver: str | None) -> None:
    if not steps or min(steps) < 1 or max(steps) > reference_steps:
        raise FewstepError(
            f"--steps {','.join(map(str, steps))}: expected numbers from 1 to {reference_steps}, the steps of the "
            "reference; raise --reference-steps, or ask for fewer"
        )
    if solver == "heun" and any(n % 2 == 0 for n in steps):
        raise FewstepError(
            f"--steps {','.join(map(str, steps))}: steps are calls, of which Heun's K steps make 2 K - 1: expected odd "
            "numbers, or another --solver"
        )
    if num < 2:
        raise FewstepError(f"--num {num}: expected at least 2 paths; 64 are enough for most teachers")
    if solver and solver not in ORDERS:
        raise FewstepError(f"--solver {solver}: expected one of {', '.join(ORDERS)}")


def _check_teacher(teacher: Teacher, solver: str | None, families: Sequence[str], freed: bool) -> None:
    if not teacher.floor:
        raise FewstepError(f"{teacher.source}: a {teacher.kind} teacher has no noise schedule to search")
    if not takes(teacher.pipe, "sigmas"):
        raise FewstepError(
            f"{teacher.source}: the stock call of a {teacher.pipeline_class} takes no times of our own; measure its "
            "few steps by a named solver: fewstep eval generate --solver dpm++"
        )
    flow, edm = (isinstance(teacher.denoiser.schedule, kind) for kind in (Flow, EDM))
    if flow and solver == "dpm++":
        raise FewstepError(
            f"--solver {solver}: no stock scheduler takes times of our own for a flow with it; use euler"
        )
    if solver == "heun" and not edm:
        raise FewstepError(
            f"--solver heun: no stock scheduler of a {teacher.pipeline_class} takes times of our own"
        )
    without = {"karras", "stopped"} if flow else {"stopped"} if edm else set()
    without |= set() if teacher.pipeline_class in AYS else {"ays"}
    if unknown := [name for name in families if name not in FAMILIES]:
        raise FewstepError(f"--families {','.join(unknown)}: expected some of {', '.join(FAMILIES)}")
    if not set(families) - without:
        raise FewstepError(
            f"--families {','.join(families)}: a {teacher.pipeline_class} has none of these; expected some of "
            f"{', '.join(name for name in FAMILIES if name not in without)}"
        )
    if freed and not hasattr(teacher.net, "enable_freeu"):
        raise FewstepError(
            f"--free-u: a {type(teacher.net).__name__} has no skip connections to scale; expected such as SDXL's "
            "UNet2DConditionModel; leave it out"
        )
