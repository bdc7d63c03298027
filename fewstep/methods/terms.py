"""Terms that methods share, each with the options that go with it: a student's times, the score difference that moves
it, and the regression that keeps its critic near.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Literal

import torch
from torch import Tensor

from ..bounds import Bound, Count, Least0, Range, Time
from ..diffusion import objectives
from ..diffusion.cond import Cond
from ..diffusion.denoiser import Denoiser, Guidance
from ..diffusion.schedules import Schedule, expand
from ..diffusion.times import TimeLaw, uniform_times
from .base import Batch, Expected, Options

if TYPE_CHECKING:
    from typing_extensions import Self

Kind = Literal["native", "x0", "eps", "v", "flow"]
MatchingWeight = Literal["l1", "kl", "vsd", "one"]
EDM_LAW = TimeLaw("log_normal", mean=-1.2, std=1.2)  # EDM, arXiv 2206.00364, table 1
# Of fewstep.diffusion.objectives.divergence_weight, and bounds of the density ratio that it is a function of.
Divergence = Literal["rkl", "kl", "js", "softened_rkl", "neyman", "hellinger", "jeffreys"]
Ratios = Annotated[
    tuple[float, float],
    Bound("0 < low < high, around 1; (0.1, 20) is f-distill's", lambda r: 0 < r[0] < r[1]),
]


@dataclass
class Times(Options):
    """When the student is called.

    Attributes:
        num_steps: its steps. start: its first time, by default the noisiest; equal strides lead down from there.
        times: an explicit list instead of both.
    """

    num_steps: Count = 4
    start: Time | None = None
    times: list[Time] | None = None

    def expected(self) -> Expected:
        if self.times is None and self.start is not None and self.start > 1:  # an index of a table
            uniform_times(self.num_steps, self.start)
        return {}


@dataclass
class Matching(Options):
    """The score difference.

    Attributes:
        guidance_scale: of the teacher only, ``u + g (c - u)``; the critic has none.
        guidance_time_range: times at which the teacher is guided, as fractions of the schedule; at the others its
            scale is 1 (arXiv 2404.07724).
        weight: see :func:`fewstep.diffusion.objectives.matching_weight`.
        time_law: its times: "uniform" in time_range, or "log_normal", EDM's ``ln(sigma / alpha) ~ N(-1.2, 1.2^2)``,
            which is little noise for the most part. time_range: as fractions of the schedule; the critic has all of it.
    """

    guidance_scale: Least0 = 1.0
    guidance_time_range: Range = (0.0, 1.0)
    weight: MatchingWeight = "l1"
    time_law: Literal["uniform", "log_normal"] = "uniform"
    time_range: Range = (0.02, 0.98)

    def expected(self) -> Expected:
        whole = tuple(self.time_range) == type(self).time_range
        return {
            "time_range": (
                whole or self.time_law != "log_normal",
                f"{type(self).time_range} with time_law log_normal, which has no range; or set time_law uniform",
            )
        }

    def noised(self, x0: Tensor, schedule: Schedule, batch: Batch) -> tuple[Tensor, Tensor]:
        """x0 (B, ...) at times (B,) of the score difference."""
        law = EDM_LAW if self.time_law == "log_normal" else TimeLaw("uniform", *self.time_range)
        t = law.draw(schedule, batch.rng, len(x0))
        return schedule.add_noise(x0, batch.rng.normal_like(x0), t), t

    def guidance_at(self, t: Tensor, schedule: Schedule) -> Guidance:
        """The teacher's scale at times (B,): one number, or (B,) where it is guided in a part of the schedule."""
        if tuple(self.guidance_time_range) == (0.0, 1.0):
            return self.guidance_scale
        ends = torch.tensor(self.guidance_time_range, dtype=torch.float64)
        low, high = schedule.draw_times(ends).tolist()
        return torch.where((low <= t) & (t <= high), self.guidance_scale, 1.0)


@dataclass
class Critic(Options):
    """The critic's own turns.

    Attributes:
        critic_steps: critic updates per student update.
        critic_loss: kind of prediction whose squared error it minimises; "native" is the network's own.
    """

    critic_steps: Count = 5
    critic_loss: Kind = "native"

    def smoke(self) -> Self:
        return replace(super().smoke(), critic_steps=2)


def noised(
    x0: Tensor, schedule: Schedule, batch: Batch, low: float = 0.0, high: float = 1.0
) -> tuple[Tensor, Tensor]:
    """x0 (B, ...) at times (B,) drawn from a part of the schedule, by default all of it, per sample."""
    t = schedule.draw_times(batch.rng.uniform(len(x0)), low, high)
    return schedule.add_noise(x0, batch.rng.normal_like(x0), t), t


def matching(
    config: Matching, teacher: Denoiser, critic: Denoiser, x0: Tensor, cond: Cond, batch: Batch
) -> Tensor:
    """Distribution matching (DMD, arXiv 2311.18828) at a random time; gradient reaches x0 (B, ...) only."""
    with torch.no_grad():
        x_t, t = config.noised(x0, teacher.schedule, batch)
        real = teacher.x0(x_t, t, cond, guidance=config.guidance_at(t, teacher.schedule))
        fake = critic.x0(x_t, t, cond)
    return difference(config.weight, x0, real, fake, teacher.schedule, t, batch)


def difference(
    weight: str,
    x0: Tensor,
    real: Tensor,
    fake: Tensor,
    schedule: Schedule,
    t: Tensor,
    batch: Batch,
    factor: Tensor | float = 1.0,
    follows: bool = True,
) -> Tensor:
    """A loss that moves x0 (B, ...) along the difference of two predictions; vital signs go to the log.

    Args:
        weight, schedule, t: see :func:`fewstep.diffusion.objectives.matching_weight`. factor: (B,), a further one.
        real, fake: of teacher and critic at one noisy version of x0. follows: the critic is to be the posterior mean
            of x0, which its lag is measured by.
    """
    with torch.no_grad():
        weights = objectives.matching_weight(weight, x0, real, schedule, t) * factor
    if follows:
        batch.note_lag(x0, real, fake)
        batch.note_latents(x0)
    return objectives.distribution_matching(x0, real, fake, weights)


def kind_of(critic: Denoiser, kind: str) -> str:
    """The kind of prediction that "native" is for a critic; a closed form, which has no network, predicts x0."""
    return getattr(critic, "prediction", "x0") if kind == "native" else kind


def regression(
    critic: Denoiser,
    kind: str,
    target: Tensor,
    x_t: Tensor,
    t: Tensor,
    cond: Cond,
    guidance: float = 1.0,
    factor: Tensor | float = 1.0,
) -> Tensor:
    """Squared error of the (guided) critic at x_t (B, ...); samples that are not finite are left out.

    Args:
        kind: see :func:`fewstep.diffusion.objectives.denoising_weight`, or "native". target: x0, or what has its mean.
        factor: (B,), a further weight.
    """
    keep = objectives.finite_rows(target)
    target, x_t = (torch.where(expand(keep, v).bool(), v, 0.0) for v in (target, x_t))
    weight = objectives.denoising_weight(kind_of(critic, kind), critic.schedule, t) * factor * keep
    return objectives.denoising(critic.x0(x_t, t, cond, guidance=guidance), target, weight)


def carried(batch: Batch, make: Callable[[], Tensor]) -> Tensor:
    """The student's samples of this iteration: those of its own turn, from before its update, or fresh ones."""
    if "x0" not in batch.carry:
        with torch.no_grad():
            batch.carry["x0"] = make()
    return batch.carry["x0"]
