"""DMD2: improved distribution matching distillation (Yin et al., NeurIPS 2024, arXiv 2405.14867).

The student follows the difference between two scores, the teacher's and that of a critic which is trained, at
every iteration, on what the student makes. A discriminator on the critic's features adds what the teacher's score
cannot give: real data. Several steps are trained on the student's own rollouts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from ..device import real, upload
from ..diffusion import objectives
from ..diffusion.cond import Cond
from ..diffusion.denoiser import Denoiser, NetDenoiser
from ..diffusion.discriminator import Discriminator
from ..diffusion.student import Student
from ..diffusion.times import chosen_times, uniform_times
from ..errors import RecipeError
from .base import Batch, Method, Phase, Progress, register


@register("dmd2")
class DMD2(Method):
    """Two time scales, distribution matching plus GAN, backward simulation."""

    summary = "distribution matching with a fast critic, a GAN on its features and backward simulation"
    networks = ("student", "critic")
    student: Student

    @dataclass
    class Config:
        """Defaults are the published ones where the paper or its code gives any.

        Attributes:
            num_steps: steps of the student. start: its first time (DMD2: 999 for 4 steps, 399 for one-step SDXL).
            times: an explicit list instead of num_steps and start.
            guidance_scale: of the teacher only, ``u + g (c - u)`` (SDXL 8, SD1.5 1.75); the critic has none.
            critic_steps: critic updates per student update (5; SD1.5 10).
            weight: of the score difference, see :func:`fewstep.diffusion.objectives.matching_weight`.
            time_range: of the score difference, as fractions of the schedule; the critic uses all of it.
            critic_loss: kind of prediction whose squared error the critic minimises; "native" is the network's own.
            gan_weight: of the student's adversarial term (SDXL 5e-3, ImageNet 3e-3, SD1.5 1e-3); 0 is data-free.
            gan_time_range: noise on what the discriminator sees, as fractions of the schedule (published: all of it). A
                small teacher gives nothing away behind much noise; a lower end tells real from fake much sooner.
            one_noise: on the student's turn score difference and discriminator see the same noisy sample, at times of
                ``time_range``, by one forward of the network that judges (FastGen); as published each draws its own.
            discriminator_weight: of the discriminator's loss beside the critic's (1e-2).
            taps: blocks whose features the discriminator sees.
            discriminator_on: "critic" as published; "teacher" is NVlabs FastGen's variant.
            critic_on_student_turn: True as published (5 critic updates per student update); False trains the critic
                on the other turns only (FastGen's 1 + 4 cycle).
            student_input: "rollout" is backward simulation; "real" noises real latents (FastGen; the paper's
                ablation without simulation).
        """

        num_steps: int = 4
        start: int | float | None = None
        times: list[int | float] | None = None
        guidance_scale: float = 1.0
        critic_steps: int = 5
        weight: Literal["l1", "kl", "vsd", "one"] = "l1"
        time_range: tuple[float, float] = (0.02, 0.98)
        critic_loss: Literal["native", "x0", "eps", "v", "flow"] = "native"
        gan_weight: float = 5e-3
        gan_time_range: tuple[float, float] = (0.0, 1.0)
        one_noise: bool = False
        discriminator_weight: float = 1e-2
        taps: list[str] = field(default_factory=lambda: ["mid_block"])
        discriminator_on: Literal["critic", "teacher"] = "critic"
        critic_on_student_turn: bool = True
        student_input: Literal["rollout", "real"] = "rollout"

        def __post_init__(self):
            for name in ("time_range", "gan_time_range"):
                low, high = getattr(self, name)
                if not 0 <= low < high <= 1:
                    raise RecipeError(f"method.{name}: {(low, high)}: expected 0 <= low < high <= 1")
            if self.one_noise and not (self.gan_weight > 0 and self.gan_time_range == self.time_range):
                raise RecipeError(
                    "method.one_noise: true: expected a positive gan_weight, and a gan_time_range that is time_range, "
                    f"{self.time_range}"
                )
            if self.critic_steps < 1:
                raise RecipeError(f"method.critic_steps: {self.critic_steps}: expected at least 1")
            if self.critic_steps == 1 and not self.critic_on_student_turn:
                raise RecipeError(
                    "method.critic_on_student_turn: false with critic_steps 1 never trains the critic"
                )
            if self.times is None and self.start is not None and self.start > 1:  # an index of a table
                uniform_times(self.num_steps, self.start)

    def __init__(
        self,
        config: DMD2.Config,
        teacher: Denoiser,
        latent_shape: Sequence[int],
        *,
        student: Denoiser,
        critic: Denoiser,
    ):
        self.config, self.teacher, self.critic = config, teacher, critic
        times = chosen_times(student.schedule, config.num_steps, config.start, config.times)
        self.student = Student(student, times)
        self.critic_kind = config.critic_loss
        if self.critic_kind == "native":
            self.critic_kind = getattr(critic, "prediction", "x0")
        self.discriminator: Discriminator | None = None
        if config.gan_weight > 0:
            judge = teacher if config.discriminator_on == "teacher" else critic
            self.judge: NetDenoiser = judge  # type: ignore[assignment]  # a network's, of which features are tapped
            self.discriminator = Discriminator(self.judge, config.taps, latent_shape)

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
            return self.at_one_noise(x0, cond, batch)
        losses = {"dm": self.matching(x0, cond, batch)}
        if self.discriminator:
            x_t, t = self.noised(x0, batch, *self.config.gan_time_range)
            logits = self.discriminator.logits(self.judge, x_t, t, cond)
            losses["gan"] = self.config.gan_weight * objectives.gan_generator(logits)
        return losses

    def critic_loss(self, batch: Batch, _progress: Progress) -> dict[str, Tensor]:
        if "x0" not in batch.carry:
            with torch.no_grad():
                batch.carry["x0"] = self.generate(batch)[0]
        x0, cond = batch.carry["x0"], self.cond(batch)
        x_t, t = self.noised(x0, batch)
        weight = self.critic.schedule.error_weight(self.critic_kind, t)
        losses = {"denoising": objectives.denoising(self.critic.x0(x_t, t, cond), x0, weight)}
        if self.discriminator:
            losses["discriminator"] = self.config.discriminator_weight * self.discrimination(x0, cond, batch)
        return losses

    def matching(self, x0: Tensor, cond: Cond, batch: Batch) -> Tensor:
        """Distribution matching at a random time; gradient reaches x0 only."""
        schedule = self.teacher.schedule
        t = schedule.draw_times(batch.rng.uniform(len(x0)), *self.config.time_range)
        with torch.no_grad():
            x_t = schedule.add_noise(x0, batch.rng.normal_like(x0), t)
            real = self.teacher.x0(x_t, t, cond, guidance=self.config.guidance_scale)
            fake = self.critic.x0(x_t, t, cond)
        return self.difference(x0, real, fake, t, batch)

    def difference(self, x0: Tensor, real: Tensor, fake: Tensor, t: Tensor, batch: Batch) -> Tensor:
        with torch.no_grad():
            weight = objectives.matching_weight(self.config.weight, x0, real, self.teacher.schedule, t)
        batch.note_health(x0, real, fake)
        return objectives.distribution_matching(x0, real, fake, weight)

    def at_one_noise(self, x0: Tensor, cond: Cond, batch: Batch) -> dict[str, Tensor]:
        """Both losses of the student at one noisy sample: the judge's forward gives its x0 and what it thinks of it."""
        x_t, t = self.noised(x0, batch, *self.config.time_range)
        real, fake, logits = self.judged(x_t, t, cond)
        gan = self.config.gan_weight * objectives.gan_generator(logits)
        return {"dm": self.difference(x0, real, fake, t, batch), "gan": gan}

    def judged(self, x_t: Tensor, t: Tensor, cond: Cond) -> tuple[Tensor, Tensor, Tensor]:
        """Posterior means of teacher (guided) and critic, which carry no gradient, and the discriminator's logits."""
        guidance, on_teacher = self.config.guidance_scale, self.judge is self.teacher
        logits, seen = self.discriminator.judged(self.judge, x_t, t, cond, guidance if on_teacher else 1.0)
        with torch.no_grad():
            if on_teacher:
                return seen, self.critic.x0(x_t, t, cond), logits
            return self.teacher.x0(x_t, t, cond, guidance=guidance), seen, logits

    def discrimination(self, fake: Tensor, cond: Cond, batch: Batch) -> Tensor:
        """Real and fake, noised independently, each with its own condition, in one forward."""
        both, t = self.noised(torch.cat([batch.real, fake]), batch, *self.config.gan_time_range)
        logits = self.discriminator.logits(self.judge, both, t, Cond.cat(batch.real_cond, cond))
        return objectives.gan_discriminator(*logits.chunk(2))

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
        """x0 at times drawn from a part of the schedule, by default all of it, per sample."""
        t = self.critic.schedule.draw_times(batch.rng.uniform(len(x0)), low, high)
        return self.critic.schedule.add_noise(x0, batch.rng.normal_like(x0), t), t
