"""DMD2: improved distribution matching distillation (Yin et al., NeurIPS 2024, arXiv 2405.14867).

The student follows the difference between two scores, the teacher's and that of a critic which is trained, at
every iteration, on what the student makes. A discriminator on the critic's features adds what the teacher's score
cannot give: real data. Several steps are trained on the student's own rollouts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from ..device import real, upload
from ..diffusion import objectives
from ..diffusion.cond import Cond
from ..diffusion.denoiser import Denoiser, NetDenoiser
from ..diffusion.discriminator import Discriminator
from ..diffusion.student import Student
from ..diffusion.times import chosen_times
from . import terms
from .base import Batch, Expected, Method, Phase, Progress, register
from .gan import Gan
from .verdicts import verdicts

if TYPE_CHECKING:
    from typing_extensions import Self


@register("dmd2")
class DMD2(Method):
    """Two time scales, distribution matching plus GAN, backward simulation."""

    summary = "distribution matching with a fast critic, a GAN on its features and backward simulation"
    papers = ("2405.14867",)
    networks = ("student", "critic")
    student: Student

    @dataclass
    class Config(Gan, terms.Critic, terms.Matching, terms.Times):
        """Defaults are the published ones where the paper or its code gives any; see also :mod:`.terms`.

        Attributes:
            start: of the student (DMD2: 999 for 4 steps, 399 for one-step SDXL).
            guidance_scale: of the teacher only (SDXL 8, SD1.5 1.75).
            critic_steps: 5; SD1.5 10.
            gan_weight: SDXL 5e-3, ImageNet 3e-3, SD1.5 1e-3; 0 is data-free. discriminator_weight: 1e-2.
            one_noise: on the student's turn score difference and discriminator see the same noisy sample, at times of
                ``time_range``, by one forward of the network that judges (FastGen); as published each draws its own.
            discriminator_on: "critic" as published; "teacher" is NVlabs FastGen's variant.
            critic_on_student_turn: True as published (5 critic updates per student update); False trains the critic
                on the other turns only (FastGen's 1 + 4 cycle).
            student_input: "rollout" is backward simulation; "real" noises real latents (FastGen; the paper's
                ablation without simulation).
        """

        one_noise: bool = False
        discriminator_on: Literal["critic", "teacher"] = "critic"
        critic_on_student_turn: bool = True
        student_input: Literal["rollout", "real"] = "rollout"

        def expected(self) -> Expected:
            alike = self.time_law == "uniform" and self.gan_time_range == self.time_range
            together = self.gan_weight > 0 and alike
            return {
                "one_noise": (
                    not self.one_noise or together,
                    "a positive gan_weight, time_law uniform, and a gan_time_range that is time_range, "
                    f"{self.time_range}",
                ),
                "critic_on_student_turn": (
                    self.critic_on_student_turn or self.critic_steps > 1,
                    "true with critic_steps 1, which would never train the critic",
                ),
            }

        @classmethod
        def toy(cls) -> Self:
            return cls(num_steps=2, start=999, critic_steps=2, gan_weight=1e-2, taps=["layers.0"])

    config: Config

    def build(self, student: Denoiser, critic: Denoiser) -> None:
        c, self.critic = self.config, critic
        self.student = Student(student, chosen_times(student.schedule, c.num_steps, c.start, c.times))
        self.discriminator: Discriminator | None = None
        if c.gan_weight > 0:
            judge = self.teacher if c.discriminator_on == "teacher" else critic
            self.judge: NetDenoiser = judge  # type: ignore[assignment]  # a network's, of which features are tapped
            self.discriminator = Discriminator(self.judge, c.taps, self.latent_shape)

    @classmethod
    def needs(cls, config: DMD2.Config) -> tuple[str, ...]:
        real = config.gan_weight > 0 or config.student_input == "real"
        return ("prompts", "images") if real else ("prompts",)

    def heads(self) -> dict[str, nn.Module]:
        return {"discriminator": self.discriminator} if self.discriminator else {}

    def phases(self) -> list[Phase]:
        fast = ("critic", "discriminator") if self.discriminator else ("critic",)
        every = self.config.critic_steps
        keep = self.config.critic_on_student_turn
        return [
            Phase("generator", ("student",), self.generator_loss, every=every),
            Phase("critic", fast, self.critic_loss, when=lambda p: keep or p.iteration % every != 0),
        ]

    # ------------------------------------------------------------------------------------------------- losses
    def generator_loss(self, batch: Batch, _progress: Progress) -> dict[str, Tensor]:
        x0, cond = self.generate(batch)
        # The critic learns from this very sample, made before the student's update (as published).
        batch.carry["x0"] = x0.detach()
        if self.config.one_noise:
            losses = self.at_one_noise(x0, cond, batch)
        else:
            losses = {"dm": self.matching(x0, cond, batch)}
            if self.discriminator:
                losses["gan"] = self.deception(x0, cond, batch)
        return {name: batch.share * loss for name, loss in losses.items()}

    def critic_loss(self, batch: Batch, _progress: Progress) -> dict[str, Tensor]:
        x0, cond = terms.carried(batch, lambda: self.generate(batch)[0]), self.cond(batch)
        x_t, t = self.noised(x0, batch)
        denoising = terms.regression(self.critic, self.config.critic_loss, x0, x_t, t, cond)
        losses = {"denoising": batch.share * denoising}
        if self.discriminator:
            losses["discriminator"] = self.config.discriminator_weight * self.discrimination(x0, cond, batch)
        return losses

    def matching(self, x0: Tensor, cond: Cond, batch: Batch) -> Tensor:
        return terms.matching(self.config, self.teacher, self.critic, x0, cond, batch)

    def at_one_noise(self, x0: Tensor, cond: Cond, batch: Batch) -> dict[str, Tensor]:
        """Both losses of the student at one noisy sample: the judge's forward gives its x0 and what it thinks of it."""
        c = self.config
        x_t, t = c.noised(x0, self.teacher.schedule, batch)
        real, fake, logits = self.judged(x_t, t, cond)
        dm = terms.difference(c.weight, x0, real, fake, self.teacher.schedule, t, batch)
        return {"dm": dm, "gan": c.gan_weight * objectives.gan_generator(logits)}

    def deception(self, x0: Tensor, cond: Cond, batch: Batch) -> Tensor:
        """The student's adversarial term at a noise of its own."""
        x_t, t = self.noised(x0, batch, *self.config.gan_time_range)
        logits = self.discriminator.logits(self.judge, x_t, t, cond)
        return self.config.gan_weight * objectives.gan_generator(logits)

    def judged(self, x_t: Tensor, t: Tensor, cond: Cond) -> tuple[Tensor, Tensor, Tensor]:
        """Posterior means of teacher (guided) and critic, which carry no gradient, and the discriminator's logits."""
        guidance = self.config.guidance_at(t, self.teacher.schedule)
        on_teacher = self.judge is self.teacher
        logits, seen = self.discriminator.judged(self.judge, x_t, t, cond, guidance if on_teacher else 1.0)
        with torch.no_grad():
            if on_teacher:
                return seen, self.critic.x0(x_t, t, cond), logits
            return self.teacher.x0(x_t, t, cond, guidance=guidance), seen, logits

    def discrimination(self, fake: Tensor, cond: Cond, batch: Batch) -> Tensor:
        """Real and fake, noised independently, each with its own condition, in one forward."""
        both, t = self.noised(torch.cat([batch.real, fake]), batch, *self.config.gan_time_range)
        logits = self.discriminator.logits(self.judge, both, t, Cond.cat(batch.real_cond, cond))
        count = len(batch.real)
        of_real, of_fake = logits[:count], logits[count:]
        batch.log |= verdicts(self.judge.schedule, (of_real, t[:count]), (of_fake, t[count:]))
        return objectives.gan_discriminator(of_real, of_fake, batch.real_share, batch.share)

    # ----------------------------------------------------------------------------------------------- sampling
    def cond(self, batch: Batch) -> Cond:
        return batch.real_cond if self.config.student_input == "real" else batch.cond

    def generate(self, batch: Batch) -> tuple[Tensor, Cond]:
        """What the student makes in this iteration, with the gradient of one step, and its conditions."""
        cond, noise = self.cond(batch), batch.rng.normal(*batch.shape)
        if self.config.student_input == "rollout":
            exit_step = batch.shared.integer(self.student.num_steps)
            return self.student.rollout(noise, cond, batch.rng.normal_like, exit_step), cond
        steps = torch.floor(batch.rng.uniform(len(noise)) * self.student.num_steps).long()
        times = torch.tensor(self.student.times, dtype=real(noise.device))
        t = upload(times, noise.device)[steps]
        noisy = self.student.denoiser.schedule.add_noise(batch.real, noise, t)
        first = (steps == 0).view(-1, *[1] * (noise.ndim - 1))
        return self.student.denoiser.x0(torch.where(first, noise, noisy), t, cond), cond

    def noised(self, x0: Tensor, batch: Batch, low: float = 0.0, high: float = 1.0) -> tuple[Tensor, Tensor]:
        return terms.noised(x0, self.critic.schedule, batch, low, high)
