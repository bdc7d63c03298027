"""Losses as functions of tensors. Useful without the rest of fewstep.

Images and latents are (B, ...); weights and times are (B,); results are scalars unless said otherwise.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .schedules import Schedule, expand

MATCHING_WEIGHTS = ("l1", "kl", "vsd", "one")


def matching_weight(
    kind: str, x0: Tensor, real: Tensor, schedule: Schedule, t: Tensor, floor: float = 1e-5
) -> Tensor:
    """Weight (B,) of the score difference ``mu_fake - mu_real``.

    * ``l1``: ``1 / mean |x0 - mu_real|`` over all but the batch axis (DMD, arXiv 2311.18828, alg. 2; DMD2). The
      algorithm's form: eq. 8 of the paper has a further ``alpha_t`` that no published code has. ``floor`` bounds
      the denominator, which published code lacks: a student that meets the teacher would divide by zero.
    * ``kl``: ``alpha^2 / sigma^2``, the exact gradient of KL(fake || real) at level t.
    * ``vsd``: ``alpha sigma``, i.e. ``sigma^2`` on the eps difference (SwiftBrush, arXiv 2312.05239).
    * ``one``: 1 (Diff-Instruct, arXiv 2305.18455).
    """
    if kind == "l1":
        return 1 / (x0 - real).abs().flatten(1).mean(1).clamp(min=floor)
    a, s = schedule.alpha(t), schedule.sigma(t)
    weights = {"kl": (a / s) ** 2, "vsd": a * s, "one": torch.ones_like(a)}
    if kind not in weights:
        raise ValueError(f"weight {kind!r}: expected one of {MATCHING_WEIGHTS}")
    return weights[kind].to(x0.device, x0.dtype)


def distribution_matching(x0: Tensor, real: Tensor, fake: Tensor, weight: Tensor) -> Tensor:
    """A loss whose gradient with respect to x0 is ``weight (mu_fake - mu_real) / x0.numel()``.

    ``0.5 mean (x0 - stopgrad(x0 - g))^2`` (DMD, arXiv 2311.18828, eq. 7 and alg. 2): following -gradient moves
    samples from where the student is too dense to where the teacher wants them.

    Args:
        x0: student samples (B, ...) with gradient. real, fake: posterior means of teacher (guided) and critic at
            one noisy version of x0; any gradient they carry is ignored. weight: (B,).
    """
    with torch.no_grad():
        direction = expand(weight, x0) * (fake - real)
        # A sample whose direction is not finite teaches nothing; the others of the batch still do.
        finite = direction.flatten(1).isfinite().all(1)
        direction = torch.where(expand(finite, x0).bool(), direction, 0.0)
        target = x0 - direction
    return 0.5 * F.mse_loss(x0, target)


def denoising(prediction: Tensor, x0: Tensor, weight: Tensor) -> Tensor:
    """``mean weight (prediction - stopgrad(x0))^2``; with ``schedule.error_weight("eps", t)`` it is the eps loss."""
    error = (prediction - x0.detach()).pow(2).flatten(1).mean(1)
    return (weight.to(error) * error).mean()


def gan_generator(fake_logits: Tensor) -> Tensor:
    """Non-saturating: ``mean softplus(-D(fake))`` (DMD2's code; the paper writes it with bare logarithms)."""
    return F.softplus(-fake_logits).mean()


def gan_discriminator(
    real_logits: Tensor, fake_logits: Tensor, real_share: float = 1.0, fake_share: float = 1.0
) -> Tensor:
    """``mean softplus(D(fake)) + mean softplus(-D(real))``, each by its share; 2 log 2 where D cannot tell."""
    return fake_share * F.softplus(fake_logits).mean() + real_share * F.softplus(-real_logits).mean()


def discrimination(real_logits: Tensor, fake_logits: Tensor, weight: Tensor, keep: Tensor) -> Tensor:
    """Half of both cross-entropies, of maps of logits (B, n) (SiDA, arXiv 2410.14919); log 2 where D cannot tell.

    Args:
        weight: (B,). keep: rows (B,) that count; the others add nothing.
    """
    both = (F.softplus(fake_logits) + F.softplus(-real_logits)).mean(1) / 2
    return (torch.where(keep, both, 0.0) * weight.to(both)).mean()


def deception(fake_logits: Tensor, weight: Tensor, keep: Tensor, limit: float = 10.0) -> Tensor:
    """The student's side of :func:`discrimination`, its logits bounded."""
    fooled = F.softplus(-fake_logits.clamp(-limit, limit)).mean(1)
    return (torch.where(keep, weight, 0.0) * torch.where(keep, fooled, 0.0)).mean()


def hinge_generator(fake_logits: Tensor) -> Tensor:
    """``-mean D(fake)`` (LADD, arXiv 2403.12015; SANA-Sprint, arXiv 2503.09641, eq. 14)."""
    return -fake_logits.mean()


def hinge_discriminator(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """``mean relu(1 - D(real)) + mean relu(1 + D(fake))``; 2 where D is 0."""
    return F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean()


IDENTITY_WEIGHTS = (
    "l1",
    "one",
    "1-sigma",
    "(1-sigma)^2",
    "1/sigma",
    "1/sigma^2",
    "alpha/sigma",
    "(alpha/sigma)^2",
)
DISTANCES = ("l2", "pseudo_huber", "log_cosh")


def identity_weight(
    kind: str, x0: Tensor, real: Tensor, schedule: Schedule, t: Tensor, floor: float = 1e-5
) -> Tensor:
    """Weight (B,) of the score identity loss, per sample and without gradient.

    * ``l1``: ``1 / mean |x0 - mu_real|``, at least ``floor`` below the line (SiD, arXiv 2404.04057).
    * the others are functions of the level alone (SiD-DiT, arXiv 2509.25127), spelled with the sigma of a flow,
      ``sigma / (alpha + sigma)``, and its alpha ``1 - sigma``: the same number on every path.
    """
    if kind == "l1":
        return 1 / (x0 - real).detach().abs().flatten(1).mean(1).clamp(min=floor)
    a, s = schedule.alpha(t), schedule.sigma(t)
    s = s / (a + s)
    weights = {
        "one": torch.ones_like(s),
        "1-sigma": 1 - s,
        "(1-sigma)^2": (1 - s) ** 2,
        "1/sigma": 1 / s,
        "1/sigma^2": 1 / s**2,
        "alpha/sigma": (1 - s) / s,
        "(alpha/sigma)^2": ((1 - s) / s) ** 2,
    }
    if kind not in weights:
        raise ValueError(f"weight {kind!r}: expected one of {IDENTITY_WEIGHTS}")
    return weights[kind].to(x0.device, x0.dtype)


def finite_rows(*tensors: Tensor) -> Tensor:
    """(B,) bool: samples that are finite in all tensors (B, ...)."""
    return torch.stack([tensor.detach().flatten(1).isfinite().all(1) for tensor in tensors]).all(0)


def _finite(weight: Tensor, *tensors: Tensor) -> list[Tensor]:
    """The weight and the tensors, with zeros in the place of samples that are not finite throughout."""
    keep = finite_rows(*tensors)
    return [torch.where(expand(keep, v).bool(), v, 0.0) for v in (weight.to(tensors[0]), *tensors)]


def score_identity(
    x0: Tensor,
    real: Tensor,
    fake: Tensor,
    weight: Tensor,
    alpha: float = 1.0,
    subtracted: Tensor | None = None,
) -> Tensor:
    """``mean weight (real - fake) ((real - x0) - alpha (real - subtracted))`` (SiD, arXiv 2404.04057, L2 - alpha L1).

    The gradient must reach x0 directly and through the noisy sample into both means, whose networks are frozen but
    differentiable: under ``no_grad`` the value is the same and the gradient that of :func:`distribution_matching`.
    With the exact posterior mean as ``fake``, alpha 1/2 is half the gradient of the Fisher divergence and alpha 1
    the same with the law of the noisy samples frozen. The value may be negative.

    Args:
        x0: student samples (B, ...). real, fake: posterior means of teacher and critic at one noisy version of it.
        weight: (B,). subtracted: another view of the critic in the second place (SiD-LSG, arXiv 2406.01561, kappa3).

    Returns:
        Mean over all entries; samples that are not finite count as zero.
    """
    others = [] if subtracted is None else [subtracted]
    weight, x0, real, fake, *others = _finite(weight, x0, real, fake, *others)
    delta = real - fake
    product = delta * ((real - x0) - alpha * (real - (others[0] if others else fake)))
    return (expand(weight, x0) * product).mean()


def expanded_divergence(
    x0: Tensor,
    real: Tensor,
    fake: Tensor,
    weight: Tensor,
    x_t: Tensor,
    log_ratio: Tensor,
    kind: str,
    alpha: float = 1.0,
    score_scale: Tensor | None = None,
) -> Tensor:
    """``mean weight (h (real - fake)(fake - x0) + (1 - alpha)(h - r h')(real - fake)^2)`` (Uni-Instruct, 2505.20755).

    An f-divergence shrinks along the diffusion by ``E_fake h(r) |score_real - score_fake|^2``, with ``r = p_real /
    p_fake`` at the noisy sample and h of :func:`divergence_weight`; the sum of what it loses at all levels is the
    divergence itself. "rkl", whose h is 1, is :func:`score_identity`, and the same holds of alpha: 1/2 is half the
    gradient, 1 that with the law of the noisy samples frozen.

    Args:
        x0, real, fake, weight: as for :func:`score_identity`. x_t: the noisy sample, with the gradient to x0.
        log_ratio: log r (B,), taken as a number.
        score_scale: alpha / sigma^2 (B,): the gradient passes through r too, whose logarithm's slope is the difference
            of the scores, so that nothing passes through what has estimated it. None leaves that out, as published.

    Returns:
        Mean over all entries; samples that are not finite count as zero.
    """
    log_ratio = log_ratio.detach().view(-1, 1)
    weight, x0, x_t, real, fake, log_ratio = _finite(weight, x0, x_t, real, fake, log_ratio)
    delta, log_ratio = real - fake, log_ratio[:, 0]
    if score_scale is not None:
        slope = (expand(score_scale, x_t) * delta).detach()
        log_ratio = log_ratio + ((x_t - x_t.detach()) * slope).flatten(1).sum(1)
    ratio = log_ratio.exp()
    h = divergence_weight(kind, ratio)
    kept = (1 - alpha) * (h - SLOPES[kind](ratio))
    product = expand(h, x0) * delta * (fake - x0) + expand(kept, x0) * delta.square()
    return (expand(weight, x0) * product).mean()


def implicit_matching(
    x0: Tensor,
    real: Tensor,
    fake: Tensor,
    weight: Tensor,
    distance: str = "pseudo_huber",
    c: float = 1.0,
    scale: Tensor | None = None,
) -> Tensor:
    """Score implicit matching (SIM, arXiv 2410.16794): ``-mean weight d'(y) scale (fake - x0)``.

    ``y = scale (fake - real)``; with ``scale = alpha / sigma^2`` it is the difference of the scores. The gradient of
    ``E d(y)`` with the law of the noisy samples frozen, if it reaches x0 as in :func:`score_identity` and flows
    through d'(y), denominator and all.

    * ``l2``: d = y^2; :func:`score_identity` at alpha 1, times ``2 scale^2``.
    * ``pseudo_huber``: ``sqrt(mean y^2 + c^2) - c``, mean over a sample; the paper's constant for the norm over a
      sample of n entries is ``c sqrt(n)``.
    * ``log_cosh``: ``c^2 log cosh(y / c)`` of each entry.

    Args:
        x0: student samples (B, ...). real, fake: as in :func:`score_identity`. weight, scale: (B,).
    """
    scale = torch.ones_like(weight) if scale is None else scale
    weight, x0, real, fake = _finite(weight, x0, real, fake)
    k = expand(scale, x0)
    y = k * (fake - real)
    if distance == "l2":
        slope = 2 * y
    elif distance == "pseudo_huber":
        slope = y / expand((y.pow(2).flatten(1).mean(1) + c**2).sqrt(), y)
    elif distance == "log_cosh":
        slope = c * torch.tanh(y / c)
    else:
        raise ValueError(f"distance {distance!r}: expected one of {DISTANCES}")
    return -(expand(weight, x0) * slope * k * (fake - x0)).mean()


def denoising_weight(kind: str, schedule: Schedule, t: Tensor) -> Tensor:
    """Weight (B,) of the squared x0 error in a critic's loss, float64.

    * a kind of prediction: its squared error, see :meth:`fewstep.diffusion.schedules.Schedule.error_weight`.
    * ``edm``: ``SNR + 1 / 0.5^2``, the training weight of EDM (arXiv 2206.00364, table 1) for data of std 0.5.
    * ``scaled_eps``: ``alpha^2`` times the squared eps error (SwiftBrush's code).
    """
    if kind == "edm":
        return schedule.log_snr(t).exp() + 1 / 0.5**2
    if kind == "scaled_eps":
        return schedule.alpha(t) ** 2 * schedule.error_weight("eps", t)
    return schedule.error_weight(kind, t)


DIVERGENCES = {
    "rkl": torch.ones_like,
    "kl": lambda r: r,
    "js": lambda r: r / (1 + r),
    "softened_rkl": lambda r: 1 / (1 + r),
    "neyman": lambda r: 1 / r,
    "hellinger": torch.sqrt,
    "jeffreys": lambda r: 1 + r,
}


SLOPES = {  # r h'(r) of each
    "rkl": torch.zeros_like,
    "kl": lambda r: r,
    "js": lambda r: r / (1 + r) ** 2,
    "softened_rkl": lambda r: -r / (1 + r) ** 2,
    "neyman": lambda r: -1 / r,
    "hellinger": lambda r: 0.5 * torch.sqrt(r),
    "jeffreys": lambda r: r,
}


def divergence_weight(kind: str, ratio: Tensor) -> Tensor:
    """``h(r) = r^2 f''(r)`` up to a constant, for density ratios ``r = p_real / p_fake`` (f-distill, 2502.15681).

    The gradient of ``D_f(p_real || p_fake) = E_fake f(r)`` is that of KL(fake || real) with each sample weighted by
    h. kinds: "rkl" 1, "kl" r, "js" r / (1 + r), "softened_rkl" 1 / (1 + r), "neyman" 1 / r, squared "hellinger"
    sqrt(r), "jeffreys" 1 + r.
    """
    if kind not in DIVERGENCES:
        raise ValueError(f"divergence {kind!r}: expected one of {', '.join(DIVERGENCES)}")
    return DIVERGENCES[kind](ratio)


def bin_means(values: Tensor, u: Tensor, bins: int) -> Tensor:
    """For each of values (B,) the mean of those in its bin; u (B,) in [0, 1) says which of equal bins that is."""
    index = (u * bins).long().clamp(0, bins - 1)
    sums = values.new_zeros(bins).index_add_(0, index, values)
    counts = values.new_zeros(bins).index_add_(
        0, index, torch.ones_like(values)
    )  # bincount makes the host wait
    return (sums / counts.clamp(min=1))[index]


def denoising_target_between(
    x_s: Tensor, eps: Tensor, s: Tensor, t: Tensor, schedule: Schedule
) -> tuple[Tensor, Tensor]:
    """Unbiased x0 target of a critic that sees ``x_t = a_ts x_s + s_ts eps`` and never the clean sample.

    ``x_s / a_s - a_t s_s^2 / (a_s^2 s_ts) eps`` (Phased DMD, arXiv 2510.27684, eq. 12): its mean given x_t is the
    posterior mean of x0, because ``-eps / s_ts`` is the score of the transition. ``x_s / a_s`` alone is biased. As
    x_t is given, every other kind of target is the linear image of this one.

    Args:
        x_s: samples at level s (B, ...). eps: the noise of x_t. s, t: (B,), s < t.

    Returns:
        (target (B, ...), weight (B,)): weight ``min(1, 10 s_ts^2)`` keeps the variance bounded as t nears s (eq. 13).
    """
    a_s, a_t, sigma_s = schedule.alpha(s), schedule.alpha(t), schedule.sigma(s)
    _, s_ts = schedule.transition(s, t)
    target = x_s / expand(a_s, x_s) - expand(a_t * sigma_s**2 / (a_s**2 * s_ts), x_s) * eps
    return target, (10 * s_ts**2).clamp(max=1.0)
