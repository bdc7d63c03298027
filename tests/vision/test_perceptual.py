"""Distances of decoded images: zero for equal latents, larger for farther ones, with a gradient that leads there."""

import sys
from types import SimpleNamespace

import pytest
import torch

from fewstep.diffusion.rng import Rng
from fewstep.errors import RecipeError
from fewstep.teachers import load_teacher
from fewstep.vision.lpips import BACKBONES
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


@pytest.fixture
def backbone(monkeypatch, tmp_path):
    """torch's cache, with a file where VGG's weights would be."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    file = tmp_path / "checkpoints" / BACKBONES["vgg"]
    file.touch()
    return file


def test_lpips_sees_decoded_images_from_minus_one_to_one(teacher, monkeypatch, backbone):
    seen = []

    class Network(torch.nn.Linear):  # with weights, to see them frozen
        def forward(self, images, wanted):
            seen.append((images, wanted))
            return (images - wanted).abs().mean((1, 2, 3), keepdim=True)

    network = Network(1, 1)

    def metric(net_type):
        assert net_type == "vgg"
        return SimpleNamespace(net=network)

    lpip = SimpleNamespace(LearnedPerceptualImagePatchSimilarity=metric)
    monkeypatch.setitem(sys.modules, "torchmetrics.image.lpip", lpip)
    distance, target = distance_of("lpips", teacher), Rng(0).normal(2, *teacher.latent_shape)
    start = (3 * target).requires_grad_()
    (gradient,) = torch.autograd.grad(distance(start, target), start)
    (images, wanted) = seen[0]
    assert images.shape == wanted.shape == (2, 3, teacher.resolution, teacher.resolution)
    for pixels in (images, wanted):
        assert -1 <= pixels.min() < -0.5 and 0.5 < pixels.max() <= 1
    assert gradient.abs().sum() > 0 and not wanted.requires_grad
    assert distance(start, target).shape == () and not network.weight.requires_grad


def test_lpips_without_its_package_or_its_weights_is_refused_by_name(teacher, monkeypatch, backbone):
    monkeypatch.setitem(sys.modules, "torchmetrics.image.lpip", None)
    with pytest.raises(RecipeError, match=r"method\.regression: lpips: .*torchmetrics"):
        distance_of("lpips", teacher)
    backbone.unlink()
    with pytest.raises(RecipeError, match=r"method\.regression: lpips: .*vgg16-397923af\.pth does not exist"):
        distance_of("lpips", teacher)
