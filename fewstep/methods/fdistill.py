"""f-distill: distribution matching under any f-divergence (Xu et al., 2025, arXiv 2502.15681).

DMD2 descends the reverse KL divergence. Any other f-divergence between teacher p and student q has the same gradient
with each sample weighted by ``h(r) = r^2 f''(r)`` of the density ratio ``r = p(x_t) / q(x_t)``, and the logit of
DMD2's discriminator is an estimate of ``log r``. Everything else is DMD2.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..bounds import Count0, Positive
from ..diffusion import objectives
from ..diffusion.cond import Cond
from ..diffusion.denoiser import Denoiser
from .base import Batch, Expected, Method, Phase, Progress, register
from .dmd2 import DMD2
from .terms import Divergence, Ratios, difference

if TYPE_CHECKING:
    from typing_extensions import Self


@register("fdistill")
class FDistill(Method):
    """DMD2 with samples weighted by a function of the discriminator's density ratio."""

    summary = "DMD2 under a chosen f-divergence, by the density ratio of its discriminator"
    papers = ("2502.15681",)
    networks = DMD2.networks

    @dataclass
    class Config(DMD2.Config):
        """DMD2's options and four more.

        Attributes:
            divergence: "rkl" (DMD2 itself), "kl", "js", "softened_rkl", "neyman", "hellinger", "jeffreys"; the first
                is mode seeking, "kl" and "jeffreys" cover most. See :func:`objectives.divergence_weight`.
            ratio_range: bounds of the density ratio. logit_limit: bound of the discriminator's logit before exp.
            time_bins: the ratio, whose mean over student samples is 1 at every level, is divided by its mean over the
                samples of the micro-batch in the same of so many equal parts of the time law. Parts of one sample
                have ratio 1, so take fewer with small batches; 0 divides nothing. Published code can average over
                iterations too, off by default; here nothing beside weights has a memory.
            gan_weight: as in DMD2, but never 0: without a discriminator there is no ratio.
        """

        divergence: Divergence = "js"
        ratio_range: Ratios = (0.1, 20.0)
        logit_limit: Positive = 10.0
        time_bins: Count0 = 10

        def expected(self) -> Expected:
            weight = (
                "a positive weight, for f-distill reads the density ratio from its discriminator; choose method.name "
                "dmd2 to run without one"
            )
            return {
                "gan_weight": (self.gan_weight > 0, weight),
                "discriminator_weight": (self.discriminator_weight > 0, weight),
                "one_noise": (
                    not self.one_noise,
                    "false; the ratio has its own forward",
                ),
                "time_law": (self.time_law == "uniform", "uniform, of which time_bins are equal parts"),
            }

        @classmethod
        def toy(cls) -> Self:
            return replace(super().toy(), student_input="real")

    config: Config

    def build(self, student: Denoiser, critic: Denoiser) -> None:
        self.host = DMD2(self.config, self.teacher, self.latent_shape, student=student, critic=critic)
        self.critic, self.student = critic, self.host.student

    @classmethod
    def needs(cls, config: FDistill.Config) -> tuple[str, ...]:
        return ("prompts", "images")

    def heads(self) -> dict[str, nn.Module]:
        return self.host.heads()

    def phases(self) -> list[Phase]:
        generator = Phase("generator", ("student",), self.generator_loss, every=self.config.critic_steps)
        return [generator, *self.host.phases()[1:]]

    def generator_loss(self, batch: Batch, _progress: Progress) -> dict[str, Tensor]:
        host = self.host
        x0, cond = host.generate(batch)
        batch.carry["x0"] = x0.detach()
        return {"dm": self.matching(x0, cond, batch), "gan": host.deception(x0, cond, batch)}

    def matching(self, x0: Tensor, cond: Cond, batch: Batch) -> Tensor:
        """DMD2's distribution matching, each sample weighted by h, whose mean over the micro-batch is 1."""
        config, schedule = self.config, self.teacher.schedule
        u = batch.rng.uniform(len(x0))
        t = schedule.draw_times(u, *config.time_range)
        with torch.no_grad():
            x_t = schedule.add_noise(x0, batch.rng.normal_like(x0), t)
            real, fake, logits = self.host.judged(x_t, t, cond)
            ratio = self.ratio(logits)
            if config.time_bins:
                ratio = ratio / objectives.bin_means(ratio, u, config.time_bins)
            h = objectives.divergence_weight(config.divergence, ratio)
        batch.log |= {"h_std": (h / h.mean()).std(correction=0), "density_ratio": ratio.mean()}
        return difference(config.weight, x0, real, fake, schedule, t, batch, h / h.mean())

    def ratio(self, logits: Tensor) -> Tensor:
        """Density ratio p / q (B,) from the mean logit of all heads, (B, n), bounded."""
        limit = self.config.logit_limit
        return logits.mean(1).clamp(-limit, limit).exp().clamp(*self.config.ratio_range)
