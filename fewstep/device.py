"""The device of a run: all that depends on its kind, in one place.

CUDA, ROCm, XPU and MPS take one path, over ``torch.accelerator`` and ``torch.Event``, and the CPU runs the same
functions and classes, so that what a GPU executes is what every test executes.
"""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import sys
import time
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .errors import RecipeError


def check_name(name: str, option: str = "train.device") -> None:
    """Refuses what names no device on any machine.

    Raises:
        RecipeError: with the names there are.
    """
    try:
        known = name == "auto" or torch.device(name).type not in ("meta", "privateuseone")
    except RuntimeError:
        known = False
    if not known:
        raise RecipeError(
            f"{option}: {name!r}: expected auto, cpu, cuda, xpu or mps, or one of several, such as cuda:1"
        )


def choose(name: str | None = None, option: str = "train.device") -> torch.device:
    """The device of a name, which becomes the current one.

    Args:
        name: "auto" or None is the accelerator that torch sees, the CPU where there is none. A kind without a number is
            this process's own of them, as launchers number processes. option: for errors.

    Raises:
        RecipeError: no device has this name, or it is not on this machine.
    """
    name = "auto" if name is None else name
    check_name(name, option)
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    kind = accelerator.type if accelerator else "cpu"
    wanted = torch.device(kind if name == "auto" else name)
    if wanted.type == "cpu":
        return torch.device("cpu")
    count = torch.accelerator.device_count() if wanted.type == kind else 0
    if not count:
        have = f"{kind} and the CPU" if accelerator else "no accelerator, only the CPU"
        raise RecipeError(f"{option}: {name}: this torch sees {have}; expected auto, or see fewstep doctor")
    index = int(os.environ.get("LOCAL_RANK", "0")) if wanted.index is None else wanted.index
    if index >= count:
        raise RecipeError(f"{option}: {kind}:{index}: there are {count}; expected a number below {count}")
    torch.accelerator.set_device_index(index)  # events, pinned memory and messages are of the current one
    return torch.device(kind, index)


def name_of(device: torch.device) -> str:
    """What the card calls itself, where its driver tells; "CPU" for the CPU."""
    if device.type == "cpu":
        return "CPU"
    ask = getattr(torch.get_device_module(device), "get_device_name", None)
    return ask(device) if ask else device.type


@lru_cache
def real(device: torch.device) -> torch.dtype:
    """dtype of times and coefficients, a few numbers per sample: float64, or float32 where a device lacks it (MPS)."""
    try:
        torch.zeros(1, dtype=torch.float64, device=device)
    except (TypeError, RuntimeError):
        return torch.float32
    return torch.float64


def bf16_units(device: torch.device | str) -> bool | None:
    """Whether a device multiplies bf16 in units of its own, faster than fp32; None where torch does not say.

    A CPU of x86-64 does with AMX. With AVX-512's bf16 instructions alone some do and others take longer than for fp32,
    so one with these is timed; without either a product is several times as long as in fp32. ``ONEDNN_MAX_CPU_ISA``
    hides units from torch.
    """
    device = torch.device(device)
    if device.type == "cpu":
        if platform.machine().lower() in ("x86_64", "amd64"):
            limit = os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper()
            hidden = limit not in ("", "ALL", "DEFAULT") and "AMX" not in limit
            if torch.cpu._is_amx_tile_supported() and not hidden:
                return True
            return torch.cpu._is_avx512_bf16_supported() and _bf16_pays()
        # Of other processors this asks for the instructions; of x86-64 for less than them.
        return bool(torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())
    ask = getattr(torch.get_device_module(device), "is_bf16_supported", None)
    if ask is None:
        return None
    try:
        return bool(ask(including_emulation=False))  # of CUDA, where cards without it say yes by default
    except TypeError:
        return bool(ask())


@lru_cache
def _bf16_pays() -> bool:
    """Whether products in bf16, what is cast for them included, take less than half the CPU's time for fp32."""
    x, weight = torch.ones(1024, 512, device="cpu"), torch.ones(512, 512, device="cpu")

    def seconds(dtype: torch.dtype) -> float:
        begin = time.perf_counter()
        torch.nn.functional.linear(x.to(dtype), weight.to(dtype)).float()
        return time.perf_counter() - begin

    # In turns, and the fastest of each: others may be at work on the same cores.
    times = [(seconds(torch.bfloat16), seconds(torch.float32)) for _ in range(10)]
    return 2 * min(bf16 for bf16, _ in times) < min(fp32 for _, fp32 in times)


