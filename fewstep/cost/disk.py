"""What a recipe's encoded prompts, images and pairs take on disk."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch

from ..data.image_sets import split, walk
from ..data.images import load_images
from ..data.prompts import load_prompts
from ..errors import FewstepError
from ..recipe import Recipe
from ..teachers.base import Teacher


def on_disk(recipe: Recipe, teacher: Teacher) -> dict[str, dict[str, int | None]]:
    """Stores of :mod:`fewstep.data.cache` and of pairs: ``bytes_each`` row, and ``rows`` and ``bytes`` where known.

    A condition is stored in the dtype of the frozen network, a latent in fp32; an image and a pair bring the condition
    of their caption.
    """
    dtype, needs = teacher.net.dtype, recipe.method_class.needs(recipe.method)
    prompt = sum(
        value.numel() * (dtype.itemsize if value.is_floating_point() else value.element_size())
        for value in teacher.blank(1).tensors.values()
    )
    latent = 4 * torch.Size(teacher.latent_shape).numel()
    data = recipe.data
    rows = {"prompts": (prompt, _count(lambda: len(load_prompts(data.prompts))))}
    if "images" in needs:
        rows["images"] = (latent + prompt, _count(lambda: _images(data.images)))
    if "pairs" in needs:
        rows["pairs"] = (teacher.pair_bytes + prompt, _count(lambda: _pairs(data.pairs)))
    return {
        name: {"bytes_each": each, "rows": number, "bytes": None if number is None else each * number}
        for name, (each, number) in rows.items()
    }


def _count(count: Callable[[], int]) -> int | None:
    """None for data that are not there yet."""
    try:
        return count()
    except (FewstepError, OSError, ValueError, TypeError):
        return None


def _images(source: str) -> int:
    if source.startswith("builtin:"):
        return len(load_images(source))
    return len(split(walk(Path(source).expanduser())[0]).names)


def _pairs(source: str) -> int:
    return json.loads((Path(source).expanduser() / "pairs.json").read_text())["num"]
