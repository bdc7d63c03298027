"""How large an image is: the one place that knows which side comes first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

Size = int | Sequence[int]  # as a recipe says it: pixels of a square's side, or height and width


class Shape(NamedTuple):
    """Pixels of an image, in diffusers' order. Pillow's is the other one."""

    height: int
    width: int

    @classmethod
    def of(cls, size: Size) -> Shape:
        """Of one number, a square's, or of height and width."""
        return cls(size, size) if isinstance(size, int) else cls(*size)

    @property
    def said(self) -> int | list[int]:
        """As a recipe and a record say it: a square is one number."""
        return self.height if self.height == self.width else list(self)

    @property
    def area(self) -> int:
        return self.height * self.width

    def over(self, pixels: int) -> Shape:
        """In units of so many pixels along a side."""
        return Shape(self.height // pixels, self.width // pixels)

    def __str__(self) -> str:
        return f"{self.height}x{self.width}"
