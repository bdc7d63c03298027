"""Features of a set of images: kept whole, or only their moments in a stream; cached by content."""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewstep.errors import FewstepError
from fewstep.evaluation.images import BLOCK, ImageSource, part_of
from fewstep.evaluation.statistics import Moments
from fewstep.files import WriteError, replacing
from fewstep.report.bar import Bar
from fewstep.vision.extractor import Extractor, identity

BATCH = BLOCK  # processes that share the work then run the batches of one


class FeatureError(FewstepError):
    """A network made numbers that are none, which only shows while it runs."""

    code = 3


def extract(
    source: ImageSource, extractor: Extractor, cached: bool = False, share: tuple[int, int] = (0, 1)
) -> Tensor:
    """Features (N, D), float32, in the order of the images.

    Args:
        source: N images.
        extractor: the network.
        cached: keep the features in the user's cache, by the hash of the images and the identity of the
            extractor.
        share: rank and number of the processes that each extract a part and get all, having joined a group of
            torch.distributed before.

    Raises:
        FeatureError: features that are not finite, in any process.
    """
    rank, world = share
    file = kept = None
    if cached and extractor.weights_sha256 != "undeclared":  # a function of the user's may change
        key = json.dumps([source.sha256, identity(extractor)], sort_keys=True)
        file = cache_dir() / "features" / f"{hashlib.sha256(key.encode()).hexdigest()}.npy"
        with suppress(OSError, ValueError, EOFError):  # absent or damaged: extract again
            features = np.load(file, allow_pickle=False)
            if features.shape == (len(source), extractor.dim):
                kept = torch.from_numpy(features)
    if all(_all_of(kept is not None, world)) and kept is not None:
        return kept
    features = _shared(source, extractor, rank, world)
    if file and rank == 0:
        # A full or read-only disk costs time later, not the result now.
        with suppress(WriteError), replacing(file) as part, part.open("wb") as handle:
            np.save(handle, features.numpy())
    return features


def _shared(source: ImageSource, extractor: Extractor, rank: int, world: int) -> Tensor:
    """The same of all parts, put together in the order of the images; one process's error is everyone's."""
    try:
        batches = _feature_batches(source.shard(rank, world), extractor)
        own: Tensor | FewstepError = (
            torch.cat(found) if (found := list(batches)) else torch.empty(0, extractor.dim)
        )
    except FewstepError as error:
        own = error
    if world == 1 and isinstance(own, Tensor):
        return own
    parts = _all_of(own, world)
    if failed := next((part for part in parts if isinstance(part, FewstepError)), None):
        raise failed
    made = {other: part for other, part in enumerate(parts) if len(part)}  # few images, many processes
    features = torch.empty(len(source), next(iter(made.values())).shape[1])
    for other, part in made.items():
        features[part_of(len(source), other, world)] = part
    return features


def _all_of(own: Any, world: int) -> list[Any]:
    """Every process's object, in the order of their ranks."""
    if world == 1:
        return [own]
    import torch.distributed as dist

    everyones: list[Any] = [own] * world
    dist.all_gather_object(everyones, own)
    return everyones


def stream_moments(source: ImageSource, extractor: Extractor) -> Moments:
    """Moments of all features, in memory that does not grow with the number of images."""
    total = Moments.none(extractor.dim)
    for features in _feature_batches(source, extractor):
        total = total + Moments.of(features)
    return total


def shared_moments(source: ImageSource, extractor: Extractor, rank: int, world: int) -> Moments:
    """The same by several processes, which each look at a part and add their moments; every one gets the sum.

    The processes must have joined a group of torch.distributed before.
    """
    own = stream_moments(source.shard(rank, world), extractor)
    return sum(_all_of(own, world), Moments.none(extractor.dim))


def _feature_batches(source: ImageSource, extractor: Extractor) -> Iterator[Tensor]:
    done = 0
    with Bar(f"reading with {extractor.name}", len(source), "images") as bar:
        for prepared in source.prepared(BATCH, extractor.prepare):
            features = extractor.features(prepared)
            if not features.isfinite().all():
                raise FeatureError(
                    f"{source.name}: images {done} to {done + len(features) - 1}, from 0, give features that "
                    f"are not finite with {extractor.name}: look at these images and at the extractor"
                )
            yield features
            done += len(features)
            bar.update(len(features))


def cache_dir() -> Path:
    """`$FEWSTEP_CACHE`, or `fewstep` in the user's cache directory."""
    if own := os.environ.get("FEWSTEP_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fewstep"
