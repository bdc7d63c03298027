"""Steps of a student of an autoregressive teacher: which tokens each is given."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..device import real
from ..diffusion.denoiser import Denoiser
from ..diffusion.student import Student


class EntryStudent(Student):
    """Steps of an autoregressive student: each is given the first tokens, and noise for the others.

    A time is the share of tokens that are noise, and every token has a time of its own, 0 or 1; the noise of a token
    is the same in every step.

    Args:
        entries: (K,) first unknown token of each step, from 0 up. num_tokens: n.
    """

    def __init__(self, denoiser: Denoiser, entries: Sequence[int], num_tokens: int):
        self.entries, self.num_tokens = list(entries), num_tokens
        super().__init__(denoiser, [1 - entry / num_tokens for entry in entries], "fixed")

    def times_from(self, entry: Tensor) -> Tensor:
        """Times (B, n, 1) of tokens, given the first unknown one (B, 1)."""
        places = torch.arange(self.num_tokens, device=entry.device)
        return (places >= entry).to(real(entry.device))[..., None]

    def _time(self, step: int, x: Tensor) -> Tensor:
        return self.times_from(torch.full((len(x), 1), self.entries[step], device=x.device))
