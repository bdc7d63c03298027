"""What a network is conditioned on, as one opaque value that methods pass around."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

OWN = "null_"  # before the name of what a row brings for its own unconditional branch
# Names of what a call reads as numbers: it stays on the host, which would wait for a device.
HOST = ("lengths", "null_lengths", "shapes")
SIZES = ("time_ids", "resolution", "aspect_ratio")  # of what says how large the image is


@dataclass(frozen=True)
class Cond:
    """Named batch-first tensors, e.g. ``embeds (B, L, D)``, ``pooled (B, D)``; their meaning is the teacher's.

    Behaves like a batch: ``len``, row indexing, ``cat``. An unconditional model has no tensors and any length.
    """

    tensors: Mapping[str, Tensor]

    def __len__(self) -> int:
        return next((len(value) for value in self.tensors.values()), 0)

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def map(self, function: Callable[[Tensor], Tensor]) -> Cond:
        return Cond({name: function(value) for name, value in self.tensors.items()})

    def rows(self, index: Tensor | slice) -> Cond:
        """Rows by slice or index tensor."""

        def some(value: Tensor) -> Tensor:
            if isinstance(index, Tensor) and value.device.type == "cpu":
                return value[index.to(value.device)]
            return value[index]

        return self.map(some)

    def expand(self, batch_size: int) -> Cond:
        """One row -> ``batch_size`` equal rows (a view)."""
        return self.map(lambda value: value.expand(batch_size, *value.shape[1:]))

    def moved(self, function: Callable[[Tensor], Tensor]) -> Cond:
        """As :meth:`map`, of what does not stay on the host."""
        return Cond({n: value if n in HOST else function(value) for n, value in self.tensors.items()})

    def to(self, *args: Any, **kwargs: Any) -> Cond:
        """Like ``Tensor.to``; a dtype is applied to floating-point tensors only."""
        device_only: Any = {k: v for k, v in kwargs.items() if k != "dtype"}
        dtype = kwargs.get("dtype") or next((a for a in args if isinstance(a, torch.dtype)), None)
        places: Any = [a for a in args if not isinstance(a, torch.dtype)]

        def move(value: Tensor) -> Tensor:
            only: Any = {"dtype": dtype} if dtype and value.is_floating_point() else {}
            to: Callable[..., Tensor] = value.to
            return to(*places, **device_only, **only)

        return self.moved(move)

    @staticmethod
    def cat(*parts: Cond) -> Cond:
        return Cond({name: torch.cat([part[name] for part in parts]) for name in parts[0].tensors})


def unconditional(null: Cond, cond: Cond, rows: int) -> Cond:
    """The unconditional condition of some rows of ``cond``, in the shapes of theirs.

    It is the null one; but what a row brings as ``null_NAME`` stands for its NAME, behind which it is padded. What the
    null one does not know, such as an image beside the text, and the size of the image are the row's own in both
    branches.
    """
    found = {name: value.expand(rows, *value.shape[1:]) for name, value in null.tensors.items()}
    for name, value in cond.tensors.items():
        if (own := cond.tensors.get(OWN + name)) is not None:
            found[name] = own if own.shape == value.shape else _padded(own, value.shape[1])
        elif name in SIZES:
            found[name] = value
        elif not name.startswith(OWN):
            found.setdefault(name, value)
    return Cond(found)


def _padded(value: Tensor, length: int) -> Tensor:
    """(B, n, ...) -> (B, length, ...), with zeros."""
    return nn.functional.pad(value, (*[0, 0] * (value.ndim - 2), 0, length - value.shape[1]))


def drop_rows(cond: Cond, null: Cond | None, rows: Tensor) -> Cond:
    """``cond``, in those of its rows (B,) that are true the unconditional one; unchanged where there is none."""
    if null is None or not len(cond):
        return cond
    instead = unconditional(null, cond, len(cond))

    def one(value: Tensor, other: Tensor) -> Tensor:
        which = rows.to(value.device).view(-1, *[1] * (value.ndim - 1))
        return torch.where(which, other.to(value), value)

    return Cond({name: one(value, instead.tensors.get(name, value)) for name, value in cond.tensors.items()})
