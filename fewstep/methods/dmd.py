"""DMD: distribution matching with regression on the teacher's own pairs (Yin et al., CVPR 2024, arXiv 2311.18828)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..diffusion import objectives
from ..diffusion.cond import Cond
from ..diffusion.denoiser import Denoiser
from ..diffusion.student import Student
from ..errors import RecipeError
from .base import Batch, Method, Phase, Progress, register


@register("dmd")
class DMD(Method):
    """One step: a score difference, and regression towards what the teacher makes of the same noise."""

    summary = "distribution matching and regression on teacher pairs; one step"
    networks = ("student", "critic")
    student: Student

    @dataclass
    class Config:
        """Defaults are the published ones.

        Attributes:
            start: time at which the student is called; null is the noisiest (999).
            guidance_scale: of the teacher only; pairs must have been made with the same (SD1.5: 3 or 8).
            regression_weight: of the pair loss beside the score difference (0.25; 0.5 for unconditional CIFAR-10).
            regression: distance to the teacher's sample: "l2" of latents, "features" of decoded images in the offline
                extractor, or "lpips" of decoded images (the paper's), which needs its weights on disk.
            match_pairs: the score difference also acts on the paired samples (the paper's text-to-image runs).
            weight, time_range: of the score difference, see :func:`fewstep.diffusion.objectives.matching_weight`.
            critic_loss: kind of prediction whose squared error the critic minimises; "native" is the network's own.
        """

        start: int | float | None = None
        guidance_scale: float = 1.0
        regression_weight: float = 0.25
        regression: Literal["l2", "features", "lpips"] = "l2"
        match_pairs: bool = False
        weight: Literal["l1", "kl", "vsd", "one"] = "l1"
        time_range: tuple[float, float] = (0.02, 0.98)
        critic_loss: Literal["native", "eps", "x0", "v", "flow"] = "native"

        def __post_init__(self):
            low, high = self.time_range
            if not 0 <= low < high <= 1:
                raise RecipeError(f"method.time_range: {self.time_range}: expected 0 <= low < high <= 1")
            if self.regression_weight < 0:
                raise RecipeError(
                    f"method.regression_weight: {self.regression_weight}: expected 0 or more; 0 needs no pairs"
                )

    def __init__(
        self,
        config: DMD.Config,
        teacher: Denoiser,
        latent_shape: Sequence[int],
        *,
        student: Denoiser,
        critic: Denoiser,
    ):
        self.config, self.teacher, self.critic = config, teacher, critic
        self.student = Student(student, [student.schedule.t_max if config.start is None else config.start])
        kind = config.critic_loss
        self.critic_kind = getattr(critic, "prediction", "x0") if kind == "native" else kind
        # Distance of latents; the run puts a perceptual one here where the recipe asks for it.
        self.distance: Callable[[Tensor, Tensor], Tensor] = torch.nn.functional.mse_loss

    @classmethod
    def needs(cls, config: DMD.Config) -> tuple[str, ...]:
        return ("prompts", "pairs") if config.regression_weight else ("prompts",)

    def phases(self) -> list[Phase]:
        return [
            Phase("generator", ("student",), self.generator_loss),
            Phase("critic", ("critic",), self.critic_loss),
        ]

    # ------------------------------------------------------------------------------------------------- losses
    def generator_loss(self, batch: Batch, _progress: Progress) -> dict[str, Tensor]:
        noise, cond, paired = batch.rng.normal(*batch.shape), batch.cond, 0
        if self.config.regression_weight:
            noises, target = batch.pairs
            paired = len(noises)
            noise, cond = torch.cat([noise, noises]), Cond.cat(cond, batch.pair_cond)
        x0 = self.student.rollout(noise, cond, batch.rng.normal_like, 0)  # both kinds in one forward
        free = len(x0) - paired
        matched = len(x0) if self.config.match_pairs else free
        batch.carry["x0"] = x0[:matched].detach()
        losses = {"dm": self.matching(x0[:matched], cond.rows(slice(0, matched)), batch)}
        if paired:
            losses["regression"] = self.config.regression_weight * self.distance(x0[free:], target)
        return losses

    def critic_loss(self, batch: Batch, _progress: Progress) -> dict[str, Tensor]:
        """On the very samples of the student's turn, 1:1 (alg. 1)."""
        x0, schedule = batch.carry["x0"], self.critic.schedule
        cond = Cond.cat(batch.cond, batch.pair_cond) if len(x0) > batch.shape[0] else batch.cond
        t = schedule.draw_times(batch.rng.uniform(len(x0)))
        x_t = schedule.add_noise(x0, batch.rng.normal_like(x0), t)
        weight = schedule.error_weight(self.critic_kind, t)
        return {"denoising": objectives.denoising(self.critic.x0(x_t, t, cond), x0, weight)}

    def matching(self, x0: Tensor, cond: Cond, batch: Batch) -> Tensor:
        """The score difference at a random time; gradient reaches x0 only."""
        schedule = self.teacher.schedule
        t = schedule.draw_times(batch.rng.uniform(len(x0)), *self.config.time_range)
        with torch.no_grad():
            x_t = schedule.add_noise(x0, batch.rng.normal_like(x0), t)
            real = self.teacher.x0(x_t, t, cond, guidance=self.config.guidance_scale)
            fake = self.critic.x0(x_t, t, cond)
            weight = objectives.matching_weight(self.config.weight, x0, real, schedule, t)
        batch.note_health(x0, real, fake)
        return objectives.distribution_matching(x0, real, fake, weight)
