"""Times: the law they are drawn from in a loss, and those at which a student is called."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..bounds import Bounded, Number, Positive, Share
from ..device import real
from ..errors import RecipeError
from .rng import Rng
from .schedules import EDM, VP, Flow, Schedule

START = 2.5  # sigma / alpha of the first input: EDM's 2.5, t = 625 of Stable Diffusion's table


@dataclass
class TimeLaw(Bounded):
    """Which times a loss is taken at.

    Attributes:
        kind: "uniform" over a part of the schedule (on EDM: of its rho = 7 grid); "log_normal":
            ``log(sigma / alpha) ~ N(mean, std^2)``, which is EDM's law and, on a flow, the logit-normal one; "auto"
            is the published law of the schedule: uniform 20..980 on VP; on EDM log-normal (-1.2, 1.2) for the critic
            and the noisiest fifth of the grid left out for the student; log-normal (log 2, 1.6) on a flow.
        low, high: of "uniform", as fractions of the schedule. mean, std: of "log_normal".
    """

    kind: Literal["auto", "uniform", "log_normal"] = "auto"
    low: Share = 0.02
    high: Share = 0.98
    mean: Number = 0.0
    std: Positive = 1.0

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.low < self.high:
            raise RecipeError(f"low: {self.low}: expected 0 <= low < high <= 1 (high is {self.high})")
        ranged, shaped = (self.low, self.high) != (0.02, 0.98), (self.mean, self.std) != (0.0, 1.0)
        if (ranged and self.kind != "uniform") or (shaped and self.kind != "log_normal"):
            wanted = "uniform, which reads low and high" if ranged else "log_normal, which reads mean and std"
            raise RecipeError(
                f"kind: {self.kind!r}: expected {wanted}; set it, or leave them at their defaults"
            )

    def on(self, schedule: Schedule, critic: bool) -> TimeLaw:
        """Itself, or what "auto" means on a schedule."""
        if self.kind != "auto":
            return self
        if isinstance(schedule, EDM):
            return TimeLaw("log_normal", mean=-1.2, std=1.2) if critic else TimeLaw("uniform", 0.0, 0.8)
        if isinstance(schedule, Flow):
            return TimeLaw("log_normal", mean=math.log(2), std=1.6)
        return TimeLaw("uniform")

    def draw(self, schedule: Schedule, rng: Rng, count: int) -> Tensor:
        """Times (count,); whole numbers on a discrete schedule."""
        if self.kind == "uniform":
            return schedule.draw_times(rng.uniform(count), self.low, self.high)
        log_ratio = self.mean + self.std * rng.normal(count).to(real(rng.device))
        t = schedule.t_from_log_snr(-2 * log_ratio).clamp(schedule.t_min, schedule.t_max)
        return t.round() if isinstance(schedule, VP) else t


def chosen_times(
    schedule: Schedule, num_steps: int, start: float | None = None, times: Sequence[float] | None = None
) -> list[float]:
    """The given times, or equal strides from ``start``, by default the noisiest time.

    Raises:
        RecipeError: start or times do not fit the schedule; it names the field.
    """
    try:
        chosen = even_times(schedule, num_steps, start) if times is None else list(times)
        check_times(chosen, schedule)
    except RecipeError as error:
        raise RecipeError(f"method.{'start' if times is None else 'times'}: {error}") from None
    return chosen


def student_times(
    schedule: Schedule, num_steps: int, start: float | None = None, times: Sequence[float] | None = None
) -> list[float]:
    """The given times, or equal strides from ``start``, by default sigma / alpha = 2.5 (a flow: its end).

    On a discrete schedule the stride is whole, so that a stock scheduler meets the grid: 625 for one step of Stable
    Diffusion, 623, 467, 311, 155 for four (the paper's 625, 468, 312, 156 has no such stride; give it as ``times``).

    Raises:
        RecipeError: start or times do not fit the schedule.
    """
    if times is None and start is None:
        level = schedule.t_from_log_snr(torch.tensor(-2 * math.log(START), dtype=torch.float64)).item()
        start = schedule.t_max if isinstance(schedule, Flow) else min(level, schedule.t_max)
        if isinstance(schedule, VP):
            start = max(1, round((start + 1) / num_steps)) * num_steps - 1
            start = start if start <= schedule.t_max else start - num_steps
    return chosen_times(schedule, num_steps, start, times)


def uniform_times(num_steps: int, start: float) -> list[int]:
    """K integer times from ``start`` down in equal strides, the grid of diffusers' LCMScheduler.

    ``uniform_times(4, 999) == [999, 749, 499, 249]`` (DMD2); one step is just ``[start]``.

    Raises:
        RecipeError: ``start + 1`` is not a multiple of ``num_steps``, so no stock scheduler would meet the grid.
    """
    if num_steps < 1 or (start + 1) % num_steps or start < 0:
        raise RecipeError(
            f"student times: start {start:g} with {num_steps} steps: expected start + 1 to be a positive multiple "
            f"of the number of steps, e.g. start {start_below(start, num_steps)}"
        )
    stride = int(start + 1) // num_steps
    return [stride * k - 1 for k in range(num_steps, 0, -1)]


def start_below(start: float, num_steps: int) -> int:
    """The next start whose even grid ends above time 0; not a noisier one, which the table may not have."""
    steps = max(num_steps, 1)
    return max(2, int(start + 1) // steps) * steps - 1


def times_at(schedule: Schedule, angles: Sequence[float]) -> list[float]:
    """TrigFlow's times in [0, pi/2] as those of a schedule: equal noise level, the nearest integers of a discrete one.

    ``times_at(Flow(), [pi / 2, 1.3]) == [1.0, 0.783]``. An angle beyond the noisiest level is that level.
    """
    angle = torch.tensor(list(angles), dtype=torch.float64)
    times = schedule.time_at(angle.cos(), angle.sin()).clamp(schedule.t_min, schedule.t_max)
    return times.round().tolist() if isinstance(schedule, VP) else times.tolist()


def even_times(schedule: Schedule, num_steps: int, start: float | None = None) -> list[float]:
    """K times from ``start`` (default: the noisiest) down in equal strides of the time that the schedule's solvers use.

    A table takes :func:`uniform_times`. A flow takes equal strides of the time before its shift, so that with shift 3
    four steps are at 1, 0.9, 0.75 and 0.5 (Euler's grid of stock pipelines, without the step that they waste at 0.001).
    EDM's are even in the seventh root of sigma.

    Raises:
        RecipeError: a start outside the schedule, or one that no table has a grid for.
    """
    start = schedule.t_max if start is None else start
    if isinstance(schedule, VP):
        return [*uniform_times(num_steps, start)]
    if num_steps < 1 or not schedule.t_min < start <= schedule.t_max:
        raise RecipeError(
            f"student times: {num_steps} steps from {start:g}: expected at least one step from a start within "
            f"({schedule.t_min:g}, {schedule.t_max:g}] of the teacher's schedule"
        )
    schedule = schedule.for_steps(num_steps)
    first = schedule.fraction_above(start)
    shares = torch.tensor([first * (1 - k / num_steps) for k in range(1, num_steps)], dtype=torch.float64)
    return [start, *schedule.draw_times(shares).tolist()]


def check_times(times: Sequence[float], schedule: Schedule) -> None:
    """Refuses times that are empty, not falling, or outside the schedule.

    Raises:
        RecipeError: naming the offending times.
    """
    falling = all(a > b for a, b in pairwise(times))
    if not times or not falling or times[0] > schedule.t_max or times[-1] <= schedule.t_min:
        raise RecipeError(
            f"student times {list(times)}: expected at least one time, strictly falling, within "
            f"({schedule.t_min:g}, {schedule.t_max:g}] of the teacher's schedule"
        )
    if isinstance(schedule, VP) and any(t != int(t) for t in times):
        raise RecipeError(f"student times {list(times)}: a discrete schedule needs integers")
