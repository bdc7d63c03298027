"""Frozen weights of a network's blocks in fewer bits, or in the host's memory: fetched for each product with them.

A layer whose weight is not trained needs that weight twice, in its forward and for the gradient of its input, and
nothing in between. So it is fetched twice, and no copy of it lives from one to the other. With hooks that move weights
back after the forward (diffusers' group offloading) autograd keeps what a linear layer had on the device, and finds a
convolution's weight on another one.

The numbers of 8 bits are those of ``TorchAoConfig(Int8WeightOnlyConfig())`` and ``Float8WeightOnlyConfig``, those of 4
bits of ``BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")`` (QLoRA, arXiv 2305.14314), without their
layers: these keep dequantised weights for the backward pass, or want a GPU.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from ..device import pinned
from ..errors import RecipeError

BLOCK = 64  # weights of nf4 that share a scale
Fetch = Callable[[], Tensor]


def blocks_of(module: nn.Module) -> list[nn.Module]:
    """The repeated blocks of a diffusers network, inner ones first, as its class names them."""
    names = getattr(module, "_no_split_modules", None) or ["BasicTransformerBlock", "ResnetBlock2D"]
    blocks = [m for m in module.modules() if type(m).__name__ in names and any(True for _ in m.parameters())]
    return blocks[::-1]


def check_quantization(kind: str | None) -> None:
    """Refuses a kind whose package is missing, before anything is loaded.

    Raises:
        RecipeError: with what to install.
    """
    if kind == "nf4" and importlib.util.find_spec("bitsandbytes") is None:
        raise RecipeError(
            "teacher.quantization: nf4: bitsandbytes is not installed; pip install 'fewstep[4bit]', or take int8"
        )


# -------------------------------------------------------------------------------------------------------- in fewer bits
def _int8(weight: Tensor) -> list[Tensor]:
    """Whole numbers, and a scale for each output: 255 steps span twice the largest weight."""
    scale = (weight.float().flatten(1).abs().amax(1, keepdim=True) / 127.5).clamp(
        min=torch.finfo(torch.float32).eps
    )
    scale = scale.to(weight.dtype)
    return [(weight.float() * (1 / scale.float())).round().clamp(-128, 127).to(torch.int8), scale]


def _fp8(weight: Tensor) -> list[Tensor]:
    """float8 with 4 bits of exponent, and a scale for each output, whose largest weight becomes 448."""
    scale = (weight.abs().amax(1, keepdim=True) / 448).clamp(min=torch.finfo(torch.float32).tiny)
    return [(weight.float() / scale.float()).clamp(-448, 448).to(torch.float8_e4m3fn), scale]


def _scaled(parts: list[Tensor], shape: torch.Size, dtype: torch.dtype) -> Tensor:
    return parts[0].to(dtype).mul_(parts[1])


def _nf4(weight: Tensor) -> list[Tensor]:
    """Two weights a byte, each one of 16 quantiles of a normal law, and the largest of each block of 64."""
    if isinstance(weight, FakeTensor):
        count = weight.numel()
        scales = weight.new_empty(-(-count // BLOCK), dtype=torch.float32)
        return [weight.new_empty(-(-count // 2), 1, dtype=torch.uint8), scales]
    from bitsandbytes.functional import quantize_4bit

    packed, state = quantize_4bit(weight.contiguous(), blocksize=BLOCK, quant_type="nf4")
    return [packed, state.absmax]


def _nf4_back(parts: list[Tensor], shape: torch.Size, dtype: torch.dtype) -> Tensor:
    if isinstance(parts[0], FakeTensor):
        return parts[0].new_empty(shape, dtype=dtype)
    import bitsandbytes  # noqa: F401  # registers the operator

    # As one row: its kernel for CPUs takes other scales where blocks go over the end of a row.
    made: Tensor = torch.ops.bitsandbytes.dequantize_4bit(*parts, BLOCK, "nf4", [1, shape.numel()], dtype)
    return made.view(shape)


KINDS: dict[
    str, tuple[Callable[[Tensor], list[Tensor]], Callable[[list[Tensor], torch.Size, torch.dtype], Tensor]]
]
KINDS = {"int8": (_int8, _scaled), "fp8": (_fp8, _scaled), "nf4": (_nf4, _nf4_back)}


class Store:
    """A frozen weight as it is kept. Copies of its layer share it.

    Args:
        weight: as it would be otherwise. kind: of :data:`KINDS`, or None for the weight as it is. host: whether it
            stays in the host's memory, pinned where that can be.
    """

    def __init__(self, weight: Tensor, kind: str | None, host: bool):
        self.shape, self.dtype, self.kind, self.host = weight.shape, weight.dtype, kind, host
        self.parts = KINDS[kind][0](weight.detach()) if kind else [weight.detach()]

    def __deepcopy__(self, memo: dict[int, Any]) -> Store:
        return self

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    def to(self, device: torch.device) -> None:
        """To the device, or, of a weight that stays in the host's memory, ready to go there."""
        if self.host:
            self.parts = [pinned(part, device) for part in self.parts]
        elif self.parts[0].device != device:
            self.parts = [part.to(device) for part in self.parts]

    def fetch(self, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
        """The weight in the precision that it had, on a device, as a tensor of its own; then in another precision."""
        parts = self.parts
        if self.host:
            parts = [torch.empty_like(part, device=device).copy_(part, non_blocking=True) for part in parts]
        whole = KINDS[self.kind][1](parts, self.shape, self.dtype) if self.kind else parts[0]
        return whole.to(dtype or self.dtype)


# --------------------------------------------------------------------------------------------------------------- layers
class _Product(torch.autograd.Function):
    """A layer's product with its weight, which is fetched for it, and again for the gradient of the input."""

    @staticmethod
    def forward(x: Tensor, layer: Any, dtype: torch.dtype) -> Tensor:
        bias = None if layer.bias is None else layer.bias.to(dtype)
        return layer.product(x, layer.store.fetch(x.device, dtype), bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, ctx.layer, ctx.dtype = inputs
        ctx.device, ctx.like = x.device, (x.shape, _layout(x))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        weight = ctx.layer.store.fetch(ctx.device, ctx.dtype)
        return ctx.layer.back(gradients[0], weight, *ctx.like), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: Any) -> Tensor:
        return ctx.layer.product(tangent, ctx.layer.store.fetch(ctx.device, ctx.dtype), None)


def _layout(x: Tensor) -> torch.memory_format:
    last = x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


class _Frozen:
    """What layers have in common whose weight is in a store; their bias is where it was.

    Attributes:
        place: the device that the network was moved to.
    """

    plain: ClassVar[type[nn.Module]]

    @property
    def weight(self) -> Tensor:
        """Fetched, for whoever reads it or asks for its dtype."""
        layer: Any = self
        fetched: Tensor = layer.store.fetch(layer.place)
        return fetched

    def forward(self, x: Tensor) -> Tensor:
        kind, dtype = x.device.type, x.dtype
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
        made: Tensor = _Product.apply(x.to(dtype), self, dtype)
        return made

    def _apply(self, function: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        layer: Any = super()._apply(function, recurse)  # type: ignore[misc]  # of the layer
        place = function(torch.empty(0, device=layer.place)).device
        if place != layer.place or layer.store.host:
            layer.store.to(place)
        layer.place = place
        return layer

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        layer: Any = self
        super()._save_to_state_dict(destination, prefix, keep_vars)  # type: ignore[misc]  # of the layer
        destination[prefix + "weight"] = layer.store.fetch(
            torch.device("cpu") if layer.store.host else layer.place
        )


class FrozenLinear(_Frozen, nn.Linear):  # type: ignore[override]  # whose weight is read only
    plain = nn.Linear

    @staticmethod
    def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)

    @staticmethod
    def back(gradient: Tensor, weight: Tensor, shape: torch.Size, _layout: torch.memory_format) -> Tensor:
        return gradient.reshape(-1, len(weight)).mm(weight).view(shape)


class FrozenConv2d(_Frozen, nn.Conv2d):  # type: ignore[override]  # as above
    plain = nn.Conv2d

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """An ordinary one for peft, which makes an adapter's layers of the class that they adapt."""
        return nn.Conv2d(*args, **kwargs) if args or kwargs else super().__new__(cls)

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self._conv_forward(x, weight, bias)

    def back(
        self, gradient: Tensor, weight: Tensor, shape: torch.Size, layout: torch.memory_format
    ) -> Tensor:
        """By autograd's own kernel, which is chosen by how the input lies in memory and reads none of it."""
        like = gradient.new_empty(1).expand(shape)
        if layout == torch.channels_last:
            like = torch.empty(shape, dtype=gradient.dtype, device=gradient.device, memory_format=layout)
        how = (self.stride, self.padding, self.dilation, False, [0, 0], self.groups, (True, False, False))
        return torch.ops.aten.convolution_backward(gradient, like, weight, None, *how)[0]


def _freeze(layer: Any, cls: type[nn.Module], kind: str | None, host: bool) -> None:
    weight = layer.weight
    layer.store, layer.place = Store(weight, kind, host), weight.device
    del layer._parameters["weight"]
    layer.__class__ = cls


def _layers(net: nn.Module) -> Iterator[Any]:
    found = {id(layer): layer for block in blocks_of(net) for layer in block.modules()}
    yield from found.values()


def keep(net: nn.Module, quantization: str | None, offload: bool) -> nn.Module:
    """Gives the layers of a frozen network's blocks another way of keeping their weights, in place.

    Args:
        quantization: of linear layers: "int8", "fp8", "nf4" or None; those outside of blocks, and convolutions, stay as
            they are. offload: the weights of linear layers and convolutions stay in the host's memory, whatever device
            the network is moved to.

    Raises:
        RecipeError: the network has no such layer.
    """
    if not quantization and not offload:
        return net
    count = 0
    for layer in _layers(net):
        convolution = (
            type(layer) is nn.Conv2d and layer.padding_mode == "zeros" and isinstance(layer.padding, tuple)
        )
        if type(layer) is nn.Linear:
            _freeze(layer, FrozenLinear, quantization, offload)
        elif offload and convolution:
            _freeze(layer, FrozenConv2d, None, True)
        count += isinstance(layer, _Frozen)
    if not count:
        option = f"quantization: {quantization}" if quantization else "offload: true"
        raise RecipeError(
            f"teacher.{option}: {type(net).__name__} has no linear layers in blocks; leave it out"
        )
    return net


def plain(net: nn.Module) -> nn.Module:
    """The same network of ordinary layers, in place, for a copy whose weights will be trained or written."""
    for layer in stored(net):
        weight = layer.weight
        del layer.store, layer.place
        layer.__class__ = layer.plain
        layer.weight = nn.Parameter(weight, requires_grad=False)
    return net


def stored(net: nn.Module) -> list[Any]:
    """Layers whose weights are in stores."""
    return [layer for layer in net.modules() if isinstance(layer, _Frozen)]


def whole_weights(net: nn.Module) -> dict[str, Tensor]:
    """All weights by name, as :meth:`~torch.nn.Module.named_parameters` has them."""
    fetched = {f"{n}.weight": m.weight for n, m in net.named_modules() if isinstance(m, _Frozen)}
    return {**dict(net.named_parameters()), **fetched}


def numel(net: nn.Module) -> int:
    """Weights, wherever they are."""
    return sum(p.numel() for p in net.parameters()) + sum(layer.store.shape.numel() for layer in stored(net))


def held_bytes(net: nn.Module) -> int:
    """What stores of a network hold on its device, each once."""
    stores = {id(layer.store): layer.store for layer in stored(net)}
    return sum(store.nbytes for store in stores.values() if not store.host)
