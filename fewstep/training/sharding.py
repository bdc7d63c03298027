"""One process or many, by one path: torch's ``fully_shard`` on a (replicate, shard) mesh.

A single process wraps nothing. Replicas are ``shard = 1``: the same engine that shards weights at scale, with none
of the traps of wrapping several models for data parallelism. Frozen weights, which LoRA roles share, stay whole on
every rank; only trained weights are sharded and their gradients averaged. A full copy is gathered block by block.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..diffusion.frozen import blocks_of
from ..process import Process


def distribute(module: nn.Module, process: Process) -> None:
    """Shards the trained weights of a module over the mesh, in place; nothing for a single process."""
    if process.mesh is None:
        return
    from torch.distributed.fsdp import fully_shard

    frozen = {p for p in module.parameters() if not p.requires_grad}
    units = (
        [] if frozen else [*_called_apart(module), *blocks_of(module)]
    )  # adapters are few, and gathered at once
    for block in units:
        fully_shard(block, mesh=process.mesh)
    # Gathered until the backward: a loss on tapped features never touches the output whose hook would gather again.
    sharded: Any = fully_shard(module, mesh=process.mesh, ignored_params=frozen, reshard_after_forward=False)
    sharded.sharded_units = [*units, module]


def _called_apart(module: nn.Module) -> list[nn.Module]:
    """Parts of blocks that a network also calls by themselves, when their block has not gathered them: DiT's."""
    return [m for m in module.modules() if type(m).__name__ == "CombinedTimestepLabelEmbeddings"]


def sync_gradients(module: nn.Module, on: bool) -> None:
    """Between micro-batches gradients need not travel."""
    if sync := getattr(module, "set_requires_gradient_sync", None):
        sync(on)


def settle(module: nn.Module) -> None:
    """Frees gathered weights, so that a write to the shards or a frozen toggle is seen by the next forward."""
    for unit in getattr(module, "sharded_units", ()):
        unit.reshard()


def shards(tensors: Iterable[Tensor]) -> list[Tensor]:
    """What this rank holds of each, to be read or written entry by entry: without a copy and without a collective.

    Lists of sharded tensors as they are would do; how they lie is then worked out for all entries of each list, for
    minutes where a network has thousands of weights.
    """
    with torch.no_grad():
        return [tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in tensors]


@torch.no_grad()
def clip_gradients(weights: Iterable[Tensor], most: float) -> Tensor:
    """Scales gradients in place to a joint norm of at most ``most``, over all ranks.

    Returns:
        The norm before, the same on every rank; not finite where one of the gradients is not.
    """
    weights = list(weights)
    gradients: list[Any] = [weight.grad for weight in weights if weight.grad is not None]
    sharded = next((gradient for gradient in gradients if hasattr(gradient, "device_mesh")), None)
    if sharded is None:
        return torch.nn.utils.clip_grad_norm_(weights, most, foreach=True)
    from torch.distributed.tensor import DTensor, Partial, Replicate

    own = shards(gradients)
    squares = torch.nn.utils.get_total_norm(own, foreach=True).square()
    parts = (Replicate(), Partial())  # replicas have the same gradient
    norm = DTensor.from_local(squares, sharded.device_mesh, parts, run_check=False).full_tensor().sqrt()
    torch._foreach_mul_(own, (most / (norm + 1e-6)).clamp(max=1.0))
    return norm


def whole(tensor: Tensor) -> Tensor:
    """The full tensor of a shard (a collective: call it on every rank), on the CPU."""
    tensor = tensor.detach()
    if hasattr(tensor, "full_tensor"):
        tensor = tensor.full_tensor()
    return tensor.cpu()


def gathered(tensors: Mapping[str, Tensor], process: Process) -> dict[str, Tensor]:
    """All of them whole, one at a time, on the first rank; nothing on the others, which take part."""
    held: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        full = whole(tensor)
        if process.main:
            held[name] = full
    return held


@torch.no_grad()
def assign(target: Tensor, value: Tensor) -> None:
    """Copies a full tensor into a parameter or its shard."""
    value = value.to(target.device, target.dtype)
    if hasattr(target, "device_mesh"):
        from torch.distributed.tensor import distribute_tensor

        sharded: Any = target
        value = distribute_tensor(value, sharded.device_mesh, sharded.placements)
    target.copy_(value)
