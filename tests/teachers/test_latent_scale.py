"""Latents are scaled, shifted and normalised as the stock pipeline of the family does it, and as no other."""

import diffusers
import pytest
import torch
from zoo import ZOO

from fewstep.diffusion.student import Student
from fewstep.errors import FewstepError
from fewstep.export import ExportError, export_student, rehearse_export, trainer_sample, verify
from fewstep.recipe import RoleConfig
from fewstep.teachers import load_teacher
from fewstep.teachers.pipelines import size_options
from fewstep.teachers.sd import StableDiffusionXL
from fewstep.teachers.tiny import write_tiny_pipeline
from fewstep.training.roles import build_role

STATISTICS = {"latents_mean": [0.5, -1.0, 2.0, 0.1], "latents_std": [3.0, 0.5, 1.5, 2.0]}
SHIFT = {"shift_factor": 0.7}
# Qwen-Image-Edit has the VAE of Qwen-Image, which is here.
IN_LATENTS = [name for name in ZOO if name not in ("UNet2D", "UNet2D by class", "EDM", "Qwen-Image-Edit")]


def with_vae(name, folder, **config):
    """A tiny teacher of a kind whose VAE says more than the published one."""
    kind = ZOO[name]
    write_tiny_pipeline(kind.pipeline_class, folder, **kind.options)
    vae = load_teacher(str(folder), resolution=kind.resolution).pipe.vae
    vae.register_to_config(**config)
    vae.save_pretrained(folder / "vae")
    return load_teacher(str(folder), resolution=kind.resolution)


def stock_pixels(teacher, prompts):
    """(latents, images in [-1, 1]) of one call each of the stock pipeline."""
    pipe = teacher.pipe
    pipe.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 2, **size_options(pipe, teacher.resolution)}
    if (
        "SANA" in teacher.pipeline_class
        or "PixArt" in teacher.pipeline_class
        or "Sana" in teacher.pipeline_class
    ):
        options |= {"use_resolution_binning": False, "max_sequence_length": 50}
    made = []
    for kind in ("latent", "pt"):
        g = torch.Generator().manual_seed(0)
        made.append(pipe(prompt=list(prompts), generator=g, output_type=kind, **options).images)
    images = made[1]
    if teacher.alpha:  # over white
        images = images[:, :3] * images[:, 3:] + 1 - images[:, 3:]
    return teacher.unpack(made[0]), images * 2 - 1


BY_WEIGHTS = ("FLUX.2-dev", "FLUX.2-klein")  # their VAE's statistics are no part of its configuration
EXTRA = [{}, SHIFT, STATISTICS, {**SHIFT, **STATISTICS}, {"latents_std": [2.0] * 4}]
SAID = [(n, e) for n in IN_LATENTS if n not in ("DiT", *BY_WEIGHTS) for e in EXTRA]
SAID += [(n, {**SHIFT, **STATISTICS}) for n in BY_WEIGHTS]
# Each says nothing, or all of it; what lies between with --long.
SAID = [pytest.param(n, e, marks=() if e in (EXTRA[0], EXTRA[3]) else pytest.mark.long) for n, e in SAID]


@pytest.mark.parametrize("name, extra", SAID)
def test_pixels_are_the_stock_pipelines_whatever_the_vae_says(name, extra, tmp_path):
    teacher = with_vae(name, tmp_path / "t", **extra)
    latents, images = stock_pixels(teacher, ZOO[name].prompts)
    assert (teacher.pixels(latents) - images).abs().max() < 1e-4


def test_the_statistics_move_the_pixels_that_they_should(tmp_path):
    """Otherwise the comparison above would prove nothing."""
    plain, told = with_vae("SDXL", tmp_path / "a"), with_vae("SDXL", tmp_path / "b", **STATISTICS)
    x = torch.randn(2, *plain.latent_shape, generator=torch.Generator().manual_seed(0))
    assert (plain.pixels(x) - told.pixels(x)).abs().max() > 0.1


@pytest.mark.parametrize(
    "name, to_image, extra",
    [
        ("SDXL", "StableDiffusionXLImg2ImgPipeline", {}),
        ("SDXL", "StableDiffusionXLImg2ImgPipeline", STATISTICS),
        ("SD 1.5", "StableDiffusionImg2ImgPipeline", STATISTICS | SHIFT),
    ],
)
def test_images_are_encoded_as_the_stock_pipeline_does(name, to_image, extra, tmp_path):
    teacher = with_vae(name, tmp_path / "t", **extra)
    images = torch.randint(0, 256, (2, *[teacher.resolution] * 2, 3), dtype=torch.uint8)
    made = teacher.latents(images, torch.Generator().manual_seed(0))
    pipe = getattr(diffusers, to_image)(**teacher.pipe.components)
    g = torch.Generator().manual_seed(0)
    pixels = images.permute(0, 3, 1, 2) / 127.5 - 1
    options = {"add_noise": False} if name == "SDXL" else {}
    if name == "SDXL":
        expected = pipe.prepare_latents(pixels, None, 2, 1, torch.float32, "cpu", g, **options)
    else:
        expected = pipe.vae.config.scaling_factor * pipe.vae.encode(pixels).latent_dist.sample(g)
    torch.testing.assert_close(made, expected)


# ------------------------------------------------------------------------------------------ it is seen if it is wrong
SWAPPED = {"latents_mean": STATISTICS["latents_std"], "latents_std": STATISTICS["latents_mean"]}


def ignored(self):
    return 0.0, self.pipe.vae.config.scaling_factor


def swapped(self):
    c = self.pipe.vae.config
    mean, std = (torch.tensor(SWAPPED[k])[:, None, None] for k in ("latents_mean", "latents_std"))
    return mean, c.scaling_factor / std


@pytest.mark.parametrize("wrong", [ignored, swapped])
def test_wrong_statistics_are_found_before_training_and_at_export(wrong, tmp_path, monkeypatch):
    teacher = with_vae("SDXL", tmp_path / "t", **STATISTICS)
    role = build_role("student", teacher.net, RoleConfig(rank=2))
    student = Student(teacher.denoiser.with_net(role.module), [999, 499])
    own = trainer_sample(student, teacher, ["a cat"])
    weights = {"student": role.final_weights()}
    folder = export_student(tmp_path / "e", teacher, student, weights, [role.config], about={"method": "x"})
    assert verify(folder, own, teacher, ["a cat"], 1e-2, "float32") < 1e-2
    assert rehearse_export(student, [role.config], teacher, "a cat") < 1e-2
    monkeypatch.setattr(StableDiffusionXL, "latent_scale", wrong)
    with pytest.raises(ExportError, match="decodes the same latents to images that differ"):
        verify(folder, own, teacher, ["a cat"], 1e-2, "float32")
    with pytest.raises(FewstepError, match="decodes the same latents to images that differ"):
        rehearse_export(student, [role.config], teacher, "a cat")
