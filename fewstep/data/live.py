"""Prompts encoded beside the training: no cache, however many there are."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from threading import Lock

import torch
from torch import Tensor

from ..teachers.base import Teacher
from ..teachers.lengths import too_long, unsaid
from ..teachers.references import check_references
from .cache import some_of, stored


class Live:
    """Rows of conditions, encoded when they are asked for; as the cache would keep them.

    Args:
        teacher: whose text encoders stay where they are. quiet: says nothing of prompts that lose their end.

    Attributes:
        seconds: that encoding has taken.
    """

    def __init__(self, teacher: Teacher, prompts: Sequence[str], quiet: bool = True):
        check_references(teacher, prompts)
        if not quiet and (cut := too_long(teacher.pipe, some_of(prompts))):
            print(f"fewstep: note: {cut}", file=sys.stderr)
        self.teacher, self.prompts, self.seconds = teacher, prompts, 0.0
        self.lock = Lock()  # a tokenizer serves one thread at a time

    def __len__(self) -> int:
        return len(self.prompts)

    def rows(self, index: Tensor) -> dict[str, Tensor]:
        """(n,) row numbers -> tensors of n rows on the CPU, floating-point ones in fp32."""
        with self.lock, unsaid(), torch.no_grad():
            begin = time.perf_counter()
            rows = stored(self.teacher.encode([self.prompts[i] for i in index.tolist()]), self.teacher)
            self.seconds += time.perf_counter() - begin
        return {n: v.float() if v.is_floating_point() else v for n, v in rows.items()}
