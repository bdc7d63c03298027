"""Statistics of the tokens that images consist of: whether a student uses the codes as its teacher does."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..teachers.base import Teacher


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


def tokens_of(teacher: Teacher, images: np.ndarray, batch_size: int = 64) -> Tensor:
    """Tokens (N, n) of images uint8 (N, H, W, 3) at the teacher's size, by its own tokenizer."""
    parts = torch.from_numpy(np.ascontiguousarray(images)).split(batch_size)
    pixels = (part.permute(0, 3, 1, 2).float() / 127.5 - 1 for part in parts)
    return torch.cat([teacher.pipe.tokenize(part.to(teacher.device)).cpu() for part in pixels])


class TokenNumbers:
    """What the rows of an evaluation carry beside other numbers where the teacher is one of tokens.

    Attributes:
        taught: the teacher's tokens and its seconds per image, once it had its turn.
    """

    def __init__(self, teacher: Teacher):
        self.teacher = teacher
        self.taught: tuple[Tensor, float] | None = None

    def of(self, kind: str, images: np.ndarray, seconds: float) -> dict[str, float]:
        """Of a row: statistics, and how many times faster a student is at equal batch."""
        if self.teacher.kind != "autoregressive":
            return {}
        tokens, found = tokens_of(self.teacher, images), {}
        if kind == "teacher":
            self.taught = tokens, seconds
        elif kind == "student" and self.taught:
            found["speed-up"] = round(self.taught[1] / seconds, 2)
        codes = len(self.teacher.pipe.codes)
        statistics = token_statistics(tokens, self.taught[0] if self.taught else tokens, codes)
        if not self.taught:
            del statistics["token TV"]  # which is against the teacher's
        return found | statistics
