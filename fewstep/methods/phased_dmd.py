"""Phased DMD: one expert per interval of noise levels (Fan et al., arXiv 2510.27684).

An expert lands on an intermediate level s and matches the teacher there, by diffusing its x_s further. Only the last
one ever projects to clean samples, so no expert is a one-step model, and diversity survives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from ..diffusion import objectives
from ..diffusion.denoiser import Denoiser
from ..diffusion.schedules import repeated
from ..diffusion.student import Student
from ..diffusion.times import chosen_times
from ..errors import RecipeError
from .base import Batch, Method, Phase, Progress, register


@register("phased_dmd")
class PhasedDMD(Method):
    """K phases of training, an expert each, nested noise intervals, data-free."""

    summary = "an expert per noise interval, matched at intermediate levels; keeps diversity"
    student: Student

    @dataclass
    class Config:
        """Defaults are the paper's where it gives any.

        Attributes:
            num_steps: steps of the whole student; phases: experts, each with num_steps / phases of them (4 and 2).
            start: first time. times: an explicit list instead.
            guidance_scale: of the teacher only (paper: 4 to 5).
            critic_steps: critic updates per student update (5).
            weight: "l1" is DMD's normaliser (as the authors' trainer), "kl" the exact weight of eq. 10.
            time_range: of the score difference in the last phase; the other phases start at their own level.
            solver: how a step arrives at the next level. Only "ddim" (Euler for flow) is possible: a step that
                re-noises its prediction at the edge of a phase has the law of that prediction at every higher level,
                and the phase would be one-step distillation in disguise.
        """

        num_steps: int = 4
        phases: int = 2
        start: int | float | None = None
        times: list[float] | None = None
        guidance_scale: float = 1.0
        critic_steps: int = 5
        weight: Literal["l1", "kl"] = "l1"
        time_range: tuple[float, float] = (0.02, 0.98)
        solver: Literal["ddim", "lcm"] = "ddim"

        def __post_init__(self):
            steps = len(self.times) if self.times else self.num_steps
            if self.phases < 1 or steps % self.phases:
                raise RecipeError(
                    f"method.phases: {self.phases} with {steps} steps: expected a number of phases that divides the "
                    "number of steps, e.g. 2 phases of 4 steps"
                )
            if self.solver == "lcm":
                raise RecipeError(
                    "method.solver: lcm: a step that re-noises its own prediction at the edge of a phase teaches the "
                    "expert to predict clean images in one step, which is what phases are there to avoid; use ddim"
                )
            low, high = self.time_range
            if not 0 <= low < high <= 1:
                raise RecipeError(f"method.time_range: {self.time_range}: expected 0 <= low < high <= 1")
            if self.critic_steps < 1:
                raise RecipeError(f"method.critic_steps: {self.critic_steps}: expected at least 1")

    @classmethod
    def networks_for(cls, config: PhasedDMD.Config) -> tuple[str, ...]:
        return (*(f"student_{k + 1}" for k in range(config.phases)), "critic")

    def __init__(
        self,
        config: PhasedDMD.Config,
        teacher: Denoiser,
        latent_shape: Sequence[int],
        *,
        critic: Denoiser,
        **experts: Denoiser,
    ):
        self.config, self.teacher, self.critic = config, teacher, critic
        self.schedule = teacher.schedule
        times = chosen_times(self.schedule, config.num_steps, config.start, config.times)
        self.per_phase = len(times) // config.phases
        names = [f"student_{i // self.per_phase + 1}" for i in range(len(times))]
        self.student = Student([experts[n] for n in names], times, "ddim", names)
        self.levels = [
            float(t) for t in times[self.per_phase :: self.per_phase]
        ]  # where all but the last phase end
        self.critic_kind = getattr(critic, "prediction", "x0")

    def phases(self) -> list[Phase]:
        count, every = self.config.phases, self.config.critic_steps
        phases = []
        for k in range(count):
            share = (k / count, (k + 1) / count)
            generator, critic = partial(self.generator_loss, k), partial(self.critic_loss, k)
            expert = f"student_{k + 1}"
            phases += [
                Phase(f"generator_{k + 1}", (expert,), generator, every=every, share=share),
                Phase(f"critic_{k + 1}", ("critic",), critic, share=share, fresh=("critic",)),
            ]
        return phases

    # ------------------------------------------------------------------------------------------------- losses
    def generator_loss(self, k: int, batch: Batch, _progress: Progress) -> dict[str, Tensor]:
        x_s, x0 = self.arrive(k, batch)
        # The critic learns from this very sample, made before the student's update.
        batch.carry["x_s"] = x_s.detach()
        t = self.times_above(k, batch, *self.config.time_range)
        with torch.no_grad():
            x_t = self.diffuse(k, x_s, batch.rng.normal_like(x_s), t)
            real = self.teacher.x0(x_t, t, batch.cond, guidance=self.config.guidance_scale)
            fake = self.critic.x0(x_t, t, batch.cond)
        batch.note_health(x0, real, fake)
        if self.config.weight == "kl":  # eq. 10: alpha_t alpha_{t|s} / sigma_t^2 on the difference, at x_s
            a_ts = self.schedule.alpha(t) / (1.0 if self.last(k) else self.schedule.alpha(self.level(k, x_s)))
            weight = (a_ts * self.schedule.alpha(t) / self.schedule.sigma(t) ** 2).to(x_s.dtype)
            return {"dm": objectives.distribution_matching(x_s, real, fake, weight)}
        # The step to x_s is linear in x0 with a positive factor, so the normalised direction may act on x0.
        weight = objectives.matching_weight("l1", x0, real, self.schedule, t)
        return {"dm": objectives.distribution_matching(x0, real, fake, weight)}

    def critic_loss(self, k: int, batch: Batch, _progress: Progress) -> dict[str, Tensor]:
        if "x_s" not in batch.carry:
            with torch.no_grad():
                batch.carry["x_s"] = self.arrive(k, batch)[0]
        x_s = batch.carry["x_s"]
        t, eps = self.times_above(k, batch), batch.rng.normal_like(x_s)
        x_t, target = self.diffuse(k, x_s, eps, t), x_s
        weight = self.schedule.error_weight(self.critic_kind, t)
        if not self.last(k):
            level = self.level(k, x_s)
            target, clamp = objectives.denoising_target_between(x_s, eps, level, t, self.schedule)
            weight = weight * clamp
        return {"denoising": objectives.denoising(self.critic.x0(x_t, t, batch.cond), target, weight)}

    # ----------------------------------------------------------------------------------------------- sampling
    def arrive(self, k: int, batch: Batch) -> tuple[Tensor, Tensor]:
        """(x_s, x0) of phase k: earlier experts and earlier steps without gradient, then one step down to s.

        The exit step is drawn within the phase and shared by all ranks: gradient truncation as in DMD2, but to s.
        """
        noise = batch.rng.normal(*batch.shape)
        step = k * self.per_phase + batch.shared.integer(self.per_phase)
        x = self.student.inputs(noise, batch.cond, batch.rng.normal_like, step)
        x0 = self.student.x0(x, step, batch.cond)
        if self.last(k):
            return x0, x0
        return self.student.advance(x, x0, step, self.level(k, x), noise, batch.rng.normal_like), x0

    def diffuse(self, k: int, x_s: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """From the level where phase k ends, which is clean for the last one, to t."""
        if self.last(k):
            return self.schedule.add_noise(x_s, eps, t)
        return self.schedule.renoise(x_s, eps, self.level(k, x_s), t)

    def last(self, k: int) -> bool:
        return k == self.config.phases - 1

    def level(self, k: int, like: Tensor) -> Tensor:
        return repeated(self.levels[k], like)

    def times_above(self, k: int, batch: Batch, low: float = 0.0, high: float = 1.0) -> Tensor:
        """Times in (s, 1], nested: all phases see the highest noise, where student and teacher overlap (3.4)."""
        if not self.last(k):
            low = max(low, self.schedule.fraction_above(self.levels[k]))
            high = max(low, high)
        u = batch.rng.uniform(batch.shape[0]).clamp(
            min=1e-4
        )  # never s itself, where the transition is no noise
        return self.schedule.draw_times(u, low, high)
