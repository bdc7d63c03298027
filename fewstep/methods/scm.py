"""sCM: continuous-time consistency distillation in TrigFlow (Lu and Song 2024, arXiv 2410.11081)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from ..bounds import Bound, Count0, Least0, Number, Positive
from ..diffusion import consistency as scm
from ..diffusion.cond import Cond
from ..diffusion.denoiser import Denoiser, Guidance, NetDenoiser, ScheduleView
from ..diffusion.kernels import gather
from ..diffusion.schedules import TrigFlow, angle_range, repeated
from ..diffusion.student import Student
from ..diffusion.times import times_at
from ..errors import RecipeError
from .base import Batch, Expected, Method, Options, Phase, Progress, register

Angle = Annotated[float, Bound("times in (0, pi/2]", lambda a: 0 < a <= math.pi / 2 + 1e-4)]


@dataclass
class ConsistencyOptions(Options):
    """Options of the consistency loss; defaults are those of the sCM paper for ImageNet 64.

    Attributes:
        angles: TrigFlow times in (0, pi/2] at which the student is called, a list for each number of steps; the first
            one is shown while training. The paper's second step is at 1.1.
        guidance_scale: of the teacher, distilled in.
        time_mean, time_std: of the log-normal law of the noise level in training (CIFAR-10: -1, 1.4).
        sigma_data: scale that papers give the data; latents here are of unit scale, so it enters the law of the noise
            level and the tangent's size beside ``tangent_constant`` only.
        warmup: student updates over which the tangent's unstable half fades in (10,000; SANA-Sprint 4,000).
        tangent_constant: c of the normalisation ``g / (|g| + c)``. tangent_norm: whether the norm is the root of the
            "sum" of squares or of their "mean", see :func:`fewstep.diffusion.consistency.consistency`. Without another
            term beside the loss they differ in c's meaning only.
        prior: a further weight of the squared error, "1/tan" as in SANA-Sprint's published code; see
            :func:`fewstep.diffusion.consistency.consistency`.
        tangent: "forward" is forward-mode differentiation; "difference" needs two plain forwards instead.
        difference: half the distance of these two in TrigFlow time. 1e-3 suits a teacher that ``fewstep prepare`` has
            been over; on a network that sees 1000 t, 1e-4 (measured).
        synthetic: noise the teacher's own samples (``fewstep pairs``) in place of real images.
    """

    angles: list[list[Angle]] = field(default_factory=lambda: [[math.pi / 2]])
    guidance_scale: Least0 = 1.0
    time_mean: Number = -1.0
    time_std: Positive = 1.6
    sigma_data: Positive = 0.5
    warmup: Count0 = 10_000
    tangent_constant: Positive = 0.1
    tangent_norm: Literal["mean", "sum"] = "mean"
    prior: Literal["one", "1/tan"] = "one"
    tangent: Literal["forward", "difference"] = "forward"
    difference: Positive = 1e-3
    synthetic: bool = False

    def expected(self) -> Expected:
        filled = bool(self.angles) and all(self.angles)
        different = len({len(grid) for grid in self.angles}) == len(self.angles)
        return {
            "angles": (filled and different, "lists of times in (0, pi/2], one for each number of steps"),
        }


class Consistency:
    """The consistency loss on one batch, for sCM and for what builds on it.

    Raises:
        RecipeError: the tangent cannot be computed on this network.
    """

    LEAST = 1e-3  # radians; keeps 1/tan(t) finite

    def __init__(self, config: ConsistencyOptions, teacher: Denoiser, student: NetDenoiser):
        self.config, self.network = config, student
        self.teacher, self.student = ScheduleView(teacher, TrigFlow()), ScheduleView(student, TrigFlow())
        self.exact = self.student.exact()
        self.low, self.high = angle_range(student.schedule)
        self.weighting = scm.LogWeight()

    def check(self, latent_shape: Sequence[int]) -> None:
        """Tries the tangent once, so that a network that has none is refused before training."""
        net = self.network.net
        weight = next(net.parameters())
        if weight.dtype != torch.float32:
            raise RecipeError(
                f"teacher.dtype: {str(weight.dtype)[6:]}: the tangent needs the student's weights in fp32; set "
                "teacher.dtype float32, or roles.student.kind full, which trains a copy in fp32"
            )
        x = torch.zeros(1, *latent_shape, device=weight.device)
        cond = self.network.example.to(weight.device)
        with scm.refusing_without(
            net, f"method.tangent: {self.config.tangent}", "set method.tangent difference"
        ):
            self.derivative(x, repeated(1.0, x), torch.ones_like(x), cond)

    def draw(self, normal: Tensor) -> Tensor:
        """Times (B,) of the proposal, within what the teacher's schedule covers."""
        c = self.config
        t = scm.angles(normal, c.time_mean, c.time_std, c.sigma_data)
        return t.clamp(max(self.low, self.LEAST) + c.difference, self.high - c.difference)

    @torch.no_grad()
    def derivative(self, x_t: Tensor, t: Tensor, ode: Tensor, cond: Cond) -> tuple[Tensor, Tensor]:
        """F and ``cos sin dF/dt`` of the student along the ODE, in fp32."""

        def velocity(x: Tensor, time: Tensor) -> Tensor:
            return self.exact.predict("v", x, time, cond)

        with torch.autocast(x_t.device.type, enabled=False):
            if self.config.tangent == "forward":
                gather(self.network.net)
                return scm.forward_mode(velocity, x_t, t, ode)
            return scm.central_difference(velocity, x_t, t, ode, self.config.difference)

    def losses(
        self, x0: Tensor, cond: Cond, told: Cond, guidance: Guidance, updates: int, batch: Batch
    ) -> dict[str, Tensor]:
        """Terms of one batch of latents x0 (B, ...).

        Args:
            cond: the teacher's condition. told: the student's. guidance: the teacher's. updates: of the student so
                far, for the warm-up. batch: gives randomness, and takes the log.
        """
        c = self.config
        t = self.draw(batch.rng.normal(len(x0)))
        x_t = TrigFlow().add_noise(x0, batch.rng.normal_like(x0), t)
        with torch.no_grad():
            ode = self.teacher.predict("v", x_t, t, cond, guidance=guidance)
            velocity, derivative = self.derivative(x_t, t, ode, told)
            g = scm.tangent(x_t, t, ode, velocity, derivative, min(1.0, updates / max(1, c.warmup)))
            batch.log["tangent"] = g.square().mean().sqrt()
            batch.note_latents(scm.consistency_function(x_t, velocity, t))
            g = scm.normalized(g, c.tangent_constant / c.sigma_data, c.tangent_norm)
        prior = 1.0 if c.prior == "one" else (1 / (c.sigma_data * torch.tan(t))).to(x0)
        velocity = self.student.predict("v", x_t, t, told)
        return scm.consistency(velocity, g, self.weighting(t), prior, c.tangent_norm)


