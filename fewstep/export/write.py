"""Writes the export folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..configs import RoleConfig
from ..diffusion.denoiser import Scalar
from ..diffusion.embedding import time_embedder
from ..diffusion.schedules import Flow
from ..diffusion.student import Sampler
from ..errors import RecipeError
from ..files import replacing, write, write_json
from ..methods.router import RoutedStudent
from ..teachers.base import Teacher
from ..teachers.classes import num_classes
from ..teachers.pipelines import size_options, takes
from ..teachers.schedulers import is_flow
from ..training.roles import lora_targets
from ..version import __version__
from .card import model_card
from .fold import folded, folded_lora
from .scheduler import scm_scheduler, student_scheduler
from .tokens import save_token_student
from .weights import (
    has_lora_files,
    lora_state_dict,
    merged,
    resized,
    save_kohya,
    save_lora,
    save_pipeline,
    save_sprint,
)


def _describe(folder: Path, record: Mapping[str, Any]) -> None:
    write_json(folder / "fewstep.json", record)
    write(folder / "README.md", model_card(record))


def _numbers(times: Sequence[float]) -> list[float]:
    """Times of a table as integers, of a flow as they are."""
    return [int(t) if t == int(t) and t != 1 else t for t in times]


def _network_times(teacher: Teacher, student: Sampler) -> Tensor:
    """All times the network is ever given, in its own unit."""
    times = sorted({float(t) for one in student.variants() for t in one.times})
    return torch.tensor(times) * teacher.denoiser.schedule.time_scale


def scalars_of(student: Sampler) -> dict[str, Scalar]:
    """What the student is told beside its condition; it is exported at the defaults."""
    return getattr(student.denoisers[0], "scalars", {})


def samplers_of(teacher: Teacher, student: Sampler) -> dict[int, tuple[Any, dict[str, Any]]]:
    """Scheduler and call for each number of steps; where one configuration does not fit all, calls name the times.

    Raises:
        RecipeError: no stock scheduler has such times, or the teacher's pipeline could not be told them.
    """
    samplers = _samplers(teacher, student)
    pipe, kind = teacher.pipe, teacher.pipeline_class
    for _, call in samplers.values():
        if teacher.denoiser.embeds_guidance:
            call["guidance_scale"] = 1.0
        if not takes(pipe, "guidance_scale"):
            call.pop("guidance_scale", None)
        if odd := [name for name in ("timesteps", "sigmas") if name in call and not takes(pipe, name)]:
            raise RecipeError(
                f"method.times: {student.times}: a {kind} makes steps on an even grid only (its call has no "
                f"{', '.join(odd)}); use num_steps and start"
            )
    if student.noise == "fixed" and student.num_steps > 1 and not takes(pipe, "callback_on_step_end"):
        raise RecipeError(
            f"method.noise: fixed: a {kind} has no callback that could rewind its noise; use fresh or ddim"
        )
    return samplers


def _samplers(teacher: Teacher, student: Sampler) -> dict[int, tuple[Any, dict[str, Any]]]:
    told, variants = scalars_of(student), student.variants()
    if "guidance" in told and teacher.pipeline_class == "SanaPipeline":
        return {one.num_steps: scm_scheduler(one.times, told["guidance"].default) for one in variants}
    scheduler, call = student_scheduler(teacher.pipe.scheduler, student.times, student.noise, eta=student.eta)
    if "timesteps" not in call and "sigmas" not in call and _nested(student) and not is_flow(scheduler):
        return {
            one.num_steps: (scheduler, {**call, "num_inference_steps": one.num_steps}) for one in variants
        }
    return {
        one.num_steps: student_scheduler(
            teacher.pipe.scheduler, one.times, one.noise, len(variants) > 1, one.eta
        )
        for one in variants
    }


def _nested(student: Sampler) -> bool:
    """Whether every list of times is every n-th of the first, as stock schedulers thin theirs out."""
    times = student.times
    return all(
        len(times) % one.num_steps == 0 and one.times == times[:: len(times) // one.num_steps]
        for one in student.variants()
    )


def export_student(
    folder: Path,
    teacher: Teacher,
    student: Sampler,
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
    precision = getattr(torch, dtype)
    if teacher.kind == "autoregressive":
        return _export_tokens(folder, teacher, student, weights, about=about, dtype=dtype)
    told = scalars_of(student)
    sprint = "guidance" in told and teacher.pipeline_class == "SanaPipeline"
    samplers = samplers_of(teacher, student)
    scheduler, call = samplers[student.num_steps]
    size = size_options(teacher.pipe, teacher.resolution)
    kind = role.kind if has_lora_files(teacher) else "full"
    experts = student.roles if len(weights) > 1 else None
    record = {
        "fewstep": __version__,
        **about,
        "teacher": teacher.source,
        "pipeline_class": teacher.pipeline_class,
        "kind": kind,
        "num_steps": len(student.times),
        "timesteps": _numbers(student.times),
        "noise": student.noise,
        "call": call | size,
        "scheduler": type(scheduler).__name__,
        "resolution": teacher.resolution,
        "latent_shape": list(teacher.stock_shape),
        "dtype": dtype,
    }
    if (classes := num_classes(teacher.pipe)) is not None:
        record["num_classes"] = classes
    if isinstance(student.schedule, Flow):  # the exported scheduler's is 1: its times are shifted already
        record["shift"] = float(student.schedule.shift)
    if experts:
        record["experts"] = experts
    absent = [name for name, part in teacher.pipe.components.items() if part is None]
    if absent:
        record["absent"] = absent
    if len(samplers) > 1:
        times = {one.num_steps: one.times for one in student.variants()}
        record["steps"] = {
            str(steps): {"timesteps": _numbers(times[steps]), "call": one | size}
            for steps, (_, one) in samplers.items()
        }

    def told_away(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The LoRA alone; what the student is told is one of its ranks."""
        state = lora_state_dict(tensors, role)
        for name, scalar in told.items():
            state = folded_lora(state, teacher.net, name, scalar, _network_times(teacher, student))
        return state

    with replacing(folder) as part:
        scheduler.save_pretrained(part / "scheduler")
        for name, tensors in weights.items():
            if kind == "lora":
                state, target = told_away(tensors), part / name if experts else part
                save_lora(teacher, state, role, precision, target)
                if kohya:
                    save_kohya(teacher, state, precision, target / "kohya" / "fewstep.safetensors")
            else:
                if role.kind == "lora":
                    tensors = merged(teacher.net, told_away(tensors))
                elif not sprint:
                    for scalar_name, scalar in told.items():
                        tensors = folded(tensors, teacher.net, scalar_name, scalar)
                if sprint:
                    save_sprint(
                        teacher, tensors, told["guidance"].scale, scheduler, precision, part / "pipeline"
                    )
                else:
                    first: Any = student.denoisers[0]
                    save_pipeline(teacher, first.net, tensors, scheduler, precision, part / "pipeline")
        _describe(part, record)
    return folder


