"""A whole pipeline with the student's network in place of the teacher's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..configs import RoleConfig
from ..diffusion.student import Sampler
from ..teachers.base import Teacher
from .comfyui import file_name
from .fold import folded
from .target import Edition, Stock, Weights
from .weights import save_pipeline


class Whole(Stock):
    """The teacher's pipeline, for a student that was trained as a whole network, of whatever size."""

    @classmethod
    def fits(cls, teacher: Teacher, student: Sampler, role: RoleConfig) -> bool:
        return role.kind == "full"

    def files(self, edition: Edition) -> dict[str, str]:
        if not self.teacher.comfyui_whole:
            return {}
        return {
            f"pipeline/{self.teacher.network}/diffusion_pytorch_model.safetensors": file_name(edition.about)
        }

    def save(self, folder: Path, weights: Weights, edition: Edition) -> None:
        self.scheduler.save_pretrained(folder / "scheduler")
        (tensors,) = weights.values()
        for name, scalar in self.told.items():
            tensors = folded(tensors, self.teacher.net, name, scalar)
        net: Any = self.student.denoisers[0]
        save_pipeline(self.teacher, net.net, tensors, self.scheduler, edition.precision, folder / "pipeline")
