"""Crops and resizes: closed forms, and bit for bit against the evaluators they follow."""

import numpy as np
import pytest
import torch
from PIL import Image

from fewstep.vision import preprocess as P

SIZES = [(16, 16), (41, 70), (350, 310)]


def random_images(height, width, n=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, height, width, 3), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("name", P.RESIZES)
def test_resizes_keep_constants_and_ranges(name):
    flat = torch.full((2, 13, 29, 3), 77, dtype=torch.uint8)
    resized = P.RESIZES[name](flat, 20)
    assert resized.shape == (2, 3, 20, 20) and resized.dtype == torch.float32
    torch.testing.assert_close(resized, torch.full_like(resized, 77), rtol=0, atol=1e-4)
    noise = P.RESIZES[name](random_images(9, 9), 31)
    assert noise.min() >= 0 and noise.max() <= 255


def test_tf1_bilinear_takes_source_pixels_at_target_times_ratio():
    ramp = torch.arange(4, dtype=torch.uint8).mul(10).view(1, 1, 4, 1).expand(1, 4, 4, 3)
    doubled = P.tf1_bilinear(ramp, 8)[0, 0, 0]
    assert doubled.tolist() == [
        0,
        5,
        10,
        15,
        20,
        25,
        30,
        30,
    ]  # not shifted by half a pixel, the edge repeated
    assert P.tf1_bilinear(ramp, 2)[0, 0, 0].tolist() == [0, 20]  # not averaged
    transposed = P.tf1_bilinear(ramp.transpose(1, 2), 8)[0, 0, :, 0]
    assert torch.equal(transposed, doubled)


def test_center_crop_of_odd_margins_rounds_half_to_even():
    columns = torch.arange(11, dtype=torch.uint8).view(1, 1, 11, 1).expand(1, 4, 11, 3)
    assert P.center_crop(columns)[0, 0, :, 0].tolist() == [4, 5, 6, 7]  # 3.5 to 4
    assert P.center_crop(columns[:, :, :9])[0, 0, :, 0].tolist() == [2, 3, 4, 5]  # 2.5 to 2
    assert P.center_crop(columns.transpose(1, 2))[0, :, 0, 0].tolist() == [4, 5, 6, 7]


def test_center_patch_is_not_resized_and_small_images_are_squeezed():
    images = random_images(40, 50)
    assert torch.equal(P.center_patch(images, 20), images[:, 10:30, 15:35])
    assert P.center_patch(random_images(40, 10), 20).shape == (2, 20, 20, 3)


def test_the_coco_chain_is_that_of_pillow_and_clean_fid():
    """Crop to the short side, Lanczos to 256 in uint8, clean bicubic to 299: pixel for pixel."""
    images = random_images(90, 131)
    ours = P.pil_bicubic_float(P.pil_resize(P.center_crop(images), 256, "lanczos"), 299)
    for image, ours_one in zip(images, ours):
        left = round((131 - 90) / 2)
        pil = (
            Image.fromarray(image.numpy())
            .crop((left, 0, left + 90, 90))
            .resize((256, 256), Image.Resampling.LANCZOS)
        )
        channels = [
            np.asarray(
                Image.fromarray(np.asarray(pil)[..., c].astype(np.float32)).resize((299, 299), Image.BICUBIC)
            )
            for c in range(3)
        ]
        assert np.array_equal(ours_one.numpy(), np.stack(channels).clip(0, 255))


@pytest.mark.parametrize("size", SIZES)
def test_clean_resize_equals_clean_fid(size):
    resize = pytest.importorskip("cleanfid.resize").build_resizer("clean")
    images = random_images(*size)
    for image, ours in zip(images, P.pil_bicubic_float(images, 299)):
        assert np.array_equal(resize(image.numpy()), ours.permute(1, 2, 0).numpy())


@pytest.mark.parametrize("size", SIZES)
def test_tf1_resize_equals_torch_fidelity(size):
    oracle = pytest.importorskip("torch_fidelity.interpolate_compat_tensorflow")
    images = random_images(*size)
    theirs = oracle.interpolate_bilinear_2d_like_tensorflow1x(
        images.permute(0, 3, 1, 2).float(), size=(299, 299), align_corners=False
    )
    torch.testing.assert_close(P.tf1_bilinear(images, 299), theirs, rtol=0, atol=1e-4)
