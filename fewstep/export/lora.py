"""A LoRA of the teacher's pipeline; several, switched from step to step; or merged, where no pipeline reads them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..configs import RoleConfig
from ..diffusion.embedding import given_to_sinusoids, time_embedder
from ..diffusion.student import Sampler
from ..errors import RecipeError
from ..teachers.base import Teacher
from ..training.roles import lora_targets
from .comfyui import file_name
from .fold import folded_lora
from .target import Edition, Stock, Weights
from .weights import (
    LORA_FILE,
    has_lora_files,
    lora_state_dict,
    merged,
    resized,
    save_kohya,
    save_lora,
)
from .whole import Whole


class Adapted(Stock):
    """A student that was trained as a LoRA."""

    def check_role(self, role: RoleConfig) -> None:
        super().check_role(role)
        denoisers: Any = self.student.denoisers
        if any(resized(self.teacher, denoiser.net) for denoiser in denoisers):
            raise RecipeError(
                "roles.student.kind: lora: a student of another size than the teacher is no adapter of it; use full"
            )


class Lora(Adapted):
    """A LoRA file beside a scheduler; of experts a folder with one each."""

    kind = "lora"

    @classmethod
    def fits(cls, teacher: Teacher, student: Sampler, role: RoleConfig) -> bool:
        return role.kind == "lora" and has_lora_files(teacher)

    def check_role(self, role: RoleConfig) -> None:
        super().check_role(role)
        if not self.told:
            return
        path, mlp, _ = time_embedder(self.teacher.net)
        adapted = f"{path}.linear_1" in lora_targets(self.teacher.net, role.targets)
        if adapted or mlp.post_act is not None:
            raise RecipeError(
                f"roles.student.targets: {path}.linear_1 must stay as it is for a student that is told its "
                f"{' and '.join(self.told)}; leave it out, or use kind full"
            )

    def alone(self, tensors: Mapping[str, Tensor], role: RoleConfig) -> dict[str, Tensor]:
        """The LoRA alone; what the student is told is one of its ranks."""
        state = lora_state_dict(tensors, role)
        if self.told:  # at all times that the network is ever given
            teacher, times = (
                self.teacher,
                sorted({float(t) for one in self.student.variants() for t in one.times}),
            )
            given = given_to_sinusoids(teacher.denoiser, teacher.latent_shape, times)
            for name, scalar in self.told.items():
                state = folded_lora(state, teacher.net, name, scalar, given)
        return state

    def save(self, folder: Path, weights: Weights, edition: Edition) -> None:
        self.scheduler.save_pretrained(folder / "scheduler")
        for name, tensors in weights.items():
            self._save(self._place(folder, name), tensors, name, edition)

    def _place(self, folder: Path, role: str) -> Path:
        return folder / role if len(self.roles) > 1 else folder

    def _save(self, folder: Path, tensors: Mapping[str, Tensor], name: str, edition: Edition) -> None:
        role = self.roles[name]
        state = self.alone(tensors, role)
        save_lora(self.teacher, state, role, edition.precision, folder)
        if edition.kohya:
            save_kohya(self.teacher, state, edition.precision, folder / self._kohya(edition, name))

    def check_kohya(self) -> None:
        if self.teacher.comfyui is None:
            raise RecipeError(
                f"export.kohya: true: ComfyUI and A1111 have no names for adapters of a {self.teacher.pipeline_class}; "
                "set it false"
            )

    def files(self, edition: Edition) -> dict[str, str]:
        place = Path()
        # Of transformers ComfyUI reads diffusers' names too.
        as_it_is = not edition.kohya and self.teacher.network == "transformer"
        return {
            (
                self._place(place, name) / (LORA_FILE if as_it_is else self._kohya(edition, name))
            ).as_posix(): file_name(edition.about, self.expert(name))
            for name in self.roles
        }

    def _kohya(self, edition: Edition, name: str) -> Path:
        return Path("kohya", file_name(edition.about, self.expert(name)))


class Merged(Adapted, Whole):
    """Merged into the weights of a whole pipeline, of a class that reads no LoRA (PixArt)."""

    @classmethod
    def fits(cls, teacher: Teacher, student: Sampler, role: RoleConfig) -> bool:
        return role.kind == "lora" and not has_lora_files(teacher)

    def network(self, role: str, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> nn.Module:
        state = lora_state_dict(tensors, self.roles[role])
        told = {name: value for name, value in state.items() if ".lora_" not in name}
        return super().network(role, merged(self.teacher.net, state) | told, dtype)
