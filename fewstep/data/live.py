"""Prompts and images encoded beside the training: no cache, however many there are."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from threading import Lock
from typing import ClassVar

import torch
from torch import Tensor

from ..diffusion.cond import Cond
from ..teachers.base import Teacher
from ..teachers.lengths import too_long, unsaid
from ..teachers.references import check_references
from .cache import BATCH, images_folder, some_of, stored
from .images import CaptionedImages
from .left_out import FILE


class Live:
    """Rows of conditions, encoded when they are asked for; as the cache would keep them.

    Args:
        teacher: whose text encoders stay where they are. quiet: says nothing of prompts that lose their end.
    """

    lock: ClassVar[Lock] = Lock()  # of prompts and captions alike: a tokenizer serves one thread at a time

    def __init__(self, teacher: Teacher, prompts: Sequence[str], quiet: bool = True):
        check_references(teacher, prompts)
        if not quiet and (cut := too_long(teacher.pipe, some_of(prompts))):
            print(f"fewstep: note: {cut}", file=sys.stderr)
        self.teacher, self.prompts = teacher, prompts

    def __len__(self) -> int:
        return len(self.prompts)

    def rows(self, index: Tensor) -> dict[str, Tensor]:
        """(n,) row numbers -> tensors of n rows on the CPU, floating-point ones in fp32; encoded as many at a time as
        for the cache, for a router reads a thousand."""
        with self.lock, unsaid(), torch.no_grad():
            parts = [
                self.teacher.encode([self.prompts[i] for i in part.tolist()]) for part in index.split(BATCH)
            ]
            rows = stored(Cond.cat(*parts), self.teacher)
        return {n: v.float() if v.is_floating_point() else v for n, v in rows.items()}


class LiveImages:
    """Rows of scaled latents, encoded when they are asked for; ``row`` is the image that each of them is.

    The VAE's posterior is drawn anew each time, as the rows that are asked for together decide, so that a run that goes
    on draws the same.
    """

    def __init__(self, teacher: Teacher, images: CaptionedImages):
        self.teacher, self.images = teacher, images
        images.left_out.keep(images_folder(teacher, images) / FILE)

    def __len__(self) -> int:
        return len(self.images)

    def rows(self, index: Tensor) -> dict[str, Tensor]:
        """(n,) numbers of images -> latents (n, C, h, w) in fp32 on the CPU, and row (n,).

        Raises:
            RecipeError: too many are of no use. ReadError: one is gone.
        """
        found = [self.images.sound(i, self.teacher.resolution) for i in index.tolist()]
        pixels = torch.stack([torch.tensor(image) for _, image in found])
        generator = torch.Generator().manual_seed(int(index[0]))
        with torch.no_grad():
            latents = self.teacher.latents(pixels, generator)
        return {"latents": latents.to("cpu", torch.float32), "row": torch.tensor([row for row, _ in found])}
