"""What a recipe's encoded prompts, images and pairs take on disk."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..data.cache import (
    condition_bytes,
    images_folder,
    latent_bytes,
    need_of_prompts,
)
from ..data.image_sets import split, walk
from ..data.images import CaptionedImages, load_images
from ..data.pairs import load_pairs
from ..data.places import PLACE, cache_root
from ..data.prompts import load_prompts
from ..data.store import rows_to_make
from ..data.texts import column_for
from ..errors import FewstepError
from ..files import Need, existing
from ..methods.base import Method
from ..recipe import Recipe
from ..teachers.base import Teacher
from .shapes import parts_of


def to_encode(
    recipe: Recipe, teacher: Teacher, prompts: list[str], images: CaptionedImages | None
) -> list[Need]:
    """What :func:`fewstep.runs.build.encode` will write, without what is cached already."""
    needs = recipe.method_class.needs(recipe.method)
    found = [] if recipe.data.cache_prompts is False else texts_to_encode(recipe, teacher, prompts, images)
    if images is not None and "images" in needs and recipe.data.cache_images is not False:
        found += _needs_of_images(recipe, teacher, images)
    return found


def _needs_of_images(recipe: Recipe, teacher: Teacher, images: CaptionedImages) -> list[Need]:
    found = []
    for view, part in parts_of(recipe, teacher, images):
        folder = images_folder(view, part)
        size = len(rows_to_make(folder, len(part))) * latent_bytes(view)
        found.append(Need("images", PLACE, folder, size))
    return found


def texts_to_encode(
    recipe: Recipe, teacher: Teacher, prompts: list[str], images: CaptionedImages | None
) -> list[Need]:
    """What its conditions will take in the cache, without those that are there already."""
    needs, found = recipe.method_class.needs(recipe.method), [need_of_prompts(teacher, prompts, "prompts")]
    if images is not None and "images" in needs and images.captions != prompts:
        found.append(need_of_prompts(teacher, images.captions, "captions"))
    if "pairs" in needs:
        found.append(need_of_prompts(teacher, load_pairs(recipe.data.pairs).prompts, "prompts of pairs"))
    return found


def beside(
    recipe: Recipe, teacher: Teacher, prompts: list[str], images: CaptionedImages | None
) -> dict[str, float]:
    """Of what a recipe leaves open, ``cache_prompts`` and ``cache_images``: the GB of a cache that is too large for
    ``cache_gb``, or 0. A method that looks at all prompts first has them cached."""
    found, data = {}, recipe.data
    if data.cache_prompts is None:
        texts = texts_to_encode(recipe, teacher, prompts, images) if _may_be_live(recipe) else []
        found["cache_prompts"] = sum(need.size for need in texts) / 1e9
    if data.cache_images is None:
        used = images is not None and "images" in recipe.method_class.needs(recipe.method)
        needs = _needs_of_images(recipe, teacher, images) if used and images is not None else []
        found["cache_images"] = sum(need.size for need in needs) / 1e9
    return {name: gb if gb > data.cache_gb else 0.0 for name, gb in found.items()}


def _may_be_live(recipe: Recipe) -> bool:
    return recipe.method_class.prepare is Method.prepare


def on_disk(recipe: Recipe, teacher: Teacher) -> dict[str, dict[str, int | None]]:
    """Stores of :mod:`fewstep.data.cache` and of pairs: ``bytes_each`` row, and ``rows`` and ``bytes`` where known.

    A condition is stored in the dtype of the frozen network, and counted here with the padding that it is stored
    without; a latent in fp32. An image and a pair bring the condition of their caption.
    """
    needs, data = recipe.method_class.needs(recipe.method), recipe.data
    prompt, column = condition_bytes(teacher, [""]), column_for(data.prompts, data.column)
    rows = {"prompts": (prompt, _count(lambda: len(load_prompts(data.prompts, column=column))))}
    if "images" in needs:
        rows["images"] = (latent_bytes(teacher) + prompt, _count(lambda: _images(data.images or "")))
    if "pairs" in needs:
        rows["pairs"] = (teacher.pair_bytes + prompt, _count(lambda: _pairs(data.pairs or "")))
    return {
        name: {"bytes_each": each, "rows": number, "bytes": None if number is None else each * number}
        for name, (each, number) in rows.items()
    }


def cached(recipe: Recipe, disk: Mapping[str, Mapping[str, Any]], name: str = "prompts") -> bool:
    """Whether prompts, or images, are encoded before training, as far as :func:`on_disk` knows; a start knows more."""
    told = getattr(recipe.data, f"cache_{name}")
    if told is not None or (name == "prompts" and not _may_be_live(recipe)):
        return told is not False
    return (disk.get(name, {}).get("bytes") or 0) / 1e9 <= recipe.data.cache_gb


def doubt(cache: Mapping[str, Mapping[str, Any]]) -> str | None:
    """What to say of stores, as :func:`on_disk` counts them, that the cache's disk has no room for."""
    needed = sum(store["bytes"] or 0 for store in cache.values())
    free = shutil.disk_usage(existing(cache_root())).free
    if needed <= free:
        return None
    return (
        f"{', '.join(cache)} take {needed / 1e9:.2f} GB on disk at most once they are encoded, and {cache_root()} has "
        f"{free / 1e9:.2f} GB free; set {PLACE} to another disk"
    )


def _count(count: Callable[[], int]) -> int | None:
    """None for data that are not there yet."""
    try:
        return count()
    except (FewstepError, OSError, ValueError, TypeError):
        return None


def _images(source: str) -> int:
    if source.startswith("builtin:"):
        return len(load_images(source))
    folder = Path(source).expanduser()
    if not source or not folder.is_dir():
        raise FewstepError(f"{folder} is no folder")
    return len(split(walk(folder)[0]).names) or len(load_images(source))


def _pairs(source: str) -> int:
    return json.loads((Path(source).expanduser() / "pairs.json").read_text())["num"]
