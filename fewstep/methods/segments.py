"""Consistency within segments of the way from noise to image: the term that Hyper-SD and PCM are made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..bounds import Count, Least0, Number, Share
from ..diffusion import objectives, trajectory
from ..diffusion.cond import Cond
from ..diffusion.denoiser import Denoiser, Guidance, NetDenoiser
from ..diffusion.discriminator import Discriminator
from .base import Batch, Expected, Options
from .verdicts import verdicts

End = Literal["random", "segment"]


@dataclass
class SegmentOptions(Options):
    """Options of the term.

    Attributes:
        segments: of each stage. Options of a stage are one value for all, or a list.
        solver_steps: DDIM steps of the teacher from noise to image: the grid that times are drawn from (PCM: 40 for
            SDXL). A multiple of the segments has the student's own times on it.
        end: where jumps land: anywhere between the beginning of the segment and the teacher's point ("random", the
            paper's), or at the beginning ("segment", PCM's). The student is not told the end, and no one prediction
            serves them all: from far off the mean squared error settles for a blur. So null is "random" for
            several segments, and the beginning where one segment is all the way.
        target: whose jump is the goal: an "ema" of the student, or the "live" student (PCM).
        target_decay: of that average, per update of the student (0.95 as in published consistency trainers).
        stage_teacher: "original", or "previous": what the stage before ended with, its guidance distilled in.
        guidance_scale: of the teacher. guidance_range: drawn from per sample instead (PCM: 7 to 8).
        distance: of two jumps, "mse" or "huber" (PCM: with c = 0.001).
        gan_weight: of an adversarial term per stage: goal against student, renoised within the segment and seen by
            heads on the teacher's features (SDXL-Lightning, arXiv 2402.13929; PCM: 0.1).
        taps: blocks whose features they see.
        synthetic: noise the teacher's own samples (``fewstep pairs``) in place of real images.
    """

    segments: list[Count] = field(default_factory=lambda: [8, 4, 2, 1])
    solver_steps: Count = 40
    end: End | list[End] | None = None
    target: Literal["ema", "live"] = "ema"
    target_decay: Share = 0.95
    stage_teacher: Literal["original", "previous"] = "original"
    guidance_scale: Least0 = 1.0
    guidance_range: tuple[Number, Number] | None = None
    distance: Literal["mse", "huber"] = "mse"
    gan_weight: Least0 | list[Least0] = 0.0
    taps: list[str] = field(default_factory=lambda: ["mid_block"])
    synthetic: bool = False

    def expected(self) -> Expected:
        stages, low_high = self.segments or [0], self.guidance_range or (0.0, 1.0)
        return {
            "segments": (
                1 <= max(stages) <= self.solver_steps,
                f"at least one stage, of 1 to solver_steps ({self.solver_steps}) segments each",
            ),
            **{
                name: (
                    not isinstance(value := getattr(self, name), list) or len(value) == len(stages),
                    f"one per stage of segments {self.segments}",
                )
                for name in ("end", "gan_weight")
            },
            "taps": (bool(self.taps) or not self.gan_weight, "names of the teacher's blocks"),
            "guidance_range": (low_high[0] < low_high[1], "low < high"),
        }

    def of_stage(self, name: str, stage: int) -> Any:
        value = getattr(self, name)
        return value[stage] if isinstance(value, list) else value

    def lands(self, stage: int) -> End:
        """Where jumps of a stage land."""
        return self.of_stage("end", stage) or ("segment" if self.segments[stage] == 1 else "random")


class Segments:
    """The term, with a discriminator of its own where a stage has one.

    Args:
        target: whose jump is the goal. previous: what the stage before ended with, where it is the teacher.
    """

    def __init__(
        self,
        config: SegmentOptions,
        teacher: NetDenoiser,
        latent_shape: Sequence[int],
        student: Denoiser,
        target: Denoiser,
        previous: Denoiser | None,
    ):
        self.config, self.teacher, self.schedule = config, teacher, teacher.schedule
        self.student, self.target, self.previous = student, target, previous
        self.discriminator: Discriminator | None = None
        if any(config.of_stage("gan_weight", i) for i in range(len(config.segments))):
            self.discriminator = Discriminator(teacher, config.taps, latent_shape)

    def losses(self, stage: int, batch: Batch) -> dict[str, Tensor]:
        distance, made, goal, end = self.inconsistency(stage, batch)
        weight = self.config.of_stage("gan_weight", stage)
        if not weight:
            return {"consistency": distance}
        batch.carry |= {"made": made.detach(), "goal": goal, "end": end}
        logits, _ = self.judge(stage, made, end, batch.clean(self.config.synthetic)[1], batch)
        return {"consistency": distance, "gan": weight * objectives.gan_generator(logits)}

    def inconsistency(self, stage: int, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(distance, where the student lands, where it should, at which fraction of the schedule) (eq. 5)."""
        c, schedule = self.config, self.schedule
        x0, cond = batch.clean(c.synthetic)
        now, before, end = self.draw_levels(stage, batch)
        t, s, r = (schedule.at(level) for level in (now, before, end))
        x_t = schedule.add_noise(x0, batch.rng.normal_like(x0), t)
        with torch.no_grad():
            x_s = trajectory.jump(schedule, x_t, self.teach(stage, x_t, t, cond, batch), t, s)
            goal = self.land(self.target, x_s, s, r, cond)
        made = self.land(self.student, x_t, t, r, cond)
        distance = trajectory.pseudo_huber if c.distance == "huber" else nn.functional.mse_loss
        return distance(made, goal), made, goal, end

    def discrimination(self, stage: int, batch: Batch) -> dict[str, Tensor]:
        _, cond = batch.clean(self.config.synthetic)
        both = torch.cat([batch.carry["goal"], batch.carry["made"]])
        logits, t = self.judge(stage, both, batch.carry["end"].repeat(2), Cond.cat(cond, cond), batch)
        of_goal, of_made = logits.chunk(2)
        of, of_other = t.chunk(2)
        batch.log |= verdicts(self.schedule, (of_goal, of), (of_made, of_other))
        return {"discriminator": objectives.gan_discriminator(of_goal, of_made)}

    def draw_levels(self, stage: int, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Fractions (B,) of the schedule: a node of the grid, the next below within its segment, the landing place."""
        nodes = self.config.solver_steps
        n = 1 + torch.floor(batch.rng.uniform(batch.shape[0]) * nodes)
        start = trajectory.segment_start(n, nodes, self.config.segments[stage])
        before = torch.maximum((n - 1) / nodes, start)
        if self.config.lands(stage) == "segment":
            return n / nodes, before, start
        return n / nodes, before, start + batch.rng.uniform(len(n)) * (before - start)

    def teach(self, stage: int, x_t: Tensor, t: Tensor, cond: Cond, batch: Batch) -> Tensor:
        """The prediction of the stage's teacher; guidance is the original's alone."""
        if self.previous is not None and stage:
            return self.previous.x0(x_t, t, cond)
        guidance: Guidance = self.config.guidance_scale
        if self.config.guidance_range is not None:
            low, high = self.config.guidance_range
            guidance = low + (high - low) * batch.rng.uniform(len(x_t))
        return self.teacher.x0(x_t, t, cond, guidance=guidance)

    def land(self, denoiser: Denoiser, x_t: Tensor, t: Tensor, r: Tensor, cond: Cond) -> Tensor:
        """Where a network's prediction at x_t leads; x_t itself if that is there already."""
        x0 = denoiser.x0(x_t, t.clamp(min=self.schedule.t_min), cond)
        return trajectory.jump(self.schedule, x_t, x0, t, r)

    def judge(self, stage: int, x: Tensor, end: Tensor, cond: Cond, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits and times of what landed at ``end``, diffused to anywhere in one segment's length above it."""
        up = end + batch.rng.uniform(len(x)) / self.config.segments[stage]
        t, r = self.schedule.at(up.clamp(max=1.0)), self.schedule.at(end)
        x_t = self.schedule.renoise(x, batch.rng.normal_like(x), r, t)
        return self.discriminator.logits(self.teacher, x_t, t.clamp(min=self.schedule.t_min), cond), t
