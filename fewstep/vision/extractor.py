"""What every extractor is: its name, its resize and the hash of its weights fix every number."""

import hashlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .preprocess import Chain

SPATIAL = ":mixed_6"  # what the name of an extractor of spatial features ends in


class Extractor:
    """Called with uint8 images (B, H, W, 3) it gives float32 features (B, dim), on the CPU.

    Subclasses define `features`. One with a classifier also has `classify`, from features to logits, for the
    Inception score; one that has `spatial` gives its extractor of spatial features there, for sFID.

    Attributes:
        name: short and complete, such as "effnet-lite0@96".
        dim: length of a feature vector.
        weights_sha256: hash of the weights file, or "undeclared".
        resize: how images come to the network's size and scale. It changes a Fréchet distance more than
            anything else.
        size: side of the network's input, of which patches are cut.
        prepare: from uint8 (B, H, W, 3) to what `features` takes; it runs on the CPU, in worker processes.
    """

    name: str
    dim: int
    weights_sha256: str
    resize: str
    size: int = 224
    prepare: Callable[[Tensor], Tensor] = Chain()

    def features(self, prepared: Tensor) -> Tensor:
        """The network, on its device."""
        raise NotImplementedError

    def __call__(self, images: Tensor) -> Tensor:
        return self.features(self.prepare(images))


def identity(extractor: Extractor) -> dict[str, Any]:
    """What must be equal for features to be comparable; JSON-ready."""
    return {
        "extractor": extractor.name,
        "weights_sha256": extractor.weights_sha256,
        "resize": extractor.resize,
        "dim": extractor.dim,
    }


class Prepared(Extractor):
    """Another extractor behind crops and resizes of uint8 images, which become part of its identity.

    Args:
        extractor: the other one. steps: descriptions and functions, as of `crop_and_resize`.
    """

    def __init__(self, extractor: Extractor, steps: Sequence[tuple[str, Callable[[Tensor], Tensor]]]):
        self.name, self.dim, self.size = extractor.name, extractor.dim, extractor.size
        self.weights_sha256 = extractor.weights_sha256
        self.resize = ", ".join([*(description for description, _ in steps), extractor.resize])
        self.extractor = extractor
        self.features = extractor.features  # type: ignore[method-assign]  # the other one's, whole
        self.prepare = Chain((*(step for _, step in steps), extractor.prepare))
        if hasattr(extractor, "classify"):
            self.classify = extractor.classify
        if hasattr(extractor, "spatial"):
            self.spatial = Prepared(extractor.spatial, steps)


def placed(prepared: Tensor, device: str) -> Tensor:
    """Images for convolutions, always in one memory format, because it decides how kernels round.

    Channels last on the CPU makes both networks 1.4 times faster.
    """
    cpu = torch.device(device).type == "cpu"
    return prepared.to(device, memory_format=torch.channels_last if cpu else torch.contiguous_format)


def full_precision():
    """Context without TF32, which PyTorch turns on for convolutions and which costs three digits."""
    return torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=False, allow_tf32=False)


def file_sha256(path: Path) -> str:
    """Hash of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for chunk in iter(partial(file.read, 1 << 20), b""):
            digest.update(chunk)
    return digest.hexdigest()
