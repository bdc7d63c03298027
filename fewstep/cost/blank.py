"""Micro-batches of the right shapes and no meaning, for measuring without prompts, images or encoders."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from ..diffusion.cond import Cond
from ..diffusion.rng import Rng
from ..methods.base import Batch
from ..teachers.base import Teacher


class Blank:
    """As :class:`~fewstep.data.batches.Batches`, with noise for conditions, images and pairs.

    Args:
        needs: of the method, see :meth:`fewstep.methods.Method.needs`.
        draws: randomness of an iteration's micro-batch, and what all micro-batches of the iteration share.
    """

    def __init__(
        self,
        teacher: Teacher,
        batch_size: int,
        needs: Sequence[str],
        draws: Callable[[int, int], tuple[Rng, Rng]],
    ):
        self.teacher, self.needs, self.draws = teacher, needs, draws
        self.shape = (batch_size, *teacher.latent_shape)
        self.rows: dict[str, int] = {}  # of nothing that could get lost

    def batch(self, iteration: int, micro: int) -> Batch:
        rng, shared = self.draws(iteration, micro)

        def noise(like: Tensor) -> Tensor:
            return rng.normal_like(like) if like.is_floating_point() else like.to(rng.device)

        def cond() -> Cond:
            one = self.teacher.blank(1)  # seen as many rows, which takes no memory
            return one.expand(self.shape[0]).moved(noise)

        more: dict[str, Any] = {}
        if "images" in self.needs:
            more = {"real": rng.normal(*self.shape), "real_cond": cond()}
        if "pairs" in self.needs:
            clean = self.teacher.paired(rng.normal(*self.shape))
            more |= {"pairs": (rng.normal(*self.shape), clean), "pair_cond": cond()}
        return Batch(cond=cond(), shape=self.shape, rng=rng, shared=shared, **more)
