"""What happens to an image before the network: crops and resizes as the public evaluators do them.

The resize decides a Fréchet distance (on the same images 4.4, 5.2 or 7.7 with three of these), so each has an
id that goes into statistics files and results.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate, pad

FILTERS = {"bicubic": Image.Resampling.BICUBIC, "lanczos": Image.Resampling.LANCZOS}


def center_crop(images: Tensor) -> Tensor:
    """Middle square of (B, H, W, 3); odd margins are rounded half to even, as torchvision does."""
    height, width = images.shape[1:3]
    side = min(height, width)
    top, left = round((height - side) / 2), round((width - side) / 2)
    return images[:, top : top + side, left : left + side]


def center_square(images: Tensor) -> Tensor:
    """Middle square of (B, H, W, 3); odd margins are rounded down, as the authors of CMMD do."""
    height, width = images.shape[1:3]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return images[:, top : top + side, left : left + side]


def center_patch(images: Tensor, size: int) -> Tensor:
    """Middle `size` x `size` pixels of (B, H, W, 3); the whole image, squeezed, where a side is shorter.

    The patch-FID of SDXL-Lightning (arXiv 2402.13929, section 5) as DMD2 computes it.
    """
    height, width = images.shape[1:3]
    if min(height, width) < size:
        return pil_resize(images, size, "bicubic")
    top, left = round((height - size) / 2), round((width - size) / 2)
    return images[:, top : top + size, left : left + size]


def pil_resize(images: Tensor, size: int, method: str) -> Tensor:
    """uint8 (B, H, W, 3) to uint8 (B, size, size, 3) with Pillow, antialiased and rounded."""
    resized = [
        np.asarray(Image.fromarray(image.numpy()).resize((size, size), FILTERS[method]))
        for image in images.contiguous()
    ]
    return torch.from_numpy(np.stack(resized))


def shortest_side_crop(images: Tensor, size: int) -> Tensor:
    """The resize of CLIP: Pillow's bicubic until the shorter side is `size`, then the middle square; uint8."""
    height, width = images.shape[1:3]
    short = min(height, width)
    target = (int(size * width / short), int(size * height / short))
    resized = [np.asarray(Image.fromarray(x.numpy()).resize(target, FILTERS["bicubic"])) for x in images]
    return center_crop(torch.from_numpy(np.stack(resized)))


def longest_side_pad(images: Tensor, size: int) -> Tensor:
    """The resize of HPSv2: antialiased bicubic until the longer side is `size`, black beside it; float, not clipped."""
    height, width = images.shape[1:3]
    target = tuple(round(side * size / max(height, width)) for side in (height, width))
    x = images.permute(0, 3, 1, 2).float()
    if target != (height, width):
        x = interpolate(x, target, mode="bicubic", antialias=True, align_corners=False)
    high, wide = size - target[0], size - target[1]
    padded = pad(x, (wide // 2, wide - wide // 2, high // 2, high - high // 2))
    return padded.permute(0, 2, 3, 1)


def pil_bicubic_float(images: Tensor, size: int) -> Tensor:
    """The "clean" resize of Parmar et al., arXiv 2104.11222: Pillow's bicubic on float channels."""
    planes = images.permute(0, 3, 1, 2).float().flatten(0, 1).contiguous().numpy()
    resized = [
        np.asarray(Image.fromarray(plane).resize((size, size), FILTERS["bicubic"])) for plane in planes
    ]
    return torch.from_numpy(np.stack(resized)).clamp(0, 255).unflatten(0, (-1, 3))


def tf1_bilinear(images: Tensor, size: int) -> Tensor:
    """The original FID's resize, TensorFlow 1's: source pixel = target pixel x ratio, not antialiased."""
    x = images.permute(0, 3, 1, 2).float()
    for dim in (2, 3):
        length = x.shape[dim]
        position = torch.arange(size, dtype=torch.float32) * (length / size)
        low = position.floor().long()
        weight = (position - low).unsqueeze(-1) if dim == 2 else position - low
        x = torch.lerp(x.index_select(dim, low), x.index_select(dim, (low + 1).clamp(max=length - 1)), weight)
    return x


def torch_bilinear(images: Tensor, size: int) -> Tensor:
    """PyTorch's bilinear resize without antialiasing, as in pytorch-fid."""
    return interpolate(images.permute(0, 3, 1, 2).float(), (size, size), mode="bilinear", align_corners=False)


def torch_bicubic_antialias(images: Tensor, size: int) -> Tensor:
    """PyTorch's antialiased bicubic resize, clipped to 0..255 and not rounded."""
    x = images.permute(0, 3, 1, 2).float()
    x = interpolate(x, (size, size), mode="bicubic", antialias=True, align_corners=False)
    return x.clamp(0, 255)


# id: from uint8 (B, H, W, 3) and a size to float32 (B, 3, size, size) in 0..255
RESIZES: dict[str, Callable[[Tensor, int], Tensor]] = {
    "pil-bicubic-float": pil_bicubic_float,
    "tf1-bilinear": tf1_bilinear,
    "torch-bilinear": torch_bilinear,
    "torch-bicubic-antialias": torch_bicubic_antialias,
}


def network_input(images: Tensor, resize: str, size: int, shift: float, scale: float) -> Tensor:
    """uint8 (B, H, W, 3) to float32 (B, 3, size, size): resized by its id, then `(x - shift) / scale`."""
    return (RESIZES[resize](images, size) - shift) / scale


def normalised(
    images: Tensor, crop: Callable[[Tensor], Tensor], mean: Sequence[float], std: Sequence[float]
) -> Tensor:
    """uint8 (B, H, W, 3) through a crop or resize to float32 (B, 3, size, size) of given mean and deviation."""
    x = crop(images).permute(0, 3, 1, 2).float() / 255
    return ((x - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]).contiguous()


@dataclass(frozen=True)
class Chain:
    """Functions of images one after the other; picklable if they are, so that other processes can run it."""

    steps: tuple[Callable[[Tensor], Tensor], ...] = ()

    def __call__(self, images: Tensor) -> Tensor:
        for step in self.steps:
            images = step(images)
        return images


def crop_and_resize(
    crop: str, resize: tuple[str, int] | None, patch: int
) -> list[tuple[str, Callable[[Tensor], Tensor]]]:
    """What a protocol does to uint8 images: descriptions, which become part of an identity, and functions.

    Args:
        crop: "none", "center" or "patch". resize: Pillow's filter and the side, or None. patch: side of a patch.
    """
    steps: list[tuple[str, Callable[[Tensor], Tensor]]] = []
    if crop == "center":
        steps.append(("center-crop", center_crop))
    if crop == "patch":
        steps.append((f"center-patch-{patch}", partial(center_patch, size=patch)))
    if resize:
        method, side = resize
        steps.append((f"pil-{method}-{side}", partial(pil_resize, size=side, method=method)))
    return steps
