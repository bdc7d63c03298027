"""Scores of an image and its caption: CLIP and the preference models, each a number per image."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fewstep.errors import FewstepError
from fewstep.vision import preprocess
from fewstep.vision.clip import MEAN, STD, Clip, OpenClip
from fewstep.vision.extractor import file_sha256, full_precision
from fewstep.vision.hps import Hps
from fewstep.vision.reward_models import ImageReward

KINDS = ("clip:PATH", "open_clip:ARCHITECTURE:FILE", "pickscore:PATH", "hpsv2.1:PATH", "imagereward:FOLDER")


class Scorer:
    """Called with uint8 images (B, H, W, 3) and B captions it gives B numbers, higher for a better match.

    Attributes:
        label: such as "CLIP score". name: of the weights. weights_sha256: hash of the weights.
        prepare: from uint8 images to what `score` takes; it runs on the CPU, in worker processes.
    """

    label: str
    name: str
    weights_sha256: str
    prepare: Callable[[Tensor], Tensor] = preprocess.Chain()

    def score(self, prepared: Tensor, captions: Sequence[str]) -> Tensor:
        """The network, on its device."""
        raise NotImplementedError

    def __call__(self, images: Tensor, captions: Sequence[str]) -> Tensor:
        return self.score(self.prepare(images), captions)


class ClipScore(Scorer):
    """Scaled cosine of image and caption.

    Args:
        clip: the model. label: what the number is called.
        scale: of the cosine; None takes the model's own, as preference models do.
        prefix: before every caption.
        before: crops and resizes of uint8 images that a protocol wants before the model's own.
    """

    def __init__(
        self,
        clip: Clip,
        label: str = "CLIP score",
        scale: float | None = 1.0,
        prefix: str = "",
        before: Sequence[Callable[[Tensor], Tensor]] = (),
    ):
        self.clip, self.label, self.prefix = clip, label, prefix
        self.name, self.weights_sha256 = clip.name.partition(":")[2], clip.weights_sha256
        self.scale = clip.scale if scale is None else scale
        self.prepare = preprocess.Chain((*before, clip.prepare))

    def score(self, prepared: Tensor, captions: Sequence[str]) -> Tensor:
        return self.scale * self.clip.cosines(prepared, [self.prefix + c for c in captions])


class ImageRewardScore(Scorer):
    """ImageReward-v1.0 (Xu et al., arXiv 2304.05977) after Pillow's resize, as its authors see an image."""

    label, name = "ImageReward", "ImageReward-v1.0"

    def __init__(self, model: ImageReward):
        self.model, self.weights_sha256 = model, file_sha256(model.file)
        crop = partial(preprocess.shortest_side_crop, size=model.size)
        self.prepare = partial(preprocess.normalised, crop=crop, mean=MEAN, std=STD)

    @torch.no_grad()
    def score(self, prepared: Tensor, captions: Sequence[str]) -> Tensor:
        with full_precision():
            return self.model.score(prepared.to(self.model.device), captions).cpu()


def get_scorer(spec: str, device: str = "cpu", clip: dict[str, Any] | None = None) -> Scorer:
    """A scorer by name.

    Args:
        spec: one of `KINDS`. HPSv2.1 (arXiv 2306.09341) and PickScore (arXiv 2305.01569) are CLIP ViT-H/14 in
            transformers' format, the first also its published file.
        device: where it runs.
        clip: the protocol's `clip`: `prefix`, `scale`, `crop`, `resize` of its CLIP score.

    Raises:
        FewstepError: unknown name, or weights that are not there.
    """
    kind, _, source = spec.partition(":")
    if kind == "imagereward" and source:
        return ImageRewardScore(ImageReward(source, device))
    if kind not in ("clip", "open_clip", "pickscore", "hpsv2.1") or not source:
        raise FewstepError(f"unknown scorer {spec!r}: expected {', '.join(KINDS)}")
    model = {"open_clip": OpenClip, "hpsv2.1": Hps}.get(kind, Clip)(source, device)
    if kind == "pickscore":
        return ClipScore(model, "PickScore", scale=None)
    if kind == "hpsv2.1":
        return ClipScore(model, "HPSv2.1", scale=None)
    clip = clip or {}
    before = preprocess.crop_and_resize(clip.get("crop", "none"), clip.get("resize"), model.size)
    return ClipScore(
        model,
        scale=clip.get("scale", 1.0),
        prefix=clip.get("prefix", ""),
        before=[step for _, step in before],
    )
