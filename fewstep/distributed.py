"""One process or many, by one path: torch's ``fully_shard`` on a (replicate, shard) mesh.

A single process wraps nothing. Replicas are ``shard = 1``: the same engine that shards weights at scale, with none
of the traps of wrapping several models for data parallelism. Frozen weights, which LoRA roles share, stay whole on
every rank; only trained weights are sharded and their gradients averaged. A full copy is gathered block by block.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .device import choose
from .errors import RecipeError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


@dataclass
class Process:
    """This process among its equals. ``mesh`` and ``control`` are None where there is only one.

    Attributes:
        mesh: (replicate, shard). control: a group on the CPU, for decisions that must not wait for a GPU.
    """

    rank: int = 0
    world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    mesh: DeviceMesh | None = None
    control: dist.ProcessGroup | None = None

    @property
    def main(self) -> bool:
        return self.rank == 0

    def any(self, flag: bool) -> bool:
        """True on all ranks if it is on one."""
        if self.world == 1:
            return flag
        tensor = torch.tensor(float(flag))
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.control)
        return bool(tensor.item())

    def agree(self, number: int) -> int:
        """The first rank's number, on all ranks."""
        if self.world == 1:
            return number
        tensor = torch.tensor(number)
        dist.broadcast(tensor, 0, group=self.control)
        return int(tensor.item())

    def collect(self, item: Any) -> list[Any]:
        """Every rank's item, in their order, on all ranks."""
        items = [item] * self.world
        if self.world > 1:
            dist.all_gather_object(items, item, group=self.control)
        return items

    def mean(self, values: Tensor) -> Tensor:
        if self.world > 1:
            dist.all_reduce(values)
            values = values / self.world
        return values

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()


def start(device: str = "auto", shard: int = 1) -> Process:
    """Joins the group that torchrun or ``accelerate launch`` set up; accelerate picks the backend.

    Args:
        device: see :func:`fewstep.device.choose`. shard: ranks over which one copy of the trained weights is split.

    Raises:
        RecipeError: a device that is not there, or a world that ``shard`` does not divide.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world % shard:
        raise RecipeError(
            f"train.shard: {shard} does not divide the number of processes, {world}; start a multiple of it (torchrun "
            f"--nproc_per_node {shard}), or set train.shard to a divisor"
        )
    if world > 1 and ":" in device:
        raise RecipeError(
            f"train.device: {device}: each of {world} processes takes its own; expected {device.split(':')[0]} or auto"
        )
    chosen = choose(device)
    if world == 1:
        return Process(device=chosen)
    from accelerate import PartialState
    from torch.distributed.device_mesh import init_device_mesh

    state = PartialState(cpu=chosen.type == "cpu")
    mesh = init_device_mesh(state.device.type, (world // shard, shard), mesh_dim_names=("replicate", "shard"))
    return Process(state.process_index, world, state.device, mesh, dist.new_group(backend="gloo"))


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


def blocks_of(module: nn.Module) -> list[nn.Module]:
    """The repeated blocks of a diffusers network, inner ones first, as its class names them."""
    names = getattr(module, "_no_split_modules", None) or ["BasicTransformerBlock", "ResnetBlock2D"]
    blocks = [m for m in module.modules() if type(m).__name__ in names and any(True for _ in m.parameters())]
    return blocks[::-1]


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


def gather(module: nn.Module) -> None:
    """Makes sharded weights whole ahead of a forward-mode derivative, inside of which they cannot be gathered."""
    if units := getattr(module, "sharded_units", ()):
        units[-1].set_reshard_after_forward(False)  # the module itself
        for unit in units:
            unit.unshard()


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
