"""Phased DMD: one expert per interval of noise levels (Fan et al., arXiv 2510.27684).

An expert lands on an intermediate level s and matches the teacher there, by diffusing its x_s further. Only the last
one ever projects to clean samples, so no expert is a one-step model, and diversity survives.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from ..bounds import Count
from ..diffusion import objectives
from ..diffusion.denoiser import Denoiser
from ..diffusion.schedules import repeated
from ..diffusion.student import Student
from ..diffusion.times import chosen_times
from .base import Batch, Expected, Method, Phase, Progress, register
from .terms import Critic, Matching, Times, carried, difference, regression

if TYPE_CHECKING:
    from typing_extensions import Self


@register("phased_dmd")
class PhasedDMD(Method):
    """K phases of training, an expert each, nested noise intervals, data-free."""

    summary = "an expert per noise interval, matched at intermediate levels; keeps diversity"
    papers = ("2510.27684",)
    steps = "2 or more"
    exports = "LoRA or network per expert, switched from step to step; DDIM"
    student: Student

    @dataclass
    class Config(Critic, Matching, Times):
        """Defaults are the paper's where it gives any.

        Attributes:
            phases: experts, each with num_steps / phases of the student's steps (2 and 4).
            guidance_scale: of the teacher only (paper: 4 to 5).
            weight: "l1" is DMD's normaliser (as the authors' trainer), "kl" the exact weight of eq. 10.
            time_range: of the score difference in the last phase; the other phases start at their own level.
            solver: how a step arrives at the next level. Only "ddim" (Euler for flow) is possible: a step that
                re-noises its prediction at the edge of a phase has the law of that prediction at every higher level,
                and the phase would be one-step distillation in disguise.
        """

        phases: Count = 2
        weight: Literal["l1", "kl"] = "l1"
        solver: Literal["ddim", "lcm"] = "ddim"

        def expected(self) -> Expected:
            steps = len(self.times) if self.times else self.num_steps
            why = "it re-noises its own prediction at the edge of a phase, which teaches the expert to predict clean "
            return {
                "phases": (
                    steps % self.phases == 0,
                    f"a number of phases that divides the {steps} steps, e.g. 2 phases of 4 steps",
                ),
                "time_law": (self.time_law == "uniform", "uniform: a phase has the times above its level"),
                "solver": (
                    self.solver == "ddim",
                    f"ddim; {why}images in one step, which is what phases are there to avoid",
                ),
            }

        @classmethod
        def toy(cls) -> Self:
            return cls(critic_steps=2)

    config: Config

    @classmethod
    def networks_for(cls, config: PhasedDMD.Config) -> tuple[str, ...]:
        return (*(f"student_{k + 1}" for k in range(config.phases)), "critic")

    def build(self, critic: Denoiser, **experts: Denoiser) -> None:
        config, self.critic, self.schedule = self.config, critic, self.teacher.schedule
        times = chosen_times(self.schedule, config.num_steps, config.start, config.times)
        self.per_phase = len(times) // config.phases
        names = [f"student_{i // self.per_phase + 1}" for i in range(len(times))]
        self.student = Student([experts[n] for n in names], times, "ddim", names)
        self.levels = [  # where all but the last phase end
            float(t) for t in times[self.per_phase :: self.per_phase]
        ]
        at = torch.tensor(self.levels, dtype=torch.float64)
        self.scales = list(zip(self.schedule.alpha(at).tolist(), self.schedule.sigma(at).tolist()))

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
        batch.carry["x0"] = x_s.detach()
        t = self.times_above(k, batch, *self.config.time_range)
        with torch.no_grad():
            x_t = self.diffuse(k, x_s, batch.rng.normal_like(x_s), t)
            guidance = self.config.guidance_at(t, self.schedule)
            real = self.teacher.x0(x_t, t, batch.cond, guidance=guidance)
            fake = self.critic.x0(x_t, t, batch.cond)
        self.note(k, batch, x_s, real, fake)
        if self.config.weight == "kl":  # eq. 10: alpha_t alpha_{t|s} / sigma_t^2 on the difference, at x_s
            a_ts = self.schedule.alpha(t) / (1.0 if self.last(k) else self.schedule.alpha(self.level(k, x_s)))
            weight = (a_ts * self.schedule.alpha(t) / self.schedule.sigma(t) ** 2).to(x_s.dtype)
            return {"dm": objectives.distribution_matching(x_s, real, fake, weight)}
        # The step to x_s is linear in x0 with a positive factor, so the normalised direction may act on x0.
        return {"dm": difference("l1", x0, real, fake, self.schedule, t, batch, follows=False)}

    def note(self, k: int, batch: Batch, x_s: Tensor, real: Tensor, fake: Tensor) -> None:
        """Vital signs. Between levels no clean sample is known, so there is no lag, and the spread is that of x_s."""
        if self.last(k):
            batch.note_lag(x_s, real, fake)
            batch.note_latents(x_s)
        else:
            batch.note_latents(x_s, *self.scales[k])

    def critic_loss(self, k: int, batch: Batch, _progress: Progress) -> dict[str, Tensor]:
        x_s = carried(batch, lambda: self.arrive(k, batch)[0])
        t, eps = self.times_above(k, batch), batch.rng.normal_like(x_s)
        x_t, target, clamp = self.diffuse(k, x_s, eps, t), x_s, torch.ones_like(t)
        if not self.last(k):
            level = self.level(k, x_s)
            target, clamp = objectives.denoising_target_between(x_s, eps, level, t, self.schedule)
        kind = self.config.critic_loss
        return {"denoising": regression(self.critic, kind, target, x_t, t, batch.cond, factor=clamp)}

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
