"""Bytes that live and operations that run, counted under torch's dispatcher."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, in_kernel_invocation_manager
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode
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
_REAL = (Tensor, nn.Parameter)


class Known(NamedTuple):
    """What an operation made of arguments of some shapes: new tensors, or arguments again (their number)."""

    made: list[tuple[torch.Size, tuple[int, ...], torch.dtype] | int | None]
    shape: type | None  # tuple or list, or None for one tensor
    flops: int
    rate: str


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
        if function._schema.name.startswith(_IN_PLACE) and function._schema.name.endswith("_"):
            return None  # one kernel over thousands of weights, which makes nothing new
        kwargs = kwargs or {}
        fakes: list[FakeTensor] = []
        key = None
        if not _BY_VALUE.intersection(function.tags):
            try:
                key = (function, _described(args, fakes), _described(tuple(kwargs.items()), fakes))
            except TypeError:  # of a kind that only torch knows
                key = None
        if key is None or not fakes:
            return self._slowly(function, args, kwargs)[0]
        mode = fakes[0].fake_mode
        if function.is_view and len(fakes) == 1 and type(args[0]) is FakeTensor:
            with in_kernel_invocation_manager(mode):
                out = function(*args, **kwargs)
            if isinstance(out, Tensor):
                return FakeTensor(mode, out, fakes[0].fake_device)
            return type(out)(FakeTensor(mode, o, fakes[0].fake_device) for o in out)
        known = self.known.get(key)
        if known is None:
            out, known = self._slowly(function, args, kwargs)
            if known is not None:
                self.known[key] = known
            return out
        if known.flops:
            self.flops[self._rate(known.rate)] += known.flops
        out = [self.again(what, args, mode, fakes[0].fake_device) for what in known.made]
        return out[0] if known.shape is None else known.shape(out)

    def again(self, what, args, mode, device) -> Any:
        if what is None or isinstance(what, int):
            return what if what is None else args[what]
        size, stride, dtype = what
        tensor = FakeTensor(mode, torch.empty_strided(size, stride, dtype=dtype, device="meta"), device)
        self._note(tensor.untyped_storage())
        return tensor

    def apart(self, function, args, kwargs) -> tuple[Any, int, Counter[str]]:
        """What a function returns, and its own peak beyond what was alive, and arithmetic."""
        before, peak, flops = self.alive, self.peak, self.flops
        self.peak, self.flops = before, Counter()
        try:
            out = function(*args, **kwargs)
            return out, self.peak - before, self.flops
        finally:
            self.peak, self.flops = max(peak, self.peak), flops + self.flops

    def _slowly(self, function, args, kwargs) -> tuple[Any, Known | None]:
        out = function(*args, **kwargs)
        parts = (out,) if isinstance(out, Tensor) or out is None else out
        made: list | None = []
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and id(storage := tensor.untyped_storage()) not in self._seen:
                given = (t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor))
                if all(t.untyped_storage() is not storage for t in given):  # no view of what was there before
                    self._note(storage)
                    continue
        if isinstance(parts, (tuple, list)):
            for tensor in parts:
                place = (
                    next((i for i, a in enumerate(args) if a is tensor), None) if tensor is not None else None
                )
                if tensor is None:
                    made.append(None)
                elif place is not None:
                    made.append(place)
                elif type(tensor) is FakeTensor and tensor._base is None:
                    made.append((tensor.shape, tensor.stride(), tensor.dtype))
                else:
                    made = None
                    break
        else:
            made = None
        count, flops, dtype = _FLOPS.get(function._overloadpacket), 0, ""
        if count is not None:
            shapes = [a.shape if isinstance(a, Tensor) else a for a in args]
            raw = function._overloadpacket in flop_registry
            flops = count(*args, **kwargs, out_val=out) if raw else count(*shapes)
            dtype = str(next(a.dtype for a in args if isinstance(a, Tensor))).removeprefix("torch.")
            self.flops[self._rate(dtype)] += flops
        if made is None:
            return out, None
        shape = None if isinstance(out, Tensor) or out is None else type(out)
        return out, Known(made, shape, flops, dtype)

    @staticmethod
    def _rate(dtype: str) -> str:
        return "tf32" if dtype == "float32" and torch.get_float32_matmul_precision() != "highest" else dtype

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        self.alive += size
        if self.alive > self.peak:
            self.peak = self.alive

        def freed(_, key=key, size=size):
            self._seen.pop(key, None)
            self.alive -= size

        self._seen[key] = weakref.ref(storage, freed)


class Remembered:
    """The forward of a network, executed once for each kind of call that keeps nothing for a backward pass.

    The steps of a rollout, and what a teacher says in every turn, cost the same each time.
    """

    def __init__(self, net: nn.Module):
        self.net, self.forward, self.known = net, net.forward, {}
        self.hooks = self._hooks()

    def _hooks(self) -> int:
        return sum(len(module._forward_hooks) for module in self.net.modules())

    def __call__(self, *args, **kwargs):
        meter, fakes = _get_current_dispatch_mode(), []
        key = self._key(args, kwargs, fakes) if isinstance(meter, Meter) else None
        if key is None or not fakes or self._keeps(fakes):
            return self.forward(*args, **kwargs)
        if key not in self.known:
            out, peak, flops = meter.apart(self.forward, args, kwargs)
            if isinstance(out, tuple) and all(type(tensor) is FakeTensor for tensor in out):
                self.known[key] = [(t.shape, t.stride(), t.dtype) for t in out], peak, flops
            return out
        made, peak, flops = self.known[key]
        meter.peak = max(meter.peak, meter.alive + peak)
        meter.flops.update(flops)
        return tuple(meter.again(what, (), fakes[0].fake_mode, fakes[0].fake_device) for what in made)

    def _key(self, args, kwargs, fakes: list):
        """What decides the cost of a call; None where something looks into it or derives it."""
        if self._hooks() != self.hooks or torch._C._functorch.peek_interpreter_stack() is not None:
            return None
        state = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"), torch.is_grad_enabled()
        kernels = torch.get_float32_matmul_precision(), torch.backends.cuda.flash_sdp_enabled()
        try:
            key = state, kernels, _described(args, fakes), _described(kwargs.items(), fakes)
            hash(key)
        except TypeError:
            return None
        return key

    def _keeps(self, fakes: list[FakeTensor]) -> bool:
        wanted = (tensor.requires_grad for tensor in (*fakes, *self.net.parameters()))
        return torch.is_grad_enabled() and any(wanted)


def _described(values, fakes: list) -> tuple:
    """What of arguments decides the shapes of results, hashable; those without storage are added to ``fakes``."""
    found = []
    for value in values:
        kind = type(value)
        if kind is FakeTensor:
            fakes.append(value)
            found.append((value.shape, value.stride(), value.dtype))
        elif kind is list or kind is tuple:
            found.append(_described(value, fakes))
        elif kind is dict:
            found.append(_described(value.items(), fakes))
        elif isinstance(value, Tensor):
            if kind not in _REAL or value.dtype == torch.bool:
                raise TypeError
            found.append((value.shape, value.stride(), value.dtype, "real"))
        else:
            found.append((kind, value))
    return tuple(found)


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Each storage once."""
    found = {id(s): s.nbytes() for s in (local(t).untyped_storage() for t in tensors)}
    return sum(found.values())


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
