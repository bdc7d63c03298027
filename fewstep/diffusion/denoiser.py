"""Denoisers: everything that varies by teacher, behind one call ``x0(x_t, t, cond, guidance=...)``.

Teacher, critic, student network and the closed-form teachers of :mod:`fewstep.teachers.analytic` all satisfy
the same protocol, so a loss never knows what a network predicts or on which path it was trained.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ..errors import FewstepError
from .cond import Cond, unconditional
from .kernels import arithmetic, exact_products
from .schedules import Schedule, change_schedule, expand, solve

Guidance = float | Tensor


class Denoiser(Protocol):
    """``x0`` is the posterior mean ``E[x0 | x_t, cond]``; ``guidance`` g means ``u + g (c - u)``, everywhere.

    Guidance is one number, or one per sample, (B,).
    """

    @property
    def schedule(self) -> Schedule: ...

    def x0(self, x_t: Tensor, t: Tensor, cond: Cond, *, guidance: Guidance = 1.0) -> Tensor: ...


EMBEDDED = "embedded_guidance"  # name of the scale (B,) in the condition of a guidance-distilled network

NetCall = Callable[[nn.Module, Tensor, Tensor, Cond], Tensor]
Guide = Callable[[Tensor, Tensor, Guidance], Tensor]
ImageOf = Callable[[Tensor, Cond, Tensor], Tensor]


def plainly(unconditional: Tensor, conditional: Tensor, guidance: Guidance) -> Tensor:
    """``u + g (c - u)`` of two predictions."""
    scale = expand(guidance, conditional) if isinstance(guidance, Tensor) else guidance
    return torch.lerp(unconditional, conditional, scale)


class Scalar(NamedTuple):
    """What a student is told: the value by default, and what it is multiplied with before its sinusoids."""

    default: float
    scale: float = 0.1  # SANA-Sprint's, of a guidance scale


def all_of_it(features: Tensor, cond: Cond | None = None, x_t: Tensor | None = None) -> Tensor:
    """A network whose blocks give the image apart from anything else."""
    return features


class NetDenoiser:
    """A diffusers network with its schedule and kind of prediction.

    Args:
        net: the network; whether its weights want gradients is the business of its role.
        schedule: its path; the network is given ``t * schedule.time_scale``.
        prediction: what it was trained to output: "x0", "eps", "v" or "flow".
        call: ``call(net, x_t, time, cond) -> prediction`` spells the class's keyword arguments.
        null: one row of the null condition, for classifier-free guidance; None where there is none.
        example: one row of any condition, for a trial call; by default the null one.
        guide: how the two predictions of guidance become one, where the stock pipeline does more than :func:`plainly`.
        image_of: the image's part of what a block gives in a call with this condition and x_t, (B, n, D) of (B, m, D)
            tokens or a whole map; all of it by default.
        image_first: of blocks that give the tokens of image and text apart.
        embeds_guidance: a network distilled from a guided one, which is told the scale as ``cond[EMBEDDED]``: the
            guidance it is called with, or ``embedded`` where that is 1, as students and critics are called.
        autocast: dtype of the network's arithmetic, or None for the weights' own. x_t and x0 stay fp32.
        attention: kernel of scaled-dot-product attention, see :mod:`diffusion.kernels`; "math" is the only one with
            forward-mode derivatives.
    """

    def __init__(
        self,
        net: nn.Module,
        schedule: Schedule,
        prediction: str,
        call: NetCall,
        null: Cond | None = None,
        autocast: torch.dtype | None = None,
        attention: str = "auto",
        example: Cond | None = None,
        embeds_guidance: bool = False,
        guide: Guide = plainly,
        image_of: ImageOf = all_of_it,
        image_first: bool = False,
    ):
        self.net, self.schedule, self.prediction = net, schedule, prediction
        self.call, self.null, self.autocast, self.attention = call, null, autocast, attention
        self.example = example or null or Cond({})
        self.embeds_guidance, self.embedded = embeds_guidance, 1.0
        self.guide, self.image_of, self.image_first = guide, image_of, image_first
        self.products: Callable[[], AbstractContextManager[None]] = (
            nullcontext  # how fp32 ones are made, see fewstep.diffusion.kernels
        )
        self.scalars: dict[str, Scalar] = {}

    def with_net(self, net: nn.Module, embedded: float = 1.0) -> NetDenoiser:
        """The same view of another network of this class: a student or a critic, told this scale if it is told one."""
        view = copy(self)
        view.net, view.scalars, view.embedded = net, {}, embedded
        return view

    def predict(self, x_t: Tensor, t: Tensor, cond: Cond, *, guidance: Guidance = 1.0) -> Tensor:
        """The native prediction, fp32, shape of x_t. Condition and null run in one batch.

        Args:
            x_t: (B, C, H, W). t: (B,). cond: B rows. guidance: 1 is a single conditional forward, 0 a single
                unconditional one; (B,) is a scale for each sample.
        """
        mixed = isinstance(guidance, Tensor)
        if self.embeds_guidance and (mixed or guidance != 0.0):
            return self._forward(x_t, t, self._told(cond, guidance, x_t))
        if not mixed and guidance == 1.0:
            return self._forward(x_t, t, cond)
        if self.null is None:
            raise FewstepError(
                f"guidance_scale: {guidance}: this teacher has no null condition to guide away from; expected 1"
            )
        null = unconditional(self.null.to(x_t.device), cond, len(x_t))
        if not mixed and guidance == 0.0:
            return self._forward(x_t, t, self._told(null, 1.0, x_t) if self.embeds_guidance else null)
        both = self._forward(torch.cat([x_t, x_t]), torch.cat([t, t]), Cond.cat(null, cond))
        without, given = both.chunk(2)
        return self.guide(without, given, guidance)

    def exact(self) -> NetDenoiser:
        """The same network without autocast and with the attention kernel that has forward-mode derivatives."""
        view = copy(self)
        view.autocast, view.attention, view.products = None, "math", exact_products
        return view

    def x0(self, x_t: Tensor, t: Tensor, cond: Cond, *, guidance: Guidance = 1.0) -> Tensor:
        """Predicted clean sample, fp32, shape of x_t. Guidance mixes before the conversion, which is linear."""
        prediction = self.predict(x_t, t, cond, guidance=guidance)
        return self.schedule.convert(prediction, x_t, t, self.prediction, "x0")

    def _told(self, cond: Cond, guidance: Guidance, x_t: Tensor) -> Cond:
        if isinstance(guidance, Tensor):
            scale = guidance.float()
        else:
            scale = torch.full((len(x_t),), self.embedded if guidance == 1.0 else guidance, device=x_t.device)
        return Cond({**cond.tensors, EMBEDDED: scale.expand(len(x_t))})

    def _forward(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        with self.products(), arithmetic(x_t.device.type, self.autocast, self.attention):
            out = self.call(self.net, x_t, t * self.schedule.time_scale, cond)
        # Networks with a learned variance output 2C channels; the mean is the first half.
        return out[:, : x_t.shape[1]].float() if out.shape[1] != x_t.shape[1] else out.float()


class ScheduleView:
    """A denoiser on another path (equal SNR, rescaled x), e.g. an SDXL teacher seen as TrigFlow."""

    def __init__(self, denoiser: Denoiser, schedule: Schedule):
        self.denoiser, self.schedule = denoiser, schedule

    def predict(self, kind: str, x_t: Tensor, t: Tensor, cond: Cond, *, guidance: Guidance = 1.0) -> Tensor:
        """A prediction of any kind on this path, by one solve from what the denoiser gives natively.

        x0 and eps are the same on both paths, so a flow seen as TrigFlow stays finite at both ends: there is no way
        over x0, which at small noise would be divided by sin t (SANA-Sprint, arXiv 2503.09641, prop. 3.1).
        """
        source = self.denoiser.schedule
        x, s = change_schedule(x_t, t, self.schedule, source)
        native = getattr(self.denoiser, "prediction", "x0")
        predict = getattr(self.denoiser, "predict", self.denoiser.x0)
        return solve(
            predict(x, s, cond, guidance=guidance),
            x_t,
            (self.schedule.alpha(t), self.schedule.sigma(t)),
            source.coefficients(native, s),
            self.schedule.coefficients(kind, t),
        )

    def x0(self, x_t: Tensor, t: Tensor, cond: Cond, *, guidance: Guidance = 1.0) -> Tensor:
        return self.predict("x0", x_t, t, cond, guidance=guidance)

    def exact(self) -> ScheduleView:
        """The view of :meth:`NetDenoiser.exact`; a closed-form denoiser is exact already."""
        exact = getattr(self.denoiser, "exact", lambda: self.denoiser)
        return ScheduleView(exact(), self.schedule)
