"""A Fréchet distance while a student trains: torchmetrics' state and sums around an extractor of ours."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fewstep.data.images import CaptionedImages
from fewstep.diffusion.cond import Cond
from fewstep.diffusion.rng import Rng
from fewstep.errors import RecipeError
from fewstep.evaluation.images import ImageSource
from fewstep.evaluation.mixture import Mixture
from fewstep.evaluation.real import real_images
from fewstep.teachers.base import Teacher
from fewstep.vision.extractor import Extractor
from fewstep.vision.extractors import get_extractor

CHUNK = 8  # samples drawn at once


class ExtractorModule(nn.Module):
    """An extractor as the network of torchmetrics' metrics: uint8 images (B, 3, H, W) to features (B, dim).

    The extractor does all preprocessing, so torchmetrics' own resize, which matches no published number, has no part.
    """

    def __init__(self, extractor: Extractor):
        super().__init__()
        self.extractor, self.num_features = extractor, extractor.dim

    def forward(self, images: Tensor) -> Tensor:
        return self.extractor(images.permute(0, 2, 3, 1).contiguous().cpu())


def check_torchmetrics() -> None:
    """Raises RecipeError where it is not installed, before anything is loaded."""
    try:
        import torchmetrics.image.fid  # noqa: F401
    except Exception as error:  # a torchvision of another build breaks its import in several ways
        raise RecipeError(
            f"samples.distance: torchmetrics cannot be imported ({error}); pip install torchmetrics, or set it 0"
        ) from None


def frechet_metric(extractor: Extractor, real: ImageSource) -> Any:
    """torchmetrics' Fréchet distance in our features, the real images already in it; ``reset`` keeps them.

    Returns:
        ``update(uint8 (B, 3, H, W), real=False)``, ``compute()``, ``reset()``.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(
        ExtractorModule(extractor), reset_real_features=False, sync_on_compute=False
    )
    for images in real.batches(64):
        metric.update(images.permute(0, 3, 1, 2), real=True)
    return metric


class Chunk(NamedTuple):
    """Samples of one shape that are drawn at once: the teacher of this shape, and their conditions."""

    teacher: Teacher
    cond: Cond


class TrainingDistance:
    """Draws the same prompts and noise whenever it is asked; all ranks draw, the one that holds images measures.

    With a mixture each prompt has one of its shapes, and the real images are those of all of them.

    Args:
        recipe: its ``samples.distance`` is the number of samples, ``evaluation.extractor`` the feature space.
        teacher: with its encoders. prompts: some are chosen. images: the real ones, None on other ranks.
        mixture: of the shapes of samples, the same on all ranks.
    """

    def __init__(
        self,
        recipe: Any,
        teacher: Any,
        prompts: list[str],
        images: CaptionedImages | None,
        mixture: Mixture | None = None,
    ):
        self.teacher, self.seed, self.num = teacher, recipe.samples.seed, recipe.samples.distance
        order = Rng(self.seed, "distance").permutation(len(prompts)).tolist()
        shapes = [mixture.at(self.seed, i) if mixture else teacher.shape for i in range(self.num)]
        self.chunks: list[Chunk] = []
        for shape in dict.fromkeys(shapes):
            view = teacher.at(shape)
            chosen = [prompts[order[i % len(order)]] for i in range(self.num) if shapes[i] == shape]
            for start in range(0, len(chosen), CHUNK):
                cond = teacher.encode(chosen[start : start + CHUNK]).to(teacher.device)
                self.chunks.append(Chunk(view, view.sized(cond) if mixture else cond))
        self.metric = None
        if images is not None:
            extractor = get_extractor(recipe.evaluation.extractor, str(teacher.device))
            self.label = f"samples/FD({extractor.name})"
            _, real = real_images(images, teacher.resolution, recipe.data, mixture, recipe.evaluation.seed)
            self.metric = frechet_metric(extractor, real)

    @torch.no_grad()
    def measure(self, student: Any) -> dict[str, float]:
        """The distance under its label, or nothing on a rank that holds no images."""
        rng = Rng(self.seed, "distance noise", device=self.teacher.device)
        for teacher, cond in self.chunks:
            noise = rng.normal(len(cond), *teacher.latent_shape)
            latents = student.sample(noise, cond, rng.normal_like)
            if self.metric is not None:
                images = torch.from_numpy(teacher.decode(latents)).permute(0, 3, 1, 2)
                self.metric.update(images, real=False)
        if self.metric is None:
            return {}
        value = float(self.metric.compute())
        self.metric.reset()
        return {self.label: value}
