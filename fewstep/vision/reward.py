"""Differentiable scores of images and prompts, for training on feedback.

A reward is ``function(images, prompts)``: images (B, 3, H, W) in [0, 1] with gradient and B prompts to B numbers, of
which higher ones are better. It is named in a recipe by ``module:function``, by a preference model of
:mod:`fewstep.vision.scores` that is CLIP underneath (``clip:PATH``, ``pickscore:PATH``, ``hpsv2.1:PATH``), or by
one of :mod:`fewstep.vision.reward_models`: ``imagereward:FOLDER``, ``aesthetic:CLIP:FILE``.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ..errors import FewstepError, RecipeError
from ..teachers.base import Teacher
from .clip import pooled
from .reward_models import Aesthetic, ImageReward, prepared
from .scores import ClipScore, get_scorer

Reward = Callable[[Tensor, Sequence[str]], Tensor]
CLIPS = ("clip", "pickscore", "hpsv2.1")
KINDS = (*(f"{name}:PATH" for name in CLIPS), "imagereward:FOLDER", "aesthetic:CLIP:FILE")


def load_reward(spec: str, device: str = "cpu") -> Reward:
    """A reward by name.

    Raises:
        RecipeError: no such function, or weights that are not there.
    """
    kind, _, rest = spec.partition(":")
    try:
        if kind in CLIPS:
            scorer: Any = get_scorer(spec, device)
            return _differentiable(scorer)
        if kind == "imagereward":
            return ImageReward(rest, device)
        if kind == "aesthetic":
            return Aesthetic(*rest.rpartition(":")[::2], device)
    except FewstepError as error:
        raise RecipeError(f"method.reward: {error}") from None
    try:
        reward = getattr(importlib.import_module(kind), rest)
    except (ImportError, AttributeError, ValueError) as error:
        raise RecipeError(
            f"method.reward: {spec}: {error}; expected module:function of an importable module, or one of "
            f"{', '.join(KINDS)}"
        ) from None
    if not callable(reward):
        raise RecipeError(f"method.reward: {spec} is a {type(reward).__name__}; expected a function")
    return reward


def of_latents(
    reward: Reward, teacher: Teacher, prompts: Sequence[str]
) -> Callable[[Tensor, Tensor], Tensor]:
    """The reward of latents (B, C, h, w) for the prompts of these rows (B,), through the VAE's decoder.

    Raises:
        RecipeError: it gives no number per image, or no gradient.
    """

    def score(latents: Tensor, index: Tensor) -> Tensor:
        images = teacher.decode_pixels(latents) / 2 + 0.5
        value = reward(images, [prompts[i] for i in index.tolist()])
        if value.shape != (len(images),) or (images.requires_grad and not value.requires_grad):
            raise RecipeError(
                f"method.reward: gives {tuple(value.shape)}{'' if value.requires_grad else ' without gradient'} for "
                f"{len(images)} images; expected one differentiable number each, ({len(images)},)"
            )
        return value

    return score


def _differentiable(scorer: ClipScore) -> Reward:
    """The scorer's model behind a resize that has a gradient."""
    clip = scorer.clip
    clip.model.requires_grad_(False)

    def reward(images: Tensor, prompts: Sequence[str]) -> Tensor:
        x = prepared(images, clip.size, clip.mean, clip.std)
        seen = pooled(clip.model.get_image_features(pixel_values=x))
        texts = clip.texts([scorer.prefix + prompt for prompt in prompts]).to(x.device)
        return scorer.scale * F.cosine_similarity(seen.float(), texts)

    return reward
