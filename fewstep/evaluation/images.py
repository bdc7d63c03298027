"""Images for evaluation: a folder, a zip or npz file or an array, all checked before the expensive part."""

import copy
import hashlib
import zipfile
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path, PurePath

import numpy as np
import torch
from torch import Tensor

from fewstep.data.image_sets import EXTENSIONS, ImageSet, check_one_set, folder_set, split
from fewstep.errors import FewstepError
from fewstep.evaluation.files import (
    File,
    Member,
    check_files,
    default_workers,
    prepared_files,
    read_files,
)
from fewstep.evaluation.reading import READINGS, SHOWN, matters

BLOCK = 64  # images in a row that go to one process
KEYS = ("images", "arr_0")  # names of the image array in an npz file; ADM's sample files use the second


class ImageSource:
    """Images in a fixed order.

    Attributes:
        name: path, or "array".
        sizes: the (height, width) that occur, before any rotation that EXIF asks for. each: of every file.
        skipped: names of files that could not be read and were left out, as the caller allowed.
        passed_over: what lies there and is no part of the set, in words.
        files: one per image, if there are files. workers: how many processes decode them.
        kinds: of each file, see `reading.KINDS`. reading: how files become pixels, a name of `READINGS`.
    """

    name: str
    sizes: set[tuple[int, int]]
    skipped: tuple[str, ...] = ()
    passed_over: tuple[str, ...] = ()
    files: list[File] | None = None
    workers: int = 0
    kinds: Sequence[frozenset[str]] = ()
    each: Sequence[tuple[int, int]] = ()
    reading: str = SHOWN

    def __len__(self) -> int:
        raise NotImplementedError

    def batches(self, size: int) -> Iterator[Tensor]:
        """uint8 RGB tensors (B, H, W, 3), B <= size. A change of image size starts a new batch."""
        raise NotImplementedError

    def prepared(self, size: int, prepare: Callable[[Tensor], Tensor]) -> Iterator[Tensor]:
        """All images through `prepare`, in batches (B, ...), B <= size; files are read ahead by the workers."""
        if self.files is None:
            yield from map(prepare, self.batches(size))
        else:
            yield from prepared_files(self.files, size, prepare, self.workers, self.reading)

    def read_as(self, reading: str) -> "ImageSource":
        """The same images, with files read in another way; arrays are pixels already."""
        other = copy.copy(self)
        other.reading = reading
        vars(other).pop("sha256", None)
        if isinstance(source := vars(self).get("source"), ImageSource):
            vars(other)["source"] = source.read_as(reading)
        return other

    @property
    def remarks(self) -> list[str]:
        """What one should know about how these files were read."""
        sizes = self.sizes if self.files is not None else set()
        return list(READINGS[self.reading].remarks(self.name, self.kinds, sizes))

    @property
    def origin(self) -> dict[str, str]:
        """What statistics say of the images they were made of."""
        how = {"reads_as": self.reading} if matters(self.kinds) else {}
        return {"source": self.name, "images_sha256": self.sha256, **how}

    def shard(self, rank: int, world: int) -> "ImageSource":
        """The images that process `rank` of `world` looks after."""
        return self if world == 1 else ShardImages(self, rank, world)

    @cached_property
    def sha256(self) -> str:
        """Hash of the images in their order: of the pixels, or of the files of a folder."""
        digest = hashlib.sha256()
        for batch in self.batches(256):
            digest.update(repr(tuple(batch.shape)).encode())
            digest.update(batch.contiguous().numpy().data)
        return digest.hexdigest()


def open_images(
    images: "str | Path | np.ndarray | Tensor | ImageSource",
    at_least: int = 1,
    skip_bad: int | None = None,
    workers: int | None = None,
) -> ImageSource:
    """Opens images and checks them all, so that errors come before expensive work.

    Args:
        images: folder or zip file of image files (see `fewstep.data.image_sets`), npz file with a uint8 array
            `images` or `arr_0` (N, H, W, 3), or such an array or tensor.
        at_least: smallest number of images that is useful to the caller.
        skip_bad: how many unreadable files may be left out; more are an error. None where none may, because images
            belong to prompts by their order.
        workers: processes that decode files, by default `default_workers()`.

    Raises:
        FewstepError: missing path, no images, unreadable images, wrong shape or type, too few images.
    """
    if isinstance(images, ImageSource):
        source = images
    elif isinstance(images, np.ndarray | Tensor):
        source = ArrayImages(images)
    else:
        path = Path(images)
        if not path.exists():
            raise FewstepError(f"{path} does not exist: expected a folder of images, or a zip or npz file")
        if path.is_dir() or path.suffix.lower() == ".zip":
            source = FileImages(path, skip_bad, default_workers() if workers is None else workers)
        else:
            source = NpzImages(path)
    if len(source) < at_least:
        raise FewstepError(f"{source.name} has {len(source)} images, but at least {at_least} are needed")
    return source


