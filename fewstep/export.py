"""Export: a folder that stock diffusers loads, whose numbers are checked before anyone else trusts them.

    pytorch_lora_weights.safetensors   PEFT keys, alpha folded into B (alpha == rank), adapter metadata beside it
    scheduler/scheduler_config.json    complete; its defaults already give the trained timesteps
    fewstep.json                       steps, timesteps, guidance, method, recipe hash, teacher
    README.md                          model card with a snippet that runs as it stands
    kohya/fewstep.safetensors          on request: keys of ComfyUI and A1111

A fully trained student is a whole pipeline under ``pipeline/`` instead of the LoRA file. Several students, each for
a part of the prompts, are a folder ``part_k/`` of this kind each, and a router beside them.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import __version__
from .errors import FewstepError, RecipeError
from .roles import RoleConfig
from .router import RoutedPipeline, RoutedStudent, Router
from .student import Student, uniform_times
from .teachers import hushed, load_pipeline
from .teachers.base import Teacher

LORA_FILE = "pytorch_lora_weights.safetensors"


class ExportError(FewstepError):
    """The export does not reproduce the trainer's own sample."""


# ------------------------------------------------------------------------------------------------------- scheduler
def student_scheduler(teacher_scheduler, times: list[int], noise: str = "fresh"):
    """A stock scheduler that samples as the student was trained, and the call it needs.

    Fresh (and fixed) noise is ``LCMScheduler``; ``original_inference_steps`` and the length of the table are set such
    that ``num_inference_steps=K`` alone gives the trained times, and only an uneven grid needs ``timesteps=`` at the
    call. Deterministic steps are ``DDIMScheduler``.

    Returns:
        (scheduler, call): call holds the arguments of the pipeline's ``__call__`` beside the prompt.

    Raises:
        RecipeError: deterministic steps on an uneven grid, which no stock scheduler takes.
    """
    from diffusers import DDIMScheduler, LCMScheduler

    config = teacher_scheduler.config
    steps, start = len(times), int(times[0])
    even = (start + 1) % steps == 0 and list(times) == uniform_times(steps, start)
    table: dict[str, Any] = {
        key: config[key]
        for key in ("beta_start", "beta_end", "beta_schedule", "num_train_timesteps")
        if key in config
    }
    length = start + 1 if even else len(teacher_scheduler.alphas_cumprod)
    if length != config.num_train_timesteps or config.get("trained_betas") is not None or _rescaled(config):
        cumulative = teacher_scheduler.alphas_cumprod.double()[:length]
        ratio = cumulative / torch.cat([torch.ones(1, dtype=torch.float64), cumulative[:-1]])
        table = {"trained_betas": (1 - ratio).tolist(), "num_train_timesteps": length}
    table |= {
        "prediction_type": config.get("prediction_type", "epsilon"),
        "clip_sample": False,
        "set_alpha_to_one": True,
    }
    call: dict[str, Any] = {"num_inference_steps": steps, "guidance_scale": 0.0}
    if noise == "ddim":
        if not even:
            raise RecipeError(
                f"method.times: {list(times)}: stock schedulers take deterministic steps on an even grid only; use "
                f"num_steps and start, e.g. {uniform_times(steps, steps * max(1, round(start / steps)) - 1)}"
            )
        return DDIMScheduler(**table, timestep_spacing="trailing"), call
    scheduler = LCMScheduler(
        **table,
        original_inference_steps=steps if even else 50,
        # LCM blends x_t into x0 with a weight of 0.25 / (scaling t)^2; students here are pure x0 predictors.
        timestep_scaling=1e6,
    )
    if not even:
        call = {"timesteps": [int(t) for t in times], "guidance_scale": 0.0}
    return scheduler, call


def _rescaled(config) -> bool:
    return bool(config.get("rescale_betas_zero_snr"))


# ---------------------------------------------------------------------------------------------------------- weights
def lora_state_dict(weights: Mapping[str, Tensor], config: RoleConfig) -> dict[str, Tensor]:
    """PEFT keys with the strength ``alpha / rank`` folded into B, so that no reader can lose it."""
    scale = config.alpha / config.rank
    folded = {}
    for name, value in weights.items():
        value = value.float() * scale if ".lora_B." in name else value.float()
        folded[name.replace(".default.", ".")] = value.contiguous()
    return folded


