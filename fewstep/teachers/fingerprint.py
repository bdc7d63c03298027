"""Which weights a network has, as short hashes: of 64 numbers of every tensor, whatever file they came from."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

NUMBERS = 64  # of each tensor


def hash_of(texts: Iterable[str]) -> str:
    state = hashlib.sha256()
    for text in texts:
        state.update(f"{len(text)}:".encode() + text.encode("utf-8", "surrogatepass"))
    return state.hexdigest()[:20]


def of_tensors(module: nn.Module, rounded: bool = False) -> Iterator[str]:
    """One hash per tensor, whatever its name.

    Args:
        rounded: to bfloat16, so that a network loaded at less precision is the same one.
    """
    for tensor in module.state_dict().values():
        if tensor.is_floating_point():
            yield _of_tensor(tensor.bfloat16() if rounded else tensor)


def of_network(module: nn.Module) -> str:
    """Of a network at any precision; of one in fewer bits, what it was before."""
    return getattr(module, "known_as", None) or hash_of(sorted(of_tensors(module, rounded=True)))


def of_file(path: Path) -> str:
    """Of a LoRA: names and tensors, each as a whole; where it lies and what else it says does not matter."""
    with safe_open(path, "pt") as held:
        names = sorted(held.keys())
        return hash_of(f"{name} {_of_tensor(held.get_tensor(name), whole=True)}" for name in names)


@torch.no_grad()
def _of_tensor(tensor: Tensor, whole: bool = False) -> str:
    every = tensor.flatten()
    some = every if whole else every[:: max(1, tensor.numel() // NUMBERS)][:NUMBERS]
    data = some.cpu().double().numpy().tobytes()
    return hashlib.sha256(repr(tuple(tensor.shape)).encode() + data).hexdigest()
