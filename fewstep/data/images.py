"""Captioned training images: a folder with tables of captions or sidecar text files, or the built-in emoji."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from ..errors import FewstepError, RecipeError, why
from ..files import ReadError
from ..pictures import fault, read_picture
from . import emoji, texts
from .image_sets import EXTENSIONS, split, walk

TABLES = (".jsonl", ".csv", ".parquet")  # with captions: metadata.jsonl and so on


@dataclass(frozen=True)
class CaptionedImages:
    """Captions and their images; ``load(i, size)`` is uint8 (size, size, 3).

    With twice as many captions as files every file has two: i and ``i + len(files)``. ``passed_over`` says what else
    lay there.
    """

    captions: list[str]
    files: Sequence[Path] | np.ndarray
    passed_over: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.captions)

    def load(self, index: int, size: int) -> np.ndarray:
        """Centre crop to a square, then Lanczos to ``size``; transparent pixels become white."""
        item = self.files[index % len(self.files)]
        try:
            image = Image.fromarray(item) if isinstance(item, np.ndarray) else read_picture(item)
        except Exception as error:  # it was fine when the run began
            raise ReadError(
                f"data.images: {item}: {why(error) or error}; put it back, then go on with fewstep resume"
            ) from error
        return np.asarray(ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS))


def load_images(source: str, column: str | None = None) -> CaptionedImages:
    """Captioned images of a folder, or ``builtin:emoji``, where every image comes under both its captions.

    A folder's captions are in ``NAME.txt`` files, or in tables as Hugging Face's image folders have them: a
    ``metadata.jsonl`` (or .csv, .parquet) in the folder or in those within it, with ``file_name`` and ``text``.
    Every file is checked before anything expensive starts.

    Args:
        column: of the captions in tables; None is their only one called text, caption or prompt.

    Raises:
        RecipeError: folder missing or empty, a caption missing or no text, or corrupt files (up to ten are named).
    """
    if (captions := emoji.prompts(source)) is not None:
        return CaptionedImages(captions, emoji.load()[0])
    folder = Path(source).expanduser()
    if not folder.is_dir():
        raise RecipeError(f"data.images: {source} is no folder; expected captioned images, or builtin:emoji")
    found = split(walk(folder)[0])
    files = sorted(
        folder / name for name in found.names
    )  # captions go by name, so runs keep the order they had
    if not files:
        raise RecipeError(f"data.images: {source} holds no image; looked for {', '.join(EXTENSIONS)}")
    try:
        captions = _captions(folder, files, column)
    except RecipeError:
        raise
    except FewstepError as error:
        raise RecipeError(f"data.images: {error}") from error
    corrupt = [f"{f.name} ({reason})" for f in files if (reason := fault(f))]
    if corrupt:
        more = f" and {len(corrupt) - 10} more" if len(corrupt) > 10 else ""
        raise RecipeError(
            f"data.images: {source}: {len(corrupt)} of {len(files)} files cannot be read: {', '.join(corrupt[:10])}"
            f"{more}; remove or replace them"
        )
    return CaptionedImages(captions, files, found.passed_over)


def tables(source: str | Path) -> list[Path]:
    """Tables of captions in a folder and in those within it.

    Raises:
        RecipeError: two in one folder.
    """
    found = sorted(p for p in Path(source).expanduser().rglob("metadata.*") if p.suffix in TABLES)
    for one, other in pairwise(found):
        if one.parent == other.parent:
            raise RecipeError(f"data.images: {one} and {other.name} are in one folder; remove one of them")
    return found


def _captions(folder: Path, files: Sequence[Path], column: str | None) -> list[str]:
    if found := tables(folder):
        known = [Path(os.path.normpath(f)) for f in files]
        by_file = _of_tables(folder, found, set(known), column)
        captions = [by_file.get(f) for f in known]
        if lost := list(by_file.keys() - set(known)):
            print(
                f"fewstep: note: data.images: {len(lost)} rows of {found[0]} name no image that is there, e.g. "
                f"{min(lost)}",
                file=sys.stderr,
            )
    else:
        sidecars = [f.with_suffix(".txt") for f in files]
        captions = [texts.read_text(s).strip() if s.is_file() else None for s in sidecars]
    if missing := [
        f.relative_to(folder).as_posix() for f, caption in zip(files, captions) if caption is None
    ]:
        raise RecipeError(
            f"data.images: {folder}: no caption for {len(missing)} of {len(files)} images, e.g. {missing[0]}; give "
            "metadata.jsonl or a .txt file beside each image"
        )
    return [caption or "" for caption in captions]


def _of_tables(folder: Path, found: Sequence[Path], known: set[Path], column: str | None) -> dict[Path, str]:
    """File -> caption; names are relative to their table's folder, to the whole one, or to that which holds it."""
    captions: dict[Path, str] = {}
    for table in found:
        rows = texts.rows(table)
        name = texts.column_of(table, rows, column)
        found_texts = [texts.cell(table, place, row, name, blank=True).strip() for place, row in rows]
        for (place, row), text in zip(rows, texts.with_references(table, rows, found_texts)):
            file = texts.cell(table, place, row, "file_name").replace("\\", "/")
            starts = (table.parent, folder, folder.parent)
            near = [Path(os.path.normpath(start / file)) for start in starts]
            path = next((path for path in near if path in known), near[0])
            if captions.setdefault(path, text) != text:
                raise RecipeError(
                    f"data.images: {table}, {place}: {file} has another caption before; keep one"
                )
    return captions
