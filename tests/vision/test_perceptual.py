"""Distances of decoded images: zero for equal latents, larger for farther ones, with a gradient that leads there."""

import sys
from types import SimpleNamespace

import pytest
import torch

from fewstep.diffusion.rng import Rng
from fewstep.errors import RecipeError
from fewstep.teachers import load_teacher
from fewstep.vision.perceptual import distance_of


@pytest.fixture(scope="module")
def teacher():
    return load_teacher("builtin:emoji-xl")


@pytest.mark.parametrize("kind", ["l2", "features"])
def test_a_distance_is_zero_at_its_target_and_leads_there(teacher, kind):
    distance = distance_of(kind, teacher)
    target, offset = Rng(0).normal(2, *teacher.latent_shape), Rng(1).normal(2, *teacher.latent_shape)
    assert distance(target, target).abs() < 1e-6
    near, far = (distance(target + scale * offset, target) for scale in (0.1, 1.0))
    assert 0 < near < far
    start = (target + 0.5 * offset).requires_grad_()
    (gradient,) = torch.autograd.grad(distance(start, target), start)
    assert (gradient * offset).sum() > 0  # going back along the offset lowers it
    assert all(p.grad is None for p in teacher.pipe.vae.parameters())


def test_lpips_sees_decoded_images_from_minus_one_to_one(teacher, monkeypatch):
    seen = []

    class Metric(torch.nn.Module):
        def __init__(self, net_type):
            assert net_type == "vgg"
            super().__init__()

        def forward(self, images, wanted):
            seen.append((images, wanted))
            return (images - wanted).abs().mean()

    lpip = SimpleNamespace(LearnedPerceptualImagePatchSimilarity=Metric)
    monkeypatch.setitem(sys.modules, "torchmetrics.image.lpip", lpip)
    distance, target = distance_of("lpips", teacher), Rng(0).normal(2, *teacher.latent_shape)
    start = (3 * target).requires_grad_()
    (gradient,) = torch.autograd.grad(distance(start, target), start)
    (images, wanted) = seen[0]
    assert images.shape == wanted.shape == (2, 3, teacher.resolution, teacher.resolution)
    for pixels in (images, wanted):
        assert -1 <= pixels.min() < -0.5 and 0.5 < pixels.max() <= 1
    assert gradient.abs().sum() > 0 and not wanted.requires_grad


def test_lpips_without_its_weights_is_refused_by_name(teacher, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchmetrics.image.lpip", None)
    with pytest.raises(RecipeError, match=r"method\.regression: lpips"):
        distance_of("lpips", teacher)
