"""Writing files: whatever happens, the old file or the new one is there, never a part of one.

Everything fewstep writes goes through here: beside its place under a hidden name, flushed to the disk, renamed.
A kill may leave the hidden file behind; :func:`sweep` removes it. What others have made is never lost: a file takes
the place of a file only, and a folder that of an empty one or of one that fewstep wrote.
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
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import FewstepError, why

HOST = re.sub(r"\W", "_", platform.node())
LOCK = ".lock"  # file of a folder in which one process at a time may work
SHARED = "*"  # record of a folder to which files are added beside those of others
Record = str | tuple[str, ...] | None  # names of files, of which one says that fewstep made a folder


class WriteError(FewstepError):
    """A file cannot be written; what stood in its place still does."""

    code = 4


class ReadError(FewstepError):
    """A file that was there when the command began cannot be read any more."""

    code = 4


def at_home(text: str) -> str:
    """A path with ``~`` at its beginning, or behind the ``kind:`` before it, as the shell would have it."""
    return re.sub(r"(^|:)~(?=/|$)", lambda found: found[1] + str(Path.home()), text)


def all_at_home(value: Any) -> Any:
    """A value of options with every text in it, and in its lists and mappings, by :func:`at_home`."""
    if isinstance(value, Mapping):
        return {name: all_at_home(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(all_at_home, value))
    return type(value)(at_home(str(value))) if isinstance(value, (str, Path)) else value


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """This process alone works in a folder, until the end of the context or its own, whatever ends it.

    Raises:
        FewstepError: another process does.
    """
    import fcntl

    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("a+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # of this process, not of those it forks
        except (BlockingIOError, PermissionError):
            file.seek(0)
            raise FewstepError(
                f"{folder}: {file.read() or 'another process'} is at work in it; wait for its end, or give another "
                "folder"
            ) from None
        except OSError:
            pass  # a file system without locks
        file.truncate(0)
        file.write(f"process {os.getpid()} of {platform.node()}")
        file.flush()
        yield


@contextlib.contextmanager
def replacing(path: str | os.PathLike, durable: bool = True, record: Record = None) -> Iterator[Path]:
    """``with replacing(path) as part:`` write the file or folder ``part``; it takes the place of ``path`` at the end.

    Args:
        durable: wait until the disk has it; files that are checked when read, and are many, need not.
        record: of a folder: the file in it by which an older one is known, which it may replace; see
            :func:`check_place`.

    Raises:
        WriteError: no space, no permission and the like; ``path`` is what it was and nothing is left beside it.
        FewstepError: ``path`` is somebody else's.
    """
    path = Path(path)
    part = _part(path)
    try:
        if path.is_dir():
            check_place(path, True, record)
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        if durable:
            _flush(part)
        check_place(path, part.is_dir(), record)
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


def append(path: Path, text: str) -> None:
    """Text as UTF-8 behind what a file holds, in one piece, whoever else writes to it.

    Raises:
        WriteError: no space, no permission and the like.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab", buffering=0) as file:
            file.write(text.encode())
    except OSError as error:
        raise WriteError(
            f"{path}: cannot be written: {why(error)}; free some space or give another place"
        ) from error


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
        # The library writes beside its file, under a name by chance that a kill leaves for good.
        room = _part(part)
        room.mkdir(exist_ok=True)
        try:
            save_file({name: value.contiguous() for name, value in tensors.items()}, room / part.name)
            os.replace(room / part.name, part)
        finally:
            _remove(room)


def contents(folder: Path) -> list[str]:
    """Names in a folder, without those that a kill leaves behind."""
    return [name for name in os.listdir(folder) if name != LOCK and not name.startswith(".part-")]


