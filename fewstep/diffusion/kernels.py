"""How networks are run: autocast, attention kernel, memory format, compiled blocks, fp32 products. All of it."""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, _cur_sdpa_kernel_backends, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from ..device import bf16_units as bf16_units
from ..errors import RecipeError

# Kernels of torch's scaled_dot_product_attention; any other name is one of diffusers' dispatcher, or "xformers".
ATTENTION = {
    "auto": None,  # decided where a teacher is loaded
    "sdpa": None,  # torch chooses
    "math": SDPBackend.MATH,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}


FEW = 192  # tokens up to which "math" is the faster kernel for bf16 on a CPU: 0.8 times at 144, 1.3 at 256


def choose_autocast(kind: str, units: bool | None) -> tuple[str | None, str]:
    """What ``autocast: auto`` means on a kind of device (cpu, cuda, ...), and why.

    Args:
        units: see :func:`fewstep.device.bf16_units`.

    Returns:
        ("bfloat16", "float16" or None, half a sentence).
    """
    if units:
        return "bfloat16", "it has units for bf16"
    if units is None:
        return None, "torch does not say whether it has units for bf16; teacher.autocast=bfloat16 if it has"
    if kind == "cpu":
        return None, "it has no matrix units for bf16, without which fp32 is faster"
    return "float16", "it has no bf16; losses are scaled for fp16"


def choose_attention(kind: str, autocast: str | None, positions: int) -> tuple[str, str]:
    """What ``attention: auto`` means: torch's own choice, but for one case; and why.

    Args:
        autocast: as decided, "bfloat16" or None. positions: of a sample, the most tokens that attention may see.
    """
    if kind == "cpu" and autocast and positions <= FEW:
        return "math", f"torch's fused kernel is slow in bf16 on a CPU up to {FEW} tokens"
    return "sdpa", "torch chooses"


def autocast_for(option: str | None, device: torch.device | str) -> str | None:
    """A recipe's ``teacher.autocast`` with "auto" decided for a device."""
    if option != "auto":
        return option
    return choose_autocast(torch.device(device).type, bf16_units(device))[0]


def doubt(autocast: str | None, device: torch.device | str) -> str | None:
    """What to say of a dtype that a recipe or an earlier part of its run fixed, where ``auto`` would not choose it."""
    kind = torch.device(device).type
    units = bf16_units(device)
    if autocast != "bfloat16" or units is not False:
        return None
    why = choose_autocast(kind, units)[1]
    return f"teacher.autocast: {autocast} on {kind}: {why}; --teacher.autocast=auto decides anew"


def attention_for(option: str, device: torch.device | str, autocast: str | None, positions: int) -> str:
    """A recipe's ``teacher.attention`` with "auto" decided for a device."""
    if option != "auto":
        return option
    return choose_attention(torch.device(device).type, autocast, positions)[0]


def check_attention(name: str, device: torch.device | str | None = None, autocast: str | None = None) -> None:
    """Refuses a kernel that nobody has heard of, whose package is missing, or that the device has not, before anything
    is loaded.

    Args:
        device: None where any will do. autocast: as of a recipe, for kernels differ by precision.

    Raises:
        RecipeError: with what to install, or the nearest name.
    """
    if name in ATTENTION:
        if device is not None:
            _probe(name, device, autocast_for(autocast, device))
        return
    if name == "xformers":
        if importlib.util.find_spec("xformers") is None:
            raise RecipeError("teacher.attention: xformers: not installed; pip install 'fewstep[xformers]'")
        return
    from diffusers.models import attention_dispatch as dispatch

    known = list(dict.fromkeys([*ATTENTION, *(backend.value for backend in dispatch.AttentionBackendName)]))
    if name not in known:
        close = difflib.get_close_matches(name, known, 1)
        hint = f"did you mean {close[0]}?" if close else f"expected one of {', '.join(known)}"
        raise RecipeError(f"teacher.attention: {name!r} is unknown; {hint}")
    try:
        dispatch._check_attention_backend_requirements(dispatch.AttentionBackendName(name))
    except (RuntimeError, ImportError) as error:
        raise RecipeError(f"teacher.attention: {name}: {error}") from error


