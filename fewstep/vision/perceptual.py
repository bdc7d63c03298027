"""Distances of decoded images, for regression losses: gradient flows through the VAE's decoder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import FewstepError, RecipeError
from ..teachers.base import Teacher
from .lpips import Distance, load_lpips


def distance_of(kind: str, teacher: Teacher, vgg: Distance | None = None) -> Distance:
    """A distance of two batches of latents (B, C, h, w), a scalar.

    Args:
        kind: "l2" of the latents; "features": unit-normalised maps of EfficientNet-Lite0 on decoded images (LPIPS
            without learned weights, arXiv 1801.03924, eq. 1); "lpips": the VGG one, whose weights must be on disk.
        vgg: in its place, of two batches of images.

    Raises:
        RecipeError: weights or package of "lpips" are not there.
    """
    if kind == "l2":
        return F.mse_loss
    images = _Decoded(teacher, _maps(teacher) if kind == "features" else None)
    if kind == "features":
        return images.features
    return images.compare(vgg or _lpips(teacher))


class _Decoded:
    def __init__(self, teacher: Teacher, maps):
        self.teacher, self.maps = teacher, maps

    def features(self, latents: Tensor, target: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = self.maps(self.teacher.decode_pixels(target))
        found = self.maps(self.teacher.decode_pixels(latents))
        return sum((a - b).pow(2).sum(1).mean() for a, b in zip(found, wanted)) / len(wanted)

    def compare(self, metric: Distance) -> Distance:
        def distance(latents: Tensor, target: Tensor) -> Tensor:
            with torch.no_grad():
                wanted = self.teacher.decode_pixels(target)
            return metric(self.teacher.decode_pixels(latents), wanted)

        return distance


def _maps(teacher: Teacher) -> Callable[[Tensor], list[Tensor]]:
    from .extractors import get_extractor

    extractor: Any = get_extractor("effnet-lite0@96")
    network = extractor.network.to(teacher.device).requires_grad_(False).eval()
    wanted = [block for i, block in enumerate(network._blocks) if i in (2, 4, 10, 15)]

    def maps(images: Tensor) -> list[Tensor]:
        found: list[Tensor] = []
        handles = [block.register_forward_hook(lambda _m, _i, out: found.append(out)) for block in wanted]
        try:
            # The network was trained at 224 px and on values scaled as (x - 127) / 128.
            network.extract_features(F.interpolate(images, size=96, mode="bilinear", antialias=True))
        finally:
            for handle in handles:
                handle.remove()
        return [F.normalize(m.float(), dim=1) for m in found]

    return maps


def _lpips(teacher: Teacher) -> Distance:
    try:
        each = load_lpips("vgg", teacher.device)
    except FewstepError as error:
        raise RecipeError(
            f"method.regression: lpips: its VGG weights cannot be loaded ({error}); install fewstep[fid] with the "
            "weights in torch's cache, or use features or l2"
        ) from error
    return lambda images, wanted: each(images, wanted).mean()
