"""Captioned training images: folders of files, WebDataset shards, sets of tables, or the built-in emoji.

A picture is decoded when it is wanted. One that cannot be used is left out then, see :mod:`.left_out`, and the next one
that can be used stands in for it: a rule of the set alone, so a run that is resumed sees the same.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ..errors import FewstepError, RecipeError, why
from ..files import ReadError
from ..pictures import fault, read_picture, size_of
from ..shape import Shape, Size
from . import emoji, texts
from .image_sets import EXTENSIONS, split, walk
from .left_out import BadRecord, LeftOut, TooSmall
from .shards import Member, read_shards, shards_of
from .tables import Cell, open_tables, tables_in

TABLES = (".jsonl", ".csv", ".parquet")  # with captions: metadata.jsonl and so on
LOOK = 64  # pictures that are decoded before anything expensive starts
Picture = Path | Member | Cell


class Chosen(Sequence[Picture]):
    """Some of many pictures, which are made when they are wanted."""

    def __init__(self, files: Sequence[Picture], records: Sequence[int]):
        self.files, self.records = files, records

    def __len__(self) -> int:
        return len(self.records)

    @overload
    def __getitem__(self, index: int) -> Picture: ...
    @overload
    def __getitem__(self, index: slice) -> list[Picture]: ...
    def __getitem__(self, index: int | slice) -> Picture | list[Picture]:
        if isinstance(index, slice):
            return [self.files[i] for i in self.records[index]]
        return self.files[self.records[index]]


@dataclass(frozen=True)
class CaptionedImages:
    """Captions and their images; ``load(i, size)`` is uint8 (height, width, 3).

    With twice as many captions as files every file has two: i and ``i + len(files)``.

    Attributes:
        passed_over: what else lay there. places: files on disk that hold the images; None where each is one.
        upscale: whether an image may be smaller than what is asked for. source, max_bad: see :class:`LeftOut`.
        of: of a part of a set: rows of the set that its rows are. known: what was found out of all of them, once.
    """

    captions: list[str]
    files: Sequence[Picture] | np.ndarray
    passed_over: tuple[str, ...] = ()
    places: Sequence[Path] | None = None
    upscale: bool = False
    source: str = "images"
    max_bad: float = 0.0
    of: Tensor | None = None
    left_out: LeftOut = field(init=False, compare=False)
    known: dict[str, Any] = field(init=False, compare=False, default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "left_out", LeftOut(self.source, len(self.files), self.max_bad))

    def __len__(self) -> int:
        return len(self.captions)

    def on_disk(self) -> Sequence[Path]:
        """The files that hold them."""
        return self.places if self.places is not None else [f for f in self.files if isinstance(f, Path)]

    def part(self, records: Sequence[int]) -> CaptionedImages:
        """Some of them as a set of their own, of which as many may be of no use as of the whole one.

        Parts of one set count apart, unless :meth:`LeftOut.count_together` is told of them.
        """
        files = self.files[records] if isinstance(self.files, np.ndarray) else Chosen(self.files, records)
        first = torch.tensor(list(records))
        rows = torch.cat([first + begin for begin in range(0, len(self), len(self.files))])
        captions = [self.captions[row] for row in rows.tolist()]
        found = replace(self, captions=captions, files=files, of=rows)
        known = self.left_out.reasons
        found.left_out.total = self.left_out.total
        found.left_out.reasons = {new: known[old] for new, old in enumerate(records) if old in known}
        return found

    def load(self, index: int, size: Size) -> np.ndarray:
        """Centre crop to the proportions of ``size``, then Lanczos to it; transparent pixels become white.

        Raises:
            BadRecord: no picture, or (TooSmall) one that is lower or narrower than ``size``, unless ``upscale``.
            ReadError: the disk does not give it, as when its file is gone.
        """
        item, shape = self.files[index % len(self.files)], Shape.of(size)
        try:
            image = Image.fromarray(item) if isinstance(item, np.ndarray) else _read(item)
        except (ReadError, BadRecord):
            raise
        except Exception as error:  # Pillow raises many kinds on hostile files
            if reason := why(error):  # it was there when the run began
                raise ReadError(
                    f"data.images: {item}: {reason}; put it back, then go on with fewstep resume"
                ) from error
            raise BadRecord(str(error).splitlines()[0][:80] or type(error).__name__) from error
        reason = (
            None if isinstance(item, np.ndarray) else self.too_small(Shape(image.height, image.width), size)
        )
        if reason:
            raise TooSmall(reason)
        return np.asarray(ImageOps.fit(image, (shape.width, shape.height), Image.Resampling.LANCZOS))

    def too_small(self, found: Shape, size: Size) -> str | None:
        """Why an image of this shape is not made one of this size; None where it is, or where ``upscale`` allows it."""
        shape = Shape.of(size)
        if self.upscale or (found.height >= shape.height and found.width >= shape.width):
            return None
        below = shape.said if isinstance(shape.said, int) else f"{shape.width} wide and {shape.height} high"
        return f"{found.width}x{found.height} pixels, below {below}; data.upscale would enlarge it"

    def sound(self, index: int, size: Size) -> tuple[int, np.ndarray]:
        """The first record from ``index`` on that can be used, and its pixels.

        Raises:
            RecipeError: too many cannot, see :class:`LeftOut`. ReadError: as :meth:`load`.
        """
        for row in (i % len(self) for i in range(index, index + len(self))):
            if (record := row % len(self.files)) in self.left_out.reasons:
                continue
            try:
                return row, self.load(row, size)
            except BadRecord as error:
                self.left_out.add(record, name_of(self.files[record]), str(error))
        raise RecipeError(f"data.images: {self.source}: no image of it can be used")


def size_at(images: CaptionedImages, record: int) -> Shape | None:
    """How large an image is, by its header; None where it has none that can be read.

    Raises:
        ReadError: the disk does not give it.
    """
    item = images.files[record]
    if isinstance(item, np.ndarray):
        return Shape(*item.shape[:2])
    try:
        width, height = size_of(item if isinstance(item, Path) else item.open())
    except Exception as error:  # Pillow raises many kinds on hostile files
        if reason := why(error):
            raise ReadError(f"data.images: {item}: {reason}; put it back") from error
        return None
    return Shape(height, width)


def name_of(item: Picture | np.ndarray) -> str:
    return "an array" if isinstance(item, np.ndarray) else item.name


def _read(item: Picture) -> Image.Image:
    return read_picture(item if isinstance(item, Path) else item.open())


def load_images(
    source: str, column: str | None = None, *, upscale: bool = False, max_bad: float = 0.0
) -> CaptionedImages:
    """Captioned images of a folder, or ``builtin:emoji``, where every image comes under both its captions, or
    ``builtin:emoji-32``, of 32 pixels and captioned by their kinds.

    - image files, captioned by ``NAME.txt`` files, or by tables as Hugging Face's image folders have them: a
      ``metadata.jsonl`` (or .csv, .parquet) in the folder or in those within it, with ``file_name`` and ``text``;
    - WebDataset shards, ``*.tar``, see :mod:`.shards`;
    - tables with pictures in them, or what ``datasets`` saved, see :mod:`.tables`.

    Of many, 64 are decoded before anything expensive starts, and each of the others when it is wanted.

    Args:
        column: of the captions in tables; None is their only one called text, caption or prompt.
        upscale, max_bad: see :class:`CaptionedImages`.

    Raises:
        RecipeError: folder missing or empty, a caption missing or no text, or corrupt files (up to ten are named).
    """
    captions, pictures = emoji.prompts(source), emoji.pictures(source)
    if captions is not None and pictures is not None:
        return CaptionedImages(captions, pictures, source=source)
    place = Path(source).expanduser()
    if not place.exists():
        raise RecipeError(f"data.images: {source} is no folder; expected captioned images, or builtin:emoji")
    try:
        captions, files, passed_over, places = _open(place, column)
    except RecipeError:
        raise
    except FewstepError as error:
        raise RecipeError(f"data.images: {error}") from error
    images = CaptionedImages(captions, files, passed_over, places, upscale, source, max_bad)
    look(images, range(0, len(files), -(-len(files) // LOOK)))
    return images


def look(images: CaptionedImages, records: Sequence[int]) -> None:
    """Decodes some of them; what is of no use is left out already.

    Raises:
        RecipeError: more than may be.
    """
    for record in records:
        item = images.files[record]
        try:
            reason = (
                None
                if isinstance(item, np.ndarray)
                else fault(item if isinstance(item, Path) else item.open())
            )
        except BadRecord as error:
            reason = str(error)
        if reason:
            images.left_out.reasons[record] = (name_of(item), reason)
    images.left_out.check(len(records))


class Fault(NamedTuple):
    """Why a record is of no use: the rule, of :data:`RULES`, and the words of a run."""

    name: str
    rule: str
    reason: str


RULES = ("too small", "cannot be decoded", "cannot be read")


def faults(
    images: CaptionedImages, sizes: Sequence[Size], threads: int | None = None
) -> Iterator[Fault | None]:
    """Of every record in turn what is wrong with it at the size of its place; None where nothing is."""

    def fault_of(record: int) -> Fault | None:
        try:
            images.load(record, sizes[record])
            return None
        except (BadRecord, ReadError) as error:
            rule = RULES[0 if isinstance(error, TooSmall) else 1 if isinstance(error, BadRecord) else 2]
            return Fault(name_of(images.files[record]), rule, str(error))

    chunk = 1024  # results that wait to be told
    with ThreadPoolExecutor(threads or os.cpu_count()) as pool:
        for begin in range(0, len(images.files), chunk):
            yield from pool.map(fault_of, range(begin, min(begin + chunk, len(images.files))))


def _open(
    place: Path, column: str | None
) -> tuple[list[str], Sequence[Picture], tuple[str, ...], Sequence[Path] | None]:
    """Captions, images, what was passed over, and the files that hold the images where they are not those."""
    found = split(walk(place)[0] if place.is_dir() else [])
    if found.names:
        # Captions go by name, so runs keep the order they had.
        files = sorted(place / name for name in found.names)
        return _captions(place, files, column), files, found.passed_over, None
    if shards := shards_of(place):
        members, captions = read_shards(shards, column)
        return captions, members, (), shards
    if tables_in(place):
        tables = open_tables(place)
        return tables.texts(column), tables.pictures(), (), tables.files
    raise RecipeError(
        f"data.images: {place} holds no image; looked for {', '.join(EXTENSIONS)}, for .tar shards, and for tables"
    )


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
