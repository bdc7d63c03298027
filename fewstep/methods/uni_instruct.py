"""Uni-Instruct: score identity under any f-divergence (Wang et al., NeurIPS 2025, arXiv 2505.20755).

Every f-divergence between teacher and student is the sum, over all levels of noise, of their Fisher divergences with
each sample weighted by ``h(r) = r^2 f''(r)`` of the density ratio. SiD and SIM are its reverse KL. The logit of SiDA's
discriminator, which has no weights beside the critic's, is an estimate of ``log r``. Everything else is SiDA.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from torch import Tensor

from ..bounds import Bound
from ..diffusion import objectives
from .base import Expected, register
from .sid import SiD
from .terms import Divergence, Ratios

if TYPE_CHECKING:
    from typing_extensions import Self


@register("uni_instruct")
class UniInstruct(SiD):
    """SiDA with samples weighted by a function of the discriminator's density ratio."""

    summary = "score identity under a chosen f-divergence, by the density ratio of SiDA's discriminator"
    papers = ("2505.20755",)

    @dataclass
    class Config(SiD.Config):
        """SiD's options with SiDA's discriminator, and three more.

        Attributes:
            divergence: "kl" is the published choice for the lowest distances, "rkl" is SiDA; see
                :func:`objectives.divergence_weight`. It takes effect when the GAN joins, see gan_schedule.
            ratio_range: bounds of the density ratio. Its weight is divided by its mean over the micro-batch.
            through_ratio: the gradient passes through the ratio too. Published is false; with alpha 0.5 and an exact
                ratio true is the exact gradient of the divergence.
            gan_weight: as in SiDA, but never 0: without a discriminator there is no ratio.
        """

        divergence: Divergence = "kl"
        ratio_range: Ratios = (0.1, 20.0)
        through_ratio: bool = False
        gan_weight: Annotated[float, Bound("a positive number; 1e-4 is published", lambda x: x > 0)] = 1e-4

        def expected(self) -> Expected:
            _, kappa2, kappa3, _ = self.kappas
            return {
                **super().expected(),
                "kappa3": (kappa2 == kappa3, f"kappa2's {kappa2:g}: the critic has one place in this loss"),
            }

        @classmethod
        def toy(cls) -> Self:
            return cls(taps=["layers.0"], gan_schedule=(0, 0))

    config: Config

    def identity(
        self,
        x0: Tensor,
        x_t: Tensor,
        real: Tensor,
        fake: Tensor,
        weight: Tensor,
        _subtracted: Tensor | None,
        logits: Tensor,
        t: Tensor,
    ) -> Tensor:
        config, schedule = self.config, self.teacher.schedule
        low, high = map(math.log, config.ratio_range)
        log_ratio = logits.detach().mean(1).clamp(low, high)
        h = objectives.divergence_weight(config.divergence, log_ratio.exp())
        scale = (schedule.alpha(t) / schedule.sigma(t) ** 2).to(x0.dtype) if config.through_ratio else None
        weight = weight / h.mean()
        return objectives.expanded_divergence(
            x0, real, fake, weight, x_t, log_ratio, config.divergence, config.alpha, scale
        )
