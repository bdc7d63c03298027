"""SiD: score identity distillation (Zhou et al., ICML 2024, arXiv 2404.04057) and its relatives.

The student minimises the Fisher divergence between its diffused law and the teacher's. The estimate needs no data:
two networks, the teacher and a critic trained on what the student makes, and the gradient through both of them.
With guidance on all four evaluations it is SiD-LSG (arXiv 2406.01561), with several steps the uniform mixture of
arXiv 2505.12674, with a GAN on the critic's encoder SiDA (arXiv 2410.14919).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import torch
from torch import Tensor

from ..bounds import Bound, Number
from ..diffusion import objectives
from ..diffusion.cond import Cond
from ..diffusion.denoiser import Denoiser, NetDenoiser
from ..diffusion.discriminator import check_taps, mean_logits
from ..diffusion.schedules import Flow
from ..diffusion.student import Student
from .base import Batch, Expected, Method, Phase, Progress, check_guidance, few, register
from .live_scores import LevelWeight, LiveOptions, drop_captions, made_by, through_networks
from .terms import regression
from .verdicts import verdicts

if TYPE_CHECKING:
    from typing_extensions import Self


Alpha = Annotated[
    float,
    Bound("-1 <= alpha <= 2; 1 and 1.2 are published, beyond 2 descent leads away", lambda x: -1 <= x <= 2),
]
Images = Annotated[
    tuple[int, int],
    Bound("0 <= first <= second; SiDA has 100000, 200000", lambda seen: 0 <= seen[0] <= seen[1]),
]


@register("sid")
class SiD(Method):
    """Score identity distillation: critic and student in turn, the critic first."""

    summary = "score identity: Fisher divergence by a critic, gradient through both networks, data-free"
    moved: ClassVar = {"tap": "method.taps, a list,"}
    papers: ClassVar[tuple[str, ...]] = ("2404.04057", "2406.01561", "2410.14919", "2505.12674")
    exports = "LoRA or pipeline; LCM or DDIM, by its noise"
    networks = ("student", "critic")
    sums = True
    student: Student
    critic: NetDenoiser

    @dataclass
    class Config(LiveOptions):
        """Options; the paper's values are the defaults where there is one for all its experiments.

        The losses are means over entries where published code sums, so weights of terms are relative to a mean; Adam's
        eps is the published one, as it is for a sum (``Method.sums``). Both
        turns of an iteration share its conditions; noise, times and rollouts of the student's turn are drawn anew.

        Attributes:
            last_share: of the run, at its end, in which the last step alone is trained. Published is 0: a uniform
                mixture of all steps, which gives the one whose samples are kept 1 / num_steps of the updates. In a
                short run that leaves four steps no better than one; 0.3 does not.
            alpha: 1 or 1.2 as published; 0.5 is the exact gradient of the Fisher divergence.
            weight: see :func:`objectives.identity_weight`; "auto" is "1-sigma" on a flow and else "l1".
            guidance: which of the four scales is what. "long_short" (SiD-LSG): all are ``guidance_scale``.
                "teacher_only": the teacher's is. "zero_cfg": a plain teacher and an unconditional critic (1, and 0
                three times). "anti_cfg": a plain teacher and a critic trained plainly and used with the scale
                ``-guidance_scale``. The last two (arXiv 2505.12674) leave alignment with the text to the GAN.
            kappa1, kappa2, kappa3, kappa4: override single scales: critic in training, critic in its two places of
                the loss, teacher. kappa1 and kappa2 should be equal, or the critic used is no posterior mean.
            caption_dropout: of the critic's turn, where kappa1 or kappa2 is not 1.
            gan_weight: of the adversarial term beside the identity's, 0 for none. SiDA: 0.01 to 100, so 1e-4.
            discriminator_weight: of its loss beside the critic's sum over pixels (SiDA 1, on EDM2 100).
            taps: blocks of the critic whose features, averaged over channels, are the logits; no further weights.
            gan_schedule: images seen when the student starts to learn, and when the GAN joins, half and half.
        """

        last_share: Annotated[float, Bound("0 <= share < 1; 0 is published", lambda x: 0 <= x < 1)] = 0.0
        alpha: Alpha = 1.0
        weight: Literal["auto", "l1", LevelWeight] = "auto"
        guidance: Literal["long_short", "teacher_only", "zero_cfg", "anti_cfg"] = "long_short"
        kappa1: Number | None = None
        kappa2: Number | None = None
        kappa3: Number | None = None
        kappa4: Number | None = None
        caption_dropout: Annotated[float, Bound("0 <= rate < 1; published is 0.1", lambda x: 0 <= x < 1)] = (
            0.1
        )
        gan_weight: Annotated[float, Bound("0 or more; 0 is data-free, 1e-4 is SiDA's", lambda x: x >= 0)] = (
            0.0
        )
        discriminator_weight: Annotated[float, Bound("a positive number; SiDA has 1", lambda x: x > 0)] = 1.0
        taps: list[str] = field(default_factory=lambda: ["mid_block"])
        gan_schedule: Images = (100_000, 200_000)

        def expected(self) -> Expected:
            return {
                "taps": (bool(self.taps) or not self.gan_weight, "names of the critic's blocks"),
                "guidance_scale": (
                    self.guidance != "zero_cfg" or self.guidance_scale == 1.0,
                    "1 with guidance zero_cfg, which reads no scale; drop it or choose another guidance",
                ),
            }

        @property
        def kappas(self) -> tuple[float, float, float, float]:
            g = self.guidance_scale
            preset = {
                "long_short": (g, g, g, g),
                "teacher_only": (1.0, 1.0, 1.0, g),
                "zero_cfg": (0.0, 0.0, 0.0, 1.0),
                "anti_cfg": (1.0, -g, -g, 1.0),
            }[self.guidance]
            given = (self.kappa1, self.kappa2, self.kappa3, self.kappa4)
            a, b, c, d = (k if own is None else own for k, own in zip(preset, given))
            return a, b, c, d

        def smoke(self) -> Self:
            return replace(super().smoke(), gan_schedule=(2, 4), taps=few(self.taps))

    config: Config

    def build(self, student: Denoiser, critic: NetDenoiser) -> None:
        config, self.critic, schedule = self.config, critic, critic.schedule
        self.student = config.student_of(student, schedule)
        self.kappas = config.kappas
        self.weight = config.weight
        if self.weight == "auto":
            self.weight = "1-sigma" if isinstance(schedule, Flow) else "l1"
        self.generator_times = config.generator_times.on(schedule, critic=False)
        self.critic_times = config.critic_times.on(schedule, critic=True)
        for i, (kappa, view) in enumerate(zip(self.kappas, (critic, critic, critic, self.teacher)), 1):
            check_guidance(f"kappa{i}", kappa, view)
        if config.gan_weight > 0:
            check_taps(critic, config.taps, "taps")

    @classmethod
    def needs(cls, config: SiD.Config) -> tuple[str, ...]:
        return ("prompts", "images") if config.gan_weight > 0 else ("prompts",)

    def phases(self) -> list[Phase]:
        # With a GAN, critic and discriminator warm up first.
        first = self.config.gan_schedule[0] if self.config.gan_weight > 0 else 0
        return [
            Phase("critic", ("critic",), self.critic_loss),
            Phase(
                "generator",
                ("student",),
                self.generator_loss,
                every=self.config.critic_steps,
                after=lambda progress: math.ceil(first / progress.per_iteration),
            ),
        ]

    # ------------------------------------------------------------------------------------------------- losses
    def generated(self, batch: Batch, progress: Progress) -> Callable[[], Tensor]:
        last = progress.iteration >= (1 - self.config.last_share) * progress.steps
        return made_by(self.student, batch, last)

    def critic_loss(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        with torch.no_grad():
            x0 = self.generated(batch, progress)()
        schedule, kappa1, kappa2 = self.critic.schedule, *self.kappas[:2]
        t, eps = self.critic_times.draw(schedule, batch.rng, len(x0)), batch.rng.normal_like(x0)
        x_t, cond = schedule.add_noise(x0, eps, t), batch.cond
        if kappa1 != 1 or kappa2 != 1:
            cond = drop_captions(cond, self.critic.null, batch.rng, self.config.caption_dropout)
        kind = self.config.critic_loss
        losses = {"denoising": regression(self.critic, kind, x0, x_t, t, cond, kappa1)}
        if self.config.gan_weight > 0:
            # The same noise and time on both sides, each with its own captions, in one forward.
            both = torch.cat([schedule.add_noise(batch.real, eps, t), x_t])
            logits = self.logits(both, torch.cat([t, t]), Cond.cat(batch.real_cond, batch.cond))
            real, fake = logits.chunk(2)
            batch.log |= verdicts(schedule, (real, t), (fake, t))
            told = objectives.discrimination(real, fake, torch.ones_like(t), objectives.finite_rows(x0))
            # On EDM SiDA weighs it as the critic's error, but all levels of a batch by the mean of their weights.
            size = objectives.denoising_weight("edm", schedule, t).mean().to(told) if kind == "edm" else 1.0
            entries = math.prod(batch.shape[1:])
            losses["discriminator"] = self.config.discriminator_weight / entries * size * told
        return losses

    def generator_loss(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        config, schedule, cond = self.config, self.teacher.schedule, batch.cond
        make = self.generated(batch, progress)
        t = self.generator_times.draw(schedule, batch.rng, batch.shape[0])
        eps = batch.rng.normal(*batch.shape)
        _, kappa2, kappa3, kappa4 = self.kappas
        # No no_grad here: weights are frozen, but the gradient passes through both networks. Without it the value
        # stays and the method silently becomes distribution matching.
        networks = [
            lambda x_t: self.teacher.x0(x_t, t, cond, guidance=kappa4),
            lambda x_t: self.critic.x0(x_t, t, cond, guidance=kappa2),
        ]
        if kappa3 != kappa2:
            networks.append(lambda x_t: self.critic.x0(x_t, t, cond, guidance=kappa3))
        adversarial = config.gan_weight > 0 and progress.images >= config.gan_schedule[1]
        if adversarial:
            networks.append(lambda x_t: self.logits(x_t, t, cond))

        def loss(x0: Tensor, real: Tensor, fake: Tensor, *others: Tensor) -> Tensor:
            batch.note_latents(x0)
            if self.kappas[0] == kappa2:  # else the critic used is no posterior mean
                batch.note_lag(x0, real, fake)
            weight = objectives.identity_weight(self.weight, x0, real, schedule, t)
            subtracted = others[0] if kappa3 != kappa2 else None
            if not adversarial:
                return objectives.score_identity(x0, real, fake, weight, config.alpha, subtracted)
            identity = self.identity(x0, noised(x0), real, fake, weight, subtracted, others[-1], t)
            gan = objectives.deception(others[-1], weight, objectives.finite_rows(x0, real, fake))
            batch.log |= {"identity": identity.detach(), "gan": gan.detach()}
            return 0.5 * identity + 0.5 * config.gan_weight * gan

        noised = lambda x0: schedule.add_noise(x0, eps, t)  # noqa: E731
        return {"sid": through_networks(make, noised, networks, loss, config.lean)}

    def identity(
        self,
        x0: Tensor,
        _x_t: Tensor,
        real: Tensor,
        fake: Tensor,
        weight: Tensor,
        subtracted: Tensor | None,
        _logits: Tensor,
        _t: Tensor,
    ) -> Tensor:
        """The loss of the scores, once the GAN has joined."""
        return objectives.score_identity(x0, real, fake, weight, self.config.alpha, subtracted)

    def logits(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return mean_logits(self.critic, self.config.taps, x_t, t, cond)
