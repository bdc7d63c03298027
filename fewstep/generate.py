"""Images from a stock pipeline, one seed per sample: the same image whatever the batch size."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from tqdm import tqdm


def bind_noise(pipe, generator: torch.Generator | Sequence[torch.Generator]) -> None:
    """Lets a pipeline draw the noise of its steps from the generator of its call.

    Stable Diffusion 3's does not hand it to its scheduler, which then draws from torch's global one.
    """
    if type(pipe).__name__ != "StableDiffusion3Pipeline":
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
    for start in tqdm(range(0, len(prompts), batch_size), desc=label, disable=quiet, leave=False):
        chunk = list(prompts[start : start + batch_size])
        generators = [torch.Generator().manual_seed(seed + start + i) for i in range(len(chunk))]
        bind_noise(pipe, generators)
        options = call(generators) if callable(call) else call
        output = pipe(chunk, generator=generators, output_type="np", **options).images
        images.append((output * 255).round().astype(np.uint8))
    return np.concatenate(images), (time.perf_counter() - begin) / len(prompts)
