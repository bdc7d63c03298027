"""Export of an autoregressive teacher's student: a pipeline folder; no stock pipeline draws all tokens at once."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..diffusion.student import Sampler
from ..teachers.base import Teacher
from ..teachers.pipelines import hushed
from ..tokens.entries import EntryStudent


def save_token_student(
    teacher: Teacher, student: Sampler, weights: Mapping[str, Tensor], dtype: torch.dtype, folder: Path
) -> dict[str, Any]:
    """The teacher's pipeline with the student in place of its transformer; returns what ``fewstep.json`` says of it."""
    denoiser: Any = student.denoisers[-1]
    net = copy.deepcopy(getattr(denoiser, "net", denoiser)).cpu().float()
    net.load_state_dict(
        {**dict(net.named_buffers()), **{n: v.float() for n, v in weights.items()}}, strict=False
    )
    config = {name: teacher.pipe.config[name] for name in ("temperature", "top_k", "top_p")}
    if isinstance(student, EntryStudent):
        config["entries"] = student.entries
    with hushed():
        parts = {**teacher.pipe.components, "transformer": net.to(dtype)}
        type(teacher.pipe)(**parts, **config).save_pretrained(folder)
    calls = {str(k): {"call": {"num_inference_steps": k}} for k in range(1, student.num_steps + 1)}
    made = {"student": type(net).__name__, **calls[str(student.num_steps)]}
    return made | ({"steps": calls} if len(calls) > 1 else {})  # fewer steps are the first ones
