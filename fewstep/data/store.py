"""Rows of named tensors in files of many rows each; of a row that ends in zeros only what stands before them is kept.

Texts of many lengths are padded to one, so most of a row may be padding. A tensor NAME (n, L, ...) of a file is
kept as the tokens of all its rows, one row behind another, (T, ...), with NAME/kept (n, 2): how many tokens of each
row, and L. Where no row ends in a token of zeros it is kept as it is.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..files import ReadError

KEPT = "/kept"
SHARD = 1024  # rows of one file
IN_MEMORY = 2 << 30  # stores up to this size are read once


def without_padding(rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rows (n, L, ...) -> tokens (T, ...) and NAME/kept (n, 2) of each, as above; numbers (n,) are as they were.

    Padding is what ends a row and has no bit set, so nothing is lost.
    """
    found: dict[str, Tensor] = {}
    for name, value in rows.items():
        found[name] = value
        if value.ndim > 1 and value.numel():
            ends = _ends(value)
            found[name] = torch.cat([row[:end] for row, end in zip(value, ends.tolist())])
            found[name + KEPT] = torch.stack([ends, torch.full_like(ends, value.shape[1])], 1)
    return found


def _ends(value: Tensor) -> Tensor:
    """(n, L, ...) -> (n,), behind each row's last token that is more than zeros."""
    n, length = value.shape[:2]
    filled = value.reshape(n, length, -1).contiguous().view(torch.uint8).any(-1)
    return (filled * torch.arange(1, length + 1)).amax(1)


def joined(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """All rows of several parts as one file keeps them; what is nowhere padded is whole again."""
    found = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    for name in [name for name in found if name.endswith(KEPT)]:
        kept, length = found[name].unbind(1)
        if kept.equal(length):
            whole = name.removesuffix(KEPT)
            found[whole] = found[whole].unflatten(0, (len(kept), -1))
            del found[name]
    return found


class Shard:
    """Rows of one safetensors file, in memory or by plain reads: one that is cut short, or whose disk is gone, is an
    error then.

    Were it mapped into memory, as safetensors does, the system would end the process without a word.
    """

    def __init__(self, path: Path, in_memory: bool):
        from safetensors import safe_open

        self.path = path
        with safe_open(path, framework="pt") as file:
            names = [name for name in file.keys() if not name.endswith(KEPT)]  # noqa: SIM118
            nothing = {name: file.get_slice(name)[:0] for name in names}
            kept = {name for name in names if name + KEPT in set(file.keys())}
            self.kept = {name: _spans(file.get_tensor(name + KEPT)) for name in kept}
            self.memory = {name: file.get_tensor(name).clone() for name in names} if in_memory else None
        self.kinds = {name: (value.dtype, value.shape[1:]) for name, value in nothing.items()}
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
        self.begins = {name: 8 + size + header[name]["data_offsets"][0] for name in names}

    def row(self, row: int) -> dict[str, Tensor]:
        if self.memory is not None:
            return {name: self._row(name, row, None) for name in self.kinds}
        with self.path.open("rb", buffering=0) as file:
            return {name: self._row(name, row, file.fileno()) for name in self.kinds}

    def _row(self, name: str, row: int, file: int | None) -> Tensor:
        if name not in self.kept:
            return self._read(name, row, 1, file)[0]
        start, count, length = self.kept[name][row].tolist()
        tokens = self._read(name, start, count, file)
        return torch.cat([tokens, tokens.new_zeros(length - count, *tokens.shape[1:])])

    def _read(self, name: str, start: int, count: int, file: int | None) -> Tensor:
        """(count, ...) of a tensor, behind the first ``start``."""
        if file is None:
            assert self.memory is not None
            tokens: Tensor = self.memory[name][start : start + count]
            return tokens
        dtype, shape = self.kinds[name]
        size = shape.numel() * dtype.itemsize
        data = os.pread(file, count * size, self.begins[name] + start * size)
        if len(data) < count * size:
            raise OSError(errno.EIO, "cut short", str(self.path))
        found = torch.empty(count, *shape, dtype=dtype)
        found.view(-1).view(torch.uint8)[:] = (
            torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else 0
        )
        return found


def _spans(kept: Tensor) -> Tensor:
    """(n, 2) of a file -> (n, 3): where each row's tokens begin, how many they are, and how many with padding."""
    return torch.cat([(kept[:, :1].cumsum(0) - kept[:, :1]), kept], 1)


class Store:
    """Rows of named tensors on disk; ``rows(index)`` gathers any of them, with their padding.

    Args:
        remedy: for a file that cannot be read any more.
    """

    def __init__(
        self,
        folder: Path,
        length: int,
        shard: int | None = None,
        remedy: str = "fewstep resume encodes it again",
    ):
        self.folder, self.length, self.shard, self.remedy = folder, length, shard or SHARD, remedy
        paths = [shard_path(folder, start) for start in range(0, length, self.shard)]
        self.in_memory = sum(path.stat().st_size for path in paths) <= IN_MEMORY
        self.files = [Shard(path, self.in_memory) for path in paths]

    def __len__(self) -> int:
        return self.length

    def rows(self, index: Tensor) -> dict[str, Tensor]:
        """(n,) row numbers -> tensors of n rows, floating-point ones in fp32.

        Raises:
            ReadError: a file that was there when the store was opened is gone or cut short.
        """
        found = [self._row(*divmod(i, self.shard)) for i in index.tolist()]
        rows = {name: torch.stack([row[name] for row in found]) for name in self.files[0].kinds}
        return {n: v.float() if v.is_floating_point() else v for n, v in rows.items()}

    def _row(self, file: int, row: int) -> dict[str, Tensor]:
        try:
            return self.files[file].row(row)
        except OSError as error:
            raise ReadError(f"{self.files[file].path}: {error.strerror}; {self.remedy}") from error


def shard_path(folder: Path, start: int) -> Path:
    return folder / f"{start:09d}.safetensors"


def rows_to_make(folder: Path, length: int, shard: int | None = None) -> list[int]:
    """Numbers of a store's rows whose files are not there yet."""
    shard = shard or SHARD
    starts = [start for start in range(0, length, shard) if not shard_path(folder, start).is_file()]
    return [row for start in starts for row in range(start, min(start + shard, length))]
