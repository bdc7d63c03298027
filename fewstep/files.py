"""Writing files: whatever happens, the old file or the new one is there, never a part of one.

Everything fewstep writes goes through here: beside its place under a hidden name, flushed to the disk, renamed.
A kill may leave the hidden file behind; :func:`sweep` removes it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import FewstepError, why

HOST = re.sub(r"\W", "_", platform.node())


class WriteError(FewstepError):
    """A file cannot be written; what stood in its place still does."""

    code = 4


class ReadError(FewstepError):
    """A file that was there when the command began cannot be read any more."""

    code = 4


def at_home(text: str) -> str:
    """A path with ``~`` at its beginning, or behind the ``kind:`` before it, as the shell would have it."""
    return re.sub(r"(^|:)~(?=/|$)", lambda found: found[1] + str(Path.home()), text)


@contextlib.contextmanager
def replacing(path: str | os.PathLike, durable: bool = True) -> Iterator[Path]:
    """``with replacing(path) as part:`` write the file or folder ``part``; it takes the place of ``path`` at the end.

    Args:
        durable: wait until the disk has it; files that are checked when read, and are many, need not.

    Raises:
        WriteError: no space, no permission and the like; ``path`` is what it was and nothing is left beside it.
    """
    path = Path(path)
    part = _part(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        if durable:
            _flush(part)
        _put(part, path)
        if durable:
            _sync(path.parent)
    except BaseException as error:
        _remove(part)
        if isinstance(error, FewstepError) or not (reason := why(error)):
            raise
        raise WriteError(
            f"{path}: cannot be written: {reason}; what was there before is untouched. Free some space or give "
            "another place, then run the command again (a run goes on with fewstep resume)"
        ) from error


def write(path: str | os.PathLike, content: str | bytes, durable: bool = True) -> None:
    """A whole file, text as UTF-8."""
    with replacing(path, durable) as part, open(part, "wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)


def create(path: str | os.PathLike, content: str) -> bool:
    """Writes a whole file unless there is one already; False if there is, also when another process was first."""
    path = Path(path)
    part = _part(path.with_name(f"new-{path.name}"))
    write(part, content)
    try:
        os.link(part, path)
    except FileExistsError:
        return False
    finally:
        _remove(part)
    return True


def write_json(path: str | os.PathLike, data: Any, durable: bool = True) -> None:
    write(path, json.dumps(data, indent=1) + "\n", durable)


def write_tensors(path: str | os.PathLike, tensors: Mapping[str, Any]) -> None:
    """A safetensors file."""
    from safetensors.torch import save_file

    with replacing(path) as part:
        save_file({name: value.contiguous() for name, value in tensors.items()}, part)


def read_text(path: Path) -> str:
    """What a text file holds, as far as it is text; nothing where there is none."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


@dataclass(frozen=True)
class Need:
    """Bytes of something that will be written below ``path``; ``field`` decides where that is."""

    what: str
    field: str
    path: Path
    size: int


def check_room(needs: Sequence[Need], remedy: str) -> None:
    """Refuses what a disk has no room for; what goes to one disk is added up.

    Raises:
        FewstepError: with the disk, what is free, and what each part takes.
    """
    disks: dict[int, list[Need]] = {}
    for need in needs:
        if need.size:
            disks.setdefault(existing(need.path).stat().st_dev, []).append(need)
    for on_it in disks.values():
        free, needed = shutil.disk_usage(existing(on_it[0].path)).free, sum(need.size for need in on_it)
        if free < needed:
            parts = ", ".join(f"{need.what} ({need.size / 1e9:.2f} GB)" for need in on_it)
            raise FewstepError(
                f"{on_it[0].field}: {on_it[0].path}: {free / 1e9:.2f} GB free, about {needed / 1e9:.2f} GB needed for "
                f"{parts}; free some, {remedy}"
            )


def existing(path: Path) -> Path:
    """The path, or the nearest folder above it that is there."""
    return next(p for p in [path, *path.absolute().parents] if p.exists())


def sketch(path: Path, blocks: int = 16, size: int = 4096) -> str:
    """Hash of a file's length and of some blocks spread over it, first and last included; quick whatever its length."""
    length = path.stat().st_size
    state = hashlib.sha256(str(length).encode())
    with path.open("rb") as file:
        if length <= blocks * size:
            state.update(file.read())
            return state.hexdigest()[:20]
        for k in range(blocks):
            file.seek(max(0, length - size) * k // (blocks - 1))
            state.update(file.read(size))
    return state.hexdigest()[:20]


def sweep(folder: Path) -> None:
    """Removes what killed writers left below a folder: writers of this machine that are gone, and any a day old."""
    for left in list(folder.rglob(".part-*")):
        found = re.match(r"\.part-(\w+)-(\d+)-", left.name)
        with contextlib.suppress(OSError):  # another one swept it
            gone = found and found[1] == HOST and not _alive(int(found[2]))
            if gone or time.time() - left.stat().st_mtime > 86400:
                _remove(left)


def _alive(pid: int) -> bool:
    """Whether another process has this number; this one is not writing while it sweeps."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return pid != os.getpid()


def _part(path: Path) -> Path:
    """A hidden name beside, which no reader looks for; its end is kept, for the suffix decides the format."""
    return path.with_name(f".part-{HOST}-{os.getpid()}-{path.name}")


def _put(part: Path, path: Path) -> None:
    """Renames; a folder that is in the way steps aside first, and comes back should the renaming fail."""
    if not path.is_dir():
        os.replace(part, path)
        return
    aside = _part(path.with_name(f"old-{path.name}"))
    os.replace(path, aside)
    try:
        os.replace(part, path)
    except BaseException:
        os.replace(aside, path)
        raise
    _remove(aside)


def _flush(part: Path) -> None:
    for path in [part, *part.rglob("*")] if part.is_dir() else [part]:
        _sync(path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
