"""DD2: conditional score distillation of autoregressive image models (Liu et al., NeurIPS 2025, arXiv 2510.21003).

The teacher's probabilities give the exact score of the next token's embedding, noised, under any prefix. A one-step
generator is trained such that, at every position, the score of its own conditional law equals the teacher's; a critic
tracks the former. What is distilled is a law, not a map, so pairs serve only to initialise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..bounds import Bound, Count, Least0, Number, Part, Positive, Share
from ..diffusion import objectives
from ..diffusion.cond import Cond
from ..diffusion.student import Student
from ..errors import RecipeError
from ..tokens.codes import CodebookDenoiser, likeliest_code
from ..tokens.entries import EntryStudent
from .base import Batch, Expected, Method, Options, Phase, Progress, register

if TYPE_CHECKING:
    from typing_extensions import Self

    from ..tokens.students import CausalStudent, ParallelStudent


Levels = Annotated[tuple[float, float], Bound("0 < low < high <= 1", lambda r: 0 < r[0] < r[1] <= 1)]


@register("dd2")
class DD2(Method):
    """Stage 1: the critic learns the teacher's own scores, and the generator starts from it. Stage 2: distillation."""

    summary = "autoregressive teachers: score distillation at every position; one step"
    papers = ("2510.21003",)
    steps = "1"
    exports = "pipeline of tokens"
    networks = ("student", "critic")
    extras = ()
    teacher_kind = "autoregressive"
    moved: ClassVar = {"from_dd1": "roles.student.start_from"}
    student: Student
    critic: CausalStudent

    @dataclass
    class Config(Options):
        """Defaults are the published ones where the paper gives any; those marked * are ours.

        Attributes:
            guidance_scale: of the teacher, ``u + g (c - u)``.
            critic_steps: critic updates per generator update (5).
            matching: "sid", the paper's score identity loss, or "dmd", the gradient of the KL divergence.
            alpha: of "sid" (1).
            time_range: noise levels of the generator's loss*. critic_time_range: of the critic's*.
            copies, critic_copies: noise levels per token that share one prefix (the critic's is that of MAR, 4)*.
            initial_share: of the run, for stage 1 (published: 330k of some 400k iterations, on teacher samples).
            initial_rate: times the critic's learning rate, in stage 1 (LlamaGen: 1e-4, and 2e-4 in stage 2).
            initial_rows: share of each batch that stage 1 learns from (LlamaGen: 512 samples, and 1024 in stage 2).
            regression_share: of the run after stage 1, in which the generator learns DD1's map first, at
                ``regression_rate`` times its learning rate; 0 is none, as in the paper*. regression_rate: this factor.
            regression_weight: of the same loss beside the distillation, which anchors the generator to the map as DMD
                does (arXiv 2311.18828); 0 is none, as in the paper*.
            alignment_share: of the run, in which the critic alone learns what the generator makes: before the
                distillation*, or, where there is a second round of it, between the two, and of the generator's moving
                average, from which it goes on (the paper's, for VAR-d16 and d20).
            second_share: of the run, for that second round; 0 is none.
            second_critic_steps: critic updates per generator update in it (2).
            prefix: what teacher and critic are conditioned on: "nearest" codes of what the generator made, which needs
                no change of the teacher*, or "continuous" embeddings, which the teacher must read (published, after a
                fine-tuning that makes LlamaGen read them).
            generator: "embeddings", the paper's, whose tokens are what its flow head makes of the noise; or "codes", a
                student as DD1 has it, whose tokens are the likeliest codes. Gradients pass to the mean code of its
                probabilities (straight through)*, and its stage of regression is DD1's cross-entropy. It may start from
                a finished DD1 student: ``roles.student.start_from``*.
            head_width, head_depth: of the flow head (3 blocks of 1024).
        """

        guidance_scale: Least0 = 1.0
        critic_steps: Count = 5
        matching: Literal["sid", "dmd"] = "sid"
        alpha: Number = 1.0
        time_range: Levels = (0.02, 0.98)
        critic_time_range: Levels = (0.005, 1.0)
        copies: Count = 1
        critic_copies: Count = 4
        initial_share: Share = 0.3
        initial_rate: Positive = 1.0
        initial_rows: Part = 1.0
        regression_share: Share = 0.0
        regression_rate: Positive = 1.0
        regression_weight: Least0 = 0.0
        alignment_share: Share = 0.0
        second_share: Share = 0.0
        second_critic_steps: Count = 2
        prefix: Literal["nearest", "continuous"] = "nearest"
        generator: Literal["embeddings", "codes"] = "embeddings"
        head_width: Count = 1024
        head_depth: Count = 3

        def expected(self) -> Expected:
            later = self.regression_share, self.alignment_share, self.second_share
            return {
                "initial_share": (
                    self.initial_share > 0 and self.initial_share + sum(later) < 1,
                    f"with regression_share {later[0]}, alignment_share {later[1]} and second_share {later[2]} a "
                    "positive one and something left of the run after all",
                ),
            }

        def smoke(self) -> Self:
            return replace(self, critic_steps=2, initial_share=0.25, head_width=32)

        @classmethod
        def toy(cls) -> Self:
            return cls(critic_steps=2, initial_share=0.25, regression_share=0.25, head_width=16)

    config: Config
    teacher: CodebookDenoiser

    def build(self, student: CausalStudent | ParallelStudent, critic: CausalStudent) -> None:
        config, teacher, self.critic, self.net = self.config, self.teacher, critic, student
        if config.prefix == "continuous" and not getattr(teacher.net, "reads_codes", False):
            raise RecipeError(
                "method.prefix: continuous: this teacher reads token indices only; use nearest, or a teacher whose "
                "transformer reads embeddings"
            )
        if config.generator == "codes":
            self.student = EntryStudent(student, [0], self.latent_shape[0])
        else:
            from ..tokens.students import Generator

            self.student = Student(Generator(student), [student.schedule.t_max])

    @classmethod
    def network(cls, config: DD2.Config, teacher, name: str) -> nn.Module:
        from ..tokens.students import CausalStudent, ParallelStudent

        if name == "student" and config.generator == "codes":
            return ParallelStudent.of(teacher.net, teacher.denoiser.codes, split=sum(teacher.net.groups))
        options = {"head_width": config.head_width, "head_depth": config.head_depth}
        return CausalStudent.of(teacher.net, teacher.denoiser.codes, **options)

    @classmethod
    def needs(cls, config: DD2.Config) -> tuple[str, ...]:
        return ("prompts", "pairs")

    def phases(self) -> list[Phase]:
        c = self.config
        taught = c.initial_share
        ready = taught + c.regression_share
        again = 1 - c.second_share  # where a second round begins
        begin, end = ready + c.alignment_share, 1.0
        if c.second_share:
            begin, end = ready, again - c.alignment_share

        initial, distil = self.initial_loss, self.generator_loss
        phases = [
            Phase("initial", ("critic",), initial, share=(0.0, taught), rate=c.initial_rate),
            Phase("generator", ("student",), distil, every=c.critic_steps, share=(begin, end)),
            Phase("critic", ("critic",), self.critic_loss, share=(ready, 1.0)),
        ]
        if c.second_share:
            share, every, own = (again, 1.0), c.second_critic_steps, ("student", 0.0)
            phases[2:2] = [
                Phase("average", ("student",), None, once=True, share=(end, 1.0), follows=own),
                Phase("second", ("student",), distil, every=every, share=share, warm=False),
            ]
        if c.regression_share:
            share, rate = (taught, ready), c.regression_rate
            phases.insert(1, Phase("regression", ("student",), self.regression_loss, share=share, rate=rate))
        if c.generator == "embeddings":
            share = (taught, 1.0)
            phases.insert(
                1, Phase("start", ("student",), None, once=True, share=share, follows=("critic", 0.0))
            )
        return phases

    # ------------------------------------------------------------------------------------------------- stage 1
    def initial_loss(self, batch: Batch, _progress: Progress) -> dict[str, Tensor]:
        """The critic learns the teacher's velocity at the teacher's own samples (GTS): the exact conditional mean takes
        the place of the drawn target, which has the same minimiser and far less variance."""
        some = slice(math.ceil(self.config.initial_rows * len(batch.pairs[1])))
        batch = batch.view(some, some)
        tokens = batch.pairs[1]
        q = self.teacher.codes[tokens]
        real = self.teacher.context(tokens, batch.pair_cond, guidance=self.config.guidance_scale)
        fake = self.critic.context(q, batch.pair_cond)
        return {"score": self._denoising(q, fake, batch, real)}

    def regression_loss(self, batch: Batch, _progress: Progress) -> dict[str, Tensor]:
        """DD1's map, by mean squared error or by the cross-entropy of its codes."""
        noise, tokens = batch.pairs
        if self.config.generator == "codes":
            logits = self._logits(noise, batch.pair_cond)
            return {"regression": F.cross_entropy(logits.flatten(0, 1), tokens.flatten())}
        made = self.student.x0(noise, 0, batch.pair_cond)
        return {"regression": (made - self.teacher.codes[tokens]).square().mean()}

    # ------------------------------------------------------------------------------------------------- stage 2
    def generator_loss(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        """The gradient reaches a token through its own noisy version only; prefixes are given."""
        c = self.config
        q = self._generate(batch)
        batch.carry["x0"] = q.detach()
        with torch.no_grad():
            prefix = self._prefix(q)
            given = self.teacher.context(prefix, batch.cond, guidance=c.guidance_scale)
            seen = self.critic.context(prefix, batch.cond)
        loss: Any = 0.0
        for _ in range(c.copies):
            x_t, t = self._noised(q, batch, *c.time_range)
            with torch.set_grad_enabled(c.matching == "sid"):
                real, fake = self.teacher.x0(x_t, t, given), self.critic.x0(x_t, t, seen)
            loss = loss + self._matching(*(v.flatten(0, 1) for v in (q, real, fake, t))) / c.copies
        batch.note_lag(q, real, fake)  # codes are of another scale than latents
        losses: dict[str, Tensor] = {c.matching: loss}
        if c.regression_weight:
            losses["regression"] = c.regression_weight * self.regression_loss(batch, progress)["regression"]
        return losses

    def critic_loss(self, batch: Batch, _progress: Progress) -> dict[str, Tensor]:
        """Flow matching on what the generator makes, which then stands for itself as the target (FCS)."""
        if "x0" not in batch.carry:
            with torch.no_grad():
                batch.carry["x0"] = self._generate(batch)
        q = batch.carry["x0"]
        return {"denoising": self._denoising(q, self.critic.context(self._prefix(q), batch.cond), batch)}

    def _matching(self, q: Tensor, real: Tensor, fake: Tensor, t: Tensor) -> Tensor:
        """Every token is a sample of its own: (B n, C). SiD's normaliser is per token, and floored (0.05 is ours)."""
        weight = objectives.identity_weight("l1", q, real, self.teacher.schedule, t[:, 0], floor=0.05)
        if self.config.matching == "dmd":
            return objectives.distribution_matching(q, real, fake, weight)
        return objectives.score_identity(q, real, fake, weight, self.config.alpha)

    def _denoising(self, q: Tensor, context: Cond, batch: Batch, real: Cond | None = None) -> Tensor:
        """Squared error of the critic's velocity at several noise levels per token, towards q or the teacher's mean."""
        loss: Any = 0.0
        for _ in range(self.config.critic_copies):
            x_t, t = self._noised(q, batch, *self.config.critic_time_range)
            target = q if real is None else self.teacher.x0(x_t, t, real)
            weight = self.critic.schedule.error_weight("flow", t).flatten()
            prediction = self.critic.x0(x_t, t, context)
            loss = loss + objectives.denoising(prediction.flatten(0, 1), target.flatten(0, 1), weight)
        return loss / self.config.critic_copies

    def _generate(self, batch: Batch) -> Tensor:
        noise = batch.rng.normal(*batch.shape)
        if self.config.generator == "embeddings":
            return self.student.x0(noise, 0, batch.cond)
        return likeliest_code(self._logits(noise, batch.cond), self.teacher.codes)

    def _logits(self, noise: Tensor, cond: Cond) -> Tensor:
        return self.net(noise, torch.ones_like(noise[..., :1]), cond)[0]

    def _prefix(self, q: Tensor) -> Tensor:
        return self.critic.quantised(q.detach()) if self.config.prefix == "nearest" else q.detach()

    def _noised(self, q: Tensor, batch: Batch, low: float, high: float) -> tuple[Tensor, Tensor]:
        """At a time per token (B, n, 1)."""
        t = self.teacher.schedule.draw_times(batch.rng.uniform(*q.shape[:2], 1), low, high)
        return self.teacher.schedule.add_noise(q, batch.rng.normal_like(q), t), t
