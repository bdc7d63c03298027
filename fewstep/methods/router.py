"""Several one-step students, each for a part of the conditions, and the router that knows which part is whose."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ..diffusion.cond import Cond
from ..diffusion.denoiser import Denoiser, Guidance
from ..diffusion.rng import Rng
from ..diffusion.schedules import Schedule
from ..diffusion.student import Draw, Student
from ..errors import RecipeError
from ..files import write_json, write_tensors

CHUNK = 1024  # conditions read at once
# What conditions are split by, the first that is there: (B, ...) -> (B, D).
FEATURES: dict[str, Callable[[Tensor], Tensor]] = {
    "pooled": lambda value: value,
    "embeds": lambda value: value.mean(1),
    "label": lambda value: value.view(len(value), -1),
}


class Conditions(Protocol):
    """As much of a store of encoded prompts as a router is fitted on."""

    def __len__(self) -> int: ...

    def rows(self, index: Tensor) -> dict[str, Tensor]: ...


class Router:
    """A balanced binary tree of half-spaces, a leaf for each of K parts (MSD, arXiv 2410.23274, "quadrants").

    Every node cuts its conditions along the principal direction, such that the parts have equally many distinct
    conditions, within 1. A pure function of the set of conditions: no seed, no order. Arithmetic is in float64 on the
    CPU, so that the same condition takes the same way wherever it is computed.

    Attributes:
        parts: K. feature: name in ``FEATURES`` of what it was fitted on.
        directions: (K - 1, D). thresholds: (K - 1,). children: (below, above) per node; another node, or ``-(k + 1)``
            for part k. sizes: distinct conditions of each part.
    """

    def __init__(self, parts: int):
        self.parts, self.feature = parts, ""
        self.directions, self.thresholds = torch.zeros(0), torch.zeros(0)
        self.children: list[list[int]] = []
        self.sizes: list[int] = []

    # ------------------------------------------------------------------------------------------------ routing
    def __call__(self, cond: Cond) -> Tensor:
        """Part (B,) of every row, on the CPU."""
        sides = features(cond)[1] @ self.directions.T > self.thresholds
        return torch.tensor([self._leaf(row) for row in sides.tolist()], dtype=torch.long)

    def _leaf(self, sides: Sequence[bool]) -> int:
        node = 0
        while node >= 0:
            node = self.children[node][int(sides[node])]
        return -node - 1

    def apply(self, cond: Cond, call: Callable[[int, Tensor], Tensor]) -> Tensor:
        """``call(k, rows)`` once for each part that has rows; its results (n, ...) in the order of cond."""
        parts = self(cond)
        groups = [(k, (parts == k).nonzero()[:, 0]) for k in parts.unique().tolist()]
        made = torch.cat([call(k, rows) for k, rows in groups])
        return made[torch.cat([rows for _, rows in groups]).argsort().to(made.device)]

    # ------------------------------------------------------------------------------------------------ fitting
    def fit(self, conditions: Conditions) -> list[int]:
        """Builds the tree; returns the first row of each part.

        Raises:
            RecipeError: fewer distinct conditions than parts.
        """
        chunks = [
            features(Cond(conditions.rows(torch.arange(i, min(i + CHUNK, len(conditions))))))
            for i in range(0, len(conditions), CHUNK)
        ]
        self.feature, points = chunks[0][0], torch.cat([chunk for _, chunk in chunks])
        distinct = points.unique(dim=0)
        if len(distinct) < self.parts:
            raise RecipeError(
                f"method.parts: {self.parts} with {len(distinct)} distinct prompts: expected at most as many parts as "
                "prompts; lower method.parts or give more prompts"
            )
        n, k = len(distinct), self.parts
        self.sizes = [n // k + (i < n % k) for i in range(k)]
        nodes: list[tuple[Tensor, Tensor]] = []
        self.children = []

        def grow(points: Tensor, first: int, count: int) -> int:
            if count == 1:
                return -(first + 1)
            node, half = len(nodes), count // 2
            direction, threshold = _cut(points, sum(self.sizes[first : first + half]))
            nodes.append((direction, threshold))
            self.children.append([])
            above = points @ direction > threshold
            below = grow(points[~above], first, half)
            self.children[node] = [below, grow(points[above], first + half, count - half)]
            return node

        grow(distinct, 0, k)
        self.directions, self.thresholds = (torch.stack(values) for values in zip(*nodes))
        sides = (points @ self.directions.T > self.thresholds).tolist()
        leaves = [self._leaf(row) for row in sides]
        return [leaves.index(part) for part in range(k)]

    # -------------------------------------------------------------------------------------------------- files
    def save(self, folder: Path) -> None:
        """``router.safetensors`` and ``router.json``."""
        tensors = {"directions": self.directions, "thresholds": self.thresholds}
        write_tensors(folder / "router.safetensors", tensors)
        plain = {"feature": self.feature, "children": self.children, "sizes": self.sizes}
        write_json(folder / "router.json", plain)

    @classmethod
    def load(cls, folder: Path) -> Router:
        from safetensors.torch import load_file

        plain = json.loads((folder / "router.json").read_text())
        tensors = load_file(folder / "router.safetensors")
        router = cls(len(plain["sizes"]))
        router.feature, router.children, router.sizes = plain["feature"], plain["children"], plain["sizes"]
        router.directions, router.thresholds = tensors["directions"], tensors["thresholds"]
        return router


def features(cond: Cond) -> tuple[str, Tensor]:
    """Name and (B, D) float64 on the CPU of what conditions are split by.

    Raises:
        RecipeError: an unconditional teacher, or conditions of a kind that is not known here.
    """
    name = next((name for name in FEATURES if name in cond.tensors), None)
    if name is None:
        raise RecipeError(
            f"method.name: multi_student splits prompts by one of {', '.join(FEATURES)}, and this teacher's conditions "
            f"have {', '.join(cond.tensors) or 'nothing'}; use dmd2"
        )
    return name, FEATURES[name](cond[name].detach().cpu().double())


def _cut(points: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(direction (D,), threshold) with exactly ``count`` of the distinct points (N, D) below.

    The first principal direction along which the two points next to the cut are apart beyond rounding; where points
    form a grid there may be none, and a generic direction does.
    """
    centred = points - points.mean(0)
    axes = torch.linalg.eigh(centred.T @ centred)[1].T.flip(0)  # (D, D), largest variance first
    axes = torch.cat([axes, Rng("router").normal(1, points.shape[1]).to(axes)])
    for axis in axes:
        axis = axis * axis[axis.abs().argmax()].sign()
        along = (points @ axis).sort().values
        below, above = along[count - 1], along[count]
        if above - below > 1e-6 * along.std():
            break
    return axis, (below + above) / 2


