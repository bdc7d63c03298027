"""What ComfyUI has to be set to, for a student to be called there as it was trained."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from ..diffusion.schedules import VP, Flow
from ..diffusion.student import Sampler
from ..teachers.base import Teacher
from ..teachers.origin import RECORD

# Levels of its own table, of which its scheduler `simple` takes every (TABLE / K)-th from the noisiest down.
TABLE = 1000
FLUX = (
    *("FluxPipeline", "ChromaPipeline"),
    "Flux2Pipeline",
    "Flux2KleinPipeline",
    "Krea2Pipeline",
    "QwenImage21Pipeline",
)  # whose shift it tells by its logarithm
FRACTIONS = (
    "QwenImagePipeline",
    "QwenImageEditPlusPipeline",
    "ZImagePipeline",
)  # whose networks it gives times in 0..1, so another node shifts them


def file_name(about: Mapping[str, Any], part: str = "") -> str:
    """Of a student's weights among those of others in one folder: its title, and the expert."""
    words = [str(about.get("title", "student")), part]
    return re.sub(r"[^\w.-]+", "_", "_".join(filter(None, words))) + ".safetensors"


def settings(teacher: Teacher, student: Sampler) -> dict[str, Any]:
    """Sampler, scheduler, steps, cfg and shift; nothing where it knows no such network, or has no such times.

    Its samplers scale the first noise to the level of the first time, and a student is given unit noise, which is the
    same at the noisiest time only.
    """
    schedule, steps = student.schedule, student.num_steps
    sampler = {"fresh": "lcm", "ddim": "euler", "tcd": {0.0: "euler", 1.0: "lcm"}.get(student.eta)}.get(
        student.noise
    )
    if teacher.comfyui is None or sampler is None:
        return {}
    fractions = [1 - int(k * TABLE / steps) / TABLE for k in range(steps)]
    found = {"sampler": sampler, "scheduler": "simple", "steps": steps, "cfg": 1.0}
    if isinstance(schedule, Flow):
        for flow in (schedule.for_steps(steps), schedule):
            if all(abs(t - flow.shifted(u)) < 2e-3 for t, u in zip(student.times, fractions)):
                return {**found, "shift": float(flow.shift)}
        return {}
    if not isinstance(schedule, VP) or schedule.t_max + 1 != TABLE:
        return {}
    return found if all(abs(t + 1 - u * TABLE) < 1.5 for t, u in zip(student.times, fractions)) else {}


def lines(record: Mapping[str, Any]) -> list[str]:
    """Of the model card: which file goes where, and the settings; nothing for networks that it does not know."""
    if "comfyui" not in record:
        return []
    told = record["comfyui"]
    text = [_file(record)]
    if "sampler" not in told:
        text.append("None of its samplers and schedulers calls this student as it was trained.")
        return ["## ComfyUI", "", " ".join(text), ""]
    text.append(
        f"KSampler: steps {told['steps']}, cfg {told['cfg']}, sampler_name `{told['sampler']}`, scheduler "
        f"`{told['scheduler']}`, denoise 1.0."
    )
    if "shift" in told:
        text.append(_shift(record["pipeline_class"], told["shift"]))
    if "experts" in record:
        text.append(
            "Its experts follow one another: a KSampler (Advanced) for each, with the file of that expert, from its "
            f"first step to its last ({', '.join(record['experts'])})."
        )
    return ["## ComfyUI", "", " ".join(text), ""]


def _file(record: Mapping[str, Any]) -> str:
    """Where its files are, and where they go."""
    told, names = record["comfyui"], record["comfyui"]["files"]
    if record["kind"] == "full":
        where = "where it is one file, goes to `models/diffusion_models` as"
        return "; ".join(f"`{source}`, {where} `{name}`" for source, name in names.items()) + "."
    placed = ", ".join(f"`{source}` as `{name}`" for source, name in names.items())
    if told["read"]:
        return f"To `models/loras` go {placed}; strength 1.0.{_beside(record)}"
    return (
        "Names of layers in this LoRA are those of diffusers, most of which it does not read: `fewstep export RUN "
        f"--kohya` writes, with its names, what goes to `models/loras`: {placed}; strength 1.0.{_beside(record)}"
    )


def _beside(record: Mapping[str, Any]) -> str:
    """LoRAs that were merged into the teacher, and are loaded with it."""
    loras = record.get(RECORD, {}).get("loras", [])
    names = [f"`{one['path'].rpartition('/')[2]}` at strength {one['weight']:g}" for one in loras]
    return f" Before it, on the checkpoint, those of its teacher: {', '.join(names)}." if names else ""


def _shift(pipeline_class: str, shift: float) -> str:
    if pipeline_class in FLUX:
        mu = round(math.log(shift), 4)
        guidance = " FluxGuidance: 1.0." if pipeline_class in ("FluxPipeline", "Flux2Pipeline") else ""
        return (
            f"ModelSamplingFlux before it: max_shift and base_shift both {mu}, for its shift is {shift:.4g} whatever "
            f"the size.{guidance}"
        )
    node = "ModelSamplingAuraFlow" if pipeline_class in FRACTIONS else "ModelSamplingSD3"
    return f"{node} before it: shift {shift:.4g}."
