"""Whether stock diffusers, given the export, makes the trainer's own sample."""

from __future__ import annotations

import ast
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
from .load import at_steps, given, load_exported, stock_call
from .target import describe

PIXELS = 0.02  # the same decoder, given the same latents, rounds on


class ExportError(TrainingError):
    """The export does not reproduce the trainer's own sample."""


@torch.no_grad()
def trainer_sample(student: Sampler, teacher: Teacher, prompts: list[str], seed: int = 0) -> Tensor:
    """Latents as the trainer samples them, in fp32; noise from one CPU generator, in the stock pipeline's layout.

    The frozen weights are cast up in place, for good, so that nothing but the export is compared: training is over.
    """
    with hushed():
        teacher.pipe.to(torch.float32)
    if teacher.singly and len(prompts) > 1:  # whose stock call takes one
        return torch.cat([trainer_sample(student, teacher, [p], seed + i) for i, p in enumerate(prompts)])
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
    pipe,
    record: Mapping[str, Any],
    teacher: Teacher,
    prompts: list[str],
    seed: int = 0,
    decoded: bool = False,
) -> Tensor:
    """The same from a stock pipeline, by one ordinary call: latents, or images in [-1, 1] where it gives no latents.

    Args:
        decoded: images in any case.
    """
    if teacher.singly and len(prompts) > 1:
        rows = enumerate(prompts)
        return torch.cat([stock_sample(pipe, record, teacher, [p], seed + i, decoded) for i, p in rows])
    generator = torch.Generator().manual_seed(seed)
    call = {**stock_call(pipe, record, []), **size_options(pipe, teacher.resolution)}
    if teacher.draws_latents:
        noise = torch.randn(len(prompts), *teacher.stock_shape, generator=generator)
        call["latents"] = given(noise, record).to(getattr(pipe, teacher.network).dtype)
        if record.get("noise") == "fixed" and takes(
            teacher.pipe, "callback_on_step_end"
        ):  # every step draws the first noise again
            generator.manual_seed(seed)
            call["callback_on_step_end"] = lambda _pipe, _step, _time, kwargs: (
                generator.manual_seed(seed) and kwargs
            )
        if not decoded:
            made = call_pipeline(pipe, prompts, generator, output_type="latent", **call).images
            return teacher.unpack(made.float().cpu())
    # Without latents it draws the same from the same generator.
    images = call_pipeline(pipe, prompts, generator, output_type="np", **call).images
    return torch.from_numpy(images).permute(0, 3, 1, 2) * 2 - 1


def compared_pixels(
    pipe: Any, record: Mapping[str, Any], teacher: Teacher, prompts: list[str], latents: Tensor
) -> float:
    """The largest difference between the stock pipeline's images, in [-1, 1], and fewstep's decoding of its latents.

    Args:
        latents: of :func:`stock_sample` with the same arguments.

    Raises:
        ExportError: it exceeds what rounding can do.
    """
    vae: Any = getattr(pipe, teacher.autoencoder or "", None)
    sliced = getattr(vae, "use_slicing", None)
    if sliced is not None:  # one image at a time, as fewstep decodes large ones
        vae.use_slicing = True
    theirs, ours = stock_sample(pipe, record, teacher, prompts, decoded=True), teacher.pixels(latents).cpu()
    if sliced is not None:
        vae.use_slicing = sliced
    difference = (theirs - ours).abs().max().item()
    if not difference <= PIXELS:
        raise ExportError(
            f"{teacher.source}: a stock {teacher.pipeline_class} decodes the same latents to images that differ by "
            f"{difference:.2e}, of 2; its VAE has statistics that fewstep reads otherwise"
        )
    return difference


def _check_card(folder: Path, record: Mapping[str, Any]) -> None:
    """The program in the model card calls the pipeline as the export is verified.

    Raises:
        ExportError: it does not.
    """
    code = (folder / "README.md").read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    calls = [
        node
        for node in ast.walk(ast.parse(code))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "pipe"
    ]
    said = {word.arg: word.value for word in calls[-1].keywords if word.arg in record["call"]}
    if {name: ast.literal_eval(value) for name, value in said.items()} != record["call"]:
        raise ExportError(f"README.md: its program does not call the pipeline by {record['call']}")


def verify(
    folder: Path,
    own: Tensor,
    teacher: Teacher,
    prompts: list[str],
    tolerance: float,
    dtype: str,
    base_dtype: str = "float32",
    steps: int | None = None,
    quantization: str | None = None,
) -> float:
    """Loads the export in stock diffusers and compares its latents with the trainer's own, both in fp32.

    Pipelines that give no latents (DiT, UNet2DModel) are compared in pixels. Of others the images are compared too, and
    of the model card its call; of a student of several numbers of steps for the first.

    Args:
        own: of :func:`trainer_sample`. dtype: of the exported weights. base_dtype: of the teacher's while training.
        steps: of a student of several numbers of steps. quantization: of the base while training; it is the stock
            pipeline's too, which :func:`on_the_whole_base` has none of.

    Returns:
        The largest absolute difference.

    Raises:
        ExportError: it exceeds the tolerance; a half-precision export is allowed its rounding (5% of the spread).
    """
    pipe, record = load_exported(folder, teacher.source, base_dtype, upcast=True, quantization=quantization)
    pipe.to(teacher.device)
    first = steps is None or steps == record["num_steps"]
    if first:
        _check_card(folder, record)
    record = at_steps(record, steps)
    if not teacher.draws_latents:
        own = teacher.pixels(own).cpu()
    made = stock_sample(pipe, record, teacher, prompts)
    difference = (made - own).abs().max().item()
    limit = tolerance if dtype == "float32" else max(tolerance, 0.05 * own.std().item() + tolerance)
    if not difference <= limit:
        raise ExportError(
            f"stock diffusers is off the trainer's own sample by {difference:.2e} (allowed {limit:.1e}); the exported "
            "weights or scheduler do not mean what was trained"
        )
    if first and teacher.draws_latents:
        compared_pixels(pipe, record, teacher, prompts, made)
    return difference


def on_the_whole_base(
    folder: Path, own: Tensor, teacher: Teacher, prompts: list[str], base_dtype: str = "float32"
) -> float | None:
    """How far a LoRA that was trained on a base in fewer bits is from itself on the base as it is published.

    That is what a model card's program loads. The number goes into ``fewstep.json`` and the card.

    Args:
        own: of :func:`trainer_sample`, on the base that it was trained on.

    Returns:
        The largest absolute difference of latents over their spread; None for a whole pipeline, which has one base.
    """
    pipe, record = load_exported(folder, teacher.source, base_dtype, upcast=True)
    if record["kind"] != "lora":
        return None
    pipe.to(teacher.device)
    own = own if teacher.draws_latents else teacher.pixels(own).cpu()
    made = stock_sample(pipe, record, teacher, prompts)
    difference = ((made - own).abs().max() / own.std()).item()
    describe(folder, {**record, "trained_on": {**record["trained_on"], "difference": difference}})
    return difference