def student_of(denoiser: Denoiser, angles: Sequence[Sequence[float]]) -> Student:
    """A student that is called at these TrigFlow times."""
    first, *rest = (times_at(denoiser.schedule, grid) for grid in angles)
    return Student(denoiser, first, also=rest)


@register("scm")
class SCM(Method):
    """One network, no critic, no target network: the target is the student itself and its tangent."""

    summary = "continuous-time consistency with TrigFlow tangents; one or more steps"
    papers = ("2410.11081",)
    extras = ("weighting",)

    @dataclass
    class Config(ConsistencyOptions):
        """Nothing beside :class:`ConsistencyOptions`."""

    config: Config

    def build(self, student: NetDenoiser) -> None:
        self.student = student_of(student, self.config.angles)
        self.term = Consistency(self.config, self.teacher, student)
        self.term.check(self.latent_shape)

    @classmethod
    def needs(cls, config: SCM.Config) -> tuple[str, ...]:
        return ("prompts", "pairs" if config.synthetic else "images")

    def heads(self) -> dict[str, nn.Module]:
        return {"weighting": self.term.weighting}

    def phases(self) -> list[Phase]:
        return [Phase("student", ("student", "weighting"), self.loss)]

    def loss(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        x0, cond = batch.clean(self.config.synthetic)
        return self.term.losses(x0, cond, cond, self.config.guidance_scale, progress.iteration, batch)