# ----------------------------------------------------------------------------------------------- routed networks
class RoutedStudent:
    """K one-step students as one: every sample is made by the student of its part, in one call.

    Has what preview and export use of a :class:`~fewstep.diffusion.student.Student`.

    Args:
        students: in the order of the parts, equal but for their networks and roles.
    """

    def __init__(self, students: Sequence[Student], router: Router):
        self.students, self.router = list(students), router
        self.times, self.noise = students[0].times, students[0].noise
        self.denoisers = [student.denoiser for student in students]
        self.roles = [student.roles[0] for student in students]

    @property
    def num_steps(self) -> int:
        return len(self.times)

    def variants(self) -> list[RoutedStudent]:
        return [self]

    @property
    def eta(self) -> float:
        return self.students[0].eta

    @property
    def schedule(self) -> Schedule:
        return self.students[0].schedule

    @torch.no_grad()
    def sample(self, noise: Tensor, cond: Cond, draw: Draw) -> Tensor:
        return self.router.apply(
            cond, lambda k, rows: self.students[k].sample(noise[rows], cond.rows(rows), draw)
        )


class RoutedDenoiser:
    """K denoisers as one, e.g. the critics of K students."""

    def __init__(self, denoisers: Sequence[Denoiser], router: Router):
        self.denoisers, self.router, self.schedule = list(denoisers), router, denoisers[0].schedule

    def x0(self, x_t: Tensor, t: Tensor, cond: Cond, *, guidance: Guidance = 1.0) -> Tensor:
        def call(k: int, rows: Tensor) -> Tensor:
            return self.denoisers[k].x0(x_t[rows], t[rows], cond.rows(rows), guidance=guidance)

        return self.router.apply(cond, call)