def _save_lora(
    teacher: Teacher, state: dict[str, Tensor], config: RoleConfig, dtype: torch.dtype, folder: Path
) -> None:
    from peft import LoraConfig

    lora = LoraConfig(r=config.rank, lora_alpha=config.rank, target_modules=list(config.targets))
    type(teacher.pipe).save_lora_weights(
        folder,
        **{
            f"{teacher.lora_prefix}_lora_layers": {k: v.to(dtype) for k, v in state.items()},
            f"{teacher.lora_prefix}_lora_adapter_metadata": lora.to_dict(),
        },
    )


def _save_kohya(teacher: Teacher, state: dict[str, Tensor], dtype: torch.dtype, path: Path) -> None:
    from diffusers.utils import convert_state_dict_to_kohya
    from safetensors.torch import save_file

    prefixed = {f"{teacher.lora_prefix}.{name}": value.to(dtype) for name, value in state.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in convert_state_dict_to_kohya(prefixed).items()}, path)


# ---------------------------------------------------------------------------------------------------------- export
def export_student(
    folder: Path,
    teacher: Teacher,
    student: Student,
    weights: Mapping[str, Mapping[str, Tensor]],
    role: RoleConfig,
    *,
    about: Mapping[str, Any],
    dtype: str = "float32",
    kohya: bool = False,
) -> Path:
    """Writes the export folder beside and renames it; replaces an older export.

    Args:
        weights: trained tensors by the names of the role, for every role of the student; more than one are experts and
            get a folder each. role: how they were trained. about: method, recipe hash, title and the like for
            ``fewstep.json`` and the model card.
    """
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    precision = getattr(torch, dtype)
    scheduler, call = student_scheduler(teacher.pipe.scheduler, student.times, student.noise)
    scheduler.save_pretrained(part / "scheduler")
    experts = student.roles if len(weights) > 1 else None
    for name, tensors in weights.items():
        if role.kind == "lora":
            state, target = lora_state_dict(tensors, role), part / name if experts else part
            _save_lora(teacher, state, role, precision, target)
            if kohya:
                _save_kohya(teacher, state, precision, target / "kohya" / "fewstep.safetensors")
        else:
            _save_pipeline(teacher, tensors, scheduler, precision, part / "pipeline")
    record = {
        "fewstep": __version__,
        **about,
        "teacher": teacher.source,
        "pipeline_class": teacher.pipeline_class,
        "kind": role.kind,
        "num_steps": len(student.times),
        "timesteps": [int(t) for t in student.times],
        "noise": student.noise,
        "call": call,
        "scheduler": type(scheduler).__name__,
        "resolution": teacher.resolution,
        "latent_shape": list(teacher.latent_shape),
        "dtype": dtype,
    }
    if experts:
        record["experts"] = experts
    (part / "fewstep.json").write_text(json.dumps(record, indent=1))
    (part / "README.md").write_text(model_card(record))
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(part, folder)
    return folder


def export_routed(
    folder: Path,
    teacher: Teacher,
    student: RoutedStudent,
    weights: Mapping[str, Mapping[str, Tensor]],
    configs: Mapping[str, RoleConfig],
    **options: Any,
) -> Path:
    """Writes ``part_k/``, each an export of one student, and the router with a model card of the whole.

    Args:
        weights, configs: trained tensors and how they were trained, by role. options: as of :func:`export_student`.
    """
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    names = [f"part_{k + 1}" for k in range(len(student.students))]
    for name, role, one in zip(names, student.roles, student.students):
        export_student(part / name, teacher, one, {role: weights[role]}, configs[role], **options)
    shutil.copytree(part / names[0] / "scheduler", part / "scheduler")
    student.router.save(part)
    record = json.loads((part / names[0] / "fewstep.json").read_text())
    record |= {"parts": names, "routed_on": student.router.feature}
    (part / "fewstep.json").write_text(json.dumps(record, indent=1))
    (part / "README.md").write_text(model_card(record))
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(part, folder)
    return folder


def check_exportable(student: Student | RoutedStudent, role: RoleConfig, teacher_scheduler) -> None:
    """Refuses, before training, what no stock pipeline could sample."""
    student_scheduler(teacher_scheduler, student.times, student.noise)
    if len(set(student.roles)) > 1 and role.kind != "lora":
        raise RecipeError(
            f"roles.student.kind: {role.kind}: several students share one pipeline as LoRAs that are switched; use lora"
        )


def _save_pipeline(
    teacher: Teacher, weights: Mapping[str, Tensor], scheduler, dtype: torch.dtype, folder: Path
) -> None:
    """The stock pipeline with the student's network and scheduler in place of the teacher's."""
    import copy

    net = copy.deepcopy(teacher.net).cpu().float()
    buffers = dict(net.named_buffers())  # never trained, so they stay the teacher's
    net.load_state_dict({**buffers, **{name: value.float() for name, value in weights.items()}})
    parts = {**teacher.pipe.components, teacher.network: net.to(dtype), "scheduler": scheduler}
    type(teacher.pipe)(**parts, **_options(teacher.pipe)).save_pretrained(folder)


