"""Times: the law they are drawn from in a loss, and those at which a student is called."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from .device import real
from .errors import RecipeError
from .rng import Rng
from .schedules import EDM, VP, Flow, Schedule
from .student import check_times, even_times

START = 2.5  # sigma / alpha of the first input: EDM's 2.5, t = 625 of Stable Diffusion's table


@dataclass
class TimeLaw:
    """Which times a loss is taken at.

    Attributes:
        kind: "uniform" over a part of the schedule (on EDM: of its rho = 7 grid); "log_normal":
            ``log(sigma / alpha) ~ N(mean, std^2)``, which is EDM's law and, on a flow, the logit-normal one; "auto"
            is the published law of the schedule: uniform 20..980 on VP; on EDM log-normal (-1.2, 1.2) for the critic
            and the noisiest fifth of the grid left out for the student; log-normal (log 2, 1.6) on a flow.
        low, high: of "uniform", as fractions of the schedule. mean, std: of "log_normal".
    """

    kind: Literal["auto", "uniform", "log_normal"] = "auto"
    low: float = 0.02
    high: float = 0.98
    mean: float = 0.0
    std: float = 1.0

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    def __post_init__(self):
        if not 0 <= self.low < self.high <= 1:
            raise RecipeError(f"low: {self.low}: expected 0 <= low < high <= 1 (high is {self.high})")
        if not self.std > 0:
            raise RecipeError(f"std: {self.std}: expected a positive number; published ones are 1.2 and 1.6")
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
