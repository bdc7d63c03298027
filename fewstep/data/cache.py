"""Prompts and images encoded once: sharded safetensors that any later run with the same inputs finds again.

A store is a folder named by the hash of everything that decides its content. A shard is there whole
or not at all, so an interrupted encoding goes on where it stopped.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..diffusion.cond import Cond
from ..files import Need, ReadError, sweep, write_tensors
from ..report.bar import Bar
from ..teachers.base import Teacher
from ..teachers.lengths import too_long, unsaid
from ..teachers.origin import lora_file
from ..teachers.references import check_references, identity_of
from .images import CaptionedImages

SHARD = 1024  # rows of one file
PLACE = "FEWSTEP_CACHE"  # the variable that says where
IN_MEMORY = 2 << 30  # stores up to this size are read once


def cache_root() -> Path:
    """``$FEWSTEP_CACHE``, or ``fewstep`` in the user's cache folder."""
    base = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return Path(os.environ.get(PLACE, base / "fewstep"))


class Shard:
    """Rows of one safetensors file by plain reads: one that is cut short, or whose disk is gone, is an error then.

    Were it mapped into memory, as safetensors does, the system would end the process without a word.
    """

    def __init__(self, path: Path):
        from safetensors import safe_open

        self.path = path
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        self.kinds = {name: (value.dtype, value.shape[1:]) for name, value in tensors.items()}
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
        self.begins = {name: 8 + size + header[name]["data_offsets"][0] for name in tensors}

    def row(self, row: int) -> dict[str, Tensor]:
        with self.path.open("rb", buffering=0) as file:
            return {name: self._read(file.fileno(), name, row) for name in self.kinds}

    def _read(self, file: int, name: str, row: int) -> Tensor:
        dtype, shape = self.kinds[name]
        size = shape.numel() * dtype.itemsize
        data = os.pread(file, size, self.begins[name] + row * size)
        if len(data) < size:
            raise OSError(errno.EIO, "cut short", str(self.path))
        return torch.frombuffer(bytearray(data), dtype=dtype).view(shape)


class Store:
    """Rows of named tensors on disk; ``rows(index)`` gathers any of them.

    Args:
        remedy: for a file that cannot be read any more.
    """

    def __init__(
        self, folder: Path, length: int, shard: int = SHARD, remedy: str = "fewstep resume encodes it again"
    ):
        from safetensors.torch import load_file

        self.folder, self.length, self.shard, self.remedy = folder, length, shard, remedy
        paths = [shard_path(folder, start) for start in range(0, length, shard)]
        self.memory: dict[str, Tensor] | None = None
        self.files: list[Shard] = []
        if sum(path.stat().st_size for path in paths) <= IN_MEMORY:
            parts = [load_file(path) for path in paths]
            self.memory = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        else:
            self.files = [Shard(path) for path in paths]

    def __len__(self) -> int:
        return self.length

    def rows(self, index: Tensor) -> dict[str, Tensor]:
        """(n,) row numbers -> tensors of n rows, floating-point ones in fp32.

        Raises:
            ReadError: a file that was there when the store was opened is gone or cut short.
        """
        if self.memory is not None:
            rows = {name: value[index] for name, value in self.memory.items()}
        else:
            found = [self._row(*divmod(i, self.shard)) for i in index.tolist()]
            rows = {name: torch.stack([row[name] for row in found]) for name in self.files[0].kinds}
        return {n: v.float() if v.is_floating_point() else v for n, v in rows.items()}

    def _row(self, file: int, row: int) -> dict[str, Tensor]:
        try:
            return self.files[file].row(row)
        except OSError as error:
            raise ReadError(f"{self.files[file].path}: {error.strerror}; {self.remedy}") from error


def encode_prompts(
    teacher: Teacher, prompts: Sequence[str], batch_size: int = 32, quiet: bool = False
) -> Store:
    """Conditions of all prompts, as a store with one row per prompt."""
    check_references(teacher, prompts)

    def encode(start: int, stop: int) -> dict[str, Tensor]:
        with unsaid():
            parts = [
                teacher.encode(prompts[i : min(i + batch_size, stop)]) for i in range(start, stop, batch_size)
            ]
        return dict(Cond.cat(*parts).tensors)

    folder = prompts_folder(teacher, prompts)
    if not quiet and rows_to_make(folder, len(prompts)) and (cut := too_long(teacher.pipe, prompts)):
        print(f"fewstep: note: {cut}", file=sys.stderr)
    return _store(folder, len(prompts), encode, teacher.net.dtype, quiet)


def prompts_folder(teacher: Teacher, prompts: Sequence[str]) -> Path:
    """Where the store of these prompts is, or will be."""
    return _folder(
        "prompts", ["prompts", identity(teacher), teacher.resolution, list(map(identity_of, prompts))]
    )


