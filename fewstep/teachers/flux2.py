"""FLUX.2: a flow in the patchified, normalised latents of its VAE; stacked layers of a language model are its text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..diffusion.cond import Cond
from ..diffusion.denoiser import EMBEDDED
from .base import Teacher
from .flux import positions
from .ragged import LONGEST


class Flux2(Teacher):
    """FLUX.2 "dev": three layers of Mistral 3, told the guidance scale as FLUX.1 is.

    One of the teacher's latents is 2x2 of the VAE's, normalised by the statistics of its BatchNorm, as the stock call's
    ``latents`` are; what the call gives may be the VAE's own again. Padding of a text is read as the rest of it is.
    """

    pipeline_class = "Flux2Pipeline"
    network = "transformer"
    needs: ClassVar[dict[str, str]] = {"diffusers": "0.36", "transformers": "4.56"}
    folds = 2
    normalises = True
    comfyui = "lora_transformer_"
    comfyui_whole = False  # where queries, keys and values are one weight

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Cond:
        embeds, _ = self.pipe.encode_prompt(list(prompts), device=self.pipe.text_encoder.device)
        return Cond({"embeds": embeds.float()})

    def blank(self, rows: int) -> Cond:
        return Cond({"embeds": torch.zeros(rows, LONGEST, self.net.config.joint_attention_dim)})

    @staticmethod
    def call(net: Any, x_t: Tensor, time: Tensor, cond: Cond) -> Tensor:
        embeds, (height, width) = cond["embeds"], x_t.shape[-2:]
        order = torch.arange(embeds.shape[1], device=x_t.device, dtype=torch.float32)[:, None]
        out = net(
            Flux2.pack(x_t),
            encoder_hidden_states=embeds,
            timestep=(time / 1000).to(x_t.dtype),
            guidance=cond.tensors.get(EMBEDDED),
            txt_ids=nn.functional.pad(order, (3, 0)),
            img_ids=nn.functional.pad(positions(2 * height, 2 * width, x_t.device), (0, 1)),
            return_dict=False,
        )[0]
        return out.transpose(1, 2).unflatten(2, (height, width))

    @staticmethod
    def image_of(count: int, features: Tensor, cond: Cond) -> Tensor:
        """Behind the text's in blocks of one stream; others give it apart."""
        return features[:, -count:]

    @staticmethod
    def pack(latents: Tensor) -> Tensor:
        return latents.flatten(2).transpose(1, 2)

    def given(self, latents: Tensor) -> Tensor:
        return latents

    def unpack(self, latents: Tensor) -> Tensor:
        """Of tokens, or of the VAE's own z, which "klein" gives."""
        if latents.ndim == 3:
            return latents.transpose(1, 2).unflatten(2, self.latent_shape[1:])
        shift, factor = (value.to(latents) for value in self.latent_scale())
        return (self.fold(latents) - shift) * factor


class Flux2Klein(Flux2):
    """FLUX.2 "klein": three layers of Qwen 3, guided by the empty prompt; a distilled one is not guided at all."""

    pipeline_class = "Flux2KleinPipeline"
    needs: ClassVar[dict[str, str]] = {"diffusers": "0.37", "transformers": "4.51"}

    def null(self) -> Cond | None:
        return None if self.pipe.config.is_distilled else super().null()

    def example(self) -> Cond | None:
        return self.encode([""]) if self.pipe.config.is_distilled else None
