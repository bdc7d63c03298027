"""Multi-student distillation: a one-step student for each part of the conditions (Song et al., arXiv 2410.23274).

The conditions are split into K parts. Every part has a student and a critic of its own, which never see the others'
conditions and are trained with DMD2's losses. One student makes each sample, so K times the capacity costs no time.
Students may be smaller than the teacher; then they learn its score first.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from torch import Tensor, nn

from ..bounds import Bound, Count, Least0
from ..device import upload
from ..diffusion.denoiser import NetDenoiser
from ..teachers.resize import resize
from . import terms
from .base import Batch, Expected, Method, Phase, Progress, register
from .dmd2 import DMD2
from .router import Conditions, RoutedDenoiser, RoutedStudent, Router

if TYPE_CHECKING:
    from typing_extensions import Self


@register("multi_student")
class MultiStudent(Method):
    """K students and K critics on disjoint parts of the conditions; DMD2's losses, GAN included.

    Rows of a micro-batch go to the student of their part, about batch size / K each: the cost of one student, as in
    the paper's ablation at equal compute (4 students at batch 32 against one at 128).
    """

    summary = "a one-step student per part of the prompts, each by DMD2, and a router between them"
    papers = ("2410.23274",)
    steps = "1"
    exports = "LoRA per part of the prompts, or pipeline of a smaller network, and a router; LCM"

    @dataclass
    class Config(DMD2.Config):
        """DMD2's options, with its values for ImageNet, and those of the parts.

        Attributes:
            parts: students (the paper's text-to-image run: 4), of one step each.
            gan_weight: of the students' adversarial term (the paper's second stage); 0 is data-free (its first stage
                without the regression on pairs).
            student_network: what the students' configuration has differently from the teacher's, such as
                ``{"layers_per_block": 1}``. Smaller students begin with teacher score matching (TSM); critics keep
                the teacher's size.
            tsm_share: of the run, at its beginning, spent on that (not published; ours).
            tsm_data: real images of the student's own "part", or "all".
        """

        parts: Annotated[int, Bound("at least 2; for a single student use dmd2", lambda n: n >= 2)] = 4
        num_steps: Count = 1
        gan_weight: Least0 = 3e-3
        student_network: dict[str, Any] | None = None
        tsm_share: Annotated[float, Bound("0 < share < 1", lambda x: 0 < x < 1)] = 0.5
        tsm_data: Literal["part", "all"] = "part"

        def expected(self) -> Expected:
            return {
                "num_steps": (self.num_steps == 1, "1; each sample is made by one student in one step"),
                "times": (self.times is None or len(self.times) == 1, "one time, or null"),
                "student_input": (
                    self.student_input == "rollout",
                    "rollout; the conditions of a part are not those of its real images",
                ),
            }

        def smoke(self) -> Self:
            return replace(super().smoke(), parts=2)  # so that few samples reach every student

        @classmethod
        def toy(cls) -> Self:
            return cls(parts=2, critic_steps=2, gan_weight=1e-2, taps=["layers.0"])

    config: Config

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

    def build(self, **networks: NetDenoiser) -> None:
        self.router = Router(self.config.parts)
        names = [str(k + 1) for k in range(self.config.parts)]
        self.hosts = [
            DMD2(
                self.config,
                self.teacher,
                self.latent_shape,
                student=networks[f"student_{n}"],
                critic=networks[f"critic_{n}"],
            )
            for n in names
        ]
        for n, host in zip(names, self.hosts):
            host.student.roles = [f"student_{n}"]
        self.student = RoutedStudent([host.student for host in self.hosts], self.router)
        self.critic = RoutedDenoiser([host.critic for host in self.hosts], self.router)

    def prepare(self, conditions: Conditions) -> list[int]:
        return self.router.fit(conditions)

    def heads(self) -> dict[str, nn.Module]:
        heads: dict[str, nn.Module] = {}
        for k, host in enumerate(self.hosts):
            heads |= {f"{name}_{k + 1}": head for name, head in host.heads().items()}
        return heads

    def phases(self) -> list[Phase]:
        phases, tsm = [], self.config.tsm_share if self.config.student_network is not None else 0.0
        for k, host in enumerate(self.hosts):
            n = k + 1
            if tsm:
                phases.append(
                    Phase(f"tsm_{n}", (f"student_{n}",), partial(self.tsm_loss, k), share=(0.0, tsm))
                )
            phases += [self.of_part(k, phase, (tsm, 1.0)) for phase in host.phases()]
        return phases

    def of_part(self, k: int, phase: Phase, share: tuple[float, float]) -> Phase:
        """DMD2's phase for student k, on its rows."""
        train = tuple(f"{role}_{k + 1}" for role in phase.train)
        loss = partial(self.on_part, k, phase.loss)
        return replace(phase, name=f"{phase.name}_{k + 1}", train=train, loss=loss, share=share)

    # ------------------------------------------------------------------------------------------------- losses
    def on_part(self, k: int, loss: Any, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        """DMD2's loss of student k on its rows of the micro-batch."""
        part = self.part(k, batch)
        losses = loss(part, progress)
        batch.log |= {f"{name}_{k + 1}": value for name, value in part.log.items()}
        part.log.clear()
        return losses

    def tsm_loss(self, k: int, batch: Batch, _progress: Progress) -> dict[str, Tensor]:
        """The student as a denoiser at all times; its target is the teacher's prediction, not the sample."""
        host, part = self.hosts[k], self.part(k, batch) if self.config.tsm_data == "part" else batch
        x_t, t = terms.noised(part.real, self.teacher.schedule, batch)
        with torch.no_grad():
            target = self.teacher.x0(x_t, t, part.real_cond)
        learner, kind = host.student.denoiser, terms.kind_of(host.critic, "native")
        return {"matching": part.real_share * terms.regression(learner, kind, target, x_t, t, part.real_cond)}

    # -------------------------------------------------------------------------------------------------- parts
    def part(self, k: int, batch: Batch) -> Batch:
        """The rows of a micro-batch that belong to part k, whose mean has the weight ``K n / B``.

        With this weight the mean over micro-batches and processes is that over all rows of the part, however they are
        spread. Where there are none, the first row stands in with weight 0: every process calls the same networks.
        """
        if "parts" not in batch.carry:
            rows, shares = self.split(batch, "cond")
            real_rows, real_shares = (
                self.split(batch, "real_cond") if batch.real is not None else (rows, shares)
            )
            batch.carry["parts"] = [
                batch.view(mine, real, share=share, real_share=real_share)
                for mine, share, real, real_share in zip(rows, shares, real_rows, real_shares)
            ]
        return batch.carry["parts"][k]

    def split(self, batch: Batch, name: str) -> tuple[list[Tensor], list[float]]:
        """Rows (n,) of each part, and the weights of their means."""
        parts = self.router(batch.on_host(name))
        rows = [(parts == part).nonzero()[:, 0] for part in range(self.config.parts)]
        shares = [self.config.parts * len(part) / len(parts) for part in rows]
        rows = [part if len(part) else torch.zeros(1, dtype=torch.long) for part in rows]
        return [upload(part, batch.rng.device) for part in rows], shares