def _probe(name: str, device: torch.device | str, autocast: str | None) -> None:
    """One small call of a kernel that torch has been asked for by name."""
    backend = ATTENTION[name]
    if backend in (None, SDPBackend.MATH):
        return
    x = torch.zeros(1, 1, 16, 16, device=device, dtype=getattr(torch, autocast or "float32"))
    try:
        with sdpa_kernel(backend):
            nn.functional.scaled_dot_product_attention(x, x, x)
    except RuntimeError as error:
        kind = f"{x.device.type} in {autocast or 'float32'}"
        raise RecipeError(
            f"teacher.attention: {name}: torch has no such kernel for {kind}; expected auto, sdpa or math"
        ) from error


def set_attention(net: Any, name: str) -> None:
    """Gives a network the kernel of a recipe; those of :data:`ATTENTION` are chosen at each call instead.

    Raises:
        RecipeError: the network would ignore it, which diffusers does not say.
    """
    if name in ATTENTION:
        return
    check_attention(name)
    dispatched = any(
        hasattr(getattr(module, "processor", None), "_attention_backend") for module in net.modules()
    )
    try:
        if name == "xformers" and not dispatched:
            net.enable_xformers_memory_efficient_attention()
        elif dispatched:
            net.set_attention_backend(name)
        else:
            raise RecipeError(
                f"teacher.attention: {name}: {type(net).__name__} does not go through diffusers' dispatcher, so this "
                f"would do nothing; expected one of {', '.join(ATTENTION)}, xformers"
            )
    except (ValueError, NotImplementedError, ImportError, ModuleNotFoundError) as error:
        raise RecipeError(f"teacher.attention: {name}: {error}") from error


@contextmanager
def arithmetic(device: str, autocast: torch.dtype | None, attention: str) -> Iterator[None]:
    """Around a network's call: autocast to a dtype, or not, and the attention kernel where torch chooses it."""
    backend = ATTENTION.get(attention)  # other kernels sit in the network
    # Its cache would hand on weights that were cast without gradient: to a later call, where the caller casts too.
    cast = torch.autocast(device, autocast, cache_enabled=False) if autocast else nullcontext()
    with cast, sdpa_kernel(backend) if backend else nullcontext():
        yield


def use_channels_last(net: Any) -> None:
    """Convolutions of a UNet in the layout that tensor cores take; weights that shells share stay shared.

    Raises:
        RecipeError: no UNet; tokens have no channels to put last.
    """
    if "UNet" not in type(net).__name__:
        raise RecipeError(f"teacher.channels_last: true: {type(net).__name__} is no UNet; expected false")
    net.to(memory_format=torch.channels_last)


def checkpoint_blocks(net: Any) -> None:
    """Activations of a network's blocks are computed again in the backward pass: with the forward's attention kernel.

    Torch remembers the autocast of a checkpointed forward, and not its kernel, of which each keeps other things.
    """
    net.enable_gradient_checkpointing(_checkpoint)


def _checkpoint(module: nn.Module, *args):
    return checkpoint(module.__call__, *args, use_reentrant=False, context_fn=_same_kernel)


def _same_kernel():
    return nullcontext(), sdpa_kernel(_cur_sdpa_kernel_backends())


def compiles(device: torch.device) -> bool:
    """Whether torch.compile writes code for this kind of device."""
    from torch._inductor.codegen import common

    common.init_backend_registration()
    return common.get_scheduling_for_device(device.type) is not None


def compile_blocks(net: Any, **options) -> None:
    """torch.compile of the blocks that a network repeats, each once for all: minutes become seconds.

    Args:
        options: of ``torch.compile``.

    Raises:
        RecipeError: diffusers names no such blocks for this class, or torch writes no code for the device.
    """
    device = next(net.parameters()).device
    if not compiles(device):
        raise RecipeError(f"teacher.compile: true: torch writes no code for {device.type}; expected false")
    try:
        net.compile_repeated_blocks(**options)
    except (AttributeError, ValueError) as error:
        raise RecipeError(f"teacher.compile: true: {type(net).__name__}: {error}; expected false") from error


def set_precision(device: torch.device, tf32: bool) -> None:
    """What fp32 products of a GPU are rounded to: TF32, which loses three digits and is several times as fast.

    Everything else is bf16 under the teacher's ``autocast``, and fp32 in losses, schedules and trained weights.
    """
    if device.type != "cpu":
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = tf32


@contextmanager
def exact_products() -> Iterator[None]:
    """fp32 products are fp32, for derivatives that cancel."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def gather(module: nn.Module) -> None:
    """Makes sharded weights whole ahead of a forward-mode derivative, inside of which they cannot be gathered."""
    if units := getattr(module, "sharded_units", ()):
        units[-1].set_reshard_after_forward(False)  # the module itself
        for unit in units:
            unit.unshard()
