"""Writes the export folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..configs import RoleConfig
from ..diffusion.student import Sampler
from ..files import replacing
from ..teachers.base import Teacher
from .lora import Switched
from .routed import ALONE, Routed
from .sprint import Sprint
from .target import Edition, Target, Weights
from .tokens import Tokens

RECORD = "fewstep.json"  # which every target writes
TARGETS: tuple[type[Target], ...] = (Tokens, Routed, Sprint, Switched, *ALONE)


def target_of(teacher: Teacher, student: Sampler, roles: Sequence[RoleConfig]) -> Target:
    """How a student leaves: the first way that fits.

    Args:
        roles: how each of its networks is trained, in the order of ``student.roles``.
    """
    chosen = next(target for target in TARGETS if target.fits(teacher, student, roles[0]))
    return chosen(teacher, student, roles)


def check_exportable(student: Sampler, roles: Sequence[RoleConfig], teacher: Teacher) -> None:
    """Refuses, before training, what no pipeline could sample.

    Args:
        roles: how each of the student's networks is trained.
    """
    target_of(teacher, student, roles).check()


def export_student(
    folder: Path,
    teacher: Teacher,
    student: Sampler,
    weights: Weights,
    roles: Sequence[RoleConfig],
    **edition: Any,
) -> Path:
    """Writes the export folder beside and renames it; replaces an older export.

    Args:
        weights: trained tensors by the names of the role, for every role of the student. roles: how they were trained.
        edition: of :class:`Edition`.
    """
    with replacing(folder, record=RECORD) as part:
        target_of(teacher, student, roles).write(part, weights, Edition(**edition))
    return folder
