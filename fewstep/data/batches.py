"""Micro-batches: what a loss gets of prompts, images and pairs, as a function of the iteration."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from ..device import upload
from ..diffusion.cond import Cond
from ..diffusion.rng import Rng
from ..methods.base import Batch
from .buckets import Bucket, Rows, Turns


class Batches:
    """Micro-batches as a pure function of (seed, iteration, micro-batch): nothing to save, nothing to lose.

    Prompts and images are walked in an order shuffled anew each epoch. A global micro-batch number counts over
    processes and accumulation alike, so two processes see what one process with two micro-batches sees.

    Args:
        conditions: store of prompts. latents, captions: stores of real images and of their captions, or None.
        buckets: several shapes of samples with their shares and images, in place of ``latent_shape`` and ``latents``.
        pairs, pair_conditions: stores of a teacher's pairs and of their conditions, or None.
        per_iteration: micro-batches of one iteration over all processes. pixels: whether samples are no latents.
    """

    def __init__(
        self,
        conditions: Rows,
        latent_shape: Sequence[int],
        *,
        batch_size: int,
        per_iteration: int = 1,
        seed: int = 0,
        latents: Rows | None = None,
        captions: Rows | None = None,
        pairs: Rows | None = None,
        pair_conditions: Rows | None = None,
        buckets: Sequence[Bucket] = (),
        device: torch.device | str = "cpu",
        pixels: bool = False,
    ):
        self.pixels = pixels
        self.conditions, self.captions = conditions, captions
        self.buckets = list(buckets) or [Bucket(tuple(latent_shape), latents)]
        self.pairs, self.pair_conditions = pairs, pair_conditions
        images = {bucket.name: bucket.latents for bucket in self.buckets}
        stores = {"prompts": conditions, **images, "pairs": pairs}
        self.rows = {name: len(store) for name, store in stores.items() if store is not None}
        self.turns = Turns(seed, [bucket.share for bucket in self.buckets])
        self.batch_size = batch_size
        self.per_iteration, self.seed, self.device = per_iteration, seed, device

    def batch(self, iteration: int, micro: int) -> Batch:
        position = (iteration * self.per_iteration + micro) * self.batch_size
        turn, earlier = self.turns[iteration]
        bucket, host, real = self.buckets[turn], {}, None
        if bucket.latents is not None:
            assert self.captions is not None
            own = (earlier * self.per_iteration + micro) * self.batch_size
            index = self._index(bucket.name, own, len(bucket.latents))
            images = bucket.latents.rows(index)
            real = upload(images["latents"], self.device)
            captions = Cond(self.captions.rows(images.get("row", index)))  # where another stands in
            host["real_cond"] = bucket.sized(captions)
        pairs = pair_cond = None
        if self.pairs is not None:
            assert self.pair_conditions is not None
            index = self._index("pairs", position, len(self.pairs))
            rows = self._upload(self.pairs.rows(index))
            pairs = (rows["noise"], rows["tokens" if "tokens" in rows else "x0"])
            pair_cond = self._moved(Cond(self.pair_conditions.rows(index)))
        index = self._index("prompts", position, len(self.conditions))
        host["cond"] = bucket.sized(Cond(self.conditions.rows(index)))
        return Batch(
            cond=self._moved(host["cond"]),
            shape=(self.batch_size, *bucket.latent_shape),
            rng=Rng(self.seed, "micro", iteration, micro, device=self.device),
            shared=Rng(self.seed, "shared", iteration),
            real=real,
            real_cond=self._moved(host["real_cond"]) if "real_cond" in host else None,
            pairs=pairs,
            pair_cond=pair_cond,
            index=index,
            host=host,
            pixels=self.pixels,
        )

    def _upload(self, rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: upload(value, self.device) for name, value in rows.items()}

    def _moved(self, cond: Cond) -> Cond:
        return cond.moved(lambda value: upload(value, self.device))

    def _index(self, stream: str, position: int, length: int) -> Tensor:
        end = position + self.batch_size
        epochs = range(position // length, (end - 1) // length + 1)
        spans = [(epoch, max(position - epoch * length, 0), end - epoch * length) for epoch in epochs]
        return torch.cat([_order(self.seed, stream, epoch, length)[a:b] for epoch, a, b in spans])


class Ahead:
    """Micro-batches that a thread reads and uploads while the device works on those before them.

    Attributes:
        waited: seconds for which one was not there yet.
    """

    def __init__(self, data: Data):
        self.data, self.thread = data, ThreadPoolExecutor(1)
        self.coming: dict[tuple[int, int], Future[Batch]] = {}
        self.rows, self.waited = data.rows, 0.0

    def batch(self, iteration: int, micro: int) -> Batch:
        found = self.coming.pop((iteration, micro), None)
        self.coming = {k: future for k, future in self.coming.items() if k[0] in (iteration, iteration + 1)}
        following = (iteration + 1, micro)
        if following not in self.coming:
            self.coming[following] = self.thread.submit(self.data.batch, *following)
        begin = time.perf_counter()
        try:
            return found.result() if found else self.data.batch(iteration, micro)
        finally:
            self.waited += time.perf_counter() - begin

    def settle(self) -> None:
        """Nothing is read beside what comes next."""
        wait(self.coming.values())


class Waits:
    """For what share of the time training waited for micro-batches, as :class:`Ahead` counts; said once if it is much.

    Attributes:
        share: since this process began to train.
    """

    MUCH, LONG = 0.2, 60.0  # of the time; seconds that are enough to tell

    def __init__(self, data: Data):
        self.data, self.share, self.said = data, 0.0, False
        self.begin: float | None = None

    def read(self, seconds: float) -> str | None:
        """A line where there is much to say.

        Args:
            seconds: of the whole run so far.
        """
        waited = getattr(self.data, "waited", 0.0)
        if self.begin is None:
            self.begin, self.before = seconds, waited
            return None
        lasted, waited = seconds - self.begin, waited - self.before
        self.share = waited / lasted if lasted > 0 else 0.0
        if self.said or lasted < self.LONG or self.share < self.MUCH:
            return None
        self.said = True
        return (
            f"warning: {self.share:.0%} of the time training waits for its data; a faster disk, data.cache_prompts "
            "true, or another data.encoder_device would spare it"
        )


@lru_cache(maxsize=8)
def _order(seed: int, stream: str, epoch: int, length: int) -> Tensor:
    return Rng(seed, stream, epoch).permutation(length)


class Data(Protocol):
    """Micro-batches as a pure function of the iteration; ``rows`` counts what they are made of, by name."""

    @property
    def rows(self) -> Mapping[str, int]: ...

    def batch(self, iteration: int, micro: int) -> Batch: ...
