"""Statistics of the tokens that images consist of: whether a student uses the codes as its teacher does."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..tokens.pipeline import AutoregressivePipeline
from .images import ImageSource

BATCH = 64


def token_statistics(tokens: Tensor, reference: Tensor, codes: int) -> dict[str, float]:
    """How often codes occur, beside a reference.

    Args:
        tokens, reference: (N, n) and (M, n). codes: V.

    Returns:
        ``token perplexity``: exp of the entropy of the codes' frequencies, 1 to V. ``token TV``: half the L1 distance
        of these frequencies from the reference's, 0 to 1; what it is between two samples of one law falls as
        1 / sqrt(N n).
    """
    mine, other = (t.flatten().bincount(minlength=codes).double() / t.numel() for t in (tokens, reference))
    entropy = -(mine * mine.clamp(min=1e-300).log()).sum()
    return {"token perplexity": entropy.exp().item(), "token TV": (0.5 * (mine - other).abs().sum()).item()}


class Tokens:
    """Those of the images that a pipeline drew, which others are compared with.

    Args:
        pipe: whose tokenizer is used. images: at its own size.
    """

    def __init__(self, pipe: AutoregressivePipeline, images: ImageSource):
        self.pipe, self.codes = pipe, len(pipe.codes)
        self.reference = self.of(images)

    @torch.no_grad()
    def of(self, images: ImageSource) -> Tensor:
        """(N, n)."""
        pixels = (part.permute(0, 3, 1, 2).float() / 127.5 - 1 for part in images.batches(BATCH))
        return torch.cat([self.pipe.tokenize(part.to(self.pipe.device)).cpu() for part in pixels])

    def statistics(self, images: ImageSource) -> dict[str, float]:
        return token_statistics(self.of(images), self.reference, self.codes)


def tokens_of(pipe: Any, images: ImageSource) -> Tokens | None:
    """None of a pipeline that has no tokens."""
    return Tokens(pipe, images) if isinstance(pipe, AutoregressivePipeline) else None
