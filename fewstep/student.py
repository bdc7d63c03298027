"""The few-step student: a denoiser and the K times at which it is called."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from .cond import Cond
from .denoiser import Denoiser
from .errors import RecipeError
from .schedules import VP, Schedule

Draw = Callable[[Tensor], Tensor]  # fresh unit noise of the shape of its argument


def uniform_times(num_steps: int, start: float) -> list[int]:
    """K integer times from ``start`` down in equal strides, the grid of diffusers' LCMScheduler.

    ``uniform_times(4, 999) == [999, 749, 499, 249]`` (DMD2); one step is just ``[start]``.

    Raises:
        RecipeError: ``start + 1`` is not a multiple of ``num_steps``, so no stock scheduler would meet the grid.
    """
    if num_steps < 1 or (start + 1) % num_steps or start < 0:
        raise RecipeError(
            f"student times: start {start:g} with {num_steps} steps: expected start + 1 to be a positive multiple "
            f"of the number of steps, e.g. start {max(1, round((start + 1) / max(num_steps, 1))) * num_steps - 1}"
        )
    stride = int(start + 1) // num_steps
    return [stride * k - 1 for k in range(num_steps, 0, -1)]


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


class Student:
    """A K-step generator: predict x0, add fresh noise at the next time, predict again.

    The first input is unit noise whatever the first time is: the schedules of SD and SDXL end at a non-zero
    SNR, and stock schedulers start from unit noise too.

    Args:
        denoiser: the trained network's denoiser. times: (K,) noisy to clean, checked.
    """

    def __init__(self, denoiser: Denoiser, times: Sequence[float]):
        check_times(times, denoiser.schedule)
        self.denoiser, self.times = denoiser, list(times)

    @property
    def num_steps(self) -> int:
        return len(self.times)

    def x0(self, x_t: Tensor, step: int, cond: Cond) -> Tensor:
        """Prediction of one step, fp32; x_t (B, ...)."""
        return self.denoiser.x0(x_t, self._time(step, x_t), cond)

    def rollout(self, noise: Tensor, cond: Cond, draw: Draw, exit_step: int) -> Tensor:
        """x0 of step ``exit_step`` (0-based) reached by the student's own earlier steps, which carry no gradient.

        This is DMD2's backward simulation (arXiv 2405.14867, section 4.5): training sees the inputs that
        inference will see. Gradient flows through the last call only, and only if it is enabled outside.
        """
        x_t = noise
        with torch.no_grad():
            for step in range(exit_step):
                x0 = self.x0(x_t, step, cond)
                x_t = self.denoiser.schedule.add_noise(x0, draw(x0), self._time(step + 1, x0))
        return self.x0(x_t, exit_step, cond)

    @torch.no_grad()
    def sample(self, noise: Tensor, cond: Cond, draw: Draw) -> Tensor:
        """All K steps: what stock diffusers does with the exported scheduler."""
        return self.rollout(noise, cond, draw, self.num_steps - 1)

    def _time(self, step: int, x: Tensor) -> Tensor:
        return torch.full((len(x),), float(self.times[step]), dtype=torch.float64, device=x.device)
