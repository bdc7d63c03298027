"""Reading an export back, as the model card's snippet does."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import FewstepError
from ..router import RoutedPipeline, Router
from ..teachers import hushed, load_pipeline, pipeline_type
from ..teachers.base import network_of
from .weights import LORA_FILE, adapters


def load_exported(
    folder: str | Path, teacher: str | None = None, dtype: str = "float32", upcast: bool = False
):
    """The stock pipeline of an export, exactly as the model card's snippet loads it, and its ``fewstep.json``.

    Args:
        teacher: the base pipeline, if it moved. dtype: weights are rounded to. upcast: compute in fp32 all the same.

    Raises:
        FewstepError: no export there.
    """
    import diffusers

    folder = Path(folder)
    if not (folder / "fewstep.json").is_file():
        raise FewstepError(
            f"{folder} is no export (no fewstep.json in it); expected RUN/export of a finished run"
        )
    record = json.loads((folder / "fewstep.json").read_text())
    lora = record["kind"] == "lora"
    with hushed():
        if lora:
            pipe = load_pipeline(teacher or record["teacher"], dtype)
        else:
            pipe = pipeline_type(record["pipeline_class"]).from_pretrained(
                folder / "pipeline",
                torch_dtype=getattr(torch, dtype),
                **dict.fromkeys(record.get("absent", [])),
            )
        if upcast:
            pipe.to(torch.float32)
        if lora:
            for name in adapters(record):
                pipe.load_lora_weights(folder / name, weight_name=LORA_FILE, adapter_name=name or None)
            scheduler = getattr(diffusers, record["scheduler"])
            pipe.scheduler = scheduler.from_pretrained(folder, subfolder="scheduler")
    pipe.set_progress_bar_config(disable=True)
    if "parts" in record:
        pipe = RoutedPipeline(pipe, Router.load(folder), record["parts"])
    return pipe, record


def stock_call(pipe, record: Mapping[str, Any], generators: list[torch.Generator]) -> dict[str, Any]:
    """Arguments of one call of the stock pipeline beside the prompts, as the model card's snippet has them.

    Args:
        generators: one per sample, on the CPU; where the noise is fixed they are used for the latents here.
    """
    call, experts = dict(record["call"]), record.get("experts")
    states = [generator.get_state() for generator in generators]
    again = record.get("noise") == "fixed" and bool(generators)  # every step adds the first noise again

    def rewind() -> None:
        for generator, state in zip(generators, states):
            generator.set_state(state)

    def after(pipe, step, _time, kwargs):
        if experts:
            pipe.set_adapters(experts[(step + 1) % len(experts)])
        if again:
            rewind()
        return kwargs

    if experts:
        pipe.set_adapters(experts[0])
    if again:
        latents = [torch.randn(1, *record["latent_shape"], generator=g) for g in generators]
        call["latents"] = torch.cat(latents).to(pipe.device, network_of(pipe).dtype)
        rewind()
    if experts or again:
        call["callback_on_step_end"] = after
    return call
