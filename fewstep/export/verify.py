"""Whether stock diffusers, given the export, makes the trainer's own sample."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..diffusion.student import Sampler
from ..errors import TrainingError
from ..teachers.base import Teacher
from ..teachers.generate import call_pipeline
from ..teachers.pipelines import hushed, size_options, takes
from .load import at_steps, load_exported, stock_call


class ExportError(TrainingError):
    """The export does not reproduce the trainer's own sample."""


@torch.no_grad()
def trainer_sample(student: Sampler, teacher: Teacher, prompts: list[str], seed: int = 0) -> Tensor:
    """Latents as the trainer samples them, in fp32; noise from one CPU generator, in the stock pipeline's layout.

    Training is over by then: the frozen weights are cast up in place, so that nothing but the export is compared.
    """
    with hushed():
        teacher.pipe.to(torch.float32)
    generator = torch.Generator().manual_seed(seed)
    cond = teacher.encode(prompts).to(teacher.device)

    def draw(x: Tensor) -> Tensor:
        return teacher.unpack(torch.randn(len(x), *teacher.stock_shape, generator=generator)).to(x.device)

    noise = draw(torch.empty(len(prompts)))

    denoisers: Sequence[Any] = student.denoisers
    before = [denoiser.autocast for denoiser in denoisers]
    try:
        for denoiser in denoisers:
            denoiser.autocast = None
        return student.sample(noise.to(teacher.device), cond, draw).cpu()
    finally:
        for denoiser, autocast in zip(denoisers, before):
            denoiser.autocast = autocast


@torch.no_grad()
def stock_sample(
    pipe, record: Mapping[str, Any], teacher: Teacher, prompts: list[str], seed: int = 0
) -> Tensor:
    """The same from a stock pipeline, by one ordinary call: latents, or images in [-1, 1] where it gives no latents."""
    generator = torch.Generator().manual_seed(seed)
    call = {**stock_call(pipe, record, []), **size_options(pipe, teacher.resolution)}
    if not takes(teacher.pipe, "latents"):  # it draws the same from the same generator
        images = call_pipeline(pipe, prompts, generator, output_type="np", **call).images
        return torch.from_numpy(images).permute(0, 3, 1, 2) * 2 - 1
    noise = torch.randn(len(prompts), *teacher.stock_shape, generator=generator)
    call["latents"] = noise.to(getattr(pipe, teacher.network).dtype)
    if record.get("noise") == "fixed" and takes(
        teacher.pipe, "callback_on_step_end"
    ):  # every step draws the first noise again
        generator.manual_seed(seed)
        call["callback_on_step_end"] = lambda _pipe, _step, _time, kwargs: (
            generator.manual_seed(seed) and kwargs
        )
    made = call_pipeline(pipe, prompts, generator, output_type="latent", **call).images
    return teacher.unpack(made.float().cpu())


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

    Pipelines that give no latents (DiT, UNet2DModel) are compared in pixels.

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
    if not takes(teacher.pipe, "latents"):
        own = teacher.pixels(own).cpu()
    difference = (stock_sample(pipe, record, teacher, prompts) - own).abs().max().item()
    limit = tolerance if dtype == "float32" else max(tolerance, 0.05 * own.std().item() + tolerance)
    if not difference <= limit:
        raise ExportError(
            f"{folder}: stock diffusers is off the trainer's own sample by {difference:.2e} (allowed {limit:.1e}); "
            "the exported weights or scheduler do not mean what was trained"
        )
    return difference
