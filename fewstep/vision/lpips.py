"""LPIPS (Zhang et al., arXiv 1801.03924), where its package and its backbone are on disk."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from fewstep.errors import FewstepError

Distance = Callable[[Tensor, Tensor], Tensor]
# torchvision's, as it names their files; the linear heads come with torchmetrics.
BACKBONES = {"alex": "alexnet-owt-7be5be79.pth", "vgg": "vgg16-397923af.pth"}


def load_lpips(net: str, device: torch.device | str = "cpu") -> Distance:
    """The distance (B,) of images (B, 3, H, W) in -1..1, frozen, with a gradient in the images.

    Args:
        net: one of ``BACKBONES``.

    Raises:
        FewstepError: a package or the backbone is not here; nothing is downloaded.
    """
    file = Path(torch.hub.get_dir()) / "checkpoints" / BACKBONES[net]
    if not file.is_file():
        raise FewstepError(f"{file} does not exist")
    try:
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

        metric = LearnedPerceptualImagePatchSimilarity(net_type=net)
    except Exception as error:  # package, torchvision or weights: each fails in its own way
        raise FewstepError(str(error).splitlines()[0]) from error
    network = metric.net.requires_grad_(False).to(device)  # the metric itself keeps all that it has ever seen
    return lambda a, b: network(a, b).flatten()


def find_lpips(net: str = "alex") -> Distance | None:
    """As :func:`load_lpips`, None where it is not here."""
    try:
        return load_lpips(net)
    except FewstepError:
        return None


@torch.no_grad()
def lpips_diversity(images: Tensor, groups: Tensor, distance: Distance) -> tuple[float, float]:
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