def encode_images(
    teacher: Teacher, images: CaptionedImages, batch_size: int = 16, quiet: bool = False
) -> Store:
    """Scaled latents of all images at the teacher's resolution; one fixed draw of the VAE's posterior each."""

    def encode(start: int, stop: int) -> dict[str, Tensor]:
        parts = []
        for i in range(start, stop, batch_size):
            pixels = [
                torch.tensor(images.load(j, teacher.resolution)) for j in range(i, min(i + batch_size, stop))
            ]
            generator = torch.Generator().manual_seed(i)  # of the CPU: the same draw on every device
            parts.append(teacher.latents(torch.stack(pixels), generator))
        return {"latents": torch.cat(parts)}

    return _store(images_folder(teacher, images), len(images), encode, torch.float32, quiet)


def images_folder(teacher: Teacher, images: CaptionedImages) -> Path:
    """Where the store of these images is, or will be."""
    key = ["images", identity(teacher), teacher.resolution, _fingerprint(images), len(images)]
    if teacher.autoencoder == "vae":  # what was kept under another rule of scaling is not taken for this one
        key.append([torch.as_tensor(value).flatten().tolist() for value in teacher.latent_scale()])
    return _folder("latents", key)


def _folder(kind: str, key: list[Any]) -> Path:
    return cache_root() / f"{kind}-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:20]}"


def rows_to_make(folder: Path, length: int, shard: int = SHARD) -> int:
    """Rows of a store whose files are not there yet."""
    starts = range(0, length, shard)
    return sum(min(shard, length - s) for s in starts if not shard_path(folder, s).is_file())


def need_of_prompts(teacher: Teacher, prompts: Sequence[str], what: str) -> Need:
    """Bytes that :func:`encode_prompts` will write for these."""
    folder = prompts_folder(teacher, prompts)
    rows = rows_to_make(folder, len(prompts))
    return Need(what, PLACE, folder, rows * condition_bytes(teacher, prompts) if rows else 0)


def condition_bytes(teacher: Teacher, prompts: Sequence[str]) -> int:
    """What one encoded prompt takes on disk, floating-point parts in the dtype of the frozen network."""
    with unsaid():
        row = teacher.encode(prompts[:1]).tensors.values()
    kept = ((value, teacher.net.dtype if value.is_floating_point() else value.dtype) for value in row)
    return sum(value.numel() * dtype.itemsize for value, dtype in kept)


def latent_bytes(teacher: Teacher) -> int:
    """What one encoded image takes on disk, in fp32."""
    return 4 * torch.Size(teacher.latent_shape).numel()


def identity(teacher: Teacher) -> list[str]:
    """What tells one teacher from another: its source, the size and time of every file, and what is merged into it."""
    from ..teachers import resolve

    origin = teacher.origin
    stats = _stats(Path(resolve(teacher.source)))
    if origin.variant:
        stats.append(f"variant:{origin.variant}")
    if origin.config:
        stats += [f"config:{origin.config}", *_stats(Path(origin.config))]
    loras = [f"lora:{_stat(lora_file(one.path))}:{one.weight}" for one in origin.loras]
    return [teacher.source, *stats, *loras]


def _stats(place: Path) -> list[str]:
    """Of a file, or of every file in a folder; of the hub nothing."""
    if place.is_file():
        return [f"{place.name}:{_stat(place)}"]
    return [f"{p.relative_to(place)}:{_stat(p)}" for p in sorted(place.rglob("*")) if p.is_file()]


def _stat(path: Path) -> str:
    return f"{path.stat().st_size}:{path.stat().st_mtime_ns}"


def _fingerprint(images: CaptionedImages) -> list[str]:
    if isinstance(images.files, Sequence):
        return [f"{p}:{_stat(p)}" for p in images.files]
    return [hashlib.sha256(images.files.tobytes()).hexdigest()]


def shard_path(folder: Path, start: int) -> Path:
    return folder / f"{start:09d}.safetensors"


def _store(
    folder: Path,
    length: int,
    encode: Callable[[int, int], dict[str, Tensor]],
    dtype: torch.dtype,
    quiet: bool,
) -> Store:
    kind = folder.name.partition("-")[0]
    folder.mkdir(parents=True, exist_ok=True)
    starts = range(0, length, SHARD)
    sweep(folder)
    missing = [start for start in starts if not is_whole(shard_path(folder, start))]
    rows = [range(start, min(start + SHARD, length)) for start in missing]
    with Bar("encoding", sum(map(len, rows)), kind, quiet=quiet) as bar:
        for part in rows:
            tensors = encode(part.start, part.stop)
            tensors = {
                n: v.to("cpu", dtype if v.is_floating_point() else v.dtype) for n, v in tensors.items()
            }
            write_tensors(shard_path(folder, part.start), tensors)
            bar.update(len(part))
    return Store(folder, length)


def is_whole(path: Path) -> bool:
    """Whether a shard is there and as long as its header says; a damaged one is named and made again."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt"):
            return True
    except FileNotFoundError:
        return False
    except (OSError, SafetensorError) as error:
        print(f"fewstep: cached file {path} is damaged ({error}); encoding it again", file=sys.stderr)
        return False
