"""Grids of images."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..shape import Shape

LEGIBLE = 192  # pixels of an image's side from which its prompt has room below


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
    images = _checked(images, columns, scale)
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
        grid.paste(_enlarged(image, scale), (x, y))
        for n, text in enumerate(captions[i] if captions else ()):
            draw.text((x + width / 2, y + height + n * line), text, "#555", font, anchor="ma")
    for n, text in enumerate(sides):
        draw.text((left - gap, gap + n * step_y + height / 2), text, "#222", font, anchor="rm")
    return grid


def centred(images: np.ndarray, cell: Shape) -> np.ndarray:
    """Images (N, H, W, 3) in the middle of white cells (N, *cell, 3), which are at least as large."""
    height, width = images.shape[1:3]
    top, left = (cell.height - height) // 2, (cell.width - width) // 2
    found = np.full((len(images), *cell, 3), 255, dtype=np.uint8)
    found[:, top : top + height, left : left + width] = images
    return found


def sheet(images: np.ndarray, prompts: Sequence[str], scale: int | None = None) -> Image.Image:
    """A page to look at: the images of each prompt side by side, with the prompt below them.

    Args:
        images: uint8 array (N, H, W, 3), 0..255; the one at i is of prompt ``i % len(prompts)``.
        prompts: shortened to two lines as wide as their images.
        scale: Integer factor of enlargement; by default as much as makes an image 192 pixels wide.

    Returns:
        An RGB image; rows of up to 8 small or 4 large images, unless more are of one prompt.

    Raises:
        ValueError: The array is not uint8 (N, H, W, 3) with N > 0, or there is no whole number of images per prompt.
    """
    scale = max(1, -(-LEGIBLE // np.shape(images)[2])) if scale is None and np.ndim(images) == 4 else scale
    images = _checked(images, len(prompts), scale or 1)
    each, rest = divmod(len(images), len(prompts))
    if rest:
        raise ValueError(f"prompts: expected a divisor of {len(images)} images, got {len(prompts)}")
    scale = scale or 1
    height, width = images.shape[1] * scale, images.shape[2] * scale
    gap, margin = max(8, width // 16), max(24, width // 8)
    font: Any = ImageFont.load_default(size=max(14, width // 12))
    line = sum(font.getmetrics())
    block = each * (width + gap) - gap
    captions = [_wrap(prompt, font, block) for prompt in prompts]
    text = line * max(map(len, captions)) + gap // 2
    columns = max(1, min(len(prompts), (8 if width <= 256 else 4) // each))
    rows = -(-len(prompts) // columns)
    columns = -(-len(prompts) // rows)  # rows of about equal length
    step_x, step_y = block + 2 * gap, height + text + 2 * gap

    size = (columns * step_x - 2 * gap + 2 * margin, rows * step_y - 2 * gap + 2 * margin)
    page = Image.new("RGB", size, "#f7f6f3")
    draw = ImageDraw.Draw(page)
    for i, image in enumerate(images):
        prompt, number = i % len(prompts), i // len(prompts)
        left, top = margin + prompt % columns * step_x, margin + prompt // columns * step_y
        x = left + number * (width + gap)
        draw.rectangle((x - 1, top - 1, x + width, top + height), outline="#dedad1")
        page.paste(_enlarged(image, scale), (x, top))
        for n, words in enumerate(captions[prompt] if not number else ()):
            place = (left + block / 2, top + height + gap // 2 + n * line)
            draw.text(place, words, "#3a3835", font, anchor="ma")
    return page


def _checked(images: np.ndarray, columns: int, scale: int) -> np.ndarray:
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or not len(images):
        raise ValueError(f"images: expected uint8 (N, H, W, 3) with N > 0, got {images.dtype} {images.shape}")
    if columns < 1 or scale < 1:
        raise ValueError(f"columns and scale must be at least 1, got {columns} and {scale}")
    return images


def _enlarged(image: np.ndarray, scale: int) -> Image.Image:
    height, width = image.shape[:2]
    return Image.fromarray(image).resize((width * scale, height * scale), Image.Resampling.NEAREST)


def cells(size: tuple[int, int], columns: int, cell: Shape | None = None) -> list[tuple[int, int, int, int]]:
    """Where the images of a grid are, row by row: (left, top, right, bottom) in pixels.

    Args:
        size: of a grid of images without texts, (width, height). columns: of the grid. cell: size of an image in it;
            None is whatever square fits.

    Returns:
        Nothing where the grid is none of these; places of a last row that is shorter are among them.
    """
    width, height = size
    squares = (Shape.of(side) for side in range(width // max(columns, 1), 0, -1))
    for one in squares if cell is None else [cell]:
        gap = _gap(min(one))
        if columns * (one.width + gap) + gap == width:
            rows, rest = divmod(height - gap, one.height + gap)
            places = [
                (gap + i % columns * (one.width + gap), gap + i // columns * (one.height + gap))
                for i in range(rows * columns)
            ]
            return [(x, y, x + one.width, y + one.height) for x, y in places] if not rest else []
    return []


def _gap(side: int) -> int:
    return max(2, side // 32)


def _wrap(text: str, font: Any, width: int) -> list[str]:
    """At most two lines of about `width` pixels; what does not fit ends in an ellipsis."""
    per_character = 1.06 * font.getlength(text) / max(len(text), 1)
    return textwrap.wrap(text, max(4, int(width / max(per_character, 1))), max_lines=2, placeholder="…")
