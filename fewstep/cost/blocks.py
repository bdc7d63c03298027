"""Networks and the blocks that they repeat: executed once for each kind of call, counted at every call."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad
from torch.nn.attention import _cur_sdpa_kernel_backends, sdpa_kernel
from torch.utils._python_dispatch import _get_current_dispatch_mode

from ..diffusion.frozen import blocks_of
from .meter import Made, Meter, described, made_of


class Call(NamedTuple):
    """What a call made and took."""

    made: list[Made]
    alone: bool  # one tensor, in no tuple
    peak: int  # bytes beyond those alive before
    flops: Counter[str]


def remember(net: nn.Module, known: dict) -> None:
    """What a network or a block of it has done is not executed again where it keeps nothing for a backward pass.

    Be it that none follows, as in a rollout, or that activations are computed again.

    Args:
        known: what networks of one plan have done.
    """
    for module in (*blocks_of(net), net):
        module.forward = Repeated(module, known)
    part: Any
    for part in net.modules():
        if getattr(part, "gradient_checkpointing", False):
            part._gradient_checkpointing_func = partial(_checkpoint, part._gradient_checkpointing_func)


class Repeated:
    """In place of a module's forward; modules of one structure share what is known."""

    def __init__(self, module: nn.Module, known: dict):
        self.module, self.forward, self.known = module, module.forward, known
        self.weights = list(module.parameters())
        self.structure = known.setdefault(_structure(module), len(known))
        self.hooks = self._hooks()

    def __call__(self, *args, **kwargs):
        fakes: list[FakeTensor] = []
        key = self.key((args, kwargs), fakes)
        wanted = (tensor.requires_grad for tensor in (*fakes, *self.weights))
        if key is None or (torch.is_grad_enabled() and any(wanted)):
            return self.forward(*args, **kwargs)
        return once(self.known, key, lambda: self.forward(*args, **kwargs), fakes[0])

    def key(self, given: tuple, fakes: list[FakeTensor]) -> tuple | None:
        """What decides the cost of a call; None where something looks into the module or derives it forward."""
        if not isinstance(_get_current_dispatch_mode(), Meter) or self._hooks() != self.hooks:
            return None
        if forward_ad._current_level >= 0:
            return None
        shapes = described(given, fakes)
        if shapes is None or not fakes:
            return None
        wanted = tuple([tensor.requires_grad for tensor in (*fakes, *self.weights)])
        cast = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")
        kernels = torch.get_float32_matmul_precision(), *_cur_sdpa_kernel_backends()
        return self.structure, self.module.training, shapes, wanted, cast, kernels

    def _hooks(self) -> int:
        return sum(len(module._forward_hooks) for module in self.module.modules())


def _meter() -> Meter:
    mode = _get_current_dispatch_mode()
    assert isinstance(mode, Meter)
    return mode


def once(known: dict[Any, Call], key: tuple, function: Callable[[], Any], like: FakeTensor) -> Any:
    """What a function returns, executed unless the key is known."""
    meter = _meter()
    if key in known:
        call = known[key]
        meter.add(meter.alive + call.peak, call.flops)
        out = tuple([meter.make(what, like) for what in call.made if not isinstance(what, int)])
        return out[0] if call.alone else out
    alive = meter.alive
    out, peak, flops = meter.apart(function)
    meter.add(alive + peak, flops)
    alone = isinstance(out, Tensor)
    made = made_of([out] if alone else out)
    if made is not None:
        known[key] = Call(made, alone, peak, flops)
    return out


def _checkpoint(checkpoint: Callable, block: nn.Module, *args):
    """In place of a network's own checkpoint of a block."""
    fakes: list[FakeTensor] = []
    repeated: Any = block.forward if isinstance(block, nn.Module) else None
    key = repeated.key((args, {}), fakes) if isinstance(repeated, Repeated) else None
    if key is None:
        return checkpoint(block, *args)
    weights = [weight for weight in repeated.weights if weight.requires_grad]
    return _Recomputed.apply(checkpoint, repeated, key, len(args), *args, *weights)


class _Recomputed(torch.autograd.Function):
    """A checkpointed block. Its backward pass, which computes it again, is executed once for each kind, too."""

    @staticmethod
    def forward(ctx, checkpoint, repeated, key, count, *given):
        cast = partial(torch.autocast, "cpu", key[4][1], enabled=key[4][0], cache_enabled=False)
        ctx.around = cast, partial(sdpa_kernel, _cur_sdpa_kernel_backends())
        ctx.set_materialize_grads(
            False
        )  # of an output that nothing is made of, such as the last text of Qwen-Image
        ctx.checkpoint, ctx.repeated, ctx.key, ctx.count, ctx.given = checkpoint, repeated, key, count, given
        return repeated.module(*given[:count])

    @staticmethod
    def backward(ctx, *gradients):
        given, ctx.given = ctx.given, None  # as a graph that has been walked frees what it saved
        wanted = ctx.needs_input_grad[4:]
        key = ctx.key, wanted, tuple([g is None for g in gradients])

        def execute():
            """Autograd's own way through torch's own checkpoint, of which only the way back is counted."""
            inputs = [
                value.detach().requires_grad_(need) if isinstance(value, Tensor) else value
                for value, need in zip(given[: ctx.count], wanted)
            ]
            cast, kernel = ctx.around
            with torch.enable_grad(), cast(), kernel():
                out, _, _ = meter.apart(lambda: ctx.checkpoint(ctx.repeated.module, *inputs))
            out = [out] if isinstance(out, Tensor) else out
            ends, slopes = zip(*[(o, g) for o, g in zip(out, gradients) if g is not None])
            leaves = [v for v, need in zip((*inputs, *given[ctx.count :]), wanted) if need]
            return torch.autograd.grad(ends, leaves, slopes, allow_unused=True)

        meter = _meter()
        like = next(g for g in gradients if g is not None)
        made = iter(once(ctx.repeated.known, key, execute, like))
        return None, None, None, None, *[next(made) if need else None for need in wanted]


def _structure(module: nn.Module) -> tuple:
    """Modules that are alike in it cost the same."""
    plain = (bool, int, float, str, type(None))

    def options(part: nn.Module) -> tuple:
        return tuple([(k, v) for k, v in vars(part).items() if isinstance(v, plain) and k != "training"])

    def weights(part: nn.Module) -> tuple:
        return tuple([(n, p.shape, p.stride(), p.dtype) for n, p in part.named_parameters(recurse=False)])

    return tuple([(name, type(part), options(part), weights(part)) for name, part in module.named_modules()])
