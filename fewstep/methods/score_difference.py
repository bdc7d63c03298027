"""Diff-Instruct (Luo et al., NeurIPS 2023, arXiv 2305.18455) and SwiftBrush (Nguyen & Tran, CVPR 2024, 2312.05239).

One loss: the student follows the difference between the scores of its critic and of the teacher, the gradient of an
integral KL divergence. The two papers differ in its weight, in the law of times, in who is updated first, and in
guidance: SwiftBrush (variational score distillation) guides teacher and critic alike, so that a student that matches
the teacher is at rest at any scale, and therefore trains the critic on the null prompt now and then.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from ..bounds import Count, Least0, Range, Share, Time
from ..diffusion.cond import unconditional
from ..diffusion.denoiser import Denoiser, NetDenoiser
from ..diffusion.schedules import EDM
from ..diffusion.student import Student
from ..diffusion.times import TimeLaw
from ..errors import RecipeError
from .base import Batch, Expected, Method, Phase, Progress, register
from .terms import EDM_LAW, Critic, Matching, MatchingWeight, carried, difference, regression

if TYPE_CHECKING:
    from typing_extensions import Self

CriticLoss = Literal["auto", "native", "x0", "eps", "v", "flow", "scaled_eps", "edm"]


@dataclass
class VariationalOptions(Critic, Matching):
    """Options of both methods; each has its paper's defaults.

    Attributes:
        start: time of the one step. Default: the noisiest; for an EDM teacher sigma 1, where the student's unit
            noise is noise of that level (Diff-Instruct's CIFAR-10 recipe).
        guide_critic: the critic in the student's loss has the teacher's guidance.
        null_probability: of an iteration in which the critic learns the student's samples under the null condition,
            all at once; a guided critic needs it.
        time_law: of student and critic. "log_normal" is EDM's, ``ln(sigma / alpha) ~ N(-1.2, 1.2^2)``; "uniform" is
            uniform in t, for an EDM teacher in EDM's grid; "auto" is log-normal for an EDM teacher, else uniform.
        time_range: of the student's uniform times, as fractions of the schedule; the critic uses all of it.
        critic_loss: kind of prediction whose squared error the critic minimises, or "scaled_eps" or "edm", see
            :func:`objectives.denoising_weight`; "native" is the network's own, "auto" is "edm" for an EDM
            teacher, else "native".
        critic_first: who is updated first. Second comes a student with samples of its own, or a critic on the samples
            of the student's turn, made before its update.
        critic_steps: critic updates per student update; both papers have 1.
    """

    start: Time | None = None
    guide_critic: bool = False
    null_probability: Share = 0.0
    weight: MatchingWeight = "one"
    time_law: Literal["auto", "uniform", "log_normal"] = "auto"  # type: ignore[assignment]  # a law of its own
    time_range: Range = (0.0, 1.0)
    critic_loss: CriticLoss = "auto"  # type: ignore[assignment]  # kinds of its own
    critic_first: bool = True
    critic_steps: Count = 1

    def expected(self) -> Expected:
        guided = self.guide_critic and self.guidance_scale != 1
        return {
            "null_probability": (
                self.null_probability > 0 or not guided,
                "more than 0; 0.1 is published. A guided critic has to learn the null condition too: "
                "give it one, or set method.guide_critic false",
            )
        }


class ScoreDifference(Method):
    """Student against critic in one step; the options say whose."""

    networks = ("student", "critic")
    student: Student
    critic: NetDenoiser

    config: VariationalOptions

    def build(self, student: Denoiser, critic: NetDenoiser) -> None:
        c, self.critic = self.config, critic
        edm = isinstance(self.teacher.schedule, EDM)
        start = c.start
        if start is None:
            start = 1.0 if edm else student.schedule.t_max
        self.student = Student(student, [int(start) if float(start).is_integer() else start])
        self.log_normal = c.time_law == "log_normal" or (c.time_law == "auto" and edm)
        self.critic_loss_kind = ("edm" if edm else "native") if c.critic_loss == "auto" else c.critic_loss
        if c.null_probability and getattr(critic, "null", None) is None:
            raise RecipeError(
                f"method.null_probability: {c.null_probability}: this teacher has no null condition; expected 0"
            )

    def phases(self) -> list[Phase]:
        generator = Phase("generator", ("student",), self.generator_loss, every=self.config.critic_steps)
        critic = Phase("critic", ("critic",), self.critic_loss)
        return [critic, generator] if self.config.critic_first else [generator, critic]

    # ------------------------------------------------------------------------------------------------- losses
    def generator_loss(self, batch: Batch, _progress: Progress) -> dict[str, Tensor]:
        x0 = self.generate(batch)
        batch.carry["x0"] = x0.detach()
        guide_critic = self.config.guide_critic
        with torch.no_grad():
            x_t, t = self.noised(x0, batch, *self.config.time_range)
            guidance = self.config.guidance_at(t, self.teacher.schedule)
            real = self.teacher.x0(x_t, t, batch.cond, guidance=guidance)
            fake = self.critic.x0(x_t, t, batch.cond, guidance=guidance if guide_critic else 1.0)
        batch.note_latents(x0)
        if self.config.guidance_scale == 1 or not guide_critic:  # a guided critic is no posterior mean
            batch.note_lag(x0, real, fake)
        schedule = self.teacher.schedule
        return {"dm": difference(self.config.weight, x0, real, fake, schedule, t, batch, follows=False)}

    def critic_loss(self, batch: Batch, _progress: Progress) -> dict[str, Tensor]:
        x0 = carried(batch, lambda: self.generate(batch))
        cond = batch.cond
        # One draw for all ranks and micro-batches: the whole batch drops its condition, or none of it.
        if self.config.null_probability and batch.shared.uniform(1).item() < self.config.null_probability:
            cond = unconditional(self.critic.null.to(x0.device), cond, len(x0))
        x_t, t = self.noised(x0, batch)
        return {"denoising": regression(self.critic, self.critic_loss_kind, x0, x_t, t, cond)}

    # ----------------------------------------------------------------------------------------------- sampling
    def generate(self, batch: Batch) -> Tensor:
        """What the student makes of fresh noise, (B, ...)."""
        return self.student.rollout(batch.rng.normal(*batch.shape), batch.cond, batch.rng.normal_like, 0)

    def noised(self, x0: Tensor, batch: Batch, low: float = 0.0, high: float = 1.0) -> tuple[Tensor, Tensor]:
        """x0 at times of the method's law, per sample."""
        schedule = self.teacher.schedule
        law = EDM_LAW if self.log_normal else TimeLaw("uniform", low, high)
        t = law.draw(schedule, batch.rng, len(x0))
        return schedule.add_noise(x0, batch.rng.normal_like(x0), t), t


@register("diff_instruct")
class DiffInstruct(ScoreDifference):
    """The integral KL with weight 1 on the difference of x0 predictions."""

    summary = "integral KL between student and teacher: the critic first, then the student, one to one"
    papers = ("2305.18455",)
    steps = "1"
    sums = True

    @dataclass
    class Config(VariationalOptions):
        """The defaults of Diff-Instruct are those of :class:`VariationalOptions`."""


@register("swiftbrush")
class SwiftBrush(ScoreDifference):
    """Variational score distillation of a text-to-image teacher, without images."""

    summary = "variational score distillation: guided teacher against guided LoRA critic, image-free"
    papers = ("2312.05239",)
    steps = "1"

    @dataclass
    class Config(VariationalOptions):
        """The defaults of SwiftBrush; see :class:`VariationalOptions`."""

        guidance_scale: Least0 = 4.5
        guide_critic: bool = True
        null_probability: Share = 0.1
        weight: MatchingWeight = "vsd"
        time_law: Literal["auto", "uniform", "log_normal"] = "uniform"
        time_range: Range = (0.02, 0.98)
        critic_loss: CriticLoss = "scaled_eps"
        critic_first: bool = False

        @classmethod
        def toy(cls) -> Self:
            return cls(guidance_scale=1.0, null_probability=0.0)
