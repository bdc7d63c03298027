"""Cards that a recipe may be planned for, and what their libraries are assumed to take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """A card: usable bytes, and the data sheet's dense rates in FLOP/s by the dtype of the arithmetic."""

    memory: float
    bfloat16: float
    tf32: float
    float32: float

    def seconds(self, flops: Mapping[str, float]) -> float:
        """At the whole rate of each kind of arithmetic; fp16 has that of bf16, fp64 none that a run would notice."""
        return sum(count / getattr(self, kind, self.bfloat16) for kind, count in flops.items())


GPUS = {
    "h100-80gb": Device(79.1 * 2**30, 989e12, 494e12, 67e12),
    "h200-141gb": Device(139.8 * 2**30, 989e12, 494e12, 67e12),
    "a100-80gb": Device(79.2 * 2**30, 312e12, 156e12, 19.5e12),
    "a100-40gb": Device(39.4 * 2**30, 312e12, 156e12, 19.5e12),
    "l40s-48gb": Device(44.4 * 2**30, 362e12, 183e12, 91.6e12),
    "rtx4090-24gb": Device(23.5 * 2**30, 165e12, 82.6e12, 82.6e12),
    "rtx4080-16gb": Device(15.6 * 2**30, 97.5e12, 48.7e12, 48.7e12),
}


def named(words: str) -> str | None:
    """The card that a name, or a part of one, is of; None where there is none, or several."""
    found = [words] if words in GPUS else [name for name in GPUS if words.lower() in name]
    return found[0] if len(found) == 1 else None


LIBRARIES = 1.5e9  # assumed: CUDA context, workspaces of cuBLAS and cuDNN
FRAGMENTS = 0.05  # assumed: of what an iteration allocates and frees
UTILISATION = 0.40  # assumed share of the data sheet's rate; hours follow from it
