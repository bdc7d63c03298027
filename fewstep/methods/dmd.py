"""DMD: distribution matching with regression on the teacher's own pairs (Yin et al., CVPR 2024, arXiv 2311.18828)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Literal

import torch
from torch import Tensor

from ..bounds import Bound, Count, Least0, Time
from ..diffusion.cond import Cond
from ..diffusion.denoiser import Denoiser
from ..diffusion.student import Student
from . import terms
from .base import Batch, Expected, Method, Phase, Progress, register

if TYPE_CHECKING:
    from typing_extensions import Self


@register("dmd")
class DMD(Method):
    """One step: a score difference, and regression towards what the teacher makes of the same noise."""

    summary = "distribution matching and regression on teacher pairs; one step"
    papers = ("2311.18828",)
    steps = "1"
    networks = ("student", "critic")
    student: Student

    @dataclass
    class Config(terms.Critic, terms.Matching):
        """Defaults are the published ones; further options are those of :mod:`.terms`.

        Attributes:
            start: time at which the student is called; null is the noisiest (999).
            guidance_scale: of the teacher only; pairs must have been made with the same (SD1.5: 3 or 8).
            regression_weight: of the pair loss beside the score difference (0.25; 0.5 for unconditional CIFAR-10).
            matching_weight: of the score difference; 0 is regression alone, without a critic: the warm-up that DMD2
                gives its one-step SDXL.
            regression: distance to the teacher's sample: "l2" of latents, "features" of decoded images in the offline
                extractor, or "lpips" of decoded images (the paper's), which needs its weights on disk.
            match_pairs: the score difference also acts on the paired samples (the paper's text-to-image runs).
        """

        start: Time | None = None
        critic_steps: Count = 1
        regression_weight: Annotated[float, Bound("0 or more; 0 needs no pairs", lambda x: x >= 0)] = 0.25
        matching_weight: Least0 = 1.0
        regression: Literal["l2", "features", "lpips"] = "l2"
        match_pairs: bool = False

        def expected(self) -> Expected:
            alone = self.regression_weight > 0
            return {
                "matching_weight": (
                    self.matching_weight > 0 or alone,
                    "a positive number with regression_weight 0",
                ),
            }

        def smoke(self) -> Self:
            offline = "features" if self.regression == "lpips" else self.regression
            return replace(super().smoke(), regression=offline)

    config: Config

    def build(self, student: Denoiser, critic: Denoiser | None = None) -> None:
        start = self.config.start
        self.critic = critic
        self.student = Student(student, [student.schedule.t_max if start is None else start])
        # Distance of latents; the run puts a perceptual one here where the recipe asks for it.
        self.distance = torch.nn.functional.mse_loss

    @classmethod
    def networks_for(cls, config: DMD.Config) -> tuple[str, ...]:
        return cls.networks if config.matching_weight else ("student",)

    @classmethod
    def needs(cls, config: DMD.Config) -> tuple[str, ...]:
        return ("prompts", "pairs") if config.regression_weight else ("prompts",)

    @classmethod
    def wants(cls, config: Config) -> tuple[str, ...]:
        return ("distance",) if config.regression_weight else ()

    def phases(self) -> list[Phase]:
        generator = Phase("generator", ("student",), self.generator_loss, every=self.config.critic_steps)
        return [generator, Phase("critic", ("critic",), self.critic_loss)] if self.critic else [generator]

    # ------------------------------------------------------------------------------------------------- losses
    def generator_loss(self, batch: Batch, _progress: Progress) -> dict[str, Tensor]:
        c, inputs = self.config, []
        if c.matching_weight:
            inputs.append((batch.rng.normal(*batch.shape), batch.cond))
        free = sum(len(noise) for noise, _ in inputs)
        if c.regression_weight:
            noise, target = batch.pairs
            inputs.append((noise, batch.pair_cond))
        noises, conds = zip(*inputs)
        cond = Cond.cat(*conds)
        x0 = self.generate(torch.cat(noises), cond, batch)  # both kinds in one forward
        losses = {}
        if c.matching_weight:
            matched = len(x0) if c.match_pairs else free
            batch.carry["x0"] = x0[:matched].detach()
            dm = self.matching(x0[:matched], cond.rows(slice(0, matched)), batch)
            losses["dm"] = c.matching_weight * dm
        if c.regression_weight:
            losses["regression"] = c.regression_weight * self.distance(x0[free:], target)
        return losses

    def critic_loss(self, batch: Batch, _progress: Progress) -> dict[str, Tensor]:
        """On the very samples of the student's turn (alg. 1), where there was one."""
        x0 = terms.carried(batch, lambda: self.generate(batch.rng.normal(*batch.shape), batch.cond, batch))
        cond = Cond.cat(batch.cond, batch.pair_cond) if len(x0) > batch.shape[0] else batch.cond
        x_t, t = terms.noised(x0, self.critic.schedule, batch)
        return {"denoising": terms.regression(self.critic, self.config.critic_loss, x0, x_t, t, cond)}

    def matching(self, x0: Tensor, cond: Cond, batch: Batch) -> Tensor:
        return terms.matching(self.config, self.teacher, self.critic, x0, cond, batch)

    def generate(self, noise: Tensor, cond: Cond, batch: Batch) -> Tensor:
        return self.student.rollout(noise, cond, batch.rng.normal_like, 0)
