"""Whether stock diffusers, given the export, makes the trainer's own sample."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import TrainingError
from ..generate import bind_noise
from ..router import RoutedStudent
from ..student import Student
from ..teachers import hushed
from ..teachers.base import Teacher, size_options
from .load import at_steps, load_exported, stock_call


class ExportError(TrainingError):
    """The export does not reproduce the trainer's own sample."""


@torch.no_grad()
def trainer_sample(
    student: Student | RoutedStudent, teacher: Teacher, prompts: list[str], seed: int = 0
) -> Tensor:
    """Latents as the trainer samples them, in fp32; noise from one CPU generator.

    Training is over by then: the frozen weights are cast up in place, so that nothing but the export is compared.
    """
    with hushed():
        teacher.pipe.to(torch.float32)
    generator = torch.Generator().manual_seed(seed)
    cond = teacher.encode(prompts).to(teacher.device)
    noise = torch.randn(len(prompts), *teacher.latent_shape, generator=generator)

    def draw(x: Tensor) -> Tensor:
        return torch.randn(x.shape, generator=generator).to(x.device)

    before = [denoiser.autocast for denoiser in student.denoisers]
    try:
        for denoiser in student.denoisers:
            denoiser.autocast = None
        return student.sample(noise.to(teacher.device), cond, draw).cpu()
    finally:
        for denoiser, autocast in zip(student.denoisers, before):
            denoiser.autocast = autocast


@torch.no_grad()
def stock_sample(
    pipe, record: Mapping[str, Any], teacher: Teacher, prompts: list[str], seed: int = 0
) -> Tensor:
    """The same latents from a stock pipeline: one ordinary call."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(len(prompts), *teacher.latent_shape, generator=generator)
    call = {
        **stock_call(pipe, record, []),
        **size_options(pipe, teacher.resolution),
        "latents": noise.to(getattr(pipe, teacher.network).dtype),
        "generator": generator,
    }
    bind_noise(pipe, generator)
    if record.get("noise") == "fixed":  # every step draws the first noise again
        generator.manual_seed(seed)
        call["callback_on_step_end"] = lambda _pipe, _step, _time, kwargs: (
            generator.manual_seed(seed) and kwargs
        )
    return pipe(prompts, output_type="latent", **call).images.float().cpu()


def verify(
    folder: Path,
    own: Tensor,
    teacher: Teacher,
    prompts: list[str],
    tolerance: float,
    dtype: str,
    base_dtype: str = "float32",
    steps: int | None = None,
) -> float:
    """Loads the export in stock diffusers and compares its latents with the trainer's own, both in fp32.

    Args:
        own: of :func:`trainer_sample`. dtype: of the exported weights. base_dtype: of the teacher's while training.
        steps: of a student of several numbers of steps.

    Returns:
        The largest absolute difference.

    Raises:
        ExportError: it exceeds the tolerance; a half-precision export is allowed its rounding (5% of the spread).
    """
    pipe, record = load_exported(folder, teacher.source, base_dtype, upcast=True)
    pipe.to(teacher.device)
    record = at_steps(record, steps)
    difference = (stock_sample(pipe, record, teacher, prompts) - own).abs().max().item()
    limit = tolerance if dtype == "float32" else max(tolerance, 0.05 * own.std().item() + tolerance)
    if not difference <= limit:
        raise ExportError(
            f"{folder}: stock diffusers is off the trainer's own sample by {difference:.2e} (allowed {limit:.1e}); "
            "the exported weights or scheduler do not mean what was trained"
        )
    return difference
