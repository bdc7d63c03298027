"""SANA-Sprint: sCM and LADD together, for one to four steps (Chen et al. 2025, arXiv 2503.09641)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from ..bounds import Count0, Least0, Number, Positive, Share
from ..diffusion.cond import Cond
from ..diffusion.denoiser import Guidance, NetDenoiser, Scalar
from ..diffusion.discriminator import Heads
from ..diffusion.embedding import with_scalar
from ..diffusion.rng import Rng
from ..diffusion.schedules import TrigFlow, angle_range, expand
from .base import Batch, Expected, Method, Phase, Progress, register
from .ladd import AdversarialOptions, Adversary
from .scm import Angle, Consistency, ConsistencyOptions, student_of

if TYPE_CHECKING:
    from typing_extensions import Self


@register("sana_sprint")
class SanaSprint(Method):
    """Consistency keeps every step near the teacher's ODE, the discriminator keeps it sharp."""

    summary = "sCM plus LADD, one student for 1, 2 and 4 steps"
    papers = ("2503.09641",)
    steps = "1, 2, 4"
    exports = "pipeline of SANA with SCM; else as scm"
    extras = ("weighting", "discriminator")

    @dataclass
    class Config(AdversarialOptions, ConsistencyOptions):
        """Options beside those of the two losses. Defaults are the paper's, or its code's where that is said.

        Attributes:
            angles: the paper's searched times for 1, 2 and 4 steps (table 7), whose first of several is 1.5683; a stock
                sampler's first input is pure noise, so ours begin at pi/2.
            guidance_scales: of the teacher, drawn for each sample. guidance_scale: the one to sample with.
            guidance_embedding: the student is told the scale of its sample, ``0.1 w`` through an embedding of its own
                beside that of time; without it, guidance_scale alone is distilled in.
            adversarial_weight: lambda.
            heads: "conv", as in its code, told nothing and with captions of others as fakes (misaligned).
            max_time: how often the adversarial terms see the student at the noisiest level, where one step starts.
            time_mean: 0.0 in the paper, 0.2 in its code. prior: "1/tan" in its code, nothing in its formula.
            tangent_norm: the plain norm, as in its code, against which adversarial_weight is meant.
            warmup: student updates. The published counter runs over both phases, so its 4,000 are 2,000 of ours.
        """

        angles: list[list[Angle]] = field(
            default_factory=lambda: [[math.pi / 2], [math.pi / 2, 1.3], [math.pi / 2, 1.3, 1.1, 0.6]]
        )
        guidance_scales: list[Least0] = field(default_factory=lambda: [4.0, 4.5, 5.0])
        guidance_scale: Least0 = 4.5
        guidance_embedding: bool = True
        adversarial_weight: Least0 = 0.5
        max_time: Share = 0.5
        time_mean: Number = 0.2
        time_std: Positive = 1.6
        warmup: Count0 = 2000
        prior: Literal["one", "1/tan"] = "1/tan"
        tangent_norm: Literal["mean", "sum"] = "sum"
        taps: list[str] = field(default_factory=lambda: [f"transformer_blocks.{i}" for i in (2, 8, 14, 19)])
        noise_mean: Number = -0.6 + math.log(2)
        heads: Heads = "conv"
        conditional_heads: bool = False
        misaligned: bool = True

        def expected(self) -> Expected:
            scales = self.guidance_scales or [math.nan]
            told = min(scales) <= self.guidance_scale <= max(scales)
            return {
                "guidance_scale": (
                    told or not self.guidance_embedding,
                    f"a scale within those that are trained, guidance_scales {self.guidance_scales}",
                ),
            }

        @classmethod
        def toy(cls) -> Self:
            return cls(taps=["layers.0", "layers.2"], guidance_embedding=False, guidance_scale=1.0)

    config: Config
    teacher: NetDenoiser

    def build(self, student: NetDenoiser) -> None:
        config = self.config
        if config.guidance_embedding:
            student = with_scalar(student, "guidance", Scalar(config.guidance_scale))
        self.student = student_of(student, config.angles)
        self.term = Consistency(config, self.teacher, student)
        self.term.check(self.latent_shape)
        self.adversary = Adversary(config, self.teacher, self.latent_shape)
        self.noisiest = angle_range(student.schedule)[1]

    @classmethod
    def needs(cls, config: SanaSprint.Config) -> tuple[str, ...]:
        return ("prompts", "pairs" if config.synthetic else "images")

    def heads(self) -> dict[str, nn.Module]:
        return {"weighting": self.term.weighting, "discriminator": self.adversary.discriminator}

    def phases(self) -> list[Phase]:
        return [
            Phase("student", ("student", "weighting"), self.student_loss, every=self.config.student_every),
            Phase("discriminator", ("discriminator",), self.discriminator_loss),
        ]

    def student_loss(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        c = self.config
        x0, cond = batch.clean(c.synthetic)
        scale = self.guidance(batch.rng, len(x0))
        updates = progress.iteration // c.student_every
        told = self.told(cond, scale)
        losses = self.term.losses(x0, cond, told, scale, updates, batch)
        fake = self.generate(x0, told, batch.rng)
        adversarial = self.adversary.student_loss(fake, cond, batch.rng)
        return {**losses, "adversarial": c.adversarial_weight * adversarial}

    def discriminator_loss(self, batch: Batch, _progress: Progress) -> dict[str, Tensor]:
        x0, cond = batch.clean(self.config.synthetic)
        with torch.no_grad():
            fake = self.generate(x0, self.told(cond, self.guidance(batch.rng, len(x0))), batch.rng)
        return {"hinge": self.adversary.discriminator_loss(x0, fake, cond, batch)}

    # ----------------------------------------------------------------------------------------------- sampling
    def guidance(self, rng: Rng, rows: int) -> Guidance:
        """A scale (B,) for each sample, the same for its teacher and its student; one number where it is not told."""
        if not self.config.guidance_embedding:
            return self.config.guidance_scale
        return rng.choice(rows, self.config.guidance_scales)

    def told(self, cond: Cond, scale: Guidance) -> Cond:
        """The student's condition: the teacher's and the scale."""
        return Cond({**cond.tensors, "guidance": scale}) if isinstance(scale, Tensor) else cond

    def generate(self, x0: Tensor, cond: Cond, rng: Rng) -> Tensor:
        """x0 of noised latents; for a part of the samples, of pure noise at the noisiest level (section 3.3)."""
        t, noise = self.term.draw(rng.normal(len(x0))), rng.normal_like(x0)
        first = rng.uniform(len(x0)) < self.config.max_time
        t = torch.where(first, self.noisiest, t)
        x_t = torch.where(expand(first, x0).bool(), noise, TrigFlow().add_noise(x0, noise, t))
        return self.term.student.x0(x_t, t, cond)
