"""Hyper-SD: trajectory-segmented consistency distillation (Ren et al., NeurIPS 2024, arXiv 2404.13686).

The way from noise to image is cut into segments; within each the student's jump from any point must land where its jump
from the teacher's next point lands. Stages of 8, 4, 2 and 1 segments resume each other, so that the last one, a
consistency model of the whole way, starts nearly right. With one stage and the beginning of its segments as the only
landing place this is PCM (arXiv 2405.18407). A reward and a score difference may follow.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from ..diffusion import objectives, trajectory
from ..diffusion.cond import Cond
from ..diffusion.denoiser import Denoiser, Guidance, NetDenoiser
from ..diffusion.discriminator import Discriminator
from ..diffusion.schedules import VP
from ..diffusion.student import Student
from .base import Batch, Expected, Method, Options, Phase, Progress, few, register
from .dmd import DMD

if TYPE_CHECKING:
    from typing_extensions import Self

End = Literal["random", "segment"]


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
    class Config(Options):
        """The paper's values where it gives any; weights and lengths of its stages are unpublished.

        Attributes:
            segments: of each stage. Options of a stage are one value for all, or a list.
            lengths: of the stages, relative to each other. feedback_length, score_length: of the stages that may
                follow, in the same unit; 0 has none.
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
            num_steps: numbers of steps at which the student is sampled; null is ``segments``.
            one_step_time: where the student of one step is called; null is the noisiest (800 for the paper's
                dedicated one-step model).
            noise, eta: how it steps, see :class:`~student.Student`; null is "tcd", or "fresh" for a flow, whose
                schedulers have no such steps. A student of one segment predicts clean images and steps by fresh noise,
                "tcd" with eta 1.
            reward: of the feedback stage, ``module:function`` or a preference model, see :mod:`fewstep.vision.reward`.
            reward_margin: rewards above it are good enough (alpha_d); the loss is a hinge. reward_weight: of it.
            score_weight, score_norm: of the score difference on one-step samples, and its kind (DMD's ``weight``).
            keep_weight: of the consistency loss within the feedback and score stages.
        """

        segments: list[int] = field(default_factory=lambda: [8, 4, 2, 1])
        lengths: list[float] | None = None
        feedback_length: float = 0.0
        score_length: float = 0.0
        solver_steps: int = 40
        end: End | list[End] | None = None
        target: Literal["ema", "live"] = "ema"
        target_decay: float = 0.95
        stage_teacher: Literal["original", "previous"] = "original"
        guidance_scale: float = 1.0
        guidance_range: tuple[float, float] | None = None
        distance: Literal["mse", "huber"] = "mse"
        gan_weight: float | list[float] = 0.0
        taps: list[str] = field(default_factory=lambda: ["mid_block"])
        synthetic: bool = False
        num_steps: list[int] | None = None
        one_step_time: float | None = None
        noise: Literal["ddim", "fresh", "tcd"] | None = None
        eta: float = 1.0
        reward: str | None = None
        reward_margin: float = 1.0
        reward_weight: float = 1.0
        score_weight: float = 1.0
        score_norm: Literal["l1", "kl", "vsd", "one"] = "l1"
        keep_weight: float = 1.0

        def expected(self) -> Expected:
            stages, low_high = self.segments or [0], self.guidance_range or (0.0, 1.0)
            lengths, counts = self.lengths or [1.0], self.num_steps if self.num_steps is not None else [1]
            return {
                "segments": (
                    min(stages) >= 1 and max(stages) <= self.solver_steps,
                    f"at least one stage, of 1 to solver_steps ({self.solver_steps}) segments each",
                ),
                **{
                    name: (
                        not isinstance(value := getattr(self, name), list) or len(value) == len(stages),
                        f"one per stage of segments {self.segments}",
                    )
                    for name in ("end", "gan_weight")
                },
                "lengths": (
                    min(lengths) > 0 and len(lengths) in (len(stages), 0 if self.lengths else 1),
                    f"a positive length per stage of segments {self.segments}",
                ),
                "feedback_length": (self.feedback_length >= 0, "0 or more"),
                "score_length": (self.score_length >= 0, "0 or more"),
                "target_decay": (0 <= self.target_decay <= 1, "0 to 1"),
                "eta": (0 <= self.eta <= 1, "0 to 1"),
                "reward": (
                    not self.feedback_length or bool(self.reward),
                    "a differentiable score of images and prompts for the feedback stage, module:function, or "
                    "feedback_length 0",
                ),
                "num_steps": (bool(counts) and min(counts) >= 1, "numbers of steps, e.g. [8, 4, 2, 1]"),
                "guidance_range": (low_high[0] < low_high[1], "low < high"),
            }

        def of_stage(self, name: str, stage: int) -> Any:
            value = getattr(self, name)
            return value[stage] if isinstance(value, list) else value

        def lands(self, stage: int) -> End:
            """Where jumps of a stage land."""
            return self.of_stage("end", stage) or ("segment" if self.segments[stage] == 1 else "random")

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
        self.previous, self.critic, self.target = previous, critic, target or student
        counts = sorted(set(config.num_steps or config.segments), reverse=True)
        grids = [self.schedule.at(torch.arange(n, 0, -1) / n).tolist() for n in counts]
        if config.one_step_time is not None:
            grids = [[config.one_step_time] if len(grid) == 1 else grid for grid in grids]
        noise = config.noise or ("tcd" if isinstance(self.schedule, VP) else "fresh")
        self.student = Student(student, grids[0], noise, also=grids[1:], eta=config.eta)
        self.discriminator: Discriminator | None = None
        if any(config.of_stage("gan_weight", i) for i in range(len(config.segments))):
            self.discriminator = Discriminator(teacher, config.taps, self.latent_shape)
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
        return {"discriminator": self.discriminator} if self.discriminator else {}

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
        distance, made, goal, end = self.inconsistency(stage, batch)
        weight = self.config.of_stage("gan_weight", stage)
        if not weight:
            return {"consistency": distance}
        batch.carry |= {"made": made.detach(), "goal": goal, "end": end}
        logits = self.judge(stage, made, end, batch.clean(self.config.synthetic)[1], batch)
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
        made = self.land(self.student.denoiser, x_t, t, r, cond)
        distance = trajectory.pseudo_huber if c.distance == "huber" else nn.functional.mse_loss
        return distance(made, goal), made, goal, end

    def discrimination(self, stage: int, batch: Batch, _progress: Progress) -> dict[str, Tensor]:
        _, cond = batch.clean(self.config.synthetic)
        both = torch.cat([batch.carry["goal"], batch.carry["made"]])
        logits = self.judge(stage, both, batch.carry["end"].repeat(2), Cond.cat(cond, cond), batch)
        of_goal, of_made = logits.chunk(2)
        return {"discriminator": objectives.gan_discriminator(of_goal, of_made)}

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
        return {"consistency": weight * self.inconsistency(len(self.config.segments) - 1, batch)[0]}

    # -------------------------------------------------------------------------------------------------- steps
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

    def judge(self, stage: int, x: Tensor, end: Tensor, cond: Cond, batch: Batch) -> Tensor:
        """Logits of what landed at ``end``, diffused to anywhere in one segment's length above it."""
        up = end + batch.rng.uniform(len(x)) / self.config.segments[stage]
        t, r = self.schedule.at(up.clamp(max=1.0)), self.schedule.at(end)
        x_t = self.schedule.renoise(x, batch.rng.normal_like(x), r, t)
        return self.discriminator.logits(self.teacher, x_t, t.clamp(min=self.schedule.t_min), cond)
