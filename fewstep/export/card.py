"""The model card, and the code in it that samples the student with stock diffusers."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

from .weights import LORA_FILE, adapters

# Finds the adapter of a prompt in the tree of fewstep.methods.router.Router; ENCODED is what it was fitted on.
ROUTE = """
with open({tree!r}) as file:
    children = json.load(file)["children"]
router = load_file({tensors!r})

def route(prompt):
    encoded = pipe.encode_prompt(
        prompt, device=pipe.device, num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    sides = router["directions"] @ {encoded}.double().cpu() > router["thresholds"]
    node = 0
    while node >= 0:  # to the half of the prompts on this side, and so on down to one part
        node = children[node][int(sides[node])]
    return {parts}[-node - 1]
"""
ENCODED = {"pooled": "encoded[2][0]", "embeds": "encoded[0][0].mean(0)"}


def snippet(record: Mapping[str, Any], folder: str = ".") -> str:
    """Code that samples the student with stock diffusers, as it stands."""
    call = ", ".join(f"{name}={value!r}" for name, value in record["call"].items())
    if "student" in record:  # of tokens
        return "\n".join(
            [
                f"from fewstep.tokens.pipeline import {record['pipeline_class']}",
                "",
                f"pipe = {record['pipeline_class']}.from_pretrained({os.path.join(folder, 'pipeline')!r})",
                f"image = pipe({record.get('prompt', '207')!r}, {call}).images[0]",
                "image.save('image.png')",
            ]
        )
    builtin = str(record["teacher"]).startswith("builtin:")
    teacher = "resolve(" + repr(record["teacher"]) + ")" if builtin else repr(record["teacher"])
    scheduler, experts, parts = record["scheduler"], record.get("experts"), record.get("parts")
    without = "".join(f", {name}=None" for name in record.get("absent", []))
    lora, fixed = record["kind"] == "lora", record["noise"] == "fixed"
    lines = ["import torch"] if fixed else ["import json", ""] if parts else []
    lines += [f"from diffusers import DiffusionPipeline{f', {scheduler}' if lora else ''}"]
    if builtin and lora:
        lines.append("from fewstep.teachers import resolve  # only for the folder of the built-in teacher")
    if parts:
        lines.append("from safetensors.torch import load_file")
    lines.append("")
    if lora:
        lines.append(f"pipe = DiffusionPipeline.from_pretrained({teacher}{without})")
        for name in adapters(record):
            where = os.path.join(folder, name) if name else folder
            adapter = f", adapter_name={name!r}" if name else ""
            lines.append(f"pipe.load_lora_weights({where!r}, weight_name={LORA_FILE!r}{adapter})")
        lines.append(f"pipe.scheduler = {scheduler}.from_pretrained({folder!r}, subfolder='scheduler')")
    else:
        where = os.path.join(folder, parts[0] if parts else "", "pipeline")
        lines.append(f"pipe = DiffusionPipeline.from_pretrained({where!r}{without})")
        if parts:
            name = record["network"]
            load = f"type(pipe.{name}).from_pretrained(f'{folder}/{{part}}/pipeline', subfolder={name!r})"
            lines.append(f"networks = {{part: {load} for part in {parts}}}")
    if experts:
        lines += [
            "",
            f"experts = {experts}  # of each step",
            "def switch(pipe, step, time, kwargs):",
            "    pipe.set_adapters(experts[(step + 1) % len(experts)])",
            "    return kwargs",
            "",
            "pipe.set_adapters(experts[0])",
        ]
        call += ", callback_on_step_end=switch"
    if fixed:
        lines += [
            "",
            f"noise = torch.randn(1, *{record['latent_shape']}, generator=torch.Generator().manual_seed(0))",
            "generator = torch.Generator().manual_seed(0)  # every step adds the first noise again",
            "def again(pipe, step, time, kwargs):",
            "    generator.manual_seed(0)",
            "    return kwargs",
            "",
        ]
        call += ", latents=noise, generator=generator, callback_on_step_end=again"
    prompt = repr(record.get("prompt", "a photo of a cat"))
    if record["pipeline_class"] == "DDPMPipeline":  # hands on no labels
        if "num_classes" in record:
            lines = [
                "from functools import partial",
                "",
                "import torch",
                *lines,
                f"pipe.unet.forward = partial(pipe.unet.forward, class_labels=torch.tensor([{_label(record)}]))",
            ]
        prompt = "batch_size=1"
    elif "num_classes" in record:
        prompt = f"[{_label(record)}]"
    if parts:
        files = {
            "tree": os.path.join(folder, "router.json"),
            "tensors": os.path.join(folder, "router.safetensors"),
        }
        encoded = ENCODED[record["routed_on"]]
        lines += [ROUTE.format(**files, encoded=encoded, parts=parts), f"prompt = {prompt}"]
        lines.append(
            "pipe.set_adapters(route(prompt))"
            if lora
            else f"pipe.{record['network']} = networks[route(prompt)]"
        )
        prompt = "prompt"
    lines += [f"image = pipe({prompt}, {call}).images[0]", "image.save('image.png')"]
    return "\n".join(lines)


def _label(record: Mapping[str, Any]) -> str:
    prompt = str(record.get("prompt", "0"))
    return prompt if prompt.isdecimal() else f"pipe.labels[{prompt!r}]"


def _task(record: Mapping[str, Any]) -> str:
    """The hub's name for what the pipeline does; it has none for class labels."""
    unprompted = record["pipeline_class"] == "DDPMPipeline" or "num_classes" in record
    return "unconditional-image-generation" if unprompted else "text-to-image"


def _about_scheduler(record: Mapping[str, Any]) -> str:
    if "scheduler" not in record:
        return ""
    return (
        f" Trained timesteps {record['timesteps']}. The scheduler's configuration is complete: load it with "
        f"`{record['scheduler']}.from_pretrained`, not with `from_config` of another scheduler."
    )


def model_card(record: Mapping[str, Any]) -> str:
    """README.md with the front matter the hub reads."""
    steps = record["num_steps"]
    plural = "step" if steps == 1 else "steps"
    several = (
        [
            f"It is {len(record['parts'])} students, each for a part of the prompts; the router, a tree of half-spaces "
            "of the prompt's embedding, says whose a prompt is. Each folder `part_k` is an export of its own.",
            "",
        ]
        if "parts" in record
        else []
    )
    front = [
        "---",
        f"base_model: {json.dumps(record['teacher'])}",
        f"base_model_relation: {'adapter' if record['kind'] == 'lora' else 'finetune'}",
        "library_name: diffusers",
        f"pipeline_tag: {_task(record)}",
        f"tags: [fewstep, {record['method']}{', lora' if record['kind'] == 'lora' else ''}]",
        "---",
    ]
    return "\n".join(
        [
            *front,
            f"# {record.get('title', 'student')}",
            "",
            f"A {steps}-{plural} student of `{record['teacher']}`, distilled with {record['method']} by fewstep "
            f"{record['fewstep']} (recipe {record.get('recipe', 'unknown')}).",
            "",
            *several,
            "Run in this folder:",
            "",
            "```python",
            snippet(record),
            "```",
            "",
            f"No guidance at sampling (the teacher's, {record.get('guidance_scale', 1.0)}, is distilled in)."
            + _about_scheduler(record),
            "",
        ]
    )
