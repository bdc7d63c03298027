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
