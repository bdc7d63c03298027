"""Which files are a set of images, and in which order: one rule for folders and zip archives, whoever reads them.

Names are in natural order, 2 before 10. Links to folders are followed. Passed over, and counted, is what is hidden,
what has a format that is not read, and a folder that was entered under another name before.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import features

from ..errors import FewstepError

EXTENSIONS: tuple[str, ...] = (
    ".png",
    ".jpg",
    ".jpeg",
    ".jfif",
    ".webp",
    ".bmp",
    ".tif",
    ".tiff",
    ".ppm",
    ".pgm",
)
EXTENSIONS += (".avif",) if features.check("avif") else ()
# Images that others read.
UNREAD = {".avif", ".gif", ".heic", ".heif", ".jp2", ".jxl", ".tga", ".exr", ".hdr", ".svg"} - {*EXTENSIONS}
MANIFEST = "manifest.json"  # of a folder that `fewstep eval generate` made


@dataclass(frozen=True)
class ImageSet:
    """Names of the images, relative and with slashes, in natural order, and what was passed over, in words."""

    names: list[str]
    passed_over: tuple[str, ...]


def natural(name: str) -> tuple[Any, ...]:
    """Key of a relative path: folder by folder, numbers in it by their value, its suffix last of all."""
    path = PurePosixPath(name.replace("\\", "/"))
    return (*(_parts(part) for part in path.parent.parts), _parts(path.stem)), name


def _parts(text: str) -> tuple[Any, ...]:
    """Text and numbers in turn; a number is its length and its digits, for names may have thousands of them."""
    pieces = re.split(r"([0-9]+)", text)
    numbers = (digits.lstrip("0") for digits in pieces[1::2])
    values = [*((len(digits), digits) for digits in numbers), None]
    return tuple(part for pair in zip(pieces[::2], values) for part in pair if part is not None)


def folder_set(folder: Path) -> ImageSet:
    """The images below a folder.

    Raises:
        FewstepError: a folder in it cannot be read, or images that are no one set, see :func:`check_one_set`.
    """
    files, again = walk(folder)
    found = split(files)
    check_one_set(str(folder), found.names, files, lambda name: (folder / name).read_bytes())
    return ImageSet(found.names, (*found.passed_over, *(f"{name}/, entered already" for name in again)))


def walk(folder: Path) -> tuple[list[str], list[str]]:
    """Every file below a folder, links followed, and folders that were not entered because they had been before."""
    files: list[str] = []
    again: list[str] = []
    seen: set[tuple[int, int]] = set()
    waiting = [("", False)]
    while waiting:
        # What lies there has the name before what a link leads to.
        waiting.sort(key=lambda place: (place[1], natural(place[0])), reverse=True)
        name, _ = waiting.pop()
        try:
            about = os.stat(folder / name)
            if (about.st_dev, about.st_ino) in seen:
                again.append(name)
                continue
            seen.add((about.st_dev, about.st_ino))
            with os.scandir(folder / name) as entries:
                for entry in entries:
                    path = f"{name}/{entry.name}".lstrip("/")
                    if _is_folder(entry):
                        waiting.append((path, entry.is_symlink()))
                    else:
                        files.append(path)
        except OSError as error:
            raise FewstepError(
                f"{folder / name} cannot be read: {error.strerror}; mend or remove it"
            ) from None
    return files, again


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself, which whoever opens it as an image will name
        return False


def split(names: Iterable[str]) -> ImageSet:
    """Images among the names of files, in natural order, and what else looks like images, counted by its reason."""
    images, over = [], Counter[str]()
    for name in dict.fromkeys(names):
        parts = name.replace("\\", "/").split("/")
        suffix = PurePosixPath(parts[-1]).suffix.lower()
        if suffix not in EXTENSIONS and suffix not in UNREAD:
            continue
        hidden = [i for i, part in enumerate(parts) if part.startswith(".") or part == "__MACOSX"]
        if hidden:  # leftovers of interrupted writers, of file browsers and of notebooks
            folder = "/".join(parts[: hidden[0] + 1])
            over["hidden" if hidden[0] == len(parts) - 1 else f"in {folder}/"] += 1
        elif suffix in UNREAD:
            over[f"of the format {suffix}, which is not read"] += 1
        else:
            images.append(name)
    return ImageSet(sorted(images, key=natural), tuple(f"{n} {why}" for why, n in sorted(over.items())))


def check_one_set(where: str, images: list[str], names: Iterable[str], read: Callable[[str], bytes]) -> None:
    """Refuses images of which nobody can tell whether they are one set.

    Args:
        where: for errors. images: names of all. names: of all files. read: a file's bytes.

    Raises:
        FewstepError: images beside folders of images, or images of several runs of ``fewstep eval generate``.
    """
    parents = {PurePosixPath(name).parent for name in images}
    for parent in sorted(parents):
        if deeper := [p for p in sorted(parents) if parent in p.parents]:
            beside = [name for name in images if PurePosixPath(name).parent == parent]
            raise FewstepError(
                f"{where}: {len(beside)} images, such as {beside[0]}, lie beside folders of images, such as "
                f"{deeper[0]}: expected images of one kind of place; give one of the folders, or move the others away"
            )
    made = [
        PurePosixPath(n).parent for n in names if PurePosixPath(n).name == MANIFEST and _is_manifest(read(n))
    ]
    for folder in sorted(made):
        if others := [str(p) for p in sorted({*parents, *made}) if p != folder and folder not in p.parents]:
            raise FewstepError(
                f"{where}: {folder} holds the images of one run of `fewstep eval generate`, and others lie in "
                f"{', '.join(others[:5])}: expected one set; give one of the folders"
            )


def _is_manifest(content: bytes) -> bool:
    try:
        found = json.loads(content)
    except ValueError:
        return False
    return isinstance(found, dict) and {"schema", "run", "num"} <= set(found)
