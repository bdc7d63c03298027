"""What is drawn is the same on every device; here on the CPU and, under ``--standin``, on one that is none."""

import torch

from fewstep.data.cache import encode_images
from fewstep.data.images import load_images
from fewstep.device import choose
from fewstep.runs.smoke import _few_emoji
from fewstep.teachers import load_teacher


def test_latents_of_images_are_the_same_draw_wherever_the_vae_is(tiny_sd15, tmp_path, monkeypatch):
    images, found = load_images(str(_few_emoji(tmp_path))), []
    for device in (torch.device("cpu"), choose("auto")):
        monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / f"cache {len(found)}"))
        teacher = load_teacher(str(tiny_sd15), device=device)
        assert next(teacher.pipe.vae.parameters()).device.type == device.type
        found.append(encode_images(teacher, images, quiet=True).rows(torch.arange(len(images)))["latents"])
    torch.testing.assert_close(*(latents.cpu() for latents in found))
    means = load_teacher(str(tiny_sd15)).pipe.vae.config.scaling_factor
    assert found[0].std() > 0 and means  # a posterior that is drawn from, not its mean alone
