"""The few-step student: a denoiser and the K times at which it is called."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor

from .cond import Cond
from .denoiser import Denoiser
from .schedules import Schedule, repeated
from .times import check_times

Draw = Callable[[Tensor], Tensor]  # fresh unit noise of the shape of its argument
Noise = Literal["fresh", "fixed", "ddim", "tcd"]


class Sampler(Protocol):
    """What trainer, preview, export and evaluation use of a student, be it one or several behind a router.

    See :class:`Student` and :class:`~fewstep.methods.router.RoutedStudent`.
    """

    @property
    def times(self) -> list[float]: ...
    @property
    def noise(self) -> Noise: ...
    @property
    def eta(self) -> float: ...
    @property
    def num_steps(self) -> int: ...
    @property
    def schedule(self) -> Schedule: ...
    @property
    def denoisers(self) -> Sequence[Denoiser]: ...
    @property
    def roles(self) -> Sequence[str]: ...

    def variants(self) -> Sequence[Sampler]: ...

    def sample(self, noise: Tensor, cond: Cond, draw: Draw) -> Tensor: ...


class Student:
    """A K-step generator: predict x0, go to the next level, predict again.

    The first input is unit noise whatever the first time is: the schedules of SD and SDXL end at a non-zero
    SNR, and stock schedulers start from unit noise too.

    Args:
        denoiser: the trained network's denoiser, or one per step (experts).
        times: (K,) noisy to clean, checked.
        noise: how the next level is reached: "fresh" noise (LCM, DMD2), the "fixed" first noise at every level, or
            "ddim", the noise that the prediction implies (deterministic; Euler for flow), or "tcd", down to
            ``(1 - eta)`` times the next time by that noise and up again by fresh one (TCD, arXiv 2402.19159, alg. 2).
        roles: names of the trained roles behind the steps, one per step.
        also: further lists of times at which the same student may be sampled, each of another length.
        eta: of "tcd", in [0, 1]: 0 is "ddim", 1 is "fresh" (gamma in the paper).
    """

    def __init__(
        self,
        denoiser: Denoiser | Sequence[Denoiser],
        times: Sequence[float],
        noise: Noise = "fresh",
        roles: Sequence[str] | None = None,
        also: Sequence[Sequence[float]] = (),
        eta: float = 0.0,
    ):
        self.times, self.noise, self.eta = list(times), noise, eta
        self.grids = {len(grid): list(grid) for grid in (times, *also)}
        self.denoisers: list[Denoiser] = (
            list(denoiser) if isinstance(denoiser, Sequence) else [denoiser] * len(self.times)
        )
        self.roles = list(roles or ["student"] * len(self.times))
        if not len(self.denoisers) == len(self.roles) == len(self.times):
            raise ValueError("a student needs one denoiser, one role and one time per step")
        if len(self.grids) != 1 + len(also) or (also and len(set(self.roles)) > 1):
            raise ValueError(
                "a student of several numbers of steps needs one network and one list of times for each"
            )
        for grid in self.grids.values():
            check_times(grid, self.schedule)

    def variants(self) -> list[Student]:
        """The student at each of its numbers of steps, itself first."""
        return [self, *(self.at(steps) for steps in self.grids if steps != self.num_steps)]

    def at(self, num_steps: int) -> Student:
        """The same student at another of its numbers of steps."""
        roles = [self.roles[0]] * num_steps
        return Student(self.denoiser, self.grids[num_steps], self.noise, roles, eta=self.eta)

    @property
    def num_steps(self) -> int:
        return len(self.times)

    @property
    def schedule(self) -> Schedule:
        return self.denoisers[0].schedule

    @property
    def denoiser(self) -> Denoiser:
        """Of the last step."""
        return self.denoisers[-1]

    def x0(self, x_t: Tensor, step: int, cond: Cond) -> Tensor:
        """Prediction of one step, fp32; x_t (B, ...)."""
        return self.denoisers[step].x0(x_t, self._time(step, x_t), cond)

    def inputs(self, noise: Tensor, cond: Cond, draw: Draw, step: int) -> Tensor:
        """What step ``step`` (0-based) is given after the student's own earlier ones; carries no gradient.

        This is DMD2's backward simulation (arXiv 2405.14867, section 4.5): training sees the inputs that
        inference will see.
        """
        x_t = self.schedule.begin(noise, self._time(0, noise))
        with torch.no_grad():
            for i in range(step):
                x_t = self.advance(x_t, self.x0(x_t, i, cond), i, self._time(i + 1, x_t), noise, draw)
        return x_t

    def advance(self, x_t: Tensor, x0: Tensor, step: int, t: Tensor, noise: Tensor, draw: Draw) -> Tensor:
        """From the prediction of one step to level t."""
        if self.noise == "ddim":
            return self.schedule.ddim_step(x_t, x0, self._time(step, x_t), t)
        if self.noise == "tcd":
            # The exported table has no noise at time 0, so a whole step down is the prediction itself.
            s = torch.floor((1 - self.eta) * t)
            s = torch.where(s > 0, s, self.schedule.clean)
            x_s = self.schedule.ddim_step(x_t, x0, self._time(step, x_t), s)
            return self.schedule.renoise(x_s, draw(x0), s, t) if self.eta else x_s
        return self.schedule.add_noise(x0, noise if self.noise == "fixed" else draw(x0), t)

    def rollout(self, noise: Tensor, cond: Cond, draw: Draw, exit_step: int) -> Tensor:
        """x0 of step ``exit_step`` on the student's own earlier steps; gradient in that one call, if enabled."""
        return self.x0(self.inputs(noise, cond, draw, exit_step), exit_step, cond)

    @torch.no_grad()
    def sample(self, noise: Tensor, cond: Cond, draw: Draw) -> Tensor:
        """All K steps: what stock diffusers does with the exported scheduler."""
        return self.rollout(noise, cond, draw, self.num_steps - 1)

    def _time(self, step: int, x: Tensor) -> Tensor:
        return repeated(self.times[step], x)
