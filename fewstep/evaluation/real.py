"""Real images that a run's samples are compared with: each is read when it is wanted, and none is kept.

Of a recipe with ``data.shapes`` they are the images of every shape as training has them: each belongs to the shape of
the nearest proportions, and is cropped and resized to it. The reference holds as many of each shape as its share of the
samples says, so that like mixtures are compared; features are of each image at its own shape, resized as the extractor
does.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby, islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.buckets import homes_of
from ..data.cache import sizes_of
from ..data.images import CaptionedImages, name_of, size_at
from ..data.left_out import BadRecord
from ..diffusion.rng import Rng
from ..errors import RecipeError
from ..shape import Shape, Size
from .images import BLOCK, ArrayImages, ImageSource
from .mixture import Mixture, counted

LEAST = 2  # images to compare with


class RealImages(ImageSource):
    """Images of a captioned set, each of them cropped and resized to its shape whenever it is read.

    Args:
        images: the set, all of which can be used. shapes: of each. sha256: of their pixels.
        note: what one should know of them.
    """

    def __init__(
        self, images: CaptionedImages, shapes: Sequence[Shape], name: str, sha256: str, note: str = ""
    ):
        self.images, self.shapes, self.name, self.note = images, list(shapes), name, note
        self.sizes = {(one.height, one.width) for one in {*shapes}}
        vars(self)["sha256"] = sha256  # known from the first look at them

    def __len__(self) -> int:
        return len(self.shapes)

    def batches(self, size: int) -> Iterator[Tensor]:
        for _, some in groupby(self._each(), lambda image: image.shape):
            waiting: list[np.ndarray] = []
            for image in some:
                waiting.append(image)
                if len(waiting) == size:
                    yield torch.from_numpy(np.stack(waiting))
                    waiting = []
            if waiting:
                yield torch.from_numpy(np.stack(waiting))

    def _each(self) -> Iterator[np.ndarray]:
        for _, image in loaded(self.images, range(len(self)), self.shapes):
            if isinstance(image, BadRecord):  # it could be used when the set was looked at
                raise image
            yield image

    def read_as(self, reading: str) -> ImageSource:
        """They are pixels already."""
        other = copy.copy(self)
        other.reading = reading
        return other

    @property
    def remarks(self) -> list[str]:
        return [self.note] if self.note else []


def loaded(
    images: CaptionedImages, records: Sequence[int], shapes: Sequence[Shape]
) -> Iterator[tuple[int, np.ndarray | BadRecord]]:
    """Records in their order, each at the shape of its place, or why it cannot be used; threads read a block ahead of
    whoever looks at it, and no more."""

    def load(record: int, shape: Shape) -> np.ndarray | BadRecord:
        try:
            return images.load(record, shape.said)
        except BadRecord as error:
            return error

    with ThreadPoolExecutor() as pool:
        for start in range(0, len(records), BLOCK):
            some = records[start : start + BLOCK]
            yield from zip(some, pool.map(load, some, shapes[start : start + BLOCK]))


def real_images(
    images: CaptionedImages, size: Size, data: Any, mixture: Mixture | None = None, seed: int = 0
) -> tuple[CaptionedImages, ImageSource]:
    """What a run's samples are compared with: those that can be used, by shapes in the order of the recipe's, and their
    pixels. All are read once, to find what cannot be used.

    Args:
        size: of the samples, unless there is a mixture. data: of the recipe. seed: of which are taken, where more are
            there of a shape than its share.

    Raises:
        RecipeError: more cannot be used than ``data.max_bad`` allows, or a shape has none.
    """
    one = Shape.of(size)
    if mixture is None and isinstance(images.files, np.ndarray) and images.files.shape[1:3] == one:
        return images, ArrayImages(images.files, data.images)
    homes = _homes(images, mixture)
    shapes = mixture.shapes if mixture else (one,)
    digests: dict[int, bytes] = {}
    records = [record for record in range(len(images.files)) if record not in images.left_out.reasons]
    for record, image in loaded(images, records, [shapes[homes[record]] for record in records]):
        if isinstance(image, BadRecord):
            images.left_out.add(record, name_of(images.files[record]), str(image))
        else:
            digests[record] = hashlib.sha256(np.ascontiguousarray(image).data).digest()
    of_shape = [[record for record in digests if homes[record] == k] for k in range(len(shapes))]
    _check(images, shapes, [len(some) for some in of_shape])
    kept, note = of_shape, ""
    if mixture and (quota := _quota(mixture, homes, [len(some) for some in of_shape])):
        kept = [_some(some, count, seed) for some, count in zip(of_shape, quota)]
        told = counted({str(shape): len(some) for shape, some in zip(shapes, kept)})
        note = (
            f"of {len(digests)} images of {data.images} the reference holds {told}, as many as the shares say"
        )
    order = [(record, shape) for shape, some in zip(shapes, kept) for record in some]
    whole = hashlib.sha256("".join(map(str, (shape for _, shape in order))).encode())
    for record, _ in order:
        whole.update(digests[record])
    chosen = [record for record, _ in order]
    used = images if chosen == list(range(len(images.files))) else images.part(chosen)
    return used, RealImages(used, [shape for _, shape in order], data.images, whole.hexdigest(), note)


def check_real(images: CaptionedImages, size: Size, mixture: Mixture | None) -> None:
    """Refuses, at the start of a run and by the headers of the files, images of which too many are too small to be
    compared with; what is found is left out.

    Raises:
        RecipeError: as :func:`real_images`, with names.
    """
    if isinstance(images.files, np.ndarray):
        return
    homes, shapes = _homes(images, mixture), mixture.shapes if mixture else (Shape.of(size),)
    usable = [0] * len(shapes)
    for record, found in enumerate(sizes_of(images)):
        if record in images.left_out.reasons:
            continue
        if found and (reason := images.too_small(found, shapes[homes[record]])):
            images.left_out.reasons[record] = name_of(images.files[record]), reason
        else:
            usable[homes[record]] += 1
    images.left_out.check()
    _check(images, shapes, usable)


def check_enough(images: CaptionedImages, size: Size) -> None:
    """Refuses, at the start of a run that trains on these images, fewer than can be compared with; by the headers of as
    few files as it takes.

    Raises:
        RecipeError: as :func:`real_images`.
    """
    records = (record for record in range(len(images.files)) if record not in images.left_out.reasons)
    if not isinstance(images.files, np.ndarray):
        records = (
            record
            for record in records
            if (found := size_at(images, record)) and not images.too_small(found, size)
        )
    _check(images, [Shape.of(size)], [len(list(islice(records, LEAST)))])


def _homes(images: CaptionedImages, mixture: Mixture | None) -> list[int]:
    """Number of the shape of each record."""
    return homes_of(sizes_of(images), mixture.shapes) if mixture else [0] * len(images.files)


def _check(images: CaptionedImages, shapes: Sequence[Shape], usable: Sequence[int]) -> None:
    for shape, count in zip(shapes, usable):
        if not count and len(shapes) > 1:
            raise RecipeError(
                f"data.shapes: {shape.said}: none of the {len(images.files)} images of {images.source} is nearest to "
                "its proportions and can be used, to compare samples with; add such images, or leave this shape out"
            )
    if sum(usable) < LEAST:
        raise RecipeError(
            f"data.images: {images.source}: {sum(usable)} of {len(images.files)} images can be used at "
            f"{' and '.join(map(str, shapes))} pixels, to compare samples with; expected at least {LEAST}: add larger "
            "ones, set data.upscale, or data.images null"
        )


def _quota(mixture: Mixture, homes: Sequence[int], usable: Sequence[int]) -> list[int] | None:
    """How many images of each shape make a reference of these shares; None for all, where the shares are as the images
    are."""
    there = [float(homes.count(k)) for k in range(len(mixture.shapes))]
    if [share / mixture.shares[0] for share in mixture.shares] == [count / there[0] for count in there]:
        return None
    most = min(count / share for count, share in zip(usable, mixture.shares))
    return [max(1, int(most * share + 1e-9)) for share in mixture.shares]


def _some(records: Sequence[int], count: int, seed: int) -> list[int]:
    order = Rng(seed, "reference").permutation(len(records)).tolist()
    return sorted(records[i] for i in order[:count])
