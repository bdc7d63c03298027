"""Stock pipelines called alike, whatever they are conditioned on; images with one seed per sample."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from ..errors import FewstepError
from ..report.bar import Bar
from .classes import labels_of, num_classes
from .lengths import unsaid
from .pipelines import EDITING, GUIDING, SINGLY, class_of, guided
from .references import Edit, refuse_references
from .transformers import text_length

FORGET = (
    *("StableDiffusion3Pipeline", "FluxPipeline", "DiTPipeline"),
    *("QwenImagePipeline", "QwenImageEditPlusPipeline", "ZImagePipeline"),
    *("ChromaPipeline", "Lumina2Pipeline"),
    *("Flux2Pipeline", "Flux2KleinPipeline", "Krea2Pipeline", "QwenImage21Pipeline"),
    "HiDreamImagePipeline",
)


@unsaid()
def call_pipeline(
    pipe, prompts: Sequence[str], generator: torch.Generator | Sequence[torch.Generator], **options: Any
):
    """One ordinary call of a stock pipeline with texts, with class labels (DiT, UNet2DModel) or with neither; one for
    each row of a pipeline that edits images or reads a text otherwise beside others.

    Args:
        generator: one, or one per prompt; all noise is drawn from it. options: of its call; ``guidance_scale`` is g of
            ``u + g (c - u)`` whatever the pipeline calls it.

    Raises:
        FewstepError: a guidance scale for a pipeline without any, or a prompt that is no class of the network.
    """
    name, prompts = type(pipe).__name__, list(prompts)
    if class_of(pipe) in SINGLY:
        return _each(pipe, prompts, generator, options)
    _bind_noise(pipe, generator)
    refuse_references(name, prompts)
    if name == "DiTPipeline":
        return pipe(labels_of(pipe, prompts), generator=generator, **options)
    if name in ("SanaPipeline", "PixArtAlphaPipeline", "PixArtSigmaPipeline"):
        options.setdefault("max_sequence_length", text_length(pipe))
    if class_of(pipe) in GUIDING and "guidance_scale" in options:
        options |= guided(pipe, options.pop("guidance_scale"), len(prompts))
    if name != "DDPMPipeline":
        return pipe(prompt=prompts, generator=generator, **options)
    scale = options.pop("guidance_scale", 1.0)
    if scale not in (0.0, 1.0):
        raise FewstepError(f"guidance_scale: {scale}: a {name} has no guidance; expected 1")
    if num_classes(pipe):  # the stock pipeline hands on no labels
        labels = torch.tensor(labels_of(pipe, prompts), device=pipe.device)
        pipe.unet.forward = partial(type(pipe.unet).forward, pipe.unet, class_labels=labels)
    return pipe(batch_size=len(prompts), generator=generator, **options)


def _each(pipe, prompts: list[str], generator, options: dict[str, Any]) -> SimpleNamespace:
    """One row at a time, with its references where the pipeline edits."""
    images, edits = [], class_of(pipe) in EDITING
    if not edits:
        refuse_references(class_of(pipe), prompts)
    if "guidance_scale" in options:
        options |= guided(pipe, options.pop("guidance_scale"))
    for i, prompt in enumerate(prompts):
        if edits and not isinstance(prompt, Edit):
            raise FewstepError(
                f"{prompt[:40]!r} has no reference image, which a {class_of(pipe)} edits; give one"
            )
        own = {name: value[i : i + 1] if name == "latents" else value for name, value in options.items()}
        rng = generator if isinstance(generator, torch.Generator) else generator[i]
        _bind_noise(pipe, rng)
        shown = {"image": prompt.images()} if isinstance(prompt, Edit) else {}
        images.append(pipe(prompt=[str(prompt)], generator=rng, **shown, **own).images)
    if isinstance(images[0], torch.Tensor):
        return SimpleNamespace(images=torch.cat(images))
    return SimpleNamespace(images=opaque(np.concatenate(images)))


def opaque(images: np.ndarray) -> np.ndarray:
    """Images (N, H, W, 3) in 0..1, of (N, H, W, 4) with their last channel as what covers white."""
    return images if images.shape[-1] == 3 else 1 - (1 - images[..., :3]) * images[..., 3:]


def _bind_noise(pipe, generator: torch.Generator | Sequence[torch.Generator]) -> None:
    """Lets a pipeline draw the noise of its steps from the generator of its call.

    Those of :data:`FORGET` do not hand it to their scheduler, which then draws from torch's own.
    """
    if type(pipe).__name__ not in FORGET:
        return
    step = type(pipe.scheduler).step
    if "generator" in inspect.signature(step).parameters:
        pipe.scheduler.step = partial(step, pipe.scheduler, generator=generator)


@torch.no_grad()
def generate(
    pipe,
    prompts: Sequence[str],
    call: dict[str, Any] | Callable[[list[torch.Generator]], dict[str, Any]],
    *,
    seed: int = 0,
    batch_size: int = 32,
    label: str = "generating",
    quiet: bool = False,
) -> tuple[np.ndarray, float]:
    """Images uint8 (N, H, W, 3) of N prompts and the seconds each took; sample i uses seed + i for all its noise.

    Args:
        call: arguments of the pipeline, or a function from the generators of a batch to them (see ``stock_call``).
    """
    images, begin = [], time.perf_counter()
    with Bar(label, len(prompts), "images", quiet=quiet) as bar:
        for start in range(0, len(prompts), batch_size):
            chunk = list(prompts[start : start + batch_size])
            generators = [torch.Generator().manual_seed(seed + start + i) for i in range(len(chunk))]
            options = call(generators) if callable(call) else call
            output = call_pipeline(pipe, chunk, generators, output_type="np", **options).images
            images.append((output * 255).round().astype(np.uint8))
            bar.update(len(chunk))
    return np.concatenate(images), (time.perf_counter() - begin) / len(prompts)
