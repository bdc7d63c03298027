"""Writes the export folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..configs import RoleConfig
from ..diffusion.student import Sampler
from ..files import replacing
from ..teachers.base import Teacher
from .rehearsal import rehearse
from .routed import ALONE, Routed
from .sprint import Sprint
from .target import Edition, Target, Weights
from .tokens import Tokens

RECORD = "fewstep.json"  # which every target writes
TARGETS: tuple[type[Target], ...] = (Tokens, Routed, Sprint, *ALONE)


def target_of(teacher: Teacher, student: Sampler, roles: Sequence[RoleConfig]) -> Target:
    """How a student leaves: the first way that fits.

    Args:
        roles: how each of its networks is trained, in the order of ``student.roles``.
    """
    chosen = next(target for target in TARGETS if target.fits(teacher, student, roles[0]))
    return chosen(teacher, student, roles)


def check_exportable(
    student: Sampler, roles: Sequence[RoleConfig], teacher: Teacher, kohya: bool = False
) -> None:
    """Refuses, before training, what no pipeline could sample.

    Args:
        roles: how each of the student's networks is trained. kohya: whether a LoRA's keys for ComfyUI are asked for.
    """
    target = target_of(teacher, student, roles)
    target.check()
    if kohya:
        target.check_kohya()


def rehearse_export(
    student: Sampler, roles: Sequence[RoleConfig], teacher: Teacher, prompt: str
) -> float | None:
    """As :func:`check_exportable`, by sampling: see :func:`fewstep.export.rehearsal.rehearse`."""
    return rehearse(target_of(teacher, student, roles), prompt)


def export_student(
    folder: Path,
    teacher: Teacher,
    student: Sampler,
    weights: Weights,
    roles: Sequence[RoleConfig],
    check: Callable[[Path], None] | None = None,
    **edition: Any,
) -> Path:
    """Writes the export folder beside and renames it; replaces an older export.

    Whatever is raised on the way, an older export is still there and no part of a new one.

    Args:
        check: of what was written, before it takes its place.
        weights: trained tensors by the names of the role, for every role of the student. roles: how they were trained.
        edition: of :class:`Edition`.
    """
    with replacing(folder, record=RECORD) as part:
        target_of(teacher, student, roles).write(part, weights, Edition(**edition))
        if check is not None:
            check(part)
    return folder
