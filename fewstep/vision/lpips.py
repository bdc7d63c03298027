"""LPIPS between the images of one prompt, where the package and its backbone are on disk."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

BACKBONE = "alexnet-owt-7be5be79.pth"  # torchvision's AlexNet; the linear heads come with the package


def find_lpips() -> Callable[[Tensor, Tensor], Tensor] | None:
    """The distance of images (B, 3, H, W) in -1..1 (Zhang et al., arXiv 1801.03924), or None if it is not here."""
    if not (Path(torch.hub.get_dir()) / "checkpoints" / BACKBONE).is_file():
        return None
    try:
        import lpips
    except ImportError:
        return None
    return lpips.LPIPS(net="alex", verbose=False).eval()


@torch.no_grad()
def lpips_diversity(
    images: Tensor, groups: Tensor, distance: Callable[[Tensor, Tensor], Tensor]
) -> tuple[float, float]:
    """Mean distance of two images of one prompt, averaged over the prompts, and its standard error.

    Args:
        images: uint8 (N, H, W, 3). groups: (N,) integers, which prompt an image belongs to.
        distance: of two batches (B, 3, H, W) in -1..1.
    """
    means = []
    for group in groups.unique():
        x = images[groups == group].permute(0, 3, 1, 2).float() / 127.5 - 1
        first, second = torch.triu_indices(len(x), len(x), 1)
        if len(first):
            pairs = zip(first.split(16), second.split(16))
            means.append(torch.cat([distance(x[i], x[j]).flatten() for i, j in pairs]).mean())
    values = torch.stack(means)
    return float(values.mean()), float(values.std() / len(values) ** 0.5)
