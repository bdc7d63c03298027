"""Images of several shapes: which image belongs to which, and of which shape an iteration is."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..diffusion.cond import Cond
from ..diffusion.rng import Rng
from ..errors import RecipeError
from ..shape import Shape
from .images import CaptionedImages
from .left_out import LeftOut

BLOCK = 1024  # iterations whose shapes are drawn together


class Rows(Protocol):
    """What micro-batches are made of: a :class:`~fewstep.data.store.Store`, or a teacher's pairs."""

    def __len__(self) -> int: ...

    def rows(self, index: Tensor) -> dict[str, Tensor]: ...


@dataclass(frozen=True)
class Part:
    """Rows of the images of one shape, whose ``row`` is that of the whole set, as captions have it.

    Attributes:
        store: of latents. of: (n,) rows of the set that they are.
    """

    store: Rows
    of: Tensor

    def __len__(self) -> int:
        return len(self.store)

    def rows(self, index: Tensor) -> dict[str, Tensor]:
        found = self.store.rows(index)
        return {**found, "row": self.of[found.get("row", index)]}


class Bucket(NamedTuple):
    """One shape of a run.

    Attributes:
        latent_shape: (C, H, W) of a sample. latents: of the images that belong to it, None where a run has none.
        name: of their order. share: of the iterations. sized: conditions -> the same, told this shape.
    """

    latent_shape: tuple[int, ...]
    latents: Rows | None = None
    name: str = "images"
    share: float = 1.0
    sized: Callable[[Cond], Cond] = lambda cond: cond


class Turns:
    """Which shape each iteration has: a pure function of the seed and its number.

    All micro-batches of an iteration have one shape, on all processes: whoever accumulates two trains what two
    processes train, none of which waits for a larger image of another.

    Args:
        shares: of the iterations, any positive numbers in proportion to one another.
    """

    def __init__(self, seed: int, shares: Sequence[float]):
        self.seed, total = seed, math.fsum(shares)
        self.chances = tuple(share / total for share in shares)

    def __getitem__(self, iteration: int) -> tuple[int, int]:
        """Number of its shape, and how many iterations before it had the same one."""
        if len(self.chances) == 1:
            return 0, iteration
        block, place = divmod(iteration, BLOCK)
        drawn = _drawn(self.seed, self.chances, block)
        turn = int(drawn[place])
        return turn, int(_before(self.seed, self.chances, block)[turn] + (drawn[:place] == turn).sum())


@lru_cache(maxsize=64)
def _drawn(seed: int, chances: tuple[float, ...], block: int) -> Tensor:
    """(BLOCK,) numbers of shapes."""
    return Rng(seed, "shapes", block).choice(BLOCK, range(len(chances)), chances).long()


@lru_cache(maxsize=4)
def _before(seed: int, chances: tuple[float, ...], block: int) -> Tensor:
    """How many iterations of each shape the blocks before this one hold."""
    counts = [_drawn(seed, chances, b).bincount(minlength=len(chances)) for b in range(block)]
    return torch.stack(counts).sum(0) if counts else torch.zeros(len(chances), dtype=torch.long)


def nearest(size: Shape, shapes: Sequence[Shape]) -> int:
    """Number of the shape whose proportions are nearest to an image's, by the ratio of the ratios; of several with the
    same ones the largest that the image covers, or else the smallest."""

    def distance(shape: Shape) -> tuple[float, bool, int]:
        ratio = abs(math.log(shape.height * size.width) - math.log(shape.width * size.height))
        covers = size.height >= shape.height and size.width >= shape.width
        return round(ratio, 12), not covers, -shape.area if covers else shape.area

    return min(range(len(shapes)), key=lambda k: distance(shapes[k]))


def homes_of(sizes: Sequence[Shape | None], shapes: Sequence[Shape]) -> list[int]:
    """Number of the shape that each image belongs to; one without a size goes to the first shape, and is left out when
    it is wanted."""
    found = {size: 0 if size is None else nearest(size, shapes) for size in {*sizes}}
    return [found[size] for size in sizes]


def split(
    images: CaptionedImages, sizes: Sequence[Shape | None], shapes: Sequence[Shape]
) -> list[CaptionedImages]:
    """The images that belong to each shape, by :func:`homes_of`; those that are left out are counted over all. Images
    that were split into the same shapes before are the same parts.

    Raises:
        RecipeError: a shape that no image belongs to.
    """
    told = f"parts of {list(shapes)}"
    if told in images.known:
        known: list[CaptionedImages] = images.known[told]
        return known
    belong: list[list[int]] = [[] for _ in shapes]
    for record, k in enumerate(homes_of(sizes, shapes)):
        belong[k].append(record)
    for shape, records in zip(shapes, belong):
        if not records:
            raise RecipeError(
                f"data.shapes: {shape.said}: none of the {len(sizes)} images of {images.source} is nearest to its "
                "proportions; leave this shape out, or add such images"
            )
    parts = [images.part(records) for records in belong]
    LeftOut.count_together([part.left_out for part in parts])
    images.known[told] = parts
    return parts


def shares_of(given: Sequence[float | None], parts: Sequence[Rows | None]) -> list[float]:
    """As given; else as each shape has images, or the same for all where a run has none."""
    return [
        share if share is not None else float(len(part)) if part is not None else 1.0
        for share, part in zip(given, parts)
    ]
