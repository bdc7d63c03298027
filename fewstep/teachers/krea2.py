"""Krea 2: a flow whose network reads many layers of a language model for each token, and fuses them itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from ..diffusion.cond import Cond
from .flux import pack, positions, unpack
from .ragged import Ragged, together


class Krea2(Ragged):
    """Krea 2: 2x2 latents of Qwen-Image's VAE are one token, behind those of a text, which have no places.

    So a text is kept without the padding that the stock pipeline puts into its middle. The stock call's
    ``guidance_scale`` is g - 1 of ``u + g (c - u)``.
    """

    pipeline_class = "Krea2Pipeline"
    needs: ClassVar[dict[str, str]] = {"diffusers": "0.39", "transformers": "4.57"}
    packing = 2
    normalises = True
    films = True
    comfyui = "lycoris_"

    @property
    def token(self) -> tuple[int, ...]:
        return self.net.config.num_text_layers, self.net.config.text_hidden_dim

    def ragged(self, prompts: Sequence[str], length: int) -> list[Tensor]:
        device = self.pipe.text_encoder.device
        embeds, mask = self.pipe.encode_prompt(list(prompts), device=device, max_sequence_length=length)
        return [row[read] for row, read in zip(embeds, mask)]

    @staticmethod
    def call(net: Any, x_t: Tensor, time: Tensor, cond: Cond) -> Tensor:
        (embeds, mask), (height, width) = together(cond), x_t.shape[-2:]
        places = positions(height, width, x_t.device)
        out = net(
            pack(x_t),
            encoder_hidden_states=embeds,
            timestep=(time / 1000).to(x_t.dtype),
            position_ids=nn.functional.pad(places, (0, 0, embeds.shape[1], 0)),
            encoder_attention_mask=None if mask is None else mask.bool(),
            return_dict=False,
        )[0]
        return unpack(out, height, width)

    @staticmethod
    def image_of(count: int, features: Tensor, cond: Cond) -> Tensor:
        return features[:, -count:]

    @staticmethod
    def pack(latents: Tensor) -> Tensor:
        return pack(latents)

    def unpack(self, latents: Tensor) -> Tensor:
        return unpack(latents, *self.latent_shape[1:])
