"""LADD: latent adversarial diffusion distillation (Sauer et al. 2024, arXiv 2403.12015)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from ..bounds import Count, Count0, Least0, Number, Part, Positive, Share
from ..diffusion import objectives
from ..diffusion.cond import Cond
from ..diffusion.consistency import angles
from ..diffusion.denoiser import Denoiser, NetDenoiser
from ..diffusion.discriminator import Discriminator, Heads
from ..diffusion.rng import Rng
from ..diffusion.schedules import expand
from ..diffusion.student import Student
from ..diffusion.times import times_at
from .base import Batch, Expected, Method, Options, Phase, Progress, few, register
from .verdicts import verdicts

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass
class AdversarialOptions(Options):
    """Options of the discriminator; defaults are LADD's.

    Attributes:
        taps: blocks of the frozen teacher whose features the heads see, several of them.
        noise_mean, noise_std: of the log-normal law of the noise on what the discriminator sees, ``sigma / alpha =
            exp(mean + std n)``, the logit-normal law of a flow's time. Much noise judges structure, little texture.
        heads: on a transformer's tokens: "mlp" of each, or "conv" of each with its neighbours (SANA-Sprint's published
            code; LADD's own heads are not published). A UNet's maps have DMD2's convolutions.
        conditional_heads: the heads are told the noise level and, where the teacher has one, the pooled text embedding
            or the class (LADD, section 3; SANA-Sprint's published code tells them neither).
        misaligned: real images under the captions of others count as fakes too (SANA-Sprint's published code).
        student_every: iterations per student update; the discriminator is trained in each.
        synthetic: the teacher's own samples (``fewstep pairs``) as "real" in place of real images.
    """

    taps: list[str] = field(default_factory=lambda: ["mid_block"])
    noise_mean: Number = 1.0
    noise_std: Positive = 1.0
    heads: Heads = "mlp"
    conditional_heads: bool = True
    misaligned: bool = False
    student_every: Count = 1
    synthetic: bool = False

    def expected(self) -> Expected:
        return {
            "taps": (bool(self.taps), "names of the teacher's blocks"),
        }

    def smoke(self) -> Self:
        return replace(super().smoke(), taps=few(self.taps))


class Adversary:
    """Heads on the frozen teacher's features of noisy samples, with the hinge loss.

    The teacher's weights want no gradient, its input does: that is how the student learns.
    """

    def __init__(self, config: AdversarialOptions, teacher: NetDenoiser, latent_shape: Sequence[int]):
        self.config, self.teacher = config, teacher
        self.discriminator = Discriminator(
            teacher, config.taps, latent_shape, config.conditional_heads, config.heads
        )

    def student_loss(self, fake: Tensor, cond: Cond, rng: Rng) -> Tensor:
        return objectives.hinge_generator(self.judge(fake, cond, *self.noise(fake, rng)))

    def discriminator_loss(self, real: Tensor, fake: Tensor, cond: Cond, batch: Batch) -> Tensor:
        """Real and fake behind the same noise at the same levels (SANA-Sprint, alg. 2), in one forward."""
        seen, conds = [real, fake], [cond, cond]
        if self.config.misaligned and len(real) > 1:
            seen, conds = [*seen, real.roll(1, 0)], [*conds, cond]
        t, eps = self.noise(real, batch.rng)
        many = len(seen)
        logits = self.judge(torch.cat(seen), Cond.cat(*conds), t.repeat(many), torch.cat([eps] * many))
        real_logits, fake_logits = logits[: len(real)], logits[len(real) :]
        schedule, of_fake = self.teacher.schedule, (fake_logits, t.repeat(many - 1))
        batch.log |= verdicts(schedule, (real_logits, t), of_fake, ratios=False)
        return objectives.hinge_discriminator(real_logits, fake_logits)

    def noise(self, x0: Tensor, rng: Rng) -> tuple[Tensor, Tensor]:
        """The teacher's times (B,) of the discriminator's law, and noise."""
        schedule, c = self.teacher.schedule, self.config
        angle = angles(rng.normal(len(x0)), c.noise_mean, c.noise_std, 1.0)
        t = schedule.time_at(angle.cos(), angle.sin()).clamp(schedule.t_min, schedule.t_max)
        return t, rng.normal_like(x0)

    def judge(self, x0: Tensor, cond: Cond, t: Tensor, eps: Tensor) -> Tensor:
        """Logits (B, n) of x0 (B, ...) noised with eps to the teacher's times t (B,)."""
        x_t = self.teacher.schedule.add_noise(x0, eps, t)
        return self.discriminator.logits(self.teacher, x_t, t, cond)


@register("ladd")
class LADD(Method):
    """A student that learns from a discriminator alone, which sees through the teacher's eyes."""

    summary = "adversarial, on the frozen teacher's features, hinge loss; 1 to 4 steps"
    moved: ClassVar = {"steps": "method.num_steps"}
    papers = ("2403.12015",)
    steps = "1 to 4"
    student: Student

    @dataclass
    class Config(AdversarialOptions):
        """Options beside those of :class:`AdversarialOptions`.

        Attributes:
            levels: noise levels ``sigma / (alpha + sigma)`` at which the student is called, noisy to clean. The
                paper's four are a flow's without a shift, as FLUX.1-schnell has them; Stable Diffusion 3.5's turbo is
                called at the same four of its pipeline, whose shift of 3 makes them 1, 0.9, 0.75 and 0.5.
            proposals: how often each is trained. early_proposals: the same in the first ``early`` student updates; the
                paper begins with the cleaner half, where the teacher's weights are nearly right already.
            early: student updates; not published, ours.
            num_steps: numbers of steps, each a regular choice of ``levels`` from the noisiest on; the first is shown
                while training.
            guidance_scale: with which the synthetic samples were made.
        """

        levels: list[Part] = field(default_factory=lambda: [1.0, 0.75, 0.5, 0.25])
        proposals: list[Share] = field(default_factory=lambda: [0.7, 0.1, 0.1, 0.1])
        early_proposals: list[Share] = field(default_factory=lambda: [0.0, 0.0, 0.5, 0.5])
        early: Count0 = 500
        num_steps: list[Count] = field(default_factory=lambda: [4])
        guidance_scale: Least0 = 1.0

        def expected(self) -> Expected:
            count = len(self.levels)

            def fine(given: list[float]) -> bool:
                return len(given) == count and math.isclose(sum(given), 1.0)

            law = f"a probability for each of the {count} levels, 1 in all"
            return {
                "proposals": (fine(self.proposals), law),
                "early_proposals": (fine(self.early_proposals), law),
                "num_steps": (
                    bool(self.num_steps) and all(count % n == 0 for n in self.num_steps),
                    f"divisors of the number of levels, {count}",
                ),
            }

        @classmethod
        def toy(cls) -> Self:
            return cls(taps=["layers.0", "layers.2"])

    config: Config
    teacher: NetDenoiser

    def build(self, student: Denoiser) -> None:
        config = self.config
        self.times = times_at(student.schedule, [math.atan2(s, 1 - s) for s in config.levels])
        first, *rest = (self.times[:: len(self.times) // steps] for steps in config.num_steps)
        self.student = Student(student, first, also=rest)
        self.adversary = Adversary(config, self.teacher, self.latent_shape)

    @classmethod
    def needs(cls, config: LADD.Config) -> tuple[str, ...]:
        return ("prompts", "pairs" if config.synthetic else "images")

    def heads(self) -> dict[str, nn.Module]:
        return {"discriminator": self.adversary.discriminator}

    def phases(self) -> list[Phase]:
        return [
            Phase("student", ("student",), self.student_loss, every=self.config.student_every),
            Phase("discriminator", ("discriminator",), self.discriminator_loss),
        ]

    def student_loss(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        _, cond = batch.clean(self.config.synthetic)
        return {"adversarial": self.adversary.student_loss(self.generate(batch, progress), cond, batch.rng)}

    def discriminator_loss(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        real, cond = batch.clean(self.config.synthetic)
        with torch.no_grad():
            fake = self.generate(batch, progress)
        batch.log["latent_std"] = fake.std()
        return {"hinge": self.adversary.discriminator_loss(real, fake, cond, batch)}

    def generate(self, batch: Batch, progress: Progress) -> Tensor:
        """x0 of noised latents at one of the levels, drawn for each sample; the noisiest input is pure noise."""
        c = self.config
        x0, cond = batch.clean(c.synthetic)
        early = progress.iteration < c.early * c.student_every
        t = batch.rng.choice(len(x0), self.times, c.early_proposals if early else c.proposals)
        noise, denoiser = batch.rng.normal_like(x0), self.student.denoiser
        first = expand(t == self.times[0], x0).bool()
        schedule = denoiser.schedule
        x_t = torch.where(first, schedule.begin(noise, t), schedule.add_noise(x0, noise, t))
        return denoiser.x0(x_t, t, cond)
