"""Diff-Instruct (Luo et al., NeurIPS 2023, arXiv 2305.18455) and SwiftBrush (Nguyen & Tran, CVPR 2024, 2312.05239).

One loss: the student follows the difference between the scores of its critic and of the teacher, the gradient of an
integral KL divergence. The two papers differ in its weight, in the law of times, in who is updated first, and in
guidance: SwiftBrush (variational score distillation) guides teacher and critic alike, so that a student that matches
the teacher is at rest at any scale, and therefore trains the critic on the null prompt now and then.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..diffusion import objectives
from ..diffusion.denoiser import Denoiser, NetDenoiser
from ..diffusion.schedules import EDM
from ..diffusion.student import Student
from ..diffusion.times import TimeLaw
from ..errors import RecipeError
from .base import Batch, Method, Phase, Progress, register

EDM_LAW = TimeLaw("log_normal", mean=-1.2, std=1.2)  # EDM, arXiv 2206.00364, table 1


@dataclass
class Options:
    """Options of both methods; each has its paper's defaults.

    Attributes:
        start: time of the one step. Default: the noisiest; for an EDM teacher sigma 1, where the student's unit
            noise is noise of that level (Diff-Instruct's CIFAR-10 recipe).
        guidance_scale: of the teacher, ``u + g (c - u)``. guide_critic: the critic in the student's loss has the same.
        null_probability: of an iteration in which the critic learns the student's samples under the null condition,
            all at once; a guided critic needs it.
        weight: of the score difference, see :func:`fewstep.diffusion.objectives.matching_weight`.
        time_law: of student and critic. "lognormal" is EDM's, ``ln(sigma / alpha) ~ N(-1.2, 1.2^2)``; "uniform" is
            uniform in t, for an EDM teacher in EDM's grid; "auto" is lognormal for an EDM teacher, else uniform.
        time_range: of the student's uniform times, as fractions of the schedule; the critic uses all of it.
        critic_loss: kind of prediction whose squared error the critic minimises, or "scaled_eps" or "edm", see
            :func:`objectives.denoising_weight`; "native" is the network's own, "auto" is "edm" for an EDM
            teacher, else "native".
        critic_first: who is updated first. Second comes a student with samples of its own, or a critic on the samples
            of the student's turn, made before its update.
        critic_steps: critic updates per student update; both papers have 1.
    """

    start: int | float | None = None
    guidance_scale: float = 1.0
    guide_critic: bool = False
    null_probability: float = 0.0
    weight: Literal["l1", "kl", "vsd", "one"] = "one"
    time_law: Literal["auto", "uniform", "lognormal"] = "auto"
    time_range: tuple[float, float] = (0.0, 1.0)
    critic_loss: Literal["auto", "native", "x0", "eps", "v", "flow", "scaled_eps", "edm"] = "auto"
    critic_first: bool = True
    critic_steps: int = 1

    def __post_init__(self):
        low, high = self.time_range
        if not 0 <= low < high <= 1:
            raise RecipeError(f"method.time_range: {self.time_range}: expected 0 <= low < high <= 1")
        if self.critic_steps < 1:
            raise RecipeError(f"method.critic_steps: {self.critic_steps}: expected at least 1")
        if not 0 <= self.null_probability <= 1:
            raise RecipeError(
                f"method.null_probability: {self.null_probability}: expected a probability; 0.1 is published, 0 is off"
            )
        if self.guide_critic and self.guidance_scale != 1 and not self.null_probability:
            raise RecipeError(
                "method.null_probability: 0: a guided critic has to learn the null condition too; expected a positive "
                "probability such as 0.1, or set method.guide_critic false"
            )


class ScoreDifference(Method):
    """Student against critic in one step; the options say whose."""

    networks = ("student", "critic")
    student: Student
    critic: NetDenoiser

    def __init__(
        self,
        config: Options,
        teacher: Denoiser,
        latent_shape: Sequence[int],
        *,
        student: Denoiser,
        critic: NetDenoiser,
    ):
        self.config, self.teacher, self.critic = config, teacher, critic
        edm = isinstance(teacher.schedule, EDM)
        start = config.start
        if start is None:
            start = 1.0 if edm else student.schedule.t_max
        self.student = Student(student, [int(start) if float(start).is_integer() else start])
        self.lognormal = config.time_law == "lognormal" or (config.time_law == "auto" and edm)
        kind = config.critic_loss
        if kind == "auto":
            kind = "edm" if edm else "native"
        self.critic_kind = getattr(critic, "prediction", "x0") if kind == "native" else kind
        if config.null_probability and getattr(critic, "null", None) is None:
            raise RecipeError(
                f"method.null_probability: {config.null_probability}: this teacher has no null condition; expected 0"
            )

    def phases(self) -> list[Phase]:
        generator = Phase("generator", ("student",), self.generator_loss, every=self.config.critic_steps)
        critic = Phase("critic", ("critic",), self.critic_loss)
        return [critic, generator] if self.config.critic_first else [generator, critic]

    # ------------------------------------------------------------------------------------------------- losses
    def generator_loss(self, batch: Batch, _progress: Progress) -> dict[str, Tensor]:
        x0 = self.generate(batch)
        batch.carry["x0"] = x0.detach()
        guidance = self.config.guidance_scale
        with torch.no_grad():
            x_t, t = self.noised(x0, batch, *self.config.time_range)
            real = self.teacher.x0(x_t, t, batch.cond, guidance=guidance)
            fake = self.critic.x0(x_t, t, batch.cond, guidance=guidance if self.config.guide_critic else 1.0)
            weight = objectives.matching_weight(self.config.weight, x0, real, self.teacher.schedule, t)
        # A guided critic is no posterior mean, so the lag noted here is not zero at rest under SwiftBrush.
        batch.note_health(x0, real, fake)
        return {"dm": objectives.distribution_matching(x0, real, fake, weight)}

    def critic_loss(self, batch: Batch, _progress: Progress) -> dict[str, Tensor]:
        x0 = batch.carry.get("x0")
        if x0 is None:
            with torch.no_grad():
                x0 = self.generate(batch)
        cond = batch.cond
        # One draw for all ranks and micro-batches: the whole batch drops its condition, or none of it.
        if self.config.null_probability and batch.shared.uniform(1).item() < self.config.null_probability:
            cond = self.critic.null.to(x0.device).expand(len(x0))
        x_t, t = self.noised(x0, batch)
        weight = objectives.denoising_weight(self.critic_kind, self.critic.schedule, t)
        return {"denoising": objectives.denoising(self.critic.x0(x_t, t, cond), x0, weight)}

    # ----------------------------------------------------------------------------------------------- sampling
    def generate(self, batch: Batch) -> Tensor:
        """What the student makes of fresh noise, (B, ...)."""
        return self.student.rollout(batch.rng.normal(*batch.shape), batch.cond, batch.rng.normal_like, 0)

    def noised(self, x0: Tensor, batch: Batch, low: float = 0.0, high: float = 1.0) -> tuple[Tensor, Tensor]:
        """x0 at times of the method's law, per sample."""
        schedule = self.teacher.schedule
        law = EDM_LAW if self.lognormal else TimeLaw("uniform", low, high)
        t = law.draw(schedule, batch.rng, len(x0))
        return schedule.add_noise(x0, batch.rng.normal_like(x0), t), t


@register("diff_instruct")
class DiffInstruct(ScoreDifference):
    """The integral KL with weight 1 on the difference of x0 predictions."""

    summary = "integral KL between student and teacher: the critic first, then the student, one to one"

    @dataclass
    class Config(Options):
        """The defaults of Diff-Instruct are those of :class:`Options`."""


@register("swiftbrush")
class SwiftBrush(ScoreDifference):
    """Variational score distillation of a text-to-image teacher, without images."""

    summary = "variational score distillation: guided teacher against guided LoRA critic, image-free"

    @dataclass
    class Config(Options):
        """The defaults of SwiftBrush; see :class:`Options`."""

        guidance_scale: float = 4.5
        guide_critic: bool = True
        null_probability: float = 0.1
        weight: Literal["l1", "kl", "vsd", "one"] = "vsd"
        time_law: Literal["auto", "uniform", "lognormal"] = "uniform"
        time_range: tuple[float, float] = (0.02, 0.98)
        critic_loss: Literal["auto", "native", "x0", "eps", "v", "flow", "scaled_eps", "edm"] = "scaled_eps"
        critic_first: bool = False
