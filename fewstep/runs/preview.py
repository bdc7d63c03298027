"""Sample grids while training: fixed prompts and fixed noise, the teacher's row once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..data.images import CaptionedImages
from ..data.prompts import shown_prompts
from ..diffusion.cond import Cond
from ..diffusion.rng import Rng
from ..diffusion.schedules import repeated
from ..errors import FewstepError
from ..evaluation.mixture import Mixture
from ..files import replacing, write_json
from ..methods import Method
from ..methods.base import guidance_of
from ..recipe import Recipe
from ..report.bar import Bar
from ..report.grid import centred, image_grid
from ..shape import Shape
from ..teachers.base import Teacher, to_bytes
from ..teachers.lengths import unsaid
from ..teachers.pipelines import hushed
from ..training.roles import Role, averaged
from .shapes import shapes_of

CHUNK = 8  # samples drawn at once


def tiny_decoder(source: str, teacher: Teacher) -> Callable[[Tensor], np.ndarray]:
    """An AutoencoderTiny (TAESD), which takes the scaled latents of its model and a fraction of the memory.

    Raises:
        FewstepError: there is none, or for latents of other channels.
    """
    from diffusers import AutoencoderTiny

    try:
        with hushed():
            vae = AutoencoderTiny.from_pretrained(source, use_safetensors=True).requires_grad_(False)
    except Exception as error:  # the hub client raises a dozen kinds
        raise FewstepError(f"samples.vae: cannot load an AutoencoderTiny from {source}: {error}") from error
    if vae.config.latent_channels != teacher.latent_shape[0]:
        raise FewstepError(
            f"samples.vae: {source} is for latents of {vae.config.latent_channels} channels; expected one for "
            f"{teacher.latent_shape[0]}, e.g. madebyollin/taesdxl for SDXL, taesd for SD 1.5, taesd3 for SD 3"
        )
    vae.to(teacher.device)

    @torch.no_grad()
    def decode(latents: Tensor) -> np.ndarray:
        images = torch.cat([vae.decode(z, return_dict=False)[0] for z in latents.to(vae.dtype).split(CHUNK)])
        return to_bytes(images)

    return decode


class Group(NamedTuple):
    """Shown samples of one shape.

    Attributes:
        teacher: of this shape. places: of its samples in the grid, every so many. cond: their conditions.
    """

    teacher: Teacher
    places: slice
    cond: Cond


class Preview:
    """Draws ``samples/step_N.png`` and ``health/step_N.png`` of a run, and ``samples/teacher.png`` at its start.

    Where a run has several shapes its samples have them in turn, in cells of one size, and health shows the first.
    """

    def __init__(
        self,
        recipe: Recipe,
        teacher: Teacher,
        method: Method,
        roles: Sequence[Role],
        prompts: list[str],
        folder: Path,
        images: CaptionedImages | None = None,
        mixture: Mixture | None = None,
    ):
        self.config, self.guidance = recipe.samples, guidance_of(recipe.method)
        self.teacher, self.method, self.roles, self.folder = teacher, method, roles, folder / "samples"
        order = Rng(self.config.seed, "preview").permutation(len(prompts))[: self.config.count]
        shown = shown_prompts(self.config.prompts, recipe.data.column)
        self.prompts = shown or [prompts[int(i)] for i in order]
        try:
            with unsaid():
                cond = teacher.encode(self.prompts).to(teacher.device)
        except FewstepError as error:
            raise FewstepError(f"samples.prompts: {error}" if shown else str(error)) from None
        views = [teacher.at(shape) for shape in shapes_of(recipe) or [teacher.shape]][: len(self.prompts)]
        places = [slice(k, None, len(views)) for k in range(len(views))]
        self.groups = [
            Group(view, part, view.sized(cond.rows(part)) if len(views) > 1 else cond)
            for view, part in zip(views, places)
        ]
        self.writer = ThreadPoolExecutor(1)
        self.writing: list[Future[None]] = []
        self.decode = tiny_decoder(self.config.vae, teacher) if self.config.vae else None
        self.distance = None
        if self.config.distance:
            from ..evaluation.while_training import TrainingDistance

            self.distance = TrainingDistance(recipe, teacher, prompts, images, mixture)

    def draw(self, step: int, write: bool) -> dict[str, float]:
        """One grid; every rank takes part in the forward passes, the first one writes and gives what it measured."""
        self.settle()
        rng = Rng(self.config.seed, "noise", device=self.teacher.device)
        noises = [
            rng.normal(len(self.prompts[group.places]), *group.teacher.latent_shape) for group in self.groups
        ]
        if step == 0 and self.config.teacher_steps:
            with Bar("drawing the teacher's", len(self.prompts), "images", quiet=not write) as bar:
                made = [
                    self._chunked(partial(self._teach, g), z, g, bar) for g, z in zip(self.groups, noises)
                ]
                self._save("teacher", made, write)
        with averaged(*self.roles):
            student = self.method.student
            sample = lambda z, cond: student.sample(z, cond, rng.normal_like)  # noqa: E731
            latents = [self._chunked(sample, z, group) for group, z in zip(self.groups, noises)]
            measured = self.distance.measure(student) if self.distance else {}
        self._save(f"step_{step:06d}", latents, write)
        if write:
            cell = [side * self.config.scale for side in self._cell()]
            about = {"prompts": self.prompts, "columns": self.config.columns}
            about |= {"cell": cell} if cell[0] != cell[1] else {}
            self.then(partial(write_json, self.folder / "prompts.json", about, durable=False))
        if self.method.critic is not None:
            self._health(f"step_{step:06d}", latents[0][:CHUNK], rng, write)
        return measured

    @torch.no_grad()
    def _health(self, name: str, latents: Tensor, rng: Rng, write: bool) -> None:
        """Three rows: the student, and what teacher and critic see in it behind as much noise as signal."""
        schedule, group = self.teacher.denoiser.schedule, self.groups[0]
        cond = group.cond.rows(slice(0, len(latents)))
        t = schedule.t_from_log_snr(repeated(0.0, latents)).round(decimals=0 if schedule.t_max > 100 else 6)
        x_t = schedule.add_noise(latents, rng.normal_like(latents), t)
        rows = [latents]
        for denoiser, guidance in ((self.teacher.denoiser, self.guidance), (self.method.critic, 1.0)):
            known = self.teacher.known(denoiser, latents, cond, guidance)
            rows.append(denoiser.x0(x_t, t, known, guidance=guidance))
        if write:
            images = self._decoded(group, torch.cat(rows))
            path = self.folder.parent / "health" / f"{name}.png"
            self.writing.append(self.writer.submit(self._write, path, images, len(latents)))

    def _teach(self, group: Group, noise: Tensor, cond: Cond) -> Tensor:
        steps = self.config.teacher_steps
        return group.teacher.sample(noise, cond, steps, self.guidance)

    def _chunked(
        self, sample: Callable[[Tensor, Cond], Tensor], noise: Tensor, group: Group, bar: Bar | None = None
    ) -> Tensor:
        made = []
        for start in range(0, len(noise), CHUNK):
            rows = slice(start, start + CHUNK)
            made.append(sample(noise[rows], group.cond.rows(rows)))
            if bar:
                bar.update(len(made[-1]))
        return torch.cat(made)

    def _cell(self) -> Shape:
        """Of a grid: the largest height and the largest width."""
        return Shape(*map(max, zip(*(group.teacher.shape for group in self.groups))))

    def _decoded(self, group: Group, latents: Tensor) -> np.ndarray:
        return self.decode(latents) if self.decode else group.teacher.decode(latents)

    def _save(self, name: str, latents: Sequence[Tensor], write: bool) -> None:
        """A grid of the latents of every group."""
        if not write:
            return
        images = [self._decoded(group, z) for group, z in zip(self.groups, latents)]
        if len(images) == 1:
            grid = images[0]
        else:
            grid = np.full((len(self.prompts), *self._cell(), 3), 255, dtype=np.uint8)
            for group, part in zip(self.groups, images):
                grid[group.places] = centred(part, self._cell())
        path = self.folder / f"{name}.png"
        self.writing.append(self.writer.submit(self._write, path, grid, self.config.columns))

    def _write(self, path: Path, images: np.ndarray, columns: int) -> None:
        """In a thread: a megapixel grid takes seconds to compress, which training need not wait for."""
        grid = image_grid(images, columns, scale=self.config.scale)
        with replacing(path) as part:
            grid.save(part)

    def then(self, job: Callable[[], None]) -> None:
        """Does something when the grids so far are on the disk; training does not wait for it either."""
        self.writing.append(self.writer.submit(job))

    def settle(self) -> None:
        """Waits until all grids are on the disk.

        Raises:
            WriteError: one cannot be written.
        """
        writing, self.writing = self.writing, []
        for future in writing:
            future.result()
