"""Image files: checked, decoded, and read ahead in worker processes."""

import io
import os
import sys
import zipfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import groupby
from multiprocessing import get_context
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from fewstep.errors import FewstepError
from fewstep.evaluation.reading import READINGS, SHOWN, kinds_of

PIECE = 16  # files that a worker handles at a time: few, so that the network need not wait long for the first
In = TypeVar("In")
Out = TypeVar("Out")


@dataclass(frozen=True)
class Member:
    """An image file inside a zip archive, read where it lies."""

    archive: Path
    path: str

    @property
    def name(self) -> str:
        return PurePosixPath(self.path).name

    def read_bytes(self) -> bytes:
        about = self.archive.stat()
        return _opened(self.archive, about.st_mtime_ns, about.st_size, os.getpid()).read(self.path)


File = Path | Member
Checked = tuple[tuple[int, int], frozenset[str]]  # height and width, and which of `reading.KINDS`


@lru_cache(8)
def _opened(archive: Path, _changed: int, _bytes: int, _process: int) -> zipfile.ZipFile:
    """One handle per process, which shares its position in the file with those that fork; none of an older file."""
    return zipfile.ZipFile(archive)


def read_image(file: File, reading: str = SHOWN) -> np.ndarray:
    """Decodes to uint8 RGB (H, W, 3), in the way that `reading` names."""
    with Image.open(io.BytesIO(file.read_bytes())) as image:
        return READINGS[reading].pixels(image)


def read_files(files: Sequence[File], size: int, reading: str) -> Iterator[Tensor]:
    """uint8 batches (B, H, W, 3), B <= size. A change of image size starts a new batch."""
    batch: list[np.ndarray] = []
    for file in files:
        try:
            image = read_image(file, reading)
        except Exception as error:  # a file that passed the check: changed since, or damaged inside a chunk
            raise FewstepError(f"{file} cannot be decoded: {_reason(error)}") from None
        if batch and (len(batch) == size or image.shape != batch[0].shape):
            yield torch.from_numpy(np.stack(batch))
            batch = []
        batch.append(image)
    if batch:
        yield torch.from_numpy(np.stack(batch))


def _reason(error: Exception) -> str:
    """What is wrong with a file in its own words, without those of the buffer that Pillow saw."""
    if isinstance(error, UnidentifiedImageError):
        return "no image of a known format"
    return f"{error or type(error).__name__}"


def check_file(file: File) -> Checked:
    """Height and width as stored, and kinds; raises what Pillow raises on a file that cannot be decoded."""
    data = file.read_bytes()
    with Image.open(io.BytesIO(data)) as image:
        width, height = image.size
        if image.mode == "F":
            raise ValueError("its pixels are floating-point numbers of unknown range; expected 8 or 16 bits")
        kinds = kinds_of(image, data)
        if image.format == "PNG":
            image.verify()  # checksums of every chunk, without decoding
        else:
            image.draft("RGB", (1, 1))  # lets JPEG decode at an eighth of the size
            image.load()
    return (height, width), kinds


def check_files(files: Sequence[File]) -> list[Checked | str]:
    """For each file its height and width and its kinds, or what is wrong with it."""

    def check(file: File) -> Checked | str:
        try:
            return check_file(file)
        except Exception as error:  # Pillow's decoders raise many kinds, SyntaxError among them
            return _reason(error)

    # One handle of a zip archive must not be shared by threads.
    threads = 1 if files and isinstance(files[0], Member) else min(8, os.cpu_count() or 1)
    with ThreadPoolExecutor(threads) as pool:  # Pillow decodes without the interpreter's lock
        return list(pool.map(check, files))


def default_workers() -> int:
    """How many processes may decode beside this one: the cores that it may use, shared with its siblings, but one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(0, min(8, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")) - 1))


def prepared_files(
    files: Sequence[File],
    size: int,
    prepare: Callable[[Tensor], Tensor],
    workers: int,
    reading: str,
) -> Iterator[Tensor]:
    """Decodes and prepares files in their order, ahead of the caller and in other processes.

    Args:
        files: of images of any sizes.
        size: how many are handled at once.
        prepare: from uint8 (B, H, W, 3) to a tensor (B, ...) on the CPU; picklable where processes do not fork.
        workers: processes; with 0 everything happens here.
        reading: name of the way in which files become pixels.

    Yields:
        Prepared batches of `size` files each; fewer where the prepared shapes differ.
    """
    pieces = [files[start : start + PIECE] for start in range(0, len(files), PIECE)]
    waiting: list[Tensor] = []
    for arrays in ahead(
        partial(_prepared, prepare=prepare, reading=reading), pieces, min(workers, len(pieces) - 1)
    ):
        for part in map(torch.from_numpy, arrays):
            if waiting and waiting[0].shape[1:] != part.shape[1:]:
                yield torch.cat(waiting)
                waiting = []
            waiting.append(part)
            while sum(map(len, waiting)) >= size:
                whole = torch.cat(waiting)
                yield whole[:size]
                waiting = [whole[size:]] if len(whole) > size else []
    if waiting:
        yield torch.cat(waiting)


def ahead(function: Callable[[In], Out], items: Sequence[In], workers: int) -> Iterator[Out]:
    """`map` by worker processes, at most four results each in advance, so that memory stays bounded.

    Results come through pipes: shared memory, which is faster by little, is too small in most containers.
    """
    if workers < 1:
        yield from map(function, items)
        return
    # Forked workers need no `if __name__ == "__main__"` in the caller's script; they never touch a GPU.
    context = get_context("fork" if sys.platform == "linux" else None)
    with ProcessPoolExecutor(workers, context, torch.set_num_threads, (1,)) as pool:
        waiting: deque[Any] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > 4 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:  # also when the caller stops early
            for future in waiting:
                future.cancel()


def _prepared(files: Sequence[File], prepare: Callable[[Tensor], Tensor], reading: str) -> list[np.ndarray]:
    """One piece: images of equal prepared shape together, whatever their own sizes."""
    parts = [prepare(batch) for batch in read_files(files, len(files), reading)]
    return [torch.cat(list(group)).numpy() for _, group in groupby(parts, lambda part: part.shape[1:])]