class ArrayImages(ImageSource):
    """Images in memory."""

    def __init__(self, images: np.ndarray | Tensor, name: str = "array"):
        self.name = name
        self.images = torch.as_tensor(images).cpu()
        _check_array(name, tuple(self.images.shape), str(self.images.dtype).removeprefix("torch."))
        self.sizes = {(self.images.shape[1], self.images.shape[2])}

    def __len__(self) -> int:
        return len(self.images)

    def batches(self, size: int) -> Iterator[Tensor]:
        yield from self.images.split(size)


class NpzImages(ImageSource):
    """Images of an npz file, read in a stream: the array may be larger than memory."""

    def __init__(self, path: Path):
        self.name, self.path = str(path), path
        try:
            with zipfile.ZipFile(path) as archive:
                _check_members(path, archive.namelist())
                names = {name.removesuffix(".npy") for name in archive.namelist()}
                keys = [key for key in KEYS if key in names]
                if not keys:
                    raise FewstepError(
                        f"{path} has the arrays {sorted(names)}, expected one called images or arr_0"
                    )
                self.member = keys[0] + ".npy"
                self.passed_over = tuple(f"the array {key}" for key in keys[1:])
                with archive.open(self.member) as file:
                    self.shape, fortran, dtype = _read_header(file)
                    stored = archive.getinfo(self.member).file_size - file.tell()
                _check_array(self.name, self.shape, str(dtype))
                if fortran:
                    raise FewstepError(
                        f"{path}: the array is in Fortran order: save np.ascontiguousarray(images)"
                    )
                if stored != int(np.prod(self.shape)):
                    raise FewstepError(
                        f"{path}: {stored} bytes are stored for an array of shape {self.shape}"
                    )
                damaged = archive.testzip()
        except (OSError, ValueError, zipfile.BadZipFile, EOFError) as error:
            if isinstance(error, FewstepError):
                raise
            raise FewstepError(
                f"{path} is neither a folder of images nor a readable npz file: {error}"
            ) from None
        self.sizes = {(self.shape[1], self.shape[2])}
        if damaged:
            raise FewstepError(f"{path}: {damaged} is damaged (wrong checksum): write the file again")

    def __len__(self) -> int:
        return self.shape[0]

    def batches(self, size: int) -> Iterator[Tensor]:
        bytes_per_image = int(np.prod(self.shape[1:]))
        with zipfile.ZipFile(self.path) as archive, archive.open(self.member) as file:
            _read_header(file)
            for start in range(0, len(self), size):
                data = file.read(min(size, len(self) - start) * bytes_per_image)
                yield torch.frombuffer(bytearray(data), dtype=torch.uint8).view(-1, *self.shape[1:])


class FileImages(ImageSource):
    """Image files of a folder or of a zip archive, in natural order.

    Attributes:
        names: of the files, relative.
    """

    files: list[File]

    def __init__(self, path: Path, skip_bad: int | None = None, workers: int = 0):
        self.name, self.workers = str(path), workers
        found_set = _set_of(path)
        names, self.passed_over = found_set.names, found_set.passed_over
        if not names:
            beside = f"; passed over {', '.join(self.passed_over)}" if self.passed_over else ""
            raise FewstepError(f"{path} has no images: looked for {', '.join(EXTENSIONS)}{beside}")
        files = [path / name if path.is_dir() else Member(path, name) for name in names]
        _check_names(path, names)
        found = check_files(files)
        broken = [f"{name}: {one}" for name, one in zip(names, found) if isinstance(one, str)]
        self.files = [file for file, one in zip(files, found) if not isinstance(one, str)]
        self.names = [name for name, one in zip(names, found) if not isinstance(one, str)]
        self.each = [one[0] for one in found if not isinstance(one, str)]
        self.sizes = {*self.each}
        self.kinds = [one[1] for one in found if not isinstance(one, str)]
        self.skipped = tuple(name for name, one in zip(names, found) if isinstance(one, str))
        if len(broken) > (skip_bad or 0) or not self.files:
            more = f"\n  and {len(broken) - 10} more" if len(broken) > 10 else ""
            allow = "" if skip_bad is None else ", or allow some with --skip-bad"
            raise FewstepError(
                f"{path}: {len(broken)} of {len(files)} images cannot be read: remove or replace them{allow}\n  "
                + "\n  ".join(broken[:10])
                + more
            )

    def __len__(self) -> int:
        return len(self.files)

    def batches(self, size: int) -> Iterator[Tensor]:
        yield from read_files(self.files, size, self.reading)

    @cached_property
    def sha256(self) -> str:
        digest = hashlib.sha256()
        if self.reading != SHOWN and matters(self.kinds):  # other pixels than those that the files show
            digest.update(READINGS[self.reading].pixels.__name__.encode())
        for file in self.files:
            digest.update(hashlib.sha256(file.read_bytes()).digest())
        return digest.hexdigest()


