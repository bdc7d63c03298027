"""Reading an export back, as the model card's snippet does."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import cycle, repeat
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..diffusion.frozen import keep
from ..errors import FewstepError
from ..methods.router import Router
from ..teachers import load_pipeline
from ..teachers.load import pipeline_type
from ..teachers.origin import Origin
from ..teachers.pipelines import hushed, network_of, takes
from .card import encoding_of
from .routed import RoutedPipeline
from .weights import LORA_FILE, adapters


def load_exported(
    folder: str | Path,
    teacher: str | None = None,
    dtype: str = "float32",
    upcast: bool = False,
    quantization: str | None = None,
):
    """The stock pipeline of an export, exactly as the model card's snippet loads it, and its ``fewstep.json``.

    Args:
        teacher: the base pipeline, if it moved; LoRAs that are merged into it are those of the record.
        dtype: weights are rounded to. upcast: compute in fp32 all the same. quantization: of a LoRA's base, after that,
            as ``teacher.quantization``.

    Raises:
        FewstepError: no export there, or a damaged one.
    """
    folder = Path(folder)
    if not (folder / "fewstep.json").is_file():
        raise FewstepError(
            f"{folder} is no export (no fewstep.json in it); expected RUN/export of a finished run"
        )
    try:
        return _load(folder, read_record(folder), teacher, dtype, upcast, quantization)
    except FewstepError:
        raise
    except Exception as error:  # a file missing or damaged: each loader raises its own kinds
        raise FewstepError(
            f"{folder}: this export cannot be loaded: {error}; export the run again"
        ) from error


def read_record(folder: Path) -> dict[str, Any]:
    """``fewstep.json``, checked: it may come from anywhere, and names folders and a class.

    Raises:
        FewstepError: no JSON, something missing, or a name that leads out of the folder.
    """
    path = folder / "fewstep.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        kinds = {
            "kind": str,
            "num_steps": int,
            "call": dict,
            "scheduler": str,
            "noise": str,
            "network": str,
            "shift": float,
            "encoding": dict,
        }
        wrong = [key for key, kind in kinds.items() if not isinstance(record.get(key, kind()), kind)]
        names = [*record.get("parts", ()), *record.get("experts", ()), record.get("network", "unet")]
        wrong += [name for name in names if not re.fullmatch(r"\w+", name)]
        # A student of tokens has no scheduler.
        stock = record.get("scheduler", "Scheduler").endswith("Scheduler")
        if wrong or not stock or record["kind"] not in ("lora", "full") or record["num_steps"] < 1:
            raise ValueError(f"unexpected {', '.join(map(repr, wrong)) or 'kind or scheduler'}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise FewstepError(f"{path}: is damaged ({error!r}); export the run again") from error
    return record


def _load(
    folder: Path,
    record: dict[str, Any],
    teacher: str | None,
    dtype: str,
    upcast: bool,
    quantization: str | None,
):
    with hushed():
        if record["kind"] == "lora":
            origin = Origin.recorded(record)
            if teacher is None and os.path.isabs(origin.path) and not os.path.exists(origin.path):
                raise FewstepError(
                    f"{folder}: its teacher, {origin.path}, is not there; say where it is with --teacher (in Python "
                    "teacher=), or put it back"
                )
            pipe = load_pipeline(replace(origin, path=teacher or origin.path), dtype)
            keep(network_of(pipe), quantization, offload=False)
        else:
            pipe = _whole(folder, record, dtype)
        if upcast:
            pipe.to(torch.float32)
        if record["kind"] == "lora":
            _adapt(pipe, folder, record)
    pipe.set_progress_bar_config(disable=True)
    if "parts" in record:
        return RoutedPipeline(pipe, Router.load(folder), _chooser(pipe, record), *encoding_of(record)), record
    return pipe, record


def _whole(folder: Path, record: Mapping[str, Any], dtype: str):
    """The pipeline in the folder; of several students the first one's, with the networks of all."""
    options = {"torch_dtype": getattr(torch, dtype), "use_safetensors": True}
    first, *others = record.get("parts", [""])
    place, absent = folder / first / "pipeline", dict.fromkeys(record.get("absent", []))
    kind = json.loads((place / "model_index.json").read_text())[
        "_class_name"
    ]  # SANA's student has a class of its own
    pipe = pipeline_type(kind).from_pretrained(place, **options, **absent)
    name, places = record.get("network", ""), [folder / other for other in _experts(record)[1:]]
    if "parts" in record:
        places = [folder / part / "pipeline" / name for part in others]
    if places:
        net = network_of(pipe)
        more = (type(net).from_pretrained(place, **options) for place in places)
        setattr(pipe, name, Networks([net, *more]))
    return pipe


