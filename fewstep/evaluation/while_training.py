"""A Fréchet distance while a student trains: torchmetrics' state and sums around an extractor of ours."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fewstep.data.images import CaptionedImages
from fewstep.diffusion.cond import Cond
from fewstep.diffusion.rng import Rng
from fewstep.errors import RecipeError
from fewstep.evaluation.images import ImageSource
from fewstep.evaluation.of_run import real_images
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


class TrainingDistance:
    """Draws the same prompts and noise whenever it is asked; all ranks draw, the one that holds images measures.

    Args:
        recipe: its ``samples.distance`` is the number of samples, ``evaluation.extractor`` the feature space.
        teacher: with its encoders. prompts: some are chosen. images: the real ones, None on other ranks.
    """

    def __init__(self, recipe: Any, teacher: Any, prompts: list[str], images: CaptionedImages | None):
        self.teacher, self.seed, self.num = teacher, recipe.samples.seed, recipe.samples.distance
        order = Rng(self.seed, "distance").permutation(len(prompts)).tolist()
        chosen = [prompts[order[i % len(order)]] for i in range(self.num)]
        self.starts = range(0, self.num, CHUNK)
        self.cond = Cond.cat(*(teacher.encode(chosen[i : i + CHUNK]) for i in self.starts)).to(teacher.device)
        self.metric = None
        if images is not None:
            extractor = get_extractor(recipe.evaluation.extractor, str(teacher.device))
            self.label = f"samples/FD({extractor.name})"
            _, real = real_images(images, teacher.resolution, recipe.data)
            self.metric = frechet_metric(extractor, real)

    @torch.no_grad()
    def measure(self, student: Any) -> dict[str, float]:
        """The distance under its label, or nothing on a rank that holds no images."""
        rng = Rng(self.seed, "distance noise", device=self.teacher.device)
        for start in self.starts:
            rows = slice(start, min(start + CHUNK, self.num))
            noise = rng.normal(rows.stop - start, *self.teacher.latent_shape)
            latents = student.sample(noise, self.cond.rows(rows), rng.normal_like)
            if self.metric is not None:
                images = torch.from_numpy(self.teacher.decode(latents)).permute(0, 3, 1, 2)
                self.metric.update(images, real=False)
        if self.metric is None:
            return {}
        value = float(self.metric.compute())
        self.metric.reset()
        return {self.label: value}
