"""Counter-based randomness: every draw is a function of (seed, stream, iteration, micro-batch).

Nothing is stored and nothing can be lost: a resumed run, a run on two processes and a run that accumulates two
micro-batches draw the same numbers. Decisions that all ranks must share, such as the exit step of a rollout,
come from a stream without a micro-batch index.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from ..device import real, upload


class Rng:
    """A generator seeded by a tuple of integers and words.

    Noise is drawn on the CPU and moved, so the numbers do not depend on the device.
    """

    def __init__(self, *key: int | str, device: torch.device | str = "cpu"):
        digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
        self.generator = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
        self.device = torch.device(device)

    def normal(self, *shape: int) -> Tensor:
        return upload(torch.randn(shape, generator=self.generator), self.device)

    def normal_like(self, x: Tensor) -> Tensor:
        return self.normal(*x.shape)

    def uniform(self, *shape: int) -> Tensor:
        """In [0, 1), float64, or what the device has of it (:func:`fewstep.device.real`)."""
        u = torch.rand(shape, generator=self.generator, dtype=torch.float64)
        return upload(u.to(real(self.device)), self.device)

    def choice(self, rows: int, values: Sequence[float], chances: Sequence[float] | None = None) -> Tensor:
        """(rows,) of values with these probabilities, default equal ones."""
        u, edge = self.uniform(rows), 0.0
        chosen = torch.full_like(u, values[0])
        for value, chance in zip(values[1:], chances or [1 / len(values)] * len(values)):
            edge += chance
            chosen = torch.where(u >= edge, value, chosen)  # no table of values to bring to the device
        return chosen

    def integer(self, below: int) -> int:
        return int(torch.randint(below, (), generator=self.generator))

    def permutation(self, n: int) -> Tensor:
        return torch.randperm(n, generator=self.generator)
