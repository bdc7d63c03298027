"""Continuous-time consistency in TrigFlow: the tangent, its derivative along the teacher's ODE, and the loss.

The path is ``x_t = cos(t) x0 + sin(t) eps``, t in [0, pi/2], for data of unit scale. F is the velocity that a network
predicts, ``dx/dt = -sin(t) x0 + cos(t) eps`` (kind "v" of :class:`~schedules.TrigFlow`), and the consistency
function ``f = cos(t) x_t - sin(t) F`` is its x0 (sCM, arXiv 2410.11081, section 3). Papers keep data at a scale
sigma_d: their x is sigma_d times ours, their F is ours, and so is t. What is left of sigma_d is where noise levels are
drawn (:func:`angles`), and the size of a tangent beside the constant of its normalisation.

Images and latents are (B, ...); times and weights are (B,).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from ..device import real
from ..errors import RecipeError
from .schedules import expand

Velocity = Callable[[Tensor, Tensor], Tensor]  # (x_t, t) -> F


def angles(normal: Tensor, mean: float, std: float, sigma_data: float = 0.5) -> Tensor:
    """Standard normal numbers -> ``t = arctan(exp(mean + std normal) / sigma_data)`` (sCM, section 4.1).

    With sigma_data 1 it is the logit-normal law of a flow's time (LADD, arXiv 2403.12015, section 3).
    """
    return torch.atan(torch.exp(mean + std * normal.to(real(normal.device))) / sigma_data)


def consistency_function(x_t: Tensor, velocity: Tensor, t: Tensor) -> Tensor:
    """``f = cos(t) x_t - sin(t) F``; x_t itself at t = 0 (sCM, eq. 5)."""
    return expand(torch.cos(t), x_t) * x_t - expand(torch.sin(t), x_t) * velocity


def tangent(
    x_t: Tensor, t: Tensor, ode: Tensor, velocity: Tensor, derivative: Tensor, warmup: float
) -> Tensor:
    """``g = cos(t) df/dt`` along the teacher's ODE, in the form that stays bounded up to pi/2 (sCM, section 4.1).

    ``g = -cos^2(t) (F - dx/dt) - r (cos(t) sin(t) x_t + cos(t) sin(t) dF/dt)``. With warm-up r = 0 it is the
    velocity's regression on the teacher's, with r = 1 the whole tangent; for the teacher's own consistency function g
    is zero.

    Args:
        ode: the teacher's velocity dx/dt at x_t. velocity: the student's F there. derivative: the student's
            ``cos(t) sin(t) dF/dt`` along the ODE, see :func:`forward_mode`. warmup: r in [0, 1].
    """
    c, s = expand(torch.cos(t), x_t), expand(torch.sin(t), x_t)
    return -(c**2) * (velocity - ode) - warmup * (c * s * x_t + derivative)


def forward_mode(velocity: Velocity, x_t: Tensor, t: Tensor, ode: Tensor) -> tuple[Tensor, Tensor]:
    """F and ``cos(t) sin(t) dF/dt`` along ``(dx, dt) = (ode, 1)``, exact, by one forward-mode derivative.

    The factor goes into the derivative's direction, where it keeps numbers small (sCM, section 4.2, "JVP
    rearrangement"). Call it under ``no_grad`` on a network whose attention has a forward-mode derivative
    (:meth:`fewstep.diffusion.denoiser.NetDenoiser.exact`).
    """
    factor = torch.cos(t) * torch.sin(t)
    return along(velocity, (x_t, t), (expand(factor, x_t) * ode, factor))


def along(
    velocity: Velocity, point: tuple[Tensor, Tensor], direction: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """F at ``(x_t, t)`` and its derivative in a direction ``(dx, dt)`` of the same shapes and dtypes.

    By dual numbers: under ``torch.func`` tensors that a network makes for itself and keeps, as tables of positions, are
    wrappers afterwards, which nothing can copy.
    """
    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(velocity(*map(forward_ad.make_dual, point, direction)))
        return found.primal, torch.zeros_like(found.primal) if found.tangent is None else found.tangent


@contextmanager
def refusing_without(net: nn.Module, option: str, remedy: str) -> Iterator[None]:
    """Around a trial: a network that cannot be differentiated in forward mode is refused by name, with what to do."""
    try:
        yield
    except (RuntimeError, NotImplementedError) as error:
        raise RecipeError(
            f"{option}: {type(net).__name__} cannot be differentiated in forward mode "
            f"({str(error).splitlines()[0]}); {remedy}"
        ) from error


def central_difference(
    velocity: Velocity, x_t: Tensor, t: Tensor, ode: Tensor, step: float
) -> tuple[Tensor, Tensor]:
    """The same by two forwards, a step (radians) ahead and behind on the circle that leaves x_t along the ODE.

    ``x_{t +- h} = cos(h) x_t +- sin(h) dx/dt``: TrigFlow's DDIM step is a rotation, so both points are as far from the
    origin as the path is. Error O(h^2), beside rounding of F divided by h; F itself is the mean of the two.
    """
    h = torch.full_like(t, step)
    turned, moved = math.cos(step) * x_t, math.sin(step) * ode
    ahead, behind = velocity(turned + moved, t + h), velocity(turned - moved, t - h)
    factor = expand(torch.cos(t) * torch.sin(t) / (2 * math.sin(step)), x_t)
    return (ahead + behind) / 2, factor * (ahead - behind)


def normalized(g: Tensor, constant: float = 0.1, norm: str = "mean") -> Tensor:
    """``g / (|g| + c)``, of each sample (sCM, section 4.2), whose own norm is below 1.

    Args:
        norm: "sum", the root of the sum of squares, as in the paper and in the published code of SANA-Sprint; or
            "mean", the root of their mean, which gives c one meaning at every resolution.
    """
    flat = g.flatten(1)
    size = flat.norm(dim=1, dtype=real(g.device))
    return g / expand((size if norm == "sum" else size / math.sqrt(flat.shape[1])) + constant, g)


class LogWeight(nn.Module):
    """The adaptive weight ``w(t)``, (B,) -> (B,): a linear map of cosines of t; zero at the start.

    ``exp(w)`` learns to be the inverse of the mean squared error at each t (EDM2, arXiv 2312.02696, eq. 14 and 21;
    there u = -w). Published heads are linear on the network's time embedding; ours needs nothing of the network.
    """

    frequency: Tensor

    def __init__(self, frequencies: int = 16):
        super().__init__()
        self.register_buffer("frequency", 2.0 * torch.arange(frequencies), persistent=False)
        self.linear = nn.Linear(frequencies, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, t: Tensor) -> Tensor:
        return self.linear(torch.cos(t.float()[:, None] * self.frequency))[:, 0]


def consistency(
    velocity: Tensor, g: Tensor, log_weight: Tensor, prior: Tensor | float = 1.0, norm: str = "mean"
) -> dict[str, Tensor]:
    """``mean prior exp(w) |F - stopgrad(F + g)|^2`` and ``-mean w`` (sCM, eq. 8), mean over samples.

    The gradient is that of ``-2 prior exp(w) <F, g>``, i.e. with g = cos(t) df/dt the continuous-time objective
    ``<f, df/dt>`` with the weight ``1 / tan(t)``: the paper's prior weight is in this form already, and the ``prior``
    is what published code of SANA-Sprint multiplies with once more. Samples whose g is not finite count for nothing.

    Args:
        velocity: student's F (B, ...) with gradient. g: normalised tangent, any gradient ignored. log_weight: w (B,)
            with gradient. prior: (B,) or a number.
        norm: that of ``g``: the square is a mean over entries, or their sum. Where w is what it learns to be, the
            gradient of a sample at F is ``2 g / |g|^2`` either way, i.e. of length 2 with "sum" and of 2 / sqrt(D) with
            "mean" for D entries: against another term, such as SANA-Sprint's adversarial one, these are not the same.
            (Published code takes the mean with either, and its w climbs by log D first.)
    """
    g = g.detach()
    keep = g.flatten(1).isfinite().all(1)
    target = velocity.detach() + torch.where(expand(keep, g).bool(), g, 0.0)
    error = (velocity - target).square().flatten(1)
    error = error.sum(1) if norm == "sum" else error.mean(1)
    count = keep.sum().clamp(min=1)
    terms = {"consistency": prior * log_weight.exp() * error, "weight": -log_weight}
    return {name: torch.where(keep, term, 0.0).sum() / count for name, term in terms.items()}
