"""WebDataset: tar files in which the parts of a record, a picture and its caption, have one name and follow each other.

Each is read once from end to end, for the place and the size of every picture and for the captions; what was found is
kept in the cache, so that later starts read nothing. From then on a picture is a plain read at its place. So the
records of all shards are one list, of which a run draws a permutation, and a run that is resumed in the middle of a
shard reads what it would have read.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, overload

import numpy as np
from PIL import UnidentifiedImageError

from ..errors import FewstepError, in_line
from ..files import write_json
from ..pictures import size_of
from .image_sets import EXTENSIONS, natural
from .left_out import BadRecord
from .places import cache_root
from .texts import COLUMNS

TEXTS = (".txt", ".caption")  # a caption alone; a .json holds it under one of its usual names, or data.column
Found = dict[str, list[Any]]


@dataclass(frozen=True)
class Member:
    """A picture within a file."""

    path: Path
    name: str
    begin: int
    size: int

    def open(self) -> io.BytesIO:
        """Raises: OSError, BadRecord: the file is gone, or shorter than it was."""
        with self.path.open("rb") as file:
            file.seek(self.begin)
            data = file.read(self.size)
        if len(data) < self.size:
            raise BadRecord(f"{self.path.name} is cut short")
        return io.BytesIO(data)

    def __str__(self) -> str:
        return f"{self.path}/{self.name}"


class Members(Sequence[Member]):
    """The pictures of all shards, in the order of the shards and in theirs."""

    def __init__(self, paths: Sequence[Path], found: Sequence[Found]):
        self.paths = list(paths)
        self.ends = np.cumsum([len(one["names"]) for one in found])
        self.names = [name for one in found for name in one["names"]]
        self.begins = np.array([n for one in found for n in one["begins"]], dtype=np.int64)
        self.sizes = np.array([n for one in found for n in one["sizes"]], dtype=np.int64)
        self.shapes = [shape for one in found for shape in one["shapes"]]  # (height, width) each, or None

    def __len__(self) -> int:
        return len(self.names)

    @overload
    def __getitem__(self, index: int) -> Member: ...
    @overload
    def __getitem__(self, index: slice) -> list[Member]: ...
    def __getitem__(self, index: int | slice) -> Member | list[Member]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        name = self.names[index]
        path = self.paths[int(np.searchsorted(self.ends, index % len(self), side="right"))]
        return Member(path, name, int(self.begins[index]), int(self.sizes[index]))


def shards_of(source: Path) -> list[Path]:
    """The tar files of a folder, or the one that is named; in natural order."""
    if source.is_file():
        return [source] if source.suffix == ".tar" else []
    return sorted((p for p in source.glob("*.tar") if p.is_file()), key=lambda p: natural(p.name))


def read_shards(paths: Sequence[Path], column: str | None = None) -> tuple[Members, list[str]]:
    """Pictures and captions.

    Args:
        column: of the caption in ``.json`` parts; None is their only one called text, caption or prompt.

    Raises:
        FewstepError: a tar that is damaged or compressed, or a picture without a caption, with the shard's name.
    """
    found = [_index(path, column) for path in paths]
    captions = [text for one in found for text in one["captions"]]
    members = Members(paths, found)
    if not captions:
        raise FewstepError(
            f"{paths[0]} holds no picture with a caption beside it (a.jpg, a.txt); looked for {', '.join(EXTENSIONS)}"
        )
    return members, captions


def _index(path: Path, column: str | None) -> Found:
    about = path.stat()
    key = json.dumps(["with sizes", str(path.resolve()), about.st_size, about.st_mtime_ns, column])
    kept = cache_root() / "shards" / f"{hashlib.sha256(key.encode()).hexdigest()[:20]}.json"
    try:
        found: Found = json.loads(kept.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = _read(path, column)
        write_json(kept, found, durable=False)
    return found


def _read(path: Path, column: str | None) -> Found:
    found: Found = {"names": [], "begins": [], "sizes": [], "captions": [], "shapes": []}
    try:
        with tarfile.open(path, "r:") as tar:
            for key, parts in _records(tar):
                picture = next((part for suffix, part in parts.items() if suffix in EXTENSIONS), None)
                if picture is None:
                    continue
                caption = _caption(tar, path, key, parts, column)
                values = (picture.name, picture.offset_data, picture.size, caption, _shape(tar, picture))
                for name, value in zip(found, values):
                    found[name].append(value)
    except (tarfile.TarError, EOFError, OSError) as error:
        raise FewstepError(
            f"{path} cannot be read as a tar file ({in_line(error)}); replace or unpack it: compressed ones have no "
            "places to read at"
        ) from None
    return found


def _shape(tar: tarfile.TarFile, picture: tarfile.TarInfo) -> tuple[int, int] | None:
    """Height and width by the picture's header, beside which the index reads nothing of it; None where it has none."""
    file = tar.extractfile(picture)
    try:
        assert file is not None
        width, height = size_of(file)
    except OSError as error:
        if isinstance(error, UnidentifiedImageError) or error.errno is None:
            return None
        raise  # of the disk
    except Exception:  # Pillow raises many kinds on hostile files
        return None
    return height, width


def _records(tar: tarfile.TarFile) -> Iterator[tuple[str, dict[str, tarfile.TarInfo]]]:
    """Name without suffixes -> its parts by suffix, of members that follow each other."""
    key, parts = "", dict[str, tarfile.TarInfo]()
    for member in tar:
        name = PurePosixPath(member.name)
        if not member.isfile() or name.name.startswith("."):
            continue
        stem, dot, suffix = name.name.partition(".")
        now = str(name.parent / stem)
        if now != key and parts:
            yield key, parts
            parts = {}
        key = now
        parts[f"{dot}{suffix}".lower()] = member
    if parts:
        yield key, parts


def _caption(
    tar: tarfile.TarFile, path: Path, key: str, parts: dict[str, tarfile.TarInfo], column: str | None
) -> str:
    where = f"{path}, {key}"
    part = next((parts[suffix] for suffix in TEXTS if suffix in parts and column is None), parts.get(".json"))
    file = tar.extractfile(part) if part else None
    if file is None or part is None:
        raise FewstepError(f"{where}: no caption; expected {' or '.join(TEXTS)}, or .json, beside it")
    try:
        text: Any = file.read().decode("utf-8-sig")
        if part is parts.get(".json"):
            row = json.loads(text)
            names = [column] if column else [name for name in row if name.lower() in COLUMNS]
            text = row[names[0]] if len(names) == 1 else None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FewstepError(f"{where}: its caption cannot be read ({in_line(error)}); mend it") from None
    if not isinstance(text, str):
        raise FewstepError(f"{where}: no caption in its .json; name its field (data.column)")
    return text.strip()
