"""Networks, data and processes that have shapes and no content."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, library, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode

from ..diffusion.rng import Rng
from ..process import Process


class Shapeless(TorchFunctionMode):
    """Weights of networks get no storage.

    ``torch.empty``, by which layers make their weights, gives a tensor of shape and dtype only; whatever is computed
    from one is one. Everything else, such as times and schedules, stays real.
    """

    def __init__(self):
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        # Weak references of its memo keep ``Module.to`` from working.
        converter: Any = self.fake.fake_tensor_converter
        converter.set_tensor_memo = lambda *_: None

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.empty:
            with self.fake:
                return function(*args, **kwargs)
        if function is Tensor.__bool__ and isinstance(args[0], FakeTensor):
            return True  # that a gradient is finite
        return function(*args, **kwargs)


class VGG(nn.Module):
    """The network of LPIPS (VGG-16's convolutions, arXiv 1801.03924) without its weights."""

    def __init__(self):
        super().__init__()
        self.stages, inner = nn.ModuleList(), 3
        for depth, width in ((2, 64), (2, 128), (3, 256), (3, 512), (3, 512)):
            layers: list[nn.Module] = [nn.MaxPool2d(2)] if self.stages else []
            for _ in range(depth):
                layers += [nn.Conv2d(inner, width, 3, padding=1), nn.ReLU(inplace=True)]
                inner = width
            self.stages.append(nn.Sequential(*layers))
        self.requires_grad_(False)

    def forward(self, images: Tensor, wanted: Tensor) -> Tensor:
        total = images.new_zeros(())
        for stage in self.stages:
            images, wanted = stage(images), stage(wanted)
            total = total + (F.normalize(images, dim=1) - F.normalize(wanted, dim=1)).square().mean()
        return total


@contextmanager
def quietly() -> Iterator[None]:
    """Without torch's warning that copies of tensors look at where their storage would be."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
        yield


@contextmanager
def products(tf32: bool) -> Iterator[None]:
    """As on a GPU of a run, whose fp32 products may be TF32 wherever nothing forbids it."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def norms_as_on_a_gpu() -> Iterator[None]:
    """Under autocast a GPU normalises in fp32 where a CPU does not, which doubles what those layers keep."""

    def in_fp32(function):
        def norm(*args, **kwargs):
            with torch.autocast("cpu", enabled=False):
                cast = [a.float() if isinstance(a, Tensor) else a for a in args]
                kwargs = {k: v.float() if isinstance(v, Tensor) else v for k, v in kwargs.items()}
                return function(*cast, **kwargs)

        return norm

    with library._scoped_library("aten", "IMPL") as scope:
        for function in (torch.ops.aten.group_norm, torch.ops.aten.layer_norm):
            scope.impl(function.default, in_fp32(function), "AutocastCPU")
        yield


class Shapes(Rng):
    """Draws have shapes only; choices take their first or their last value."""

    def __init__(self, last: bool):
        self.last, self.device = last, torch.device("cpu")
        self.chose = False  # whether a choice between several was asked for

    def normal(self, *shape: int) -> Tensor:
        return torch.empty(shape)

    def uniform(self, *shape: int) -> Tensor:
        return torch.full(shape, 0.5, dtype=torch.float64)

    def integer(self, below: int) -> int:
        self.chose |= below > 1
        return below - 1 if self.last else 0

    def pair(self, iteration: int, micro: int) -> tuple[Rng, Rng]:
        return self, self


@contextmanager
def group(processes: int, shard: int) -> Iterator[Process]:
    """This process as one of several whose messages go nowhere."""
    if processes == 1:
        yield Process()
        return
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import debug
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=processes)
    mesh = init_device_mesh("cpu", (processes // shard, shard), mesh_dim_names=("replicate", "shard"))
    try:
        yield Process(0, processes, torch.device("cpu"), mesh)
    finally:
        dist.destroy_process_group()
        # What torch keeps of operators holds this mesh, in which we are rank 0, and hands it to any that equals it.
        getattr(debug, "_clear_sharding_prop_cache", lambda: None)()  # no public name, and not in every torch
