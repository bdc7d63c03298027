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
        given = tuple(shares if shares else [1.0] * len(sizes))
        plain = all(
            type(side) is int and side > 0
            for size in sizes
            for side in ([size] if isinstance(size, int) else size)
        )
        found = tuple(Shape.of(size) for size in sizes) if plain else ()
        numbers = all(isinstance(share, int | float) and 0 < share < math.inf for share in given)
        if not found or len({*found}) < len(found) or len(given) != len(found) or not numbers:
            raise FewstepError(
                f"shapes {list(sizes)} with shares {list(given)}: expected sizes in pixels, each another, and a share "
                "above 0 for each or for none"
            )
        return cls(found, tuple(map(float, given)))

    @classmethod
    def read(cls, items: Sequence[Mapping[str, Any]]) -> Mixture | None:
        """Of mappings of ``size`` and ``share``, as YAML has them; None of none."""
        if not items:
            return None
        shares = [one["share"] for one in items if one.get("share") is not None]
        if any(set(one) - {"size", "share"} or "size" not in one for one in items):
            raise FewstepError(f"shapes is {list(items)}, expected mappings of size and share")
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
