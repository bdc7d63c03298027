"""Several students behind one stock pipeline: every prompt is sampled with the student of its part."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..configs import RoleConfig
from ..diffusion.cond import Cond
from ..diffusion.student import Sampler
from ..errors import FewstepError, RecipeError
from ..methods.router import RoutedStudent, Router
from ..teachers.base import Teacher
from ..teachers.classes import labels_of
from ..teachers.ragged import Ragged
from .lora import Lora, Merged
from .target import Edition, Target, Weights
from .whole import Whole

ALONE: tuple[type[Target], ...] = (Lora, Merged, Whole)  # how one student leaves


class Routed(Target):
    """A folder ``part_k/`` for each part of the prompts, an export of its own, and the router beside them."""

    student: RoutedStudent

    @classmethod
    def fits(cls, teacher: Teacher, student: Sampler, role: RoleConfig) -> bool:
        return isinstance(student, RoutedStudent)

    @property
    def parts(self) -> dict[str, Target]:
        """Each student alone, by the name of its folder."""
        found = {}
        for k, one in enumerate(self.student.students):
            role = self.roles[one.roles[0]]
            cls = next(c for c in ALONE if c.fits(self.teacher, one, role))
            found[f"part_{k + 1}"] = cls(self.teacher, one, [role])
        return found

    def check(self) -> None:
        super().check()
        for part in self.parts.values():
            part.check()

    def check_kohya(self) -> None:
        for part in self.parts.values():
            part.check_kohya()

    def check_role(self, role: RoleConfig) -> None:
        if not self.teacher.draws_latents:
            raise RecipeError(
                f"method.name: multi_student: the call of a {self.teacher.pipeline_class} takes no latents, so that "
                "each part of its prompts would begin from other noise than alone; use dmd2"
            )
        if isinstance(self.teacher, Ragged):
            raise RecipeError(
                f"method.name: multi_student: a {self.teacher.pipeline_class} gives each text a number of tokens of "
                "its own, by whose mean a prompt would be routed otherwise than in training; use dmd2"
            )

    def write(self, folder: Path, weights: Weights, edition: Edition) -> None:
        title = edition.about.get("title", "student")
        for name, part in self.parts.items():
            own = replace(edition, about={**edition.about, "title": f"{title}_{name}"})
            part.write(folder / name, {role: weights[role] for role in part.roles}, own)
        super().write(folder, weights, edition)

    def save(self, folder: Path, weights: Weights, edition: Edition) -> None:
        shutil.copytree(folder / next(iter(self.parts)) / "scheduler", folder / "scheduler")
        self.student.router.save(folder)

    def record(self, edition: Edition) -> dict[str, Any]:
        parts, router = self.parts, self.student.router
        teacher = self.teacher
        routed: dict[str, Any] = {
            "parts": list(parts),
            "routed_on": router.feature,
            "network": teacher.network,
        }
        if router.feature != "label":
            routed["encoding"] = {"at": teacher.encoded_at[router.feature], **teacher.encoding()}
        record = next(iter(parts.values())).record(edition) | routed
        record.pop("comfyui", None)  # which has no router
        return record


class RoutedPipeline:
    """A stock pipeline that holds one student per part; every prompt is sampled with the student of its part.

    Called like the pipeline, with one image per prompt (others are a ``FewstepError``); everything else is the
    pipeline's.

    Args:
        pipe: the stock pipeline. use: makes the student of part k the one that is sampled.
        at, options: see :func:`fewstep.export.card.encoding_of`.
    """

    def __init__(
        self, pipe: Any, router: Router, use: Callable[[int], None], at: int, options: Mapping[str, Any]
    ):
        self.__dict__.update(pipe=pipe, router=router, use=use, at=at, options=options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.pipe, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.pipe, name, value)

    def to(self, *args: Any, **kwargs: Any) -> RoutedPipeline:
        self.pipe.to(*args, **kwargs)
        return self

    def route(self, prompts: Sequence[str]) -> Tensor:
        """Part (B,) of every prompt."""
        router: Router = self.router
        if router.feature == "label":
            return router(Cond({"label": torch.tensor(labels_of(self.pipe, prompts))}))
        encoded = self.pipe.encode_prompt(prompt=list(prompts), device=self.pipe.device, **self.options)
        return router(Cond({router.feature: encoded[self.at]}))

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | int | Sequence[str | int],
        *,
        guidance_scale: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        return_dict: bool = True,
        **options: Any,
    ) -> Any:
        if (images_each := options.get("num_images_per_prompt", 1)) != 1:
            raise FewstepError(
                f"num_images_per_prompt: {images_each}: a prompt is routed with one image; expected 1, repeat a prompt "
                "for more"
            )
        prompts = [str(one) for one in ([prompt] if isinstance(prompt, (str, int)) else prompt)]
        parts, images = self.route(prompts), [None] * len(prompts)
        for k in parts.unique().tolist():
            rows = (parts == k).nonzero()[:, 0].tolist()
            self.use(k)
            output = self.pipe(
                prompt=[prompts[i] for i in rows],
                guidance_scale=guidance_scale,
                generator=[generator[i] for i in rows] if isinstance(generator, list) else generator,
                latents=None if latents is None else latents[rows],
                **options,
            )
            for i, image in zip(rows, output.images):
                images[i] = image
        output.images = _together(images)
        return output if return_dict else (output.images,)


def _together(images: list[Any]) -> Any:
    """Tensors and arrays stacked, pictures as a list."""
    if isinstance(images[0], Tensor):
        return torch.stack(images)
    return np.stack(images) if isinstance(images[0], np.ndarray) else images
