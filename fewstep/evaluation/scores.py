"""Scores of an image and its caption: CLIP and the preference models, each a number per image."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from fewstep.errors import FewstepError
from fewstep.evaluation import preprocess
from fewstep.evaluation.clip import Clip, OpenClip

KINDS = ("clip:PATH", "open_clip:ARCHITECTURE:FILE", "pickscore:PATH", "hpsv2.1:PATH", "imagereward")


class Scorer(Protocol):
    """Called with uint8 images (B, H, W, 3) and B captions it gives B numbers, higher for a better match.

    Attributes:
        label: such as "CLIP score". name: of the weights. weights_sha256: hash of the weights.
    """

    label: str
    name: str
    weights_sha256: str

    def __call__(self, images: Tensor, captions: Sequence[str]) -> Tensor: ...


class ClipScore:
    """Scaled cosine of image and caption.

    Args:
        clip: the model. label: what the number is called.
        scale: of the cosine; None takes the model's own, as preference models do.
        prefix: before every caption.
        prepare: crops or resizes of uint8 images that a protocol wants before the model's own.
    """

    def __init__(
        self,
        clip: Clip,
        label: str = "CLIP score",
        scale: float | None = 1.0,
        prefix: str = "",
        prepare: Callable[[Tensor], Tensor] | None = None,
    ):
        self.clip, self.label, self.prefix = clip, label, prefix
        self.name, self.weights_sha256 = clip.name.partition(":")[2], clip.weights_sha256
        self.scale = clip.scale if scale is None else scale
        self.prepare = prepare or (lambda images: images)

    def __call__(self, images: Tensor, captions: Sequence[str]) -> Tensor:
        return self.scale * self.clip.cosines(self.prepare(images), [self.prefix + c for c in captions])


class ImageReward:
    """ImageReward-v1.0 (Xu et al., arXiv 2304.05977), by its own package, which pins old libraries."""

    label, name, weights_sha256 = "ImageReward", "ImageReward-v1.0", "undeclared"

    def __init__(self, device: str = "cpu"):
        try:
            import ImageReward
        except ImportError as error:
            raise FewstepError(
                f"imagereward: the package cannot be imported ({error}): it needs an environment of its own with "
                "`pip install image-reward`"
            ) from None
        self.model = ImageReward.load(self.name, device=device)

    def __call__(self, images: Tensor, captions: Sequence[str]) -> Tensor:
        from PIL import Image

        pairs = zip(images, captions)
        return torch.tensor([self.model.score(text, Image.fromarray(x.numpy())) for x, text in pairs])


def get_scorer(spec: str, device: str = "cpu", clip: dict[str, Any] | None = None) -> Scorer:
    """A scorer by name.

    Args:
        spec: one of `KINDS`. HPSv2.1 (arXiv 2306.09341) and PickScore (arXiv 2305.01569) are CLIP ViT-H/14 in
            transformers' format.
        device: where it runs.
        clip: the protocol's `clip`: `prefix`, `scale`, `crop`, `resize` of its CLIP score.

    Raises:
        FewstepError: unknown name, or weights that are not there.
    """
    kind, _, source = spec.partition(":")
    if kind == "imagereward":
        return ImageReward(device)
    if kind not in ("clip", "open_clip", "pickscore", "hpsv2.1") or not source:
        raise FewstepError(f"unknown scorer {spec!r}: expected {', '.join(KINDS)}")
    model = OpenClip(source, device) if kind == "open_clip" else Clip(source, device)
    if kind == "pickscore":
        return ClipScore(model, "PickScore", scale=None)
    if kind == "hpsv2.1":
        return ClipScore(model, "HPSv2.1", scale=None)
    clip = clip or {}
    return ClipScore(
        model, scale=clip.get("scale", 1.0), prefix=clip.get("prefix", ""), prepare=_prepare(clip)
    )


def _prepare(clip: dict[str, Any]) -> Callable[[Tensor], Tensor]:
    def prepare(images: Tensor) -> Tensor:
        if clip.get("crop") == "center":
            images = preprocess.center_crop(images)
        if clip.get("resize"):
            method, side = clip["resize"]
            images = preprocess.pil_resize(images, side, method)
        return images

    return prepare
