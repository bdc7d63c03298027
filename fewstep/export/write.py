"""Writes the export folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import __version__
from ..errors import RecipeError
from ..files import replacing, write, write_json
from ..roles import RoleConfig
from ..router import RoutedStudent
from ..student import Student
from ..teachers.base import Teacher, size_options
from .card import model_card
from .scheduler import student_scheduler
from .tokens import save_token_student
from .weights import has_lora_files, lora_state_dict, merged, save_kohya, save_lora, save_pipeline


def _describe(folder: Path, record: Mapping[str, Any]) -> None:
    write_json(folder / "fewstep.json", record)
    write(folder / "README.md", model_card(record))


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
    precision = getattr(torch, dtype)
    if teacher.kind == "autoregressive":
        return _export_tokens(folder, teacher, student, weights, about=about, dtype=dtype)
    scheduler, call = student_scheduler(teacher.pipe.scheduler, student.times, student.noise)
    kind = role.kind if has_lora_files(teacher) else "full"
    experts = student.roles if len(weights) > 1 else None
    record = {
        "fewstep": __version__,
        **about,
        "teacher": teacher.source,
        "pipeline_class": teacher.pipeline_class,
        "kind": kind,
        "num_steps": len(student.times),
        "timesteps": [int(t) if t == int(t) > 1 else t for t in student.times],
        "noise": student.noise,
        "call": call | size_options(teacher.pipe, teacher.resolution),
        "scheduler": type(scheduler).__name__,
        "resolution": teacher.resolution,
        "latent_shape": list(teacher.latent_shape),
        "dtype": dtype,
    }
    if experts:
        record["experts"] = experts
    absent = [name for name, part in teacher.pipe.components.items() if part is None]
    if absent:
        record["absent"] = absent
    with replacing(folder) as part:
        scheduler.save_pretrained(part / "scheduler")
        for name, tensors in weights.items():
            if kind == "lora":
                state, target = lora_state_dict(tensors, role), part / name if experts else part
                save_lora(teacher, state, role, precision, target)
                if kohya:
                    save_kohya(teacher, state, precision, target / "kohya" / "fewstep.safetensors")
            else:
                if role.kind == "lora":
                    tensors = merged(teacher.net, lora_state_dict(tensors, role))
                save_pipeline(teacher, tensors, scheduler, precision, part / "pipeline")
        _describe(part, record)
    return folder


def _export_tokens(
    folder: Path,
    teacher: Teacher,
    student: Student,
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
        _describe(part, {**record, "parts": names, "routed_on": student.router.feature})
    return folder


def check_exportable(student: Student | RoutedStudent, role: RoleConfig, teacher: Teacher) -> None:
    """Refuses, before training, what no pipeline could sample."""
    if teacher.kind == "autoregressive":
        if role.kind != "full":
            raise RecipeError(
                f"roles.student.kind: {role.kind}: the student of an autoregressive teacher has layers that the "
                "teacher lacks, so it is no adapter of it; use full"
            )
        return
    student_scheduler(teacher.pipe.scheduler, student.times, student.noise)
    if len(set(student.roles)) > 1 and not has_lora_files(teacher):
        raise RecipeError(
            f"method: several students share one pipeline as LoRAs that are switched, and {teacher.pipeline_class} "
            "loads none; choose a method with one student"
        )
    if len(set(student.roles)) > 1 and role.kind != "lora":
        raise RecipeError(
            f"roles.student.kind: {role.kind}: several students share one pipeline as LoRAs that are switched; use lora"
        )
