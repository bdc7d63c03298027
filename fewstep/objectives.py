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


def gan_discriminator(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """``mean softplus(D(fake)) + mean softplus(-D(real))``; 2 log 2 where D cannot tell."""
    return F.softplus(fake_logits).mean() + F.softplus(-real_logits).mean()


def denoising_weight(kind: str, schedule: Schedule, t: Tensor) -> Tensor:
    """Weight (B,) of the squared x0 error in a critic's loss, float64.

    * a kind of prediction: its squared error, see :meth:`fewstep.schedules.Schedule.error_weight`.
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
    return (sums / index.bincount(minlength=bins).clamp(min=1))[index]
