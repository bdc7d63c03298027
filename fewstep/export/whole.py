"""A whole pipeline with the student's network in place of the teacher's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..configs import RoleConfig
from ..diffusion.student import Sampler
from ..teachers.base import Teacher
from .comfyui import file_name
from .fold import folded
from .target import Edition, Stock, Weights
from .weights import network_with, save_network


class Whole(Stock):
    """The teacher's pipeline, for a student that was trained as a whole network, of whatever size.

    Of experts it holds the first; each of the others is a network in a folder of its own beside it.
    """

    @classmethod
    def fits(cls, teacher: Teacher, student: Sampler, role: RoleConfig) -> bool:
        return role.kind == "full"

    def network(self, role: str, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> nn.Module:
        """The network of a role, as it is exported."""
        for name, scalar in self.told.items():
            tensors = folded(tensors, self.teacher.net, name, scalar)
        nets = dict(zip(self.student.roles, self.student.denoisers))
        net: Any = nets[role]
        return network_with(self.teacher, net.net, tensors, dtype)

    def save(self, folder: Path, weights: Weights, edition: Edition) -> None:
        self.scheduler.save_pretrained(folder / "scheduler")
        for name, tensors in weights.items():
            net: Any = self.network(name, tensors, edition.precision)
            if name == self.student.roles[0]:
                save_network(self.teacher, net, self.scheduler, folder / "pipeline")
            else:
                net.save_pretrained(folder / name)

    def files(self, edition: Edition) -> dict[str, str]:
        if not self.teacher.comfyui_whole:
            return {}
        first, *others = self.roles
        places = {first: f"pipeline/{self.teacher.network}", **{name: name for name in others}}
        return {
            f"{place}/diffusion_pytorch_model.safetensors": file_name(edition.about, self.expert(name))
            for name, place in places.items()
        }
