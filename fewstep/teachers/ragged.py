"""Texts of many lengths: padded to one for the cache, with a mask by which the network sees no padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from ..diffusion.cond import Cond
from .base import Teacher
from .transformers import text_length

LONGEST = 512  # tokens that the stock calls of these pipelines read of a text


class Ragged(Teacher):
    """A teacher whose stock pipeline gives each text the tokens that it has, up to the length of its call.

    Rows of the cache have one shape, the longest. A call cuts them to what its batch needs, by lengths that are on the
    host, so that short texts cost no more than in the stock pipeline.
    """

    network = "transformer"
    most: ClassVar[int] = LONGEST  # tokens of a text
    width: ClassVar[str]  # of the network's configuration: how wide an encoded token is

    def ragged(self, prompts: Sequence[str], length: int) -> list[Tensor]:
        """(n, D) of each prompt, or (n, layers, D), as the stock pipeline encodes it, n at most ``length``."""
        raise NotImplementedError

    @property
    def token(self) -> tuple[int, ...]:
        """Shape of an encoded token."""
        return (self.net.config[self.width],)

    @property
    def longest(self) -> int:
        """Tokens of a row, padding included."""
        return text_length(self.pipe)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Cond:
        length = self.longest
        rows = self.ragged(list(prompts), length)
        embeds = torch.stack(
            [torch.cat([row, row.new_zeros(length - len(row), *row.shape[1:])]) for row in rows]
        )
        ends = torch.tensor([len(row) for row in rows])
        mask = (torch.arange(length) < ends[:, None]).long().to(embeds.device)
        return Cond({"embeds": embeds.float(), "mask": mask, "lengths": ends})

    def blank(self, rows: int) -> Cond:
        embeds = torch.zeros(rows, self.most, *self.token)
        mask = torch.ones(rows, self.most, dtype=torch.long)
        return Cond({"embeds": embeds, "mask": mask, "lengths": torch.full((rows,), self.most)})


def apart(cond: Cond) -> list[Tensor]:
    """(n, D) of each row, without its padding."""
    return [row[:end] for row, end in zip(cond["embeds"], cond["lengths"].tolist())]


def together(cond: Cond) -> tuple[Tensor, Tensor | None]:
    """(B, n, D) of all rows with the padding of the longest, and their mask (B, n), None where none is padded."""
    ends = cond["lengths"].tolist()
    longest = max(ends)
    return cond["embeds"][:, :longest], None if min(ends) == longest else cond["mask"][:, :longest]
