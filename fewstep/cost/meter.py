"""Bytes that live and operations that run, counted under torch's dispatcher."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, in_kernel_invocation_manager
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
_BY_VALUE = {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output, torch.Tag.inplace_view}
_IN_PLACE = ("aten::_foreach_", "aten::_fused_")

# Size, stride and dtype of a new tensor; the number of an argument that is returned; or nothing.
New = tuple[torch.Size, tuple[int, ...], torch.dtype]
Made = New | int | None


class Known(NamedTuple):
    """What an operation made of arguments of some shapes."""

    made: list[Made]
    kind: type | None  # of what holds the results; None for one tensor
    flops: int
    dtype: str


class Meter(TorchDispatchMode):
    """Bytes alive among those allocated under it, their peak, and floating-point operations of matrix products.

    Torch works out the shape of every result in Python, in some 400 microseconds. What it found is kept in ``known``
    for the next time that an operation meets tensors of these shapes.

    Attributes:
        flops: of each kind of arithmetic: "bfloat16" and other dtypes of products, "tf32" for fp32 ones that may be
            rounded.
    """

    def __init__(self, known: dict | None = None):
        super().__init__()
        self.alive = self.peak = 0
        self.flops: Counter[str] = Counter()
        self.known = {} if known is None else known
        self._seen: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.prim.device.default:  # by far the most frequent
            return args[0].device
        name = function._schema.name
        if name.startswith(_IN_PLACE) and name.endswith("_"):
            return None  # one kernel over thousands of weights, which makes nothing new
        kwargs = kwargs or {}
        fakes: list[FakeTensor] = []
        key = None if _BY_VALUE.intersection(function.tags) else described((args, kwargs), fakes)
        if key is None or not fakes:
            return self._execute(function, args, kwargs)[0]
        if function.is_view and not kwargs and len(fakes) == 1 and fakes[0] is args[0]:
            return _view(function, args, fakes[0])
        known = self.known.get((function, key))
        if known is None:
            out, known = self._execute(function, args, kwargs)
            if known is not None:
                self.known[function, key] = known
            return out
        if known.flops:
            self.flops[_arithmetic(known.dtype)] += known.flops
        out = [args[what] if isinstance(what, int) else self.make(what, fakes[0]) for what in known.made]
        return out[0] if known.kind is None else known.kind(out)

    def make(self, what: New | None, like: FakeTensor) -> FakeTensor | None:
        """A new tensor without storage, counted."""
        if what is None:
            return None
        size, stride, dtype = what
        meta = torch.empty_strided(size, stride, dtype=dtype, device="meta")
        tensor = FakeTensor(like.fake_mode, meta, like.fake_device)
        self._note(tensor.untyped_storage())
        return tensor

    def apart(self, function: Callable[[], Any]) -> tuple[Any, int, Counter[str]]:
        """What a function returns, its peak beyond what was alive, and its arithmetic, neither of which is counted."""
        before = self.peak, self.flops
        alive, flops = self.alive, Counter[str]()
        self.peak, self.flops = alive, flops
        try:
            out = function()
            return out, self.peak - alive, flops
        finally:
            self.peak, self.flops = before

    def add(self, peak: int, flops: Counter[str]) -> None:
        """Counts what :meth:`apart` found."""
        self.peak = max(self.peak, peak)
        self.flops.update(flops)

    def _execute(self, function, args, kwargs) -> tuple[Any, Known | None]:
        """What torch makes of it, and what to remember; None for what tells too little of the next time."""
        out = function(*args, **kwargs)
        parts = [out] if isinstance(out, Tensor) or out is None else out
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        storages = {
            id(s): s for s in (t.untyped_storage() for t in tree_leaves(out) if isinstance(t, Tensor))
        }
        if any(key not in self._seen for key in storages):
            before = {id(s): s for s in (t.untyped_storage() for t in given)}
            for key, storage in storages.items():
                if key not in self._seen and key not in before:  # no view of what was there before
                    self._note(storage)
        flops, dtype = 0, ""
        if (count := _FLOPS.get(function._overloadpacket)) is not None:
            shapes = [a.shape if isinstance(a, Tensor) else a for a in args]
            known = function._overloadpacket in flop_registry
            flops = count(*args, **kwargs, out_val=out) if known else count(*shapes)
            dtype = str(given[0].dtype).removeprefix("torch.")
            self.flops[_arithmetic(dtype)] += flops
        made = made_of(parts, args)
        return out, None if made is None else Known(
            made, None if parts is not out else type(out), flops, dtype
        )

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self._seen:  # a tensor that is made within no operation is seen when its storage is
            return
        self.alive += size
        if self.alive > self.peak:
            self.peak = self.alive

        def freed(_, key=key, size=size):
            self._seen.pop(key, None)
            self.alive -= size

        self._seen[key] = weakref.ref(storage, freed)


def made_of(parts: Sequence, args: Sequence = ()) -> list[Made] | None:
    """How to make results again; None where one is neither new, nor an argument, nor nothing."""
    made: list[Made] = []
    if not isinstance(parts, (list, tuple)):
        return None
    for tensor in parts:
        place = next((i for i, a in enumerate(args) if a is tensor), None)
        if tensor is None or place is not None:
            made.append(place if tensor is not None else None)
        elif type(tensor) is FakeTensor and tensor._base is None and tensor.fake_device.type == "cpu":
            made.append((tensor.shape, tensor.stride(), tensor.dtype))
        else:
            return None
    return made


def described(values: Any, fakes: list[FakeTensor]) -> Any:
    """What of arguments decides the shapes of results; those without storage are added to ``fakes``.

    Returns:
        Something hashable; None for arguments of which only torch knows.
    """
    try:
        found = _described(values, fakes)
        hash(found)
    except TypeError:
        return None
    return found


def _described(value: Any, fakes: list[FakeTensor]) -> Any:
    kind = type(value)
    if kind is FakeTensor:
        if value.fake_device.type != "cpu":  # torch's own bookkeeping
            raise TypeError
        fakes.append(value)
        return value.shape, value.stride(), value.dtype
    if kind is tuple or kind is list:
        return tuple([_described(v, fakes) for v in value])
    if kind is dict:
        return tuple([(k, _described(v, fakes)) for k, v in value.items()])
    if isinstance(value, Tensor):
        if kind not in (Tensor, nn.Parameter) or value.dtype == torch.bool:  # masks decide by their values
            raise TypeError
        return value.shape, value.stride(), value.dtype, "real"
    return kind, value


def _view(function, args, source: FakeTensor):
    """A view is made by torch's own code, without what a tensor without storage adds to it."""
    with in_kernel_invocation_manager(source.fake_mode):
        out = function(*args)
    if isinstance(out, Tensor):
        return FakeTensor(source.fake_mode, out, source.fake_device)
    return type(out)(FakeTensor(source.fake_mode, o, source.fake_device) for o in out)


def _arithmetic(dtype: str) -> str:
    rounded = dtype == "float32" and torch.get_float32_matmul_precision() != "highest"
    return "tf32" if rounded else dtype


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Each storage once."""
    found = {id(s): s.nbytes() for s in (local(t).untyped_storage() for t in tensors)}
    return sum(found.values())


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