def _experts(record: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys(record.get("experts", ())))


class Networks(nn.Module):
    """Several networks in the place of a pipeline's one; but for calls, what is asked of it is the first one's.

    Attributes:
        turns: of each call, the place of the network that makes it.
    """

    turns: Iterator[int]

    def __init__(self, networks: Sequence[nn.Module]):
        super().__init__()
        self.networks, self.turns = nn.ModuleList(networks), repeat(0)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.networks[next(self.turns)](*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            networks: Any = super().__getattr__("networks")
            return getattr(networks[0], name)


def _adapt(pipe: Any, folder: Path, record: Mapping[str, Any]) -> None:
    """Gives the teacher's pipeline the export's LoRAs and its scheduler."""
    import diffusers

    for name in adapters(record):
        pipe.load_lora_weights(folder / name, weight_name=LORA_FILE, adapter_name=name or None)
    pipe.scheduler = getattr(diffusers, record["scheduler"]).from_pretrained(folder, subfolder="scheduler")


def _chooser(pipe: Any, record: Mapping[str, Any]) -> Callable[[int], None]:
    """Makes the student of part k the one that is sampled."""
    if record["kind"] == "lora":
        return lambda k: use_adapter(pipe, record["parts"], k)
    return lambda k: setattr(network_of(pipe), "turns", repeat(k))


def use_adapter(pipe: Any, own: Sequence[str], k: int) -> None:
    """Makes one of the student's adapters the active one; others, a user's style, stay as they are, weights too."""
    others = [name for name in pipe.get_active_adapters() if name not in own]
    network_of(pipe).set_adapter([own[k], *others])


def at_steps(record: Mapping[str, Any], steps: int | None) -> dict[str, Any]:
    """The record of a student of several numbers of steps at one of them; None is its first.

    Raises:
        FewstepError: it was not trained for that many.
    """
    if steps is None or steps == record["num_steps"]:
        return dict(record)
    known = record.get("steps", {str(record["num_steps"]): {}})
    if str(steps) not in known:
        raise FewstepError(
            f"--steps {steps}: this student was trained for {', '.join(known)}; leave it out or distill another one"
        )
    return {**record, "num_steps": steps, **known[str(steps)]}


def given(noise: torch.Tensor, record: Mapping[str, Any]) -> torch.Tensor:
    """Noise (B, ...) in the layout that a stock pipeline holds, in which its steps draw theirs -> its ``latents=``."""
    return noise.mT.reshape(len(noise), *record["given_shape"]) if "given_shape" in record else noise


def stock_call(pipe, record: Mapping[str, Any], generators: list[torch.Generator]) -> dict[str, Any]:
    """Arguments of one call of the stock pipeline beside the prompts, as the model card's snippet has them.

    Args:
        generators: one per sample, on the CPU; where the noise is fixed they are used for the latents here.
    """
    call, experts = dict(record["call"]), record.get("experts")
    if experts and record["kind"] == "full":
        names, experts = _experts(record), None
        network_of(pipe).turns = cycle([names.index(name) for name in record["experts"]])
    states = [generator.get_state() for generator in generators]
    # Every step adds the first noise again. Pipelines without latents have one step, which adds none.
    again = record.get("noise") == "fixed" and bool(generators) and takes(pipe, "latents")

    def rewind() -> None:
        for generator, state in zip(generators, states):
            generator.set_state(state)

    def after(pipe, step, _time, kwargs):
        if experts:
            use_adapter(pipe, experts, (step + 1) % len(experts))
        if again:
            rewind()
        return kwargs

    if experts:
        use_adapter(pipe, experts, 0)
    if again:
        latents = [torch.randn(1, *record["latent_shape"], generator=g) for g in generators]
        call["latents"] = given(torch.cat(latents), record).to(pipe.device, network_of(pipe).dtype)
        rewind()
    if experts or again:
        call["callback_on_step_end"] = after
    return call
