"""This process among its peers."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from .device import choose
from .errors import RecipeError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

PATIENCE = timedelta(days=7)


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
        """Waits for the others, however long one of them encodes; of a device's own group it would be ten minutes."""
        if self.world > 1:
            dist.barrier(group=self.control)


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
    control = dist.new_group(backend="gloo", timeout=PATIENCE)  # one that has died is known at once
    return Process(state.process_index, world, state.device, mesh, control)
