"""EDM's and EDM2's pipelines as teachers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...diffusion.cond import Cond
from ..base import Teacher
from ..classes import labels_of


class EDM(Teacher):
    """A denoiser ``D(x0 + sigma eps, sigma)`` in pixels, or in latents of a VAE, with class labels or without.

    There is a null condition only where the network was trained with labels dropped (``null_label``).
    """

    pipeline_class = "EDMPipeline"
    normalises = True
    encoders = ()
    comfyui_whole = False

    def __init__(self, pipe: Any, source: str, *args: Any):
        self.autoencoder = "vae" if pipe.vae is not None else None  # type: ignore[misc]  # of the instance
        super().__init__(pipe, source, *args)

    def encode(self, prompts: Sequence[str]) -> Cond:
        if not self.net.config.num_class_embeds:
            return Cond({})
        return Cond({"label": torch.tensor(labels_of(self.pipe, prompts), device=self.device)})

    def blank(self, rows: int) -> Cond:
        return Cond(
            {"label": torch.zeros(rows, dtype=torch.long)} if self.net.config.num_class_embeds else {}
        )

    def null(self) -> Cond | None:
        config = self.net.config
        if not (config.num_class_embeds and config.null_label):
            return None
        return Cond({"label": torch.tensor([config.num_class_embeds], device=self.device)})

    def example(self) -> Cond:
        return self.encode(["0"])

    @staticmethod
    def call(net: nn.Module, x_t: Tensor, time: Tensor, cond: Cond) -> Tensor:
        return net(x_t, time, cond.tensors.get("label"))[0]

    def latents(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        if self.autoencoder:
            return super().latents(images, generator)
        return images.to(self.device).permute(0, 3, 1, 2).float() / 127.5 - 1

    def decode_pixels(self, latents: Tensor) -> Tensor:
        return super().decode_pixels(latents) if self.autoencoder else latents.float().clamp(-1, 1)
