"""Grids of images."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont


def image_grid(
    images: np.ndarray,
    columns: int,
    *,
    labels: Sequence[str] | None = None,
    scale: int = 1,
    row_labels: Sequence[str] | None = None,
) -> Image.Image:
    """Arranges images row by row on white, with a gap of 1/32 of a cell (at least 2 px) between and around.

    Args:
        images: uint8 array (N, H, W, 3), 0..255.
        columns: Images per row; the last row may be shorter.
        labels: One caption below each image, at most two lines, shortened to the cell's width.
        scale: Integer factor of enlargement, nearest neighbour, so that pixels stay pixels.
        row_labels: One text left of each row.

    Returns:
        An RGB image. Without texts it is `columns * (W * scale + gap) + gap` pixels wide.

    Raises:
        ValueError: The array is not uint8 (N, H, W, 3) with N > 0, or a number of labels does not fit.
    """
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or not len(images):
        raise ValueError(f"images: expected uint8 (N, H, W, 3) with N > 0, got {images.dtype} {images.shape}")
    if columns < 1 or scale < 1:
        raise ValueError(f"columns and scale must be at least 1, got {columns} and {scale}")
    rows = -(-len(images) // columns)
    for name, texts, count in (("labels", labels, len(images)), ("row_labels", row_labels, rows)):
        if texts is not None and len(texts) != count:
            raise ValueError(f"{name}: expected {count} texts, got {len(texts)}")

    height, width = images.shape[1] * scale, images.shape[2] * scale
    gap = _gap(min(height, width))
    font: Any = ImageFont.load_default(size=max(10, width // 11))
    line = sum(font.getmetrics())
    captions = [_wrap(text, font, width) for text in labels or ()]
    caption_height = line * max((len(c) for c in captions), default=0)
    sides = [" ".join(text.split()) for text in row_labels or ()]
    left = math.ceil(max((font.getlength(s) + 3 * gap for s in sides), default=0))
    step_x, step_y = width + gap, height + caption_height + gap

    grid = Image.new("RGB", (left + columns * step_x + gap, rows * step_y + gap), "white")
    draw = ImageDraw.Draw(grid)
    for i, image in enumerate(images):
        x, y = left + gap + i % columns * step_x, gap + i // columns * step_y
        grid.paste(Image.fromarray(image).resize((width, height), Image.Resampling.NEAREST), (x, y))
        for n, text in enumerate(captions[i] if captions else ()):
            draw.text((x + width / 2, y + height + n * line), text, "#555", font, anchor="ma")
    for n, text in enumerate(sides):
        draw.text((left - gap, gap + n * step_y + height / 2), text, "#222", font, anchor="rm")
    return grid


def cells(size: tuple[int, int], columns: int) -> list[tuple[int, int, int, int]]:
    """Where the images of a grid are, row by row: (left, top, right, bottom) in pixels.

    Args:
        size: of a grid of square images without texts. columns: of the grid.

    Returns:
        Nothing where the grid is none of these; places of a last row that is shorter are among them.
    """
    width, height = size
    for side in range(width // max(columns, 1), 0, -1):
        gap = _gap(side)
        if columns * (side + gap) + gap == width:
            rows, rest = divmod(height - gap, side + gap)
            places = [
                (gap + i % columns * (side + gap), gap + i // columns * (side + gap))
                for i in range(rows * columns)
            ]
            return [(x, y, x + side, y + side) for x, y in places] if not rest else []
    return []


def _gap(side: int) -> int:
    return max(2, side // 32)


def _wrap(text: str, font: Any, width: int) -> list[str]:
    """At most two lines of about `width` pixels; what does not fit ends in an ellipsis."""
    per_character = 1.06 * font.getlength(text) / max(len(text), 1)
    return textwrap.wrap(text, max(4, int(width / max(per_character, 1))), max_lines=2, placeholder="…")
