"""Several shapes of the images that are measured: which of them a sample has, the same in every row of a table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..data.buckets import Turns, homes_of, shares_of
from ..data.cache import sizes_of
from ..data.images import CaptionedImages
from ..errors import FewstepError
from ..shape import Shape, Size


@dataclass(frozen=True)
class Mixture:
    """Shapes with shares, as a recipe's ``data.shapes``. Equal are those that draw the same.

    Attributes:
        shapes: (height, width) each. shares: of the prompts, any positive numbers in proportion to one another.
        chances: the same with a sum of one.
    """

    shapes: tuple[Shape, ...]
    shares: tuple[float, ...] = field(compare=False)
    chances: tuple[float, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "chances", Turns(0, self.shares).chances)

    @classmethod
    def of(cls, sizes: Sequence[Size], shares: Sequence[float] | None = None) -> Mixture:
        """Without shares each shape has as many prompts as another.

        Raises:
            FewstepError: no sizes, a size twice, or other shares than one above 0 for each.
        """
        plain = isinstance(sizes, list | tuple) and all(map(_is_size, sizes))
        found = tuple(Shape.of(size) for size in sizes) if plain else ()
        given = shares if shares else [1.0] * len(found)
        numbers = isinstance(given, list | tuple) and all(map(_is_share, given))
        if not found or len({*found}) < len(found) or not numbers or len(given) != len(found):
            raise FewstepError(
                f"shapes {sizes} with shares {shares or 'alike'}: expected sizes in pixels, each another, and a share "
                "above 0 for each or for none"
            )
        return cls(found, tuple(map(float, given)))

    @classmethod
    def read(cls, items: Sequence[Mapping[str, Any]]) -> Mixture | None:
        """Of mappings of ``size`` and ``share``, as YAML has them; None of none."""
        if not items:
            return None
        known = isinstance(items, list | tuple) and all(
            isinstance(one, Mapping) and "size" in one and not {*one} - {"size", "share"} for one in items
        )
        if not known:
            raise FewstepError(f"shapes is {items}, expected mappings of size and share")
        shares = [one["share"] for one in items if one.get("share") is not None]
        return cls.of([one["size"] for one in items], shares)

    @classmethod
    def recorded(cls, record: Mapping[str, Any] | None) -> Mixture | None:
        """Of what an export says of itself; None where it was trained in one shape."""
        shapes = (record or {}).get("shapes")
        return cls.of(shapes, (record or {}).get("shares")) if shapes else None

    def at(self, seed: int, place: int) -> Shape:
        """Of the images of a prompt: a pure function of the seed and of the prompt's place, whatever draws them."""
        return self.shapes[Turns(seed, self.shares)[place][0]]

    def items(self) -> list[dict[str, Any]]:
        """As YAML has them, see :meth:`read`."""
        return [{"size": one.said, "share": share} for one, share in zip(self.shapes, self.shares)]

    def plain(self) -> dict[str, Any]:
        """JSON-ready, as a record says it."""
        return {"shapes": [shape.said for shape in self.shapes], "shares": list(self.shares)}

    def __str__(self) -> str:
        total = math.fsum(self.shares)
        return ", ".join(f"{shape} {share / total:.3g}" for shape, share in zip(self.shapes, self.shares))


def _is_size(size: Any) -> bool:
    """Whether it is whole pixels of a side, or of height and width."""
    sides = [size, size] if isinstance(size, int) else size
    return (
        isinstance(sides, list | tuple) and [type(side) is int and side > 0 for side in sides] == [True] * 2
    )


def _is_share(share: Any) -> bool:
    return type(share) in (int, float) and 0 < share < math.inf


def counted(shapes: Mapping[str, int]) -> str:
    """How many images of each shape, in words."""
    return ", ".join(f"{count} of {shape}" for shape, count in shapes.items())


def mixture_of(recipe: Any, images: CaptionedImages | None) -> Mixture | None:
    """What a recipe trains in, with the shares of its iterations; None where ``teacher.resolution`` is the only one."""
    shapes = [Shape.of(one.size) for one in recipe.data.shapes]
    if not shapes:
        return None
    counts: list[Any] = [None] * len(shapes)
    if images is not None and "images" in recipe.method_class.needs(recipe.method):
        home = homes_of(sizes_of(images), shapes)
        counts = [range(home.count(k)) for k in range(len(shapes))]
    return Mixture(tuple(shapes), tuple(shares_of([one.share for one in recipe.data.shapes], counts)))
