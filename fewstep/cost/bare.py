"""The network calls of a few iterations, recorded, and run again by a loop that does nothing else.

What a trainer costs beyond its networks is seen beside such a loop: the same forwards on the same inputs under the
same arithmetic, backward passes through the same outputs, clipping, optimiser and moving average. It has no data, no
random numbers, no losses, no log, no check of gradients. Derivatives that a loss takes by itself are not among it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import _cur_sdpa_kernel_backends, sdpa_kernel
from torch.utils._pytree import tree_leaves, tree_map

from ..diffusion.discriminator import _LastTap, _taps
from ..errors import FewstepError
from ..methods.base import Phase
from ..training.optimizers import take_step
from ..training.roles import Role
from ..training.trainer import Trainer

SMALL = 1e-6  # a gradient that leaves no mark in the moments, and is no zero, which a GPU multiplies faster


@dataclass
class Call:
    """One forward of a network, as it was made.

    Attributes:
        forward: of the module, unrecorded. grad: whether gradients were wanted. used: outputs, by position, that a
            gradient came back to. taps: blocks whose features are its outputs. stops: whether those ended it early.
    """

    module: nn.Module
    forward: Callable
    args: tuple
    kwargs: dict[str, Any]
    grad: bool
    autocast: torch.dtype | None
    attention: list
    taps: list[str] = field(default_factory=list)
    stops: bool = True
    used: set[int] = field(default_factory=set)

    def outputs(self, device: str) -> list[Tensor]:
        cast = torch.autocast(device, self.autocast, cache_enabled=False) if self.autocast else None
        precision = cast or nullcontext()
        with ExitStack() as stack:
            for context in (precision, torch.set_grad_enabled(self.grad), sdpa_kernel(self.attention)):
                stack.enter_context(context)
            if not self.taps:
                return _tensors(self.forward(*self.args, **self.kwargs))
            features = stack.enter_context(_taps(self.module, self.taps, self.stops))
            with suppress(_LastTap):
                self.forward(*self.args, **self.kwargs)
            return list(features.values())


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _tapping(module: nn.Module) -> list[str]:
    """Blocks whose features are being kept."""
    return [
        name
        for name, inner in module.named_modules()
        if any(getattr(hook, "taps", False) for hook in inner._forward_hooks.values())
    ]


def _leaf(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    if forward_ad._current_level >= 0:
        raise FewstepError(
            "bench: --baseline bare: a method with forward-mode derivatives has no such baseline"
        )
    return value.detach().requires_grad_(value.requires_grad)


class Bare:
    """Records iterations of a trainer; :meth:`run` makes the same network calls again."""

    def __init__(self, trainer: Trainer, modules: dict[str, nn.Module]):
        self.trainer, self.modules = trainer, modules
        self.device = trainer.process.device.type
        self.events: list[tuple[str, Any]] = []
        self.pending: list[Call] = []

    def record(self, train: Callable[[], None]) -> None:
        """Runs ``train``, iterations of the trainer, and keeps what its networks were given."""
        trainer: Any = self.trainer  # whose methods are replaced meanwhile
        before = {name: module.forward for name, module in self.modules.items()}
        for module in self.modules.values():
            module.forward = self._recording(module, module.forward)
        turn, backward, update = trainer.turn, trainer.backward, trainer.update
        trainer.turn = lambda phase, batches: (self.events.append(("turn", phase)), turn(phase, batches))[1]
        trainer.backward = lambda loss: (backward(loss), self._close())[0]
        trainer.update = lambda phase, roles: (self.events.append(("update", roles)), update(phase, roles))[1]
        try:
            train()
        finally:
            for name, forward in before.items():
                self.modules[name].forward = forward
            trainer.turn, trainer.backward, trainer.update = turn, backward, update

    def _close(self) -> None:
        """A backward pass has been: the calls whose outputs it reached are known."""
        self.events.append(("backward", [call for call in self.pending if call.used]))
        self.pending = []

    def _recording(self, module: nn.Module, forward: Callable) -> Callable:
        def recorded(*args, **kwargs):
            dtype = torch.get_autocast_dtype(self.device) if torch.is_autocast_enabled(self.device) else None
            call = Call(
                module,
                forward,
                tree_map(_leaf, args),
                tree_map(_leaf, kwargs),
                torch.is_grad_enabled(),
                dtype,
                _cur_sdpa_kernel_backends(),
            )
            self.events.append(("call", call))
            self.pending.append(call)
            try:
                out = forward(*args, **kwargs)
            except _LastTap:
                self._tapped(call)
                raise
            # Off after its last tap; of a network that is called row by row, after the last row's.
            if call.grad and (not torch.is_grad_enabled() or _tapping(module)):
                call.stops = False
                self._tapped(call)
            self._watch(call, _tensors(out))
            return out

        return recorded

    @staticmethod
    def _tapped(call: Call) -> None:
        call.taps = _tapping(call.module)
        call.used = set(range(len(call.taps)))

    @staticmethod
    def _watch(call: Call, outputs: list[Tensor]) -> None:
        for place, output in enumerate(outputs):
            if output.requires_grad:
                output.register_hook(lambda _gradient, place=place: call.used.add(place))

    # ------------------------------------------------------------------------------------------------------ again
    def run(self) -> None:
        """The recorded calls, once. A rate of 0 does the arithmetic of an update and leaves the weights as they are."""
        outputs: dict[int, list[Tensor]] = {}
        for kind, what in self.events:
            if kind == "call":
                outputs[id(what)] = what.outputs(self.device)
            elif kind == "backward":
                self._backward(what, outputs)
                outputs = {}
            elif kind == "turn":
                self._turn(what)
            else:
                self._update(what)

    def _turn(self, phase: Phase) -> None:
        roles = self.trainer.roles
        for name in phase.train if phase.follows else ():
            roles[name].follow(roles[phase.follows[0]], phase.follows[1])
        for name, role in roles.items():
            for weight in role.weights.values():
                weight.requires_grad_(name in phase.train)

    def _backward(self, calls: list[Call], outputs: dict[int, list[Tensor]]) -> None:
        ends = [outputs[id(call)][place] for call in calls for place in sorted(call.used)]
        ends = [end for end in ends if end.requires_grad]
        torch.autograd.backward(ends, [torch.full_like(end, SMALL) for end in ends])

    def _update(self, roles: list[Role]) -> None:
        weights = [w for role in roles for w in role.weights.values()]
        norm = torch.nn.utils.clip_grad_norm_(weights, self.trainer.config.clip_norm, foreach=True)
        for role in roles:
            optimizer = self.trainer.optimizers[role.name]
            take_step(optimizer, 0.0, torch.zeros((), device=norm.device))
            optimizer.zero_grad(set_to_none=True)
            role.settle_weights()
            role.update_average(self.trainer.updates[role.name])
