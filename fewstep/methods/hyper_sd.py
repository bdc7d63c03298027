"""Hyper-SD: trajectory-segmented consistency distillation (Ren et al., NeurIPS 2024, arXiv 2404.13686).

The way from noise to image is cut into segments; within each the student's jump from any point must land where its jump
from the teacher's next point lands. Stages of 8, 4, 2 and 1 segments resume each other, so that the last one, a
consistency model of the whole way, starts nearly right. With one stage and the beginning of its segments as the only
landing place this is PCM (arXiv 2405.18407). A reward and a score difference may follow.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from ..bounds import Count, Least0, Number, Positive, Share
from ..diffusion.denoiser import Denoiser, NetDenoiser
from ..diffusion.schedules import VP
from ..diffusion.student import Student
from .base import Batch, Expected, Method, Phase, Progress, few, register
from .dmd import DMD
from .segments import SegmentOptions, Segments
from .terms import MatchingWeight

if TYPE_CHECKING:
    from typing_extensions import Self


@register("hyper_sd")
class HyperSD(Method):
    """Stages of ever longer segments, one network for 1 to 8 steps."""

    summary = (
        "consistency within segments that grow, 8-4-2-1; one student of 1 to 8 steps; PCM by its options"
    )
    papers = ("2404.13686", "2405.18407")
    steps = "8, 4, 2, 1"
    exports = "LoRA or pipeline; TCD, DDIM or LCM"
    followers = ("target", "previous")
    student: Student

    @dataclass
    class Config(SegmentOptions):
        """The paper's values where it gives any; weights and lengths of its stages are unpublished.

        Attributes:
            lengths: of the stages, relative to each other. feedback_length, score_length: of the stages that may
                follow, in the same unit; 0 has none.
            num_steps: numbers of steps at which the student is sampled; null is ``segments``.
            one_step_time: where the student of one step is called; null is the noisiest (800 for the paper's
                dedicated one-step model).
            noise, eta: how it steps, see :class:`~student.Student`; null is "tcd", or "fresh" for a flow, whose
                schedulers have no such steps; pipelines that hand on no eta (DiT, DDPM) want "fresh" or "ddim".
                A student of one segment predicts clean images and steps by fresh noise, "tcd" with eta 1.
            reward: of the feedback stage, ``module:function`` or a preference model, see :mod:`fewstep.vision.reward`.
            reward_margin: rewards above it are good enough (alpha_d); the loss is a hinge. reward_weight: of it.
            score_weight, score_norm: of the score difference on one-step samples, and its kind (DMD's ``weight``).
            keep_weight: of the consistency loss within the feedback and score stages.
        """

        lengths: list[Positive] | None = None
        feedback_length: Least0 = 0.0
        score_length: Least0 = 0.0
        num_steps: list[Count] | None = None
        one_step_time: Number | None = None
        noise: Literal["ddim", "fresh", "tcd"] | None = None
        eta: Share = 1.0
        reward: str | None = None
        reward_margin: Number = 1.0
        reward_weight: Least0 = 1.0
        score_weight: Least0 = 1.0
        score_norm: MatchingWeight = "l1"
        keep_weight: Least0 = 1.0

        def expected(self) -> Expected:
            lengths = self.lengths if self.lengths is not None else [1.0] * len(self.segments)
            counts = self.num_steps if self.num_steps is not None else [1]
            return {
                "lengths": (
                    len(lengths) == len(self.segments),
                    f"a length per stage of segments {self.segments}",
                ),
                "reward": (
                    not self.feedback_length or bool(self.reward),
                    "a differentiable score of images and prompts for the feedback stage, module:function, or "
                    "feedback_length 0",
                ),
                "num_steps": (bool(counts), "numbers of steps, e.g. [8, 4, 2, 1]"),
            }

        def smoke(self) -> Self:
            score = 1.0 if self.score_length else 0.0  # a stage of its own within four steps
            return replace(self, score_length=score, taps=few(self.taps))

        @classmethod
        def toy(cls) -> Self:
            return cls(segments=[4, 1], stage_teacher="previous", solver_steps=8, score_length=1.0)

    config: Config
    teacher: NetDenoiser

    def build(
        self,
        student: Denoiser,
        target: Denoiser | None = None,
        previous: Denoiser | None = None,
        critic: Denoiser | None = None,
    ) -> None:
        config, teacher, self.schedule = self.config, self.teacher, self.teacher.schedule
        self.previous, self.critic = previous, critic
        self.term = Segments(config, teacher, self.latent_shape, student, target or student, previous)
        counts = sorted(set(config.num_steps or config.segments), reverse=True)
        grids = [self.schedule.at(torch.arange(n, 0, -1) / n).tolist() for n in counts]
        if config.one_step_time is not None:
            grids = [[config.one_step_time] if len(grid) == 1 else grid for grid in grids]
        noise = config.noise or ("tcd" if isinstance(self.schedule, VP) else "fresh")
        self.student = Student(student, grids[0], noise, also=grids[1:], eta=config.eta)
        self.host: DMD | None = None
        if critic is not None:
            options: dict[str, Any] = {"guidance_scale": config.guidance_scale, "weight": config.score_norm}
            host = DMD.Config(start=config.one_step_time, regression_weight=0.0, **options)
            self.host = DMD(host, teacher, self.latent_shape, student=student, critic=critic)

    @classmethod
    def networks_for(cls, config: HyperSD.Config) -> tuple[str, ...]:
        more = {
            "target": config.target == "ema",
            "previous": config.stage_teacher == "previous" and len(config.segments) > 1,
            "critic": config.score_length > 0,
        }
        return ("student", *(name for name, needed in more.items() if needed))

    @classmethod
    def needs(cls, config: HyperSD.Config) -> tuple[str, ...]:
        return ("prompts", "pairs" if config.synthetic else "images")

    @classmethod
    def wants(cls, config: Config) -> tuple[str, ...]:
        return ("reward",) if config.reward else ()

    def heads(self) -> dict[str, nn.Module]:
        head = self.term.discriminator
        return {"discriminator": head} if head else {}

    # ------------------------------------------------------------------------------------------------- phases
    def phases(self) -> list[Phase]:
        c, last = self.config, len(self.config.segments) - 1
        shares = self.shares()
        phases: list[Phase] = []
        for i, share in enumerate(shares[: last + 1]):
            if self.previous is not None and i:
                kept = ("student", 0.0)
                phases.append(
                    Phase(f"previous_{i + 1}", ("previous",), None, once=True, share=share, follows=kept)
                )
            phases.append(Phase(f"stage_{i + 1}", ("student",), partial(self.consistency, i), share=share))
            if c.of_stage("gan_weight", i):
                judge = partial(self.discrimination, i)
                phases.append(Phase(f"discriminator_{i + 1}", ("discriminator",), judge, share=share))
        if c.feedback_length:
            phases.append(Phase("feedback", ("student",), self.feedback, share=shares[last + 1]))
        if self.host:
            phases.append(Phase("score", ("student",), self.score, share=shares[-1]))
            phases.append(Phase("critic", ("critic",), self.host.critic_loss, share=shares[-1]))
        if c.target == "ema":
            phases.append(Phase("target", ("target",), None, follows=("student", c.target_decay)))
        return phases

    def shares(self) -> list[tuple[float, float]]:
        """(begin, end) of every stage: consistency, feedback, score."""
        c = self.config
        lengths = [*(c.lengths or [1.0] * len(c.segments)), c.feedback_length, c.score_length]
        bounds = [sum(lengths[:i]) / sum(lengths) for i in range(len(lengths) + 1)]
        return list(pairwise(bounds))

    # ------------------------------------------------------------------------------------------------- losses
    def consistency(self, stage: int, batch: Batch, _progress: Progress) -> dict[str, Tensor]:
        return self.term.losses(stage, batch)

    def discrimination(self, stage: int, batch: Batch, _progress: Progress) -> dict[str, Tensor]:
        return self.term.discrimination(stage, batch)

    def feedback(self, batch: Batch, _progress: Progress) -> dict[str, Tensor]:
        """A hinge on the reward of a sample of the student's, with the gradient of its last step (section 3.3)."""
        c = self.config
        counts = list(self.student.grids)
        student = self.student.at(counts[batch.shared.integer(len(counts))])
        noise = batch.rng.normal(*batch.shape)
        x0 = student.rollout(noise, batch.cond, batch.rng.normal_like, student.num_steps - 1)
        reward = self.reward(x0, batch.index)
        batch.log["reward"] = reward.detach().mean()
        hinge = nn.functional.relu(c.reward_margin - reward).mean()
        return {"reward": c.reward_weight * hinge, **self.kept(batch)}

    def score(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        """DMD's score difference on one-step samples (section 3.4)."""
        losses = self.host.generator_loss(batch, progress)
        return {**{k: self.config.score_weight * v for k, v in losses.items()}, **self.kept(batch)}

    def kept(self, batch: Batch) -> dict[str, Tensor]:
        """The last stage's consistency, so that the other numbers of steps stay as they are."""
        weight = self.config.keep_weight
        if not weight:
            return {}
        return {"consistency": weight * self.term.inconsistency(len(self.config.segments) - 1, batch)[0]}