# ------------------------------------------------------------------------------------------------------------ transfers
@lru_cache
def _pins(kind: str) -> bool:
    """Whether host memory can be pinned for devices of a kind."""
    try:
        return torch.zeros(1).pin_memory().is_pinned()
    except (RuntimeError, NotImplementedError):
        return False


def upload(tensor: Tensor, device: torch.device | str) -> Tensor:
    """To the device without waiting for it: from pinned memory, so that its queue is not drained first."""
    device = torch.device(device)
    if tensor.device.type != "cpu" or device.type == "cpu" or not _pins(device.type):
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def pinned(tensor: Tensor, device: torch.device) -> Tensor:
    """In host memory from which the device reads without waiting, where there is such memory."""
    can = (
        tensor.device.type == "cpu" and device.type != "cpu" and not tensor.is_pinned() and _pins(device.type)
    )
    return tensor.pin_memory() if can else tensor


class Download:
    """Numbers on their way from the device; reading them waits only where they have not arrived."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor.detach().to("cpu", non_blocking=True)  # into pinned memory
        self.arrived = Mark(tensor.device)

    def read(self) -> list[Any]:
        self.arrived.wait()
        return self.tensor.tolist()


# ------------------------------------------------------------------------------------------------------ time and memory
class Mark:
    """A moment in a device's queue; on the CPU, which has none, a moment.

    So timing does not empty the queue.
    """

    def __init__(self, device: torch.device):
        self.event = None if device.type == "cpu" else torch.Event(device, enable_timing=True)
        if self.event is not None:
            self.event.record()
        self.at = time.perf_counter()

    def wait(self) -> None:
        """Until the device has got there."""
        if self.event is not None:
            self.event.synchronize()

    def seconds_until(self, later: Mark) -> float:
        """Both have been reached."""
        if self.event is None or later.event is None:
            return later.at - self.at
        return self.event.elapsed_time(later.event) / 1000


def wait(device: torch.device) -> None:
    """Until the device has done all that it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


KEPT = 2**31 - 1  # bytes
LARGEST = 32 << 20  # bytes of a block that glibc can be told to keep


def keep_freed(device: torch.device) -> None:
    """Lets a training process on the CPU use again what it has freed, up to 2 GB, in place of giving it back.

    glibc returns the end of its heap after each backward pass, and every page of it has to be zeroed again in the next
    forward. Other libraries, and accelerators, have allocators of their own.
    """
    if device.type != "cpu" or sys.platform != "linux":
        return
    library = ctypes.CDLL(None)
    if hasattr(library, "gnu_get_libc_version"):
        library.mallopt(-3, LARGEST)  # M_MMAP_THRESHOLD
        library.mallopt(-1, KEPT)  # M_TRIM_THRESHOLD


def reset_peak(device: torch.device) -> None:
    """From here :func:`peak` counts."""
    if peak(device) is not None:
        torch.accelerator.reset_peak_memory_stats(device)


def peak(device: torch.device) -> int | None:
    """Most bytes that the device's allocator has had given out at once; None where none keeps count (CPU, MPS)."""
    if device.type == "cpu":
        return None
    try:
        return torch.accelerator.max_memory_allocated(device)
    except (RuntimeError, NotImplementedError):
        return None


def resident_peak() -> int:
    """High-water mark of this process's resident memory, in bytes."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def total(device: torch.device) -> int | None:
    """Bytes of the card; None where the driver does not say."""
    ask = getattr(torch.get_device_module(device), "get_device_properties", None)
    return getattr(ask(device), "total_memory", None) if ask else None


def all_of_them() -> dict[str, str]:
    """Every device of this machine, and what it is."""
    found = {}
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    kind = accelerator.type if accelerator else "cpu"
    for i in range(torch.accelerator.device_count() if accelerator else 0):
        device = torch.device(kind, i)
        memory = total(device)
        found[str(device)] = name_of(device) + (f", {memory / 1e9:.0f} GB" if memory else "")
    built = torch.version.cuda or torch.version.hip
    why = "no driver or device for it was found" if built else "this torch is built without"
    none = "" if found else f"; no accelerator ({why})"
    return {**found, "cpu": f"{torch.get_num_threads()} threads{none}"}
