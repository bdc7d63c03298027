"""What methods share whose gradient passes through the networks of teacher and critic (SiD, SIM)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from ..bounds import Count, Least0, Number
from ..diffusion import objectives
from ..diffusion.cond import Cond, drop_rows
from ..diffusion.denoiser import Denoiser
from ..diffusion.rng import Rng
from ..diffusion.schedules import Schedule, expand
from ..diffusion.student import Student
from ..diffusion.times import TimeLaw, student_times
from .base import Batch, Options

if TYPE_CHECKING:
    from typing_extensions import Self

Kind = Literal["native", "x0", "eps", "v", "flow", "edm"]
# Functions of the level alone among the kinds of fewstep.diffusion.objectives.identity_weight.
LevelWeight = Literal[
    "one", "1-sigma", "(1-sigma)^2", "1/sigma", "1/sigma^2", "alpha/sigma", "(alpha/sigma)^2"
]


@dataclass
class LiveOptions(Options):
    """Options of both.

    Attributes:
        num_steps, start, times: of the student, see :func:`student_times`. noise: between its steps.
        guidance_scale: g of ``u + g (c - u)``.
        generator_times, critic_times: see :class:`TimeLaw`; they are two laws on pixels, one on latents.
        critic_loss: prediction whose squared error the critic minimises; "edm" is EDM's weight.
        critic_steps: iterations, each with one critic update, per student update.
        lean: hold one network's activations at a time in the student's turn; same gradient, one more forward each.
    """

    num_steps: Count = 1
    start: Number | None = None
    times: list[Number] | None = None
    noise: Literal["fresh", "fixed", "ddim"] = "fresh"
    guidance_scale: Least0 = 1.0
    generator_times: TimeLaw = field(default_factory=TimeLaw)
    critic_times: TimeLaw = field(default_factory=TimeLaw)
    critic_loss: Kind = "native"
    critic_steps: Count = 1
    lean: bool = False

    def smoke(self) -> Self:
        return replace(super().smoke(), critic_steps=2)

    def student_of(self, denoiser: Denoiser, schedule: Schedule) -> Student:
        return Student(denoiser, student_times(schedule, self.num_steps, self.start, self.times), self.noise)


def through_networks(
    make: Callable[[], Tensor],
    noised: Callable[[Tensor], Tensor],
    networks: Sequence[Callable[[Tensor], Tensor]],
    loss: Callable[..., Tensor],
    lean: bool,
) -> Tensor:
    """``loss(x0, *[network(noised(x0)) for network in networks])`` with the gradient through everything.

    Lean holds the activations of one network at a time: values first, then the loss as a function of them, one
    vector-Jacobian product per network, and the student's own forward again. The same gradient for one more forward
    of each. A sample whose gradient is not finite is left out.

    Args:
        make: the student's x0 (B, ...), the same at every call. noised: x0 -> x_t. networks: x_t -> (B, ...).
    """

    def clean(gradient: Tensor) -> Tensor:
        return torch.where(expand(objectives.finite_rows(gradient), gradient).bool(), gradient, 0.0)

    if not lean:
        x0 = make()
        if x0.requires_grad:
            x0.register_hook(clean)
        x_t = noised(x0)
        return loss(x0, *(network(x_t) for network in networks))
    with torch.no_grad():
        x0 = make()
        outputs = [network(noised(x0)) for network in networks]
    leaves = [value.detach().requires_grad_() for value in (x0, *outputs)]
    with torch.enable_grad():
        value = loss(*leaves)
        gradient, *cotangents = torch.autograd.grad(value, leaves)
        for network, cotangent in zip(networks, cotangents):
            leaf = x0.detach().requires_grad_()
            gradient = gradient + torch.autograd.grad(network(noised(leaf)), leaf, cotangent)[0]
    made = make()
    finite = torch.where(expand(objectives.finite_rows(made), made).bool(), made, 0.0)
    return value.detach() + ((finite - finite.detach()) * clean(gradient)).sum()


def exit_step(batch: Batch, student: Student, last: bool = False) -> int:
    """The step that is trained, drawn once per iteration: the same on all ranks, for critic and student.

    Args:
        last: it is the last one instead.
    """
    if "exit" not in batch.carry:
        batch.carry["exit"] = student.num_steps - 1 if last else batch.shared.integer(student.num_steps)
    return batch.carry["exit"]


def made_by(student: Student, batch: Batch, last: bool = False) -> Callable[[], Tensor]:
    """What the student makes of fresh noise in the step of this iteration; earlier steps carry no gradient."""
    step = exit_step(batch, student, last)
    x = student.inputs(batch.rng.normal(*batch.shape), batch.cond, batch.rng.normal_like, step)
    return lambda: student.x0(x, step, batch.cond)


def drop_captions(cond: Cond, null: Cond | None, rng: Rng, rate: float) -> Cond:
    """Each row replaced by the unconditional condition with this probability."""
    if null is None or not len(cond) or rate == 0:
        return cond
    return drop_rows(cond, null, rng.uniform(len(cond)) < rate)