def _export_tokens(
    folder: Path,
    teacher: Teacher,
    student: Sampler,
    weights: Mapping[str, Mapping[str, Tensor]],
    *,
    about: Mapping[str, Any],
    dtype: str,
) -> Path:
    (tensors,) = weights.values()
    with replacing(folder) as part:
        made = save_token_student(teacher, student, tensors, getattr(torch, dtype), part / "pipeline")
        record = {
            "fewstep": __version__,
            **about,
            "teacher": teacher.source,
            "pipeline_class": teacher.pipeline_class,
            "kind": "full",
            "num_steps": student.num_steps,
            "resolution": teacher.resolution,
            "latent_shape": list(teacher.latent_shape),
            "dtype": dtype,
            **made,
        }
        _describe(part, record)
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
    names = [f"part_{k + 1}" for k in range(len(student.students))]
    with replacing(folder) as part:
        for name, role, one in zip(names, student.roles, student.students):
            export_student(part / name, teacher, one, {role: weights[role]}, configs[role], **options)
        shutil.copytree(part / names[0] / "scheduler", part / "scheduler")
        student.router.save(part)
        record = json.loads((part / names[0] / "fewstep.json").read_text())
        routed = {"parts": names, "routed_on": student.router.feature, "network": teacher.network}
        _describe(part, record | routed)
    return folder


def check_exportable(student: Sampler, roles: Sequence[RoleConfig], teacher: Teacher) -> None:
    """Refuses, before training, what no pipeline could sample.

    Args:
        roles: how each of the student's networks is trained.
    """
    kinds = dict.fromkeys(role.kind for role in roles)
    if len(kinds) > 1:
        raise RecipeError(
            f"roles.student.kind: {' and '.join(kinds)}: expected the same kind for every student of one export"
        )
    for role in roles:
        _check_role(student, role, teacher)


def _check_role(student: Sampler, role: RoleConfig, teacher: Teacher) -> None:
    if teacher.kind == "autoregressive":
        if role.kind != "full":
            raise RecipeError(
                f"roles.student.kind: {role.kind}: the student of an autoregressive teacher has layers that the "
                "teacher lacks, so it is no adapter of it; use full"
            )
        return
    samplers_of(teacher, student)
    told = scalars_of(student)
    sprint = "guidance" in told and teacher.pipeline_class == "SanaPipeline"
    if sprint and role.kind != "full":
        raise RecipeError(
            f"roles.student.kind: {role.kind}: SanaSprintPipeline, whose network is told the guidance, is exported "
            "whole; use full"
        )
    if told and role.kind == "lora":
        path, mlp, _ = time_embedder(teacher.net)
        adapted = f"{path}.linear_1" in lora_targets(teacher.net, role.targets)
        if adapted or mlp.post_act is not None:
            raise RecipeError(
                f"roles.student.targets: {path}.linear_1 must stay as it is for a student that is told its "
                f"{' and '.join(told)}; leave it out, or use kind full"
            )
    scale = teacher.net.config.get("timestep_scale", 1.0) * teacher.denoiser.schedule.time_scale
    if sprint and abs(scale - 1) > 1e-6:
        raise RecipeError(
            f"teacher.path: {teacher.source}: its network sees t in [0, {scale:g}], and SanaSprintPipeline gives it t "
            "in [0, 1]; prepare the teacher first (fewstep prepare), or set method.guidance_embedding false"
        )
    if len(set(student.roles)) > 1 and not has_lora_files(teacher):
        raise RecipeError(
            f"method: several students share one pipeline as LoRAs that are switched, and {teacher.pipeline_class} "
            "loads none; choose a method with one student"
        )
    if len(set(student.roles)) > 1 and role.kind != "lora" and not isinstance(student, RoutedStudent):
        raise RecipeError(
            f"roles.student.kind: {role.kind}: several students share one pipeline as LoRAs that are switched; use lora"
        )
    denoisers: Sequence[Any] = student.denoisers
    if role.kind == "lora" and any(resized(teacher, denoiser.net) for denoiser in denoisers):
        raise RecipeError(
            "roles.student.kind: lora: a student of another size than the teacher is no adapter of it; use full"
        )