def _options(pipe) -> dict[str, Any]:
    names = ("force_zeros_for_empty_prompt", "requires_safety_checker")
    return {name: pipe.config[name] for name in names if name in pipe.config}


# Finds the adapter of a prompt in the tree of fewstep.router.Router; ENCODED is what it was fitted on.
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
    builtin = str(record["teacher"]).startswith("builtin:")
    teacher = "resolve(" + repr(record["teacher"]) + ")" if builtin else repr(record["teacher"])
    scheduler, experts, parts = record["scheduler"], record.get("experts"), record.get("parts")
    lora, fixed = record["kind"] == "lora", record["noise"] == "fixed"
    lines = ["import torch"] if fixed else ["import json", ""] if parts else []
    lines += [f"from diffusers import DiffusionPipeline{f', {scheduler}' if lora else ''}"]
    if builtin and lora:
        lines.append("from fewstep.teachers import resolve  # only for the folder of the built-in teacher")
    if parts:
        lines.append("from safetensors.torch import load_file")
    lines.append("")
    if lora:
        lines.append(f"pipe = DiffusionPipeline.from_pretrained({teacher})")
        for name in dict.fromkeys(parts or experts or [""]):
            where = os.path.join(folder, name) if name else folder
            adapter = f", adapter_name={name!r}" if name else ""
            lines.append(f"pipe.load_lora_weights({where!r}, weight_name={LORA_FILE!r}{adapter})")
        lines.append(f"pipe.scheduler = {scheduler}.from_pretrained({folder!r}, subfolder='scheduler')")
    else:
        lines.append(f"pipe = DiffusionPipeline.from_pretrained({os.path.join(folder, 'pipeline')!r})")
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
    if parts:
        files = {
            "tree": os.path.join(folder, "router.json"),
            "tensors": os.path.join(folder, "router.safetensors"),
        }
        encoded = ENCODED[record["routed_on"]]
        lines += [ROUTE.format(**files, encoded=encoded, parts=parts), f"prompt = {prompt}"]
        lines.append("pipe.set_adapters(route(prompt))")
        prompt = "prompt"
    lines += [f"image = pipe({prompt}, {call}).images[0]", "image.save('image.png')"]
    return "\n".join(lines)


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
        "pipeline_tag: text-to-image",
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
            f"Trained timesteps {record['timesteps']}; no guidance at sampling (the teacher's, "
            f"{record.get('guidance_scale', 1.0)}, is distilled in). The scheduler's configuration is complete: load "
            f"it with `{record['scheduler']}.from_pretrained`, not with `from_config` of another scheduler.",
            "",
        ]
    )


# ----------------------------------------------------------------------------------------------------- reading back
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
            pipe = diffusers.DiffusionPipeline.from_pretrained(
                folder / "pipeline", torch_dtype=getattr(torch, dtype)
            )
        if upcast:
            pipe.to(torch.float32)
        if lora:
            for name in dict.fromkeys(record.get("parts") or record.get("experts", [""])):
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
        call["latents"] = torch.cat(latents).to(pipe.device, pipe.unet.dtype)
        rewind()
    if experts or again:
        call["callback_on_step_end"] = after
    return call


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
    size = {"height": teacher.resolution, "width": teacher.resolution}
    call = {
        **stock_call(pipe, record, []),
        **size,
        "latents": noise.to(pipe.unet.dtype),
        "generator": generator,
    }
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
) -> float:
    """Loads the export in stock diffusers and compares its latents with the trainer's own, both in fp32.

    Args:
        own: of :func:`trainer_sample`. dtype: of the exported weights. base_dtype: of the teacher's while training.

    Returns:
        The largest absolute difference.

    Raises:
        ExportError: it exceeds the tolerance; a half-precision export is allowed its rounding (5% of the spread).
    """
    pipe, record = load_exported(folder, teacher.source, base_dtype, upcast=True)
    pipe.to(teacher.device)
    difference = (stock_sample(pipe, record, teacher, prompts) - own).abs().max().item()
    limit = tolerance if dtype == "float32" else max(tolerance, 0.05 * own.std().item() + tolerance)
    if not difference <= limit:
        raise ExportError(
            f"{folder}: stock diffusers is off the trainer's own sample by {difference:.2e} (allowed {limit:.1e}); "
            "the exported weights or scheduler do not mean what was trained"
        )
    return difference