def part_of(count: int, rank: int, world: int) -> Tensor:
    """Which of so many images process `rank` of `world` looks after (N,)."""
    return torch.arange(count) // BLOCK % world == rank


class ShardImages(ImageSource):
    """One process's part of another source: whole blocks in turn, so that batches are those of a single process."""

    def __init__(self, source: ImageSource, rank: int, world: int):
        self.name, self.source = source.name, source
        self.sizes, self.skipped, self.workers = source.sizes, source.skipped, source.workers
        self.passed_over, self.reading = source.passed_over, source.reading
        self.mine = part_of(len(source), rank, world)  # (N,)
        if source.files is not None:
            self.files = [file for file, mine in zip(source.files, self.mine) if mine]

    def __len__(self) -> int:
        return int(self.mine.sum())

    def batches(self, size: int) -> Iterator[Tensor]:
        if self.files is not None:  # files of others are not opened
            yield from read_files(self.files, size, self.reading)
            return
        done = 0
        for batch in self.source.batches(size):
            part = batch[self.mine[done : done + len(batch)]]
            done += len(batch)
            if len(part):
                yield part


class FirstImages(ImageSource):
    """The first n images of another source, or n after some that are passed over."""

    def __init__(self, source: ImageSource, n: int, after: int = 0):
        if n < 1:
            raise FewstepError(f"--num is {n}, expected 1 to {len(source)}, the images of {source.name}")
        if n > len(source) - after:
            raise FewstepError(f"{source.name} has {len(source)} images, but {after + n} are asked for")
        self.name, self.source, self.n, self.after = source.name, source, n, after
        self.sizes, self.skipped, self.workers = source.sizes, source.skipped, source.workers
        self.passed_over = source.passed_over
        self.files = None if source.files is None else source.files[after : after + n]
        self.kinds, self.reading = source.kinds[after : after + n], source.reading
        self.each = source.each[after : after + n]

    def __len__(self) -> int:
        return self.n

    def batches(self, size: int) -> Iterator[Tensor]:
        if self.files is not None:  # others are not opened
            yield from read_files(self.files, size, self.reading)
            return
        done = 0
        for batch in self.source.batches(size):
            part = batch[max(0, self.after - done) : max(0, self.after + self.n - done)]
            done += len(batch)
            if len(part):
                yield part
            if done >= self.after + self.n:
                return

    @cached_property
    def sha256(self) -> str:
        after = f" after {self.after}" if self.after else ""
        return hashlib.sha256(f"first {self.n}{after} of {self.source.sha256}".encode()).hexdigest()


def _set_of(path: Path) -> ImageSet:
    """The images of a folder or zip archive."""
    if path.is_dir():
        return folder_set(path)
    try:
        with zipfile.ZipFile(path) as archive:
            members = [name for name in archive.namelist() if not name.endswith("/")]
            _check_members(path, members)
            found = split(members)
            check_one_set(str(path), found.names, members, archive.read)
    except (OSError, zipfile.BadZipFile, RuntimeError) as error:  # the last of an encrypted manifest
        raise FewstepError(f"{path} is no readable zip archive: {error}") from None
    return found


def _check_names(folder: Path, names: list[str]) -> None:
    """Refuses two files of one name, such as a.png beside a.jpg: captions would shift by one."""
    seen: dict[PurePath, str] = {}
    stems = [(PurePath(name).with_suffix(""), name) for name in names]
    twice = [(seen[stem], name) for stem, name in stems if seen.setdefault(stem, name) != name]
    if twice:
        raise FewstepError(
            f"{folder}: {len(twice)} names occur more than once, such as {twice[0][0]} and {twice[0][1]}: expected "
            "one image of a name; remove the others"
        )


def _check_members(path: Path, names: list[str]) -> None:
    """Nothing is ever extracted, but a file with such names was made to do harm."""
    for name in names:
        if name.startswith(("/", "\\")) or ".." in name.replace("\\", "/").split("/") or ":" in name:
            raise FewstepError(
                f"{path}: the member {name!r} leaves the archive: expected plain names; not read"
            )


def _read_header(file) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, Fortran order and type of the npy file, which is left at its first byte of data."""
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(file)


def _check_array(name: str, shape: tuple[int, ...], dtype: str) -> None:
    if dtype != "uint8" or len(shape) != 4 or shape[3] != 3 or 0 in shape[1:]:
        raise FewstepError(
            f"{name}: the images have type {dtype} and shape {shape}, expected uint8 (N, H, W, 3) in 0..255, "
            "channels last"
        )
