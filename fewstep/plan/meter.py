"""Bytes that live and operations that run, counted under torch's dispatcher."""

from __future__ import annotations

import weakref
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

_FLOPS = {
    **flop_registry,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda g, q, k, v, *_, **__: (
        sdpa_backward_flop_count(g, q, k, v)
    ),
}  # fmt: skip


class Meter(TorchDispatchMode):
    """Bytes alive among those allocated under it, their peak, and floating-point operations of matrix products."""

    def __init__(self):
        super().__init__()
        self.alive = self.peak = self.flops = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        for tensor in (out,) if isinstance(out, Tensor) else tree_leaves(out):
            if isinstance(tensor, Tensor) and id(storage := tensor.untyped_storage()) not in self._seen:
                given = (t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor))
                if all(t.untyped_storage() is not storage for t in given):  # no view of what was there before
                    self._note(storage)
        count = _FLOPS.get(function._overloadpacket)
        if count is not None:
            shapes = [a.shape if isinstance(a, Tensor) else a for a in args]
            raw = function._overloadpacket in flop_registry
            self.flops += count(*args, **kwargs, out_val=out) if raw else count(*shapes)
        return out

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        self._seen.add(key)
        self.alive += size
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._freed, key, size).atexit = False

    def _freed(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.alive -= size


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Each storage once."""
    found = {id(s): s.nbytes() for s in (local(t).untyped_storage() for t in tensors)}
    return sum(found.values())


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
