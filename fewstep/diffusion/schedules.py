"""The algebra of noise schedules: one class, four paths, every conversion.

A schedule defines ``x_t = alpha(t) x0 + sigma(t) eps`` with ``eps ~ N(0, I)``; t grows with noise. Every method
takes t of any shape that broadcasts from the left against x_t, usually ``(B,)``. Coefficients are computed in
float64 (on MPS, which has none, in float32), which costs nothing on ``(B,)`` numbers, and cast to the dtype of x_t
before they touch an image.

A network's output is ``a x0 + b eps`` for some (a, b): x0 (1, 0), eps (0, 1), v (-sigma, alpha), flow
(d_alpha, d_sigma). Together with x_t that is a 2x2 system, so one solve converts between all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..device import real, upload
from ..errors import FewstepError

KINDS = ("x0", "eps", "v", "flow")


def expand(coefficient: Tensor, like: Tensor) -> Tensor:
    """Shape ``(B,)`` -> ``(B, 1, ..., 1)`` so that it broadcasts over ``like`` (B, ...), in its dtype and device."""
    shape = coefficient.shape + (1,) * (like.ndim - coefficient.ndim)
    return coefficient.reshape(shape).to(like.device, like.dtype)


def repeated(time: float, like: Tensor) -> Tensor:
    """(B,) of one time, for the B samples of ``like``."""
    return torch.full((len(like),), time, dtype=real(like.device), device=like.device)


def noise_table(scheduler: Any) -> Tensor:
    """``alphas_cumprod`` of a diffusers scheduler, (T,) float64.

    Where it was rescaled to zero terminal SNR (``rescale_betas_zero_snr``) the last entry is exactly 0, as it is for
    DDIM. Euler, DPM-Solver and UniPC put 2^-24 in its place, for their sigmas to stay finite.

    Raises:
        FewstepError: it has no such table.
    """
    if getattr(scheduler, "alphas_cumprod", None) is None:
        raise FewstepError(
            f"teacher.path: a {type(scheduler).__name__} has no table of noise levels (alphas_cumprod) and is no flow; "
            "expected such as DDIMScheduler, EulerDiscreteScheduler or FlowMatchEulerDiscreteScheduler. Where the "
            "network was trained on one, save that in the teacher's folder scheduler/; networks of EDM are an "
            "EDMPipeline (fewstep convert edm), consistency models are no teachers"
        )
    table: Tensor = scheduler.alphas_cumprod.detach().to("cpu", torch.float64).clone()
    if scheduler.config.get("rescale_betas_zero_snr"):
        table[-1] = 0.0
    return table


Pair = tuple[Tensor, Tensor]


def solve(prediction: Tensor, x_t: Tensor, path: Pair, source: Pair, target: Pair) -> Tensor:
    """A prediction of one kind as another: ``A x_t + B prediction`` from one 2x2 solve.

    Solving ``x_t = alpha x0 + sigma eps`` and ``prediction = c1 x0 + c2 eps`` for (x0, eps) and inserting in
    ``k1 x0 + k2 eps`` gives, with ``det = alpha c2 - sigma c1``, ``A = (k1 c2 - k2 c1) / det`` and
    ``B = (k2 alpha - k1 sigma) / det``.

    Args:
        prediction, x_t: (B, ...). path: (alpha, sigma) of x_t. source, target: (c1, c2) and (k1, k2); all (B,).
    """
    (a, s), (c1, c2), (k1, k2) = path, source, target
    det = a * c2 - s * c1
    of_x_t, of_prediction = (k1 * c2 - k2 * c1) / det, (k2 * a - k1 * s) / det
    return expand(of_x_t, x_t) * x_t + expand(of_prediction, x_t) * prediction


class Schedule:
    """A noise path. Subclasses give ``alpha``, ``sigma``, their derivatives and ``t_from_log_snr``.

    Attributes:
        t_min, t_max: the range of t; at t_max a sample is (nearly) noise.
        time_scale: what a diffusers network is given is ``t * time_scale``.
        clean: the time that stands for the clean sample itself, where sigma is exactly 0.
    """

    t_min: float
    t_max: float
    time_scale: float = 1.0
    clean: float = 0.0

    def alpha(self, t: Tensor) -> Tensor:
        raise NotImplementedError

    def sigma(self, t: Tensor) -> Tensor:
        raise NotImplementedError

    def d_alpha(self, t: Tensor) -> Tensor:
        raise NotImplementedError

    def d_sigma(self, t: Tensor) -> Tensor:
        raise NotImplementedError

    def t_from_log_snr(self, log_snr: Tensor) -> Tensor:
        raise NotImplementedError

    def time_at(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """The time at which ``sigma(t) / alpha(t)`` is that of the given pair, float64.

        Where the path has a closed form for it, exact and differentiable at the ends too, where log-SNR is infinite.
        """
        return self.t_from_log_snr(2 * (torch.log(_real(alpha)) - torch.log(_real(sigma))))

    def log_snr(self, t: Tensor) -> Tensor:
        """``log(alpha^2 / sigma^2)``, float64; +-inf at the ends of a flow."""
        return 2 * (torch.log(self.alpha(t)) - torch.log(self.sigma(t)))

    def coefficients(self, kind: str, t: Tensor) -> tuple[Tensor, Tensor]:
        """(a, b) such that a prediction of this kind is ``a x0 + b eps``.

        Raises:
            ValueError: kind is none of "x0", "eps", "v", "flow".
        """
        one, zero = torch.ones_like(_real(t)), torch.zeros_like(_real(t))
        if kind == "x0":
            return one, zero
        if kind == "eps":
            return zero, one
        if kind == "v":
            return -self.sigma(t), self.alpha(t)
        if kind == "flow":
            return self.d_alpha(t), self.d_sigma(t)
        raise ValueError(f"prediction kind {kind!r}: expected one of {KINDS}")

    def convert(self, prediction: Tensor, x_t: Tensor, t: Tensor, source: str, target: str) -> Tensor:
        """A prediction of one kind as another, see :func:`solve`."""
        if source == target:
            return prediction
        return solve(
            prediction,
            x_t,
            (self.alpha(t), self.sigma(t)),
            self.coefficients(source, t),
            self.coefficients(target, t),
        )

    def add_noise(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """``alpha(t) x0 + sigma(t) eps``; shapes of x0."""
        return expand(self.alpha(t), x0) * x0 + expand(self.sigma(t), x0) * eps

    def begin(self, noise: Tensor, t: Tensor) -> Tensor:
        """What a sampler is given at its first time t (B,): unit noise, times :meth:`first_scale`."""
        return expand(self.first_scale(t), noise) * noise

    def first_scale(self, t: Tensor) -> Tensor:
        """1 for a path of bounded size: those of stock schedulers end at a non-zero SNR, and samplers start from unit
        noise all the same.
        """
        return torch.ones_like(_real(t))

    def renoise(self, x_s: Tensor, eps: Tensor, s: Tensor, t: Tensor) -> Tensor:
        """From level s to a noisier level t with fresh noise (Phased DMD, arXiv 2510.27684, eq. 2).

        ``x_t = a x_s + b eps`` with ``a = alpha_t / alpha_s``, ``b^2 = sigma_t^2 - a^2 sigma_s^2``.
        """
        ratio, spread = self.transition(s, t)
        return expand(ratio, x_s) * x_s + expand(spread, x_s) * eps

    def transition(self, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """``(alpha_{t|s}, sigma_{t|s})`` of the forward kernel from s to t >= s, float64."""
        ratio = self.alpha(t) / self.alpha(s)
        return ratio, (self.sigma(t) ** 2 - ratio**2 * self.sigma(s) ** 2).clamp(min=0).sqrt()

    def ddim_step(self, x_t: Tensor, x0: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """Deterministic step t -> s along the line of x0 and the eps it implies (DDIM, arXiv 2010.02502, eq. 12).

        Exact first-order solution of the probability-flow ODE for constant x0; for a flow it is Euler's step.
        """
        ratio = self.sigma(s) / self.sigma(t)
        return expand(ratio, x_t) * x_t + expand(self.alpha(s) - self.alpha(t) * ratio, x_t) * x0

    def score(self, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """``grad log p_t(x_t) = (alpha x0 - x_t) / sigma^2`` for x0 = E[x0 | x_t] (Tweedie)."""
        s2 = self.sigma(t) ** 2
        return expand(self.alpha(t) / s2, x_t) * x0 - expand(1 / s2, x_t) * x_t

    def error_weight(self, kind: str, t: Tensor) -> Tensor:
        """Factor that turns a squared x0 error into the squared error of a prediction of this kind, float64.

        A prediction is ``A x_t + B x0`` with ``B = c1 - c2 alpha / sigma``, so the factor is ``B^2``; for eps it
        is the SNR.
        """
        c1, c2 = self.coefficients(kind, t)
        return (c1 - c2 * self.alpha(t) / self.sigma(t)) ** 2

    def draw_times(self, u: Tensor, low: float = 0.0, high: float = 1.0) -> Tensor:
        """Uniform numbers u in [0, 1) -> times in the given part of the range (fractions of it), float64.

        0.02 to 0.98 is DMD's range for the student's gradient; the critic uses all of it.
        """
        return self.t_min + (low + (high - low) * _real(u)) * (self.t_max - self.t_min)

    def at(self, fraction: Tensor) -> Tensor:
        """Times at fractions of the way from clean (0) to noisiest (1), float64: the even grid of few-step samplers.

        k / K for k = K..1 gives the times of a K-step student (999, 749, 499, 249 for SD), and 0 is ``clean``.
        """
        u = _real(fraction)
        return torch.where(u > 0, self._spaced(u), self.clean)

    def _spaced(self, u: Tensor) -> Tensor:
        return self.draw_times(u)

    def fraction_above(self, t: float) -> float:
        """The ``low`` with which :meth:`draw_times` draws above t only."""
        return (t - self.t_min) / (self.t_max - self.t_min)

    def for_steps(self, num_steps: int) -> Schedule:
        """The same path with the grid that a sampler of so many steps has on it; mostly itself."""
        return self

    def is_silent(self, t: float) -> bool:
        """Whether there is no signal at all at this time (zero SNR), where eps says nothing of x0."""
        return self.alpha(torch.tensor([t], dtype=torch.float64)).item() == 0

    def x0_gain(self, t: float, kind: str) -> float:
        """How many times an error of the prediction is multiplied in x0; 14.6 for eps at t=999 of SDXL."""
        time = torch.tensor([t], dtype=torch.float64)
        c1, c2 = self.coefficients(kind, time)
        det = self.alpha(time) * c2 - self.sigma(time) * c1
        return abs((self.sigma(time) / det).item())


def _real(t: Tensor) -> Tensor:
    return t.to(real(t.device))


class VP(Schedule):
    """Variance-preserving path from a diffusers scheduler's table; t in [0, T-1], fractions interpolated.

    Between two entries log-SNR is linear in t, so at integers the table is met exactly. Time -1 is the clean sample,
    as it is for diffusers' schedulers.
    """

    clean = -1.0

    def __init__(self, alphas_cumprod: Tensor | Sequence[float]):
        table = torch.as_tensor(alphas_cumprod, dtype=torch.float64, device="cpu")
        if (
            table.ndim != 1
            or len(table) < 2
            or not bool(((table[:-1] > table[1:]) & (table[:-1] <= 1)).all())
        ):
            raise FewstepError("VP schedule: alphas_cumprod must be one decreasing row of numbers up to 1")
        self.silent_from = float(len(table) - 1) if table[-1] == 0 else math.inf
        # A zero-terminal-SNR table ends at 0; log-SNR -40 stands for it, alpha = 2e-9. One of TCD starts at 1.
        self.table = torch.log(table) - torch.log1p(-table)
        self.table = self.table.clamp(-40.0, 40.0)
        self._on_device = {self.table.device: self.table}  # a copy per step would stall a GPU
        self.t_min, self.t_max = 0.0, float(len(table) - 1)

    @classmethod
    def from_scheduler(cls, scheduler) -> VP:
        """From any diffusers scheduler of a table, see :func:`noise_table`."""
        return cls(noise_table(scheduler))

    def _table(self, device: torch.device) -> Tensor:
        if device not in self._on_device:
            self._on_device[device] = upload(self.table.to(real(device)), device)
        return self._on_device[device]

    def _interval(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        table = self._table(t.device)
        low = _real(t).floor().clamp(0, len(table) - 2).long()
        return table[low], table[low + 1] - table[low], _real(t) - low

    def log_snr(self, t: Tensor) -> Tensor:
        start, slope, fraction = self._interval(t)
        return torch.where(_real(t) < 0, torch.inf, start + slope * fraction)

    def alpha(self, t: Tensor) -> Tensor:
        return torch.sigmoid(self.log_snr(t)).sqrt()

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sigmoid(-self.log_snr(t)).sqrt()

    def d_alpha(self, t: Tensor) -> Tensor:
        # alpha^2 = sigmoid(l): d alpha = alpha sigma^2 / 2 dl
        return 0.5 * self.alpha(t) * self.sigma(t) ** 2 * self._interval(t)[1]

    def d_sigma(self, t: Tensor) -> Tensor:
        return -0.5 * self.sigma(t) * self.alpha(t) ** 2 * self._interval(t)[1]

    def draw_times(self, u: Tensor, low: float = 0.0, high: float = 1.0) -> Tensor:
        # Integers, both ends included, as in training: {20..980} for (0.02, 0.98), {0..T-1} for (0, 1).
        steps = len(self.table)
        first, last = round(low * steps), min(round(high * steps), steps - 1)
        return first + torch.floor(_real(u) * (last - first + 1))

    def _spaced(self, u: Tensor) -> Tensor:
        return (torch.round(u * len(self.table)) - 1).clamp(min=0)

    def fraction_above(self, t: float) -> float:
        return (math.floor(t) + 1) / len(self.table)

    def is_silent(self, t: float) -> bool:
        return t >= self.silent_from

    def t_from_log_snr(self, log_snr: Tensor) -> Tensor:
        table = self._table(log_snr.device)
        falling = -_real(log_snr).contiguous()
        low = (torch.searchsorted(-table, falling, right=True) - 1).clamp(0, len(table) - 2)
        return low + (_real(log_snr) - table[low]) / (table[low + 1] - table[low])


class Flow(Schedule):
    """Rectified flow ``x_t = (1 - t) x0 + t eps``; t in [0, 1] is already the noise level sigma.

    ``shift`` is the resolution shift of SD3 and SANA; it moves sampling times (:meth:`shifted`), not the path.
    ``by_steps`` is the shift of a sampler by its number of steps, where they differ (FLUX.2); ``shift`` is then that of
    the teacher's own number.
    """

    t_min, t_max = 0.0, 1.0

    def __init__(
        self, shift: float = 1.0, time_scale: float = 1000.0, by_steps: Callable[[int], float] | None = None
    ):
        if not shift > 0:
            raise FewstepError(f"flow shift {shift}: expected a positive number; 1 means no shift")
        self.shift, self.time_scale, self.by_steps = shift, time_scale, by_steps

    def for_steps(self, num_steps: int) -> Flow:
        return Flow(self.by_steps(num_steps), self.time_scale) if self.by_steps else self

    def shifted(self, u: Any) -> Any:
        """Uniform time u in [0, 1] -> ``shift u / (1 + (shift - 1) u)`` (SD3, arXiv 2403.03206, eq. 23)."""
        return self.shift * u / (1 + (self.shift - 1) * u)

    def draw_times(self, u: Tensor, low: float = 0.0, high: float = 1.0) -> Tensor:
        return self.shifted(super().draw_times(u, low, high))

    def fraction_above(self, t: float) -> float:
        return t / (self.shift - (self.shift - 1) * t)

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - _real(t)

    def sigma(self, t: Tensor) -> Tensor:
        return _real(t)

    def d_alpha(self, t: Tensor) -> Tensor:
        return -torch.ones_like(_real(t))

    def d_sigma(self, t: Tensor) -> Tensor:
        return torch.ones_like(_real(t))

    def t_from_log_snr(self, log_snr: Tensor) -> Tensor:
        return torch.sigmoid(-_real(log_snr) / 2)

    def time_at(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return _real(sigma) / (_real(alpha) + _real(sigma))


class EDM(Schedule):
    """Variance-exploding path of EDM (arXiv 2206.00364): ``x_t = x0 + t eps``, t is sigma in [0.002, 80]."""

    def __init__(self, sigma_min: float = 0.002, sigma_max: float = 80.0):
        self.t_min, self.t_max = sigma_min, sigma_max

    def draw_times(self, u: Tensor, low: float = 0.0, high: float = 1.0) -> Tensor:
        # Uniform in sigma^(1/7), EDM's grid (eq. 5, rho = 7).
        first, last = self.t_min ** (1 / 7), self.t_max ** (1 / 7)
        return (first + (low + (high - low) * _real(u)) * (last - first)) ** 7

    def fraction_above(self, t: float) -> float:
        low, high = self.t_min ** (1 / 7), self.t_max ** (1 / 7)
        return (t ** (1 / 7) - low) / (high - low)

    def first_scale(self, t: Tensor) -> Tensor:
        return self.sigma(t)

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(_real(t))

    def sigma(self, t: Tensor) -> Tensor:
        return _real(t)

    def d_alpha(self, t: Tensor) -> Tensor:
        return torch.zeros_like(_real(t))

    def d_sigma(self, t: Tensor) -> Tensor:
        return torch.ones_like(_real(t))

    def t_from_log_snr(self, log_snr: Tensor) -> Tensor:
        return torch.exp(-_real(log_snr) / 2)

    def time_at(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return _real(sigma) / _real(alpha)


class TrigFlow(Schedule):
    """``x_t = cos(t) x0 + sin(t) eps``, t in [0, pi/2] (sCM, arXiv 2410.11081, for data of unit scale)."""

    t_min, t_max = 0.0, math.pi / 2

    def alpha(self, t: Tensor) -> Tensor:
        return torch.cos(_real(t))

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sin(_real(t))

    def d_alpha(self, t: Tensor) -> Tensor:
        return -torch.sin(_real(t))

    def d_sigma(self, t: Tensor) -> Tensor:
        return torch.cos(_real(t))

    def t_from_log_snr(self, log_snr: Tensor) -> Tensor:
        return torch.atan(torch.exp(-_real(log_snr) / 2))

    def time_at(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return torch.atan2(_real(sigma), _real(alpha))


def angle_range(schedule: Schedule) -> tuple[float, float]:
    """The TrigFlow times that a schedule covers: (0, pi/2) of a flow, (0.029, 1.503) of Stable Diffusion."""
    ends = torch.tensor([schedule.t_min, schedule.t_max], dtype=torch.float64)
    low, high = torch.atan2(schedule.sigma(ends), schedule.alpha(ends)).tolist()
    return low, high


def change_schedule(x_t: Tensor, t: Tensor, source: Schedule, target: Schedule) -> tuple[Tensor, Tensor]:
    """The same noisy sample seen on another path: equal SNR, rescaled x.

    The scale is the ratio of ``sqrt(alpha^2 + sigma^2)``, which stays finite where alpha or sigma vanishes.

    Returns:
        (x on the target path, t of the target path): any teacher can be viewed as TrigFlow, EDM, flow or VP.
    """
    s = target.time_at(source.alpha(t), source.sigma(t)).clamp(target.t_min, target.t_max)
    scale = torch.hypot(target.alpha(s), target.sigma(s)) / torch.hypot(source.alpha(t), source.sigma(t))
    return expand(scale, x_t) * x_t, s
