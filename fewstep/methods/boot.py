"""BOOT: data-free distillation by bootstrapping (Gu et al., ICML 2024, arXiv 2306.05544).

The student ``y(eps, s)`` is given the first noise, never a noisy sample, and says what signal the teacher's trajectory
from that noise has at level s: ``x_s = alpha y + sigma eps``. It learns each level from the one above, by a step of the
teacher from its own answer there; at the clean end it is a one-step generator.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor

from ..bounds import Bound, Least0, Number
from ..diffusion import objectives, trajectory
from ..diffusion.cond import Cond
from ..diffusion.denoiser import Guidance, NetDenoiser, Scalar
from ..diffusion.embedding import with_scalar
from ..diffusion.rng import Rng
from ..diffusion.schedules import repeated
from ..diffusion.student import Student
from .base import Batch, Expected, Method, Options, Phase, Progress, register


@register("boot")
class BOOT(Method):
    """One step, one network, prompts only."""

    summary = "bootstraps the teacher's trajectory from its own predictions; data-free, one step"
    papers = ("2306.05544",)
    steps = "1"
    exports = "LoRA with a rank more for the time it is told, or pipeline; LCM at [999]"
    student: Student

    @dataclass
    class Config(Options):
        """The paper gives no table of its own values; those here are ours.

        Attributes:
            intervals: steps that cut the trajectory, 1 / delta: the student learns DDIM of that many steps.
            solver: a step of the teacher: "ddim", or "heun" of second order with a second call.
            boundary: the signal at the first level. "teacher" is the paper's, the teacher's prediction from pure noise,
                right where a schedule ends at zero SNR. "exact" is the signal of the unit noise that samplers start
                from, right where it does not: SD and SDXL end at alpha 0.068. "auto" takes the one that is right.
            boundary_weight: of its loss (beta).
            guidance_scale: of the teacher. guidance_range: drawn from in training instead, and told to the student,
                which is then sampled, and exported, at guidance_scale.
        """

        intervals: Annotated[int, Bound("at least 2", lambda n: n >= 2)] = 50
        solver: Literal["ddim", "heun"] = "ddim"
        boundary: Literal["auto", "exact", "teacher"] = "auto"
        boundary_weight: Least0 = 1.0
        guidance_scale: Least0 = 1.0
        guidance_range: tuple[Number, Number] | None = None

        def expected(self) -> Expected:
            low, high = self.guidance_range or (-math.inf, math.inf)
            return {
                "guidance_range": (
                    low < high and low <= self.guidance_scale <= high,
                    f"low < high around the guidance_scale {self.guidance_scale} that the student is exported at",
                ),
            }

    config: Config

    def build(self, student: NetDenoiser) -> None:
        config, self.schedule = self.config, self.teacher.schedule
        student = with_scalar(student, "level", Scalar(0.0, scale=1000.0))
        if config.guidance_range is not None:
            student = with_scalar(student, "guidance", Scalar(config.guidance_scale))
        self.student = Student(student, [self.schedule.t_max])
        last = self.schedule.alpha(torch.tensor(self.schedule.t_max))
        self.exact = config.boundary == "exact" or (config.boundary == "auto" and bool(last > 1e-3))

    def phases(self) -> list[Phase]:
        return [Phase("student", ("student",), self.loss)]

    # ------------------------------------------------------------------------------------------------- losses
    def loss(self, batch: Batch, _progress: Progress) -> dict[str, Tensor]:
        noise, cond = batch.rng.normal(*batch.shape), batch.cond
        now, following = self.draw_levels(batch.rng.uniform(len(noise)))
        g = self.guidance(batch.rng, len(noise))
        with torch.no_grad():
            target, gain = self.step(self.signal(noise, now, g, cond), noise, now, following, g, cond)
            edge = self.edge(noise, g, cond)
        # Both answers of the student in one forward.
        ends = torch.cat([following, torch.ones_like(now)])
        twice = (
            torch.cat([noise, noise]),
            ends,
            g if isinstance(g, float) else g.repeat(2),
            Cond.cat(cond, cond),
        )
        made, start = self.signal(*twice).chunk(2)
        return {
            "bootstrap": objectives.denoising(made, target, 1 / gain.clamp(min=1e-3) ** 2),
            "boundary": self.config.boundary_weight * (start - edge).square().mean(),
        }

    def draw_levels(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Fractions (B,) of a level and of the next one below, by one interval: all of the trajectory alike."""
        width = 1 / self.config.intervals
        following = (1 - width) * u
        return following + width, following

    def guidance(self, rng: Rng, rows: int) -> Guidance:
        """One scale, or a scale (B,) for each sample, the same for its teacher and its student."""
        if self.config.guidance_range is None:
            return self.config.guidance_scale
        low, high = self.config.guidance_range
        return low + (high - low) * rng.uniform(rows)

    def signal(self, noise: Tensor, level: Tensor, guidance: Guidance, cond: Cond) -> Tensor:
        """The student's y(eps, s), (B, ...), at levels given as fractions (B,) of the schedule, 0 is clean."""
        told = {"guidance": guidance} if isinstance(guidance, Tensor) else {}
        first = self.schedule.begin(noise, repeated(self.student.times[0], noise))
        return self.student.x0(first, 0, Cond({**cond.tensors, "level": level, **told}))

    def step(
        self, signal: Tensor, noise: Tensor, now: Tensor, following: Tensor, guidance: Guidance, cond: Cond
    ) -> tuple[Tensor, Tensor]:
        """The signal one step of the teacher below, and the gain (B,) of that step."""
        t, s = self.schedule.at(now), self.schedule.at(following)
        gain = trajectory.signal_gain(self.schedule, t, s)
        x0 = self.teacher.x0(self.schedule.add_noise(signal, noise, t), t, cond, guidance=guidance)
        target = trajectory.signal_step(signal, x0, gain)
        if self.config.solver == "heun":
            s = s.clamp(min=self.schedule.t_min)
            again = self.teacher.x0(self.schedule.add_noise(target, noise, s), s, cond, guidance=guidance)
            target = trajectory.signal_step(signal, (x0 + again) / 2, gain)
        return target, gain

    def edge(self, noise: Tensor, guidance: Guidance, cond: Cond) -> Tensor:
        """The signal where the trajectory begins."""
        if self.exact:
            return trajectory.terminal_signal(noise, self.schedule)
        t = repeated(self.schedule.t_max, noise)
        return self.teacher.x0(self.schedule.begin(noise, t), t, cond, guidance=guidance)
