"""SIM: one-step distillation by score implicit matching (Luo et al., NeurIPS 2024, arXiv 2410.16794).

SiD's loss for other distances between scores. The pseudo-Huber distance normalises itself, and by a function of the
noisy sample alone, which keeps the gradient theorem exact where SiD's normaliser is a heuristic.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor

from ..bounds import Bound
from ..diffusion import objectives
from ..diffusion.denoiser import Denoiser
from ..diffusion.student import Student
from .base import Batch, Method, Phase, Progress, register
from .live_scores import LevelWeight, LiveOptions, made_by, through_networks
from .terms import regression

Scale = Annotated[
    float,
    Bound("a positive number; 0.01 normalises all but the smallest differences", lambda x: x > 0),
]


@register("sim")
class SIM(Method):
    """Score implicit matching: critic and student in turn, the critic first."""

    summary = "score implicit matching: a distance of scores (pseudo-Huber, log-cosh, L2), data-free"
    papers = ("2410.16794",)
    exports = "LoRA or pipeline; LCM or DDIM, by its noise"
    networks = ("student", "critic")
    sums = True
    student: Student

    @dataclass
    class Config(LiveOptions):
        """Options beside those of :class:`LiveOptions`. Published are start and alternation (SiD's); c is not, so its
        default is ours.

        Attributes:
            distance, c: see :func:`objectives.implicit_matching`; in units of x0, per entry. Below c the
                pseudo-Huber distance is quadratic, above it the gradient has unit length.
            weight: a function of the level alone, see :func:`fewstep.diffusion.objectives.identity_weight`.
            guidance_scale: of the teacher only; critic and student are plainly conditional.
        """

        distance: Literal["l2", "pseudo_huber", "log_cosh"] = "pseudo_huber"
        c: Annotated[
            float,
            Bound("a positive number; 0.01 normalises all but the smallest differences", lambda x: x > 0),
        ] = 0.01
        weight: LevelWeight = "one"

    config: Config

    def build(self, student: Denoiser, critic: Denoiser) -> None:
        config, self.critic, schedule = self.config, critic, critic.schedule
        self.student = config.student_of(student, schedule)
        self.generator_times = config.generator_times.on(schedule, critic=False)
        self.critic_times = config.critic_times.on(schedule, critic=True)

    def phases(self) -> list[Phase]:
        return [
            Phase("critic", ("critic",), self.critic_loss),
            Phase("generator", ("student",), self.generator_loss, every=self.config.critic_steps),
        ]

    def critic_loss(self, batch: Batch, _progress: Progress) -> dict[str, Tensor]:
        with torch.no_grad():
            x0 = made_by(self.student, batch)()
        t = self.critic_times.draw(self.critic.schedule, batch.rng, len(x0))
        x_t = self.critic.schedule.add_noise(x0, batch.rng.normal_like(x0), t)
        kind = self.config.critic_loss
        return {"denoising": regression(self.critic, kind, x0, x_t, t, batch.cond)}

    def generator_loss(self, batch: Batch, _progress: Progress) -> dict[str, Tensor]:
        config, schedule, cond = self.config, self.teacher.schedule, batch.cond
        make = made_by(self.student, batch)
        t = self.generator_times.draw(schedule, batch.rng, batch.shape[0])
        eps = batch.rng.normal(*batch.shape)

        def loss(x0: Tensor, real: Tensor, fake: Tensor) -> Tensor:
            batch.note_latents(x0)
            batch.note_lag(x0, real, fake)
            weight = objectives.identity_weight(config.weight, x0, real, schedule, t)
            return objectives.implicit_matching(x0, real, fake, weight, config.distance, config.c)

        networks = [
            lambda x_t: self.teacher.x0(x_t, t, cond, guidance=config.guidance_scale),
            lambda x_t: self.critic.x0(x_t, t, cond),
        ]
        noised = lambda x0: schedule.add_noise(x0, eps, t)  # noqa: E731
        return {"sim": through_networks(make, noised, networks, loss, config.lean)}