def check_place(path: Path, folder: bool, record: Record = None, option: str = "") -> None:
    """Refuses to let a file or folder take a place where something of somebody else's would be lost.

    Args:
        folder: it is a folder that wants the place.
        record: file, or one of several, that every folder of its kind holds; one that lacks it is not replaced, unless
            it is empty. ``SHARED`` where nothing is replaced.
        option: for errors.
    """
    name = f"{option} {path}".strip()
    if not folder:
        if path.is_dir():
            raise FewstepError(f"{name} is a folder, which is kept as it is; give the name of a file")
        if path.exists() and not path.is_file():
            raise FewstepError(f"{name} is a device or a pipe; give the name of a file")
    elif path.is_dir():
        names = (record,) if isinstance(record, str) else record or ()
        if contents(path) and record != SHARED and not any((path / one).is_file() for one in names):
            known = f", and no {' or '.join(names)} says that fewstep made it" if names else ""
            raise FewstepError(f"{name} is not empty{known}; it is kept as it is: give another place")
    elif path.exists() or path.is_symlink():
        raise FewstepError(f"{name} is a file; give the name of a folder")


def check_writable(
    path: Path,
    option: str,
    suffixes: tuple[str, ...] = (),
    record: Record = None,
    inputs: Iterable[str | Path] = (),
) -> None:
    """Refuses an output while nothing has been spent on it: see :func:`check_place`, and it can be written.

    Args:
        option: for errors.
        suffixes: endings that a file may have, so that it replaces only files of its kind; none for a folder.
        record: of a folder. inputs: of the same command, which it must not be.

    Raises:
        FewstepError: it would take the place of something else.
        WriteError: the system refuses to have it there.
    """
    name = f"{option} {path}"
    if suffixes and path.suffix.lower() not in suffixes:
        raise FewstepError(f"{name}: expected a name that ends in {' or '.join(suffixes)}")
    try:
        for other in inputs if os.path.exists(path) else ():
            if os.path.exists(other) and os.path.samefile(path, other):
                raise FewstepError(f"{name} is what the command reads, {other}; give another place")
            if suffixes and os.path.isdir(other) and path.resolve().is_relative_to(Path(other).resolve()):
                raise FewstepError(f"{name} lies in what the command reads, {other}; give another place")
        check_place(path, not suffixes, record, option)
        if suffixes and path.exists() and (kept := _kept(path)):
            raise FewstepError(f"{name} is {kept}, which is kept as it is; give another place")
        _try(path, name)
    except (OSError, ValueError) as error:  # a name with a zero byte is a ValueError
        if isinstance(error, FewstepError):
            raise
        raise WriteError(f"{name} cannot be written: {why(error) or error}; give another place") from error


# Files by which folders of fewstep and of diffusers are known, or that a run goes on from.
RECORDS = {
    "manifest",
    "table",
    "run",
    "inputs",
    "fewstep",
    "floor",
    "pairs",
    "recipe",
    "index",
    "model_index",
}
RECORDS |= {"config", "scheduler_config", "tokenizer", "tokenizer_config"}


def _kept(path: Path) -> str | None:
    """What a file is that no result may take the place of; None for an older result."""
    if path.suffix.lower() == ".json" and path.stem in RECORDS:
        return "no result but a record of its folder"
    if path.suffix.lower() == ".npz":
        try:
            with zipfile.ZipFile(path) as archive:
                if "mu.npy" in archive.namelist():
                    return None
        except zipfile.BadZipFile:
            return None
        return "an archive of other arrays than statistics"
    return None


def check_own(path: Path, start: str, option: str) -> None:
    """Refuses to write a file anew that somebody else wrote: it does not begin as this one does."""
    if path.exists() and not read_text(path).startswith(start):
        raise FewstepError(f"{option} {path} is not what this command writes there; give another place")


def _try(path: Path, name: str) -> None:
    """Writes a file where ``path`` will be, as near as there is a folder, and takes it away again."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        os.lstat(path)  # too long a name says so here
    near = next(place for place in (path, *path.absolute().parents) if os.path.lexists(place))
    if near == path and not path.is_dir():
        near = path.absolute().parent
    if not near.is_dir():
        raise FewstepError(f"{name} cannot be created: {near} is a file; give another place")
    part = near / _part(path.absolute()).name
    try:
        part.touch()
    finally:
        part.unlink(missing_ok=True)


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
    with contextlib.suppress(OSError):  # of a link to a folder the link alone
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
