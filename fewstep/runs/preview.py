"""Sample grids while training: fixed prompts and fixed noise, the teacher's row once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..data.images import CaptionedImages
from ..data.prompts import shown_prompts
from ..diffusion.cond import Cond
from ..diffusion.rng import Rng
from ..diffusion.schedules import repeated
from ..errors import FewstepError
from ..files import replacing, write_json
from ..methods import Method
from ..methods.base import guidance_of
from ..recipe import Recipe
from ..report.bar import Bar
from ..report.grid import image_grid
from ..teachers.base import Teacher, to_bytes
from ..teachers.lengths import unsaid
from ..teachers.pipelines import hushed
from ..training.roles import Role, averaged

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


class Preview:
    """Draws ``samples/step_N.png`` and ``health/step_N.png`` of a run, and ``samples/teacher.png`` at its start."""

    def __init__(
        self,
        recipe: Recipe,
        teacher: Teacher,
        method: Method,
        roles: Sequence[Role],
        prompts: list[str],
        folder: Path,
        images: CaptionedImages | None = None,
    ):
        self.config, self.guidance = recipe.samples, guidance_of(recipe.method)
        self.teacher, self.method, self.roles, self.folder = teacher, method, roles, folder / "samples"
        order = Rng(self.config.seed, "preview").permutation(len(prompts))[: self.config.count]
        shown = shown_prompts(self.config.prompts, recipe.data.column)
        self.prompts = shown or [prompts[int(i)] for i in order]
        with unsaid():
            self.cond = teacher.encode(self.prompts).to(teacher.device)
        self.writer = ThreadPoolExecutor(1)
        self.writing: list[Future[None]] = []
        self.decode = tiny_decoder(self.config.vae, teacher) if self.config.vae else teacher.decode
        self.distance = None
        if self.config.distance:
            from ..evaluation.while_training import TrainingDistance

            self.distance = TrainingDistance(recipe, teacher, prompts, images)

    def draw(self, step: int, write: bool) -> dict[str, float]:
        """One grid; every rank takes part in the forward passes, the first one writes and gives what it measured."""
        self.settle()
        rng = Rng(self.config.seed, "noise", device=self.teacher.device)
        noise = rng.normal(len(self.prompts), *self.teacher.latent_shape)
        if step == 0 and self.config.teacher_steps:
            with Bar("drawing the teacher's", len(noise), "images", quiet=not write) as bar:
                self._save("teacher", self._chunked(self._teach, noise, bar), write)
        with averaged(*self.roles):
            student = self.method.student
            latents = self._chunked(lambda z, cond: student.sample(z, cond, rng.normal_like), noise)
            measured = self.distance.measure(student) if self.distance else {}
        self._save(f"step_{step:06d}", latents, write)
        if write:
            cell = [side * self.config.scale for side in self.teacher.shape]
            about = {"prompts": self.prompts, "columns": self.config.columns}
            about |= {"cell": cell} if cell[0] != cell[1] else {}
            self.then(partial(write_json, self.folder / "prompts.json", about, durable=False))
        if self.method.critic is not None:
            self._health(f"step_{step:06d}", latents[:CHUNK], rng, write)
        return measured

    @torch.no_grad()
    def _health(self, name: str, latents: Tensor, rng: Rng, write: bool) -> None:
        """Three rows: the student, and what teacher and critic see in it behind as much noise as signal."""
        schedule, cond = self.teacher.denoiser.schedule, self.cond.rows(slice(0, len(latents)))
        t = schedule.t_from_log_snr(repeated(0.0, latents)).round(decimals=0 if schedule.t_max > 100 else 6)
        x_t = schedule.add_noise(latents, rng.normal_like(latents), t)
        rows = [latents]
        for denoiser, guidance in ((self.teacher.denoiser, self.guidance), (self.method.critic, 1.0)):
            known = self.teacher.known(denoiser, latents, cond, guidance)
            rows.append(denoiser.x0(x_t, t, known, guidance=guidance))
        self._save(name, torch.cat(rows), write, self.folder.parent / "health", len(latents))

    def _teach(self, noise: Tensor, cond: Cond) -> Tensor:
        steps = self.config.teacher_steps
        return self.teacher.sample(noise, cond, steps, self.guidance)

    def _chunked(
        self, sample: Callable[[Tensor, Cond], Tensor], noise: Tensor, bar: Bar | None = None
    ) -> Tensor:
        made = []
        for start in range(0, len(noise), CHUNK):
            rows = slice(start, start + CHUNK)
            made.append(sample(noise[rows], self.cond.rows(rows)))
            if bar:
                bar.update(len(made[-1]))
        return torch.cat(made)

    def _save(
        self, name: str, latents: Tensor, write: bool, folder: Path | None = None, columns: int = 0
    ) -> None:
        if write:
            folder = folder or self.folder
            columns = columns or self.config.columns
            images = self.decode(latents)
            self.writing.append(self.writer.submit(self._write, folder / f"{name}.png", images, columns))

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
