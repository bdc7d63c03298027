"""Multi-student distillation: a one-step student for each part of the conditions (Song et al., arXiv 2410.23274).

The conditions are split into K parts. Every part has a student and a critic of its own, which never see the others'
conditions and are trained with DMD2's losses. One student makes each sample, so K times the capacity costs no time.
Students may be smaller than the teacher; then they learn its score first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..device import upload
from ..diffusion import objectives
from ..diffusion.cond import Cond
from ..diffusion.denoiser import Denoiser, NetDenoiser
from ..diffusion.discriminator import Discriminator
from ..diffusion.student import Student
from ..errors import RecipeError
from ..teachers.resize import resize
from .base import Batch, Method, Phase, Progress, register
from .router import Conditions, RoutedDenoiser, RoutedStudent, Router


@register("multi_student")
class MultiStudent(Method):
    """K students and K critics on disjoint parts of the conditions; DMD2's losses, GAN included.

    Rows of a micro-batch go to the student of their part, about batch size / K each: the cost of one student, as in
    the paper's ablation at equal compute (4 students at batch 32 against one at 128).
    """

    summary = "a one-step student per part of the prompts, each by DMD2, and a router between them"

    @dataclass
    class Config:
        """The paper's where it gives any; the update ratio and the GAN's weight are DMD2's for ImageNet.

        Attributes:
            parts: students (the paper's text-to-image run: 4).
            start: time at which the students are called; the teacher's last by default.
            guidance_scale: of the teacher only.
            critic_steps: critic updates per student update.
            weight: of the score difference, see :func:`fewstep.diffusion.objectives.matching_weight`.
            time_range: of the score difference, as fractions of the schedule; the critics use all of it.
            gan_weight: of the students' adversarial term (the paper's second stage); 0 is data-free (its first stage
                without the regression on pairs).
            gan_time_range: noise on what the discriminators see, as fractions of the schedule.
            discriminator_weight: of a discriminator's loss beside its critic's.
            taps: blocks of the critics whose features the discriminators see.
            student_network: what the students' configuration has differently from the teacher's, such as
                ``{"layers_per_block": 1}``. Smaller students begin with teacher score matching (TSM); critics keep
                the teacher's size.
            tsm_share: of the run, at its beginning, spent on that (not published; ours).
            tsm_data: real images of the student's own "part", or "all".
        """

        parts: int = 4
        start: int | float | None = None
        guidance_scale: float = 1.0
        critic_steps: int = 5
        weight: Literal["l1", "kl", "vsd", "one"] = "l1"
        time_range: tuple[float, float] = (0.02, 0.98)
        gan_weight: float = 3e-3
        gan_time_range: tuple[float, float] = (0.0, 1.0)
        discriminator_weight: float = 1e-2
        taps: list[str] = field(default_factory=lambda: ["mid_block"])
        student_network: dict[str, Any] | None = None
        tsm_share: float = 0.5
        tsm_data: Literal["part", "all"] = "part"

        def __post_init__(self):
            if not 0 < self.tsm_share < 1:
                raise RecipeError(f"method.tsm_share: {self.tsm_share}: expected 0 < share < 1")
            if self.parts < 2:
                raise RecipeError(
                    f"method.parts: {self.parts}: expected at least 2; for a single student use dmd2"
                )
            for name in ("time_range", "gan_time_range"):
                low, high = getattr(self, name)
                if not 0 <= low < high <= 1:
                    raise RecipeError(f"method.{name}: {(low, high)}: expected 0 <= low < high <= 1")
            if self.critic_steps < 1:
                raise RecipeError(f"method.critic_steps: {self.critic_steps}: expected at least 1")

    @classmethod
    def networks_for(cls, config: MultiStudent.Config) -> tuple[str, ...]:
        return tuple(f"{role}_{k + 1}" for k in range(config.parts) for role in ("student", "critic"))

    @classmethod
    def network(cls, config: MultiStudent.Config, teacher: Any, name: str) -> nn.Module:
        if config.student_network is None or not name.startswith("student"):
            return teacher.net
        return resize(teacher, config.student_network, "method.student_network")

    @classmethod
    def needs(cls, config: MultiStudent.Config) -> tuple[str, ...]:
        real = config.gan_weight > 0 or config.student_network is not None
        return ("prompts", "images") if real else ("prompts",)

    def __init__(
        self,
        config: MultiStudent.Config,
        teacher: Denoiser,
        latent_shape: Sequence[int],
        **networks: NetDenoiser,
    ):
        self.config, self.teacher, self.router = config, teacher, Router(config.parts)
        self.schedule = teacher.schedule
        start = self.schedule.t_max if config.start is None else config.start
        names = [str(k + 1) for k in range(config.parts)]
        self.students = [Student(networks[f"student_{n}"], [start], roles=[f"student_{n}"]) for n in names]
        self.critics = [networks[f"critic_{n}"] for n in names]
        self.student = RoutedStudent(self.students, self.router)
        self.critic = RoutedDenoiser(self.critics, self.router)
        self.critic_kind = getattr(self.critics[0], "prediction", "x0")
        self.discriminators: list[Discriminator] = []
        if config.gan_weight > 0:
            self.discriminators = [Discriminator(c, config.taps, latent_shape) for c in self.critics]

    def prepare(self, conditions: Conditions) -> list[int]:
        return self.router.fit(conditions)

    def heads(self) -> dict[str, nn.Module]:
        return {f"discriminator_{k + 1}": head for k, head in enumerate(self.discriminators)}

    def phases(self) -> list[Phase]:
        phases, tsm = [], self.config.tsm_share if self.config.student_network is not None else 0.0
        for k in range(self.config.parts):
            n, heads = k + 1, [f"discriminator_{k + 1}"] if self.discriminators else []
            student, critic = (f"student_{n}",), (f"critic_{n}", *heads)
            if tsm:
                phases.append(Phase(f"tsm_{n}", student, partial(self.tsm_loss, k), share=(0.0, tsm)))
            generator = partial(self.generator_loss, k)
            every, rest = self.config.critic_steps, (tsm, 1.0)
            phases += [
                Phase(f"generator_{n}", student, generator, every=every, share=rest),
                Phase(f"critic_{n}", critic, partial(self.critic_loss, k), share=rest),
            ]
        return phases

    # ------------------------------------------------------------------------------------------------- losses
    def tsm_loss(self, k: int, batch: Batch, _progress: Progress) -> dict[str, Tensor]:
        """The student as a denoiser at all times; its target is the teacher's prediction, not the sample."""
        x0, cond, share = batch.real, batch.real_cond, 1.0
        if self.config.tsm_data == "part":
            rows, share = self.part(k, batch, "real_cond")
            x0, cond = x0[rows], cond.rows(rows)
        x_t, t = self.noised(x0, batch)
        with torch.no_grad():
            target = self.teacher.x0(x_t, t, cond)
        made = self.students[k].denoiser.x0(x_t, t, cond)
        weight = self.schedule.error_weight(self.critic_kind, t)
        return {"matching": share * objectives.denoising(made, target, weight)}

    def generator_loss(self, k: int, batch: Batch, _progress: Progress) -> dict[str, Tensor]:
        x0, cond, share = self.generate(k, batch)
        # The critic learns from this very sample, made before the student's update.
        batch.carry[f"x0_{k}"] = x0.detach()
        losses = {"dm": share * self.matching(k, x0, cond, batch)}
        if self.discriminators:
            x_t, t = self.noised(x0, batch, *self.config.gan_time_range)
            logits = self.discriminators[k].logits(self.critics[k], x_t, t, cond)
            losses["gan"] = share * self.config.gan_weight * objectives.gan_generator(logits)
        return losses

    def critic_loss(self, k: int, batch: Batch, _progress: Progress) -> dict[str, Tensor]:
        if f"x0_{k}" not in batch.carry:
            with torch.no_grad():
                batch.carry[f"x0_{k}"] = self.generate(k, batch)[0]
        rows, share = self.part(k, batch)
        x0, cond = batch.carry[f"x0_{k}"], batch.cond.rows(rows)
        x_t, t = self.noised(x0, batch)
        weight = self.schedule.error_weight(self.critic_kind, t)
        losses = {"denoising": share * objectives.denoising(self.critics[k].x0(x_t, t, cond), x0, weight)}
        if self.discriminators:
            loss = self.discrimination(k, x0, cond, share, batch)
            losses["discriminator"] = self.config.discriminator_weight * loss
        return losses

    def matching(self, k: int, x0: Tensor, cond: Cond, batch: Batch) -> Tensor:
        """Distribution matching at a random time; gradient reaches x0 only."""
        t = self.schedule.draw_times(batch.rng.uniform(len(x0)), *self.config.time_range)
        with torch.no_grad():
            x_t = self.schedule.add_noise(x0, batch.rng.normal_like(x0), t)
            real = self.teacher.x0(x_t, t, cond, guidance=self.config.guidance_scale)
            fake = self.critics[k].x0(x_t, t, cond)
            weight = objectives.matching_weight(self.config.weight, x0, real, self.schedule, t)
        batch.note_health(x0, real, fake)
        batch.log = {f"{name}_{k + 1}": value for name, value in batch.log.items()}
        return objectives.distribution_matching(x0, real, fake, weight)

    def discrimination(self, k: int, fake: Tensor, cond: Cond, share: float, batch: Batch) -> Tensor:
        """Real images of this part against the student's, each with its own condition, in one forward."""
        rows, real_share = self.part(k, batch, "real_cond")
        real, real_cond = batch.real[rows], batch.real_cond.rows(rows)
        both, t = self.noised(torch.cat([real, fake]), batch, *self.config.gan_time_range)
        logits = self.discriminators[k].logits(self.critics[k], both, t, Cond.cat(real_cond, cond))
        of_real, of_fake = logits.split([len(real), len(fake)])
        return real_share * objectives.gan_generator(of_real) + share * objectives.gan_generator(-of_fake)

    # ----------------------------------------------------------------------------------------------- sampling
    def part(self, k: int, batch: Batch, name: str = "cond") -> tuple[Tensor, float]:
        """Rows (n,) of a micro-batch that belong to part k, and the weight ``K n / B`` of a mean over them.

        With this weight the mean over micro-batches and processes is that over all rows of the part, however they are
        spread. Where there are none, the first row stands in with weight 0: every process calls the same networks.
        """
        if f"parts of {name}" not in batch.carry:
            parts = self.router(batch.on_host(name))
            rows = [(parts == part).nonzero()[:, 0] for part in range(self.config.parts)]
            shares = [self.config.parts * len(part) / len(parts) for part in rows]
            rows = [part if len(part) else torch.zeros(1, dtype=torch.long) for part in rows]
            batch.carry[f"parts of {name}"] = [upload(part, batch.rng.device) for part in rows], shares
        rows, shares = batch.carry[f"parts of {name}"]
        return rows[k], shares[k]

    def generate(self, k: int, batch: Batch) -> tuple[Tensor, Cond, float]:
        """What student k makes of its rows, their conditions, and the weight of a mean over them."""
        rows, share = self.part(k, batch)
        cond, noise = batch.cond.rows(rows), batch.rng.normal(len(rows), *batch.shape[1:])
        return self.students[k].x0(noise, 0, cond), cond, share

    def noised(self, x0: Tensor, batch: Batch, low: float = 0.0, high: float = 1.0) -> tuple[Tensor, Tensor]:
        """x0 at times drawn from a part of the schedule, by default all of it, per sample."""
        t = self.schedule.draw_times(batch.rng.uniform(len(x0)), low, high)
        return self.schedule.add_noise(x0, batch.rng.normal_like(x0), t), t
