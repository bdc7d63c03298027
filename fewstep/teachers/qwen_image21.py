"""Qwen-Image-2.1: a flow in the latents of a VAE with an alpha channel, one causal stream of the text's tokens and the
image's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..diffusion.cond import Cond
from ..errors import FewstepError
from .pipelines import GUIDING
from .ragged import Ragged, apart


class QwenImage21(Ragged):
    """Qwen-Image-2.1: each latent is a token, behind those of the text; made to be sampled without guidance.

    The image's places begin where the text ends, padding included, so that the stock call reads a text otherwise beside
    a longer one. Here each row is read as it is alone, in a call of the network of its own: as many on every process,
    whatever the lengths. The text is seen at time 0 and sees no image, so the stock call keeps it from its first step
    on; what is kept is the same at every step.
    """

    pipeline_class = "QwenImage21Pipeline"
    needs: ClassVar[dict[str, str]] = {"diffusers": "0.41", "transformers": "4.57"}
    normalises = True
    films = True
    alpha = True
    singly = True
    width = "context_in_dim"
    most = 1024  # ours: the stock call reads all of a text
    comfyui = "lycoris_"

    @property
    def longest(self) -> int:
        return self.most

    def ragged(self, prompts: Sequence[str], length: int) -> list[Tensor]:
        embeds, mask, _ = self.pipe.encode_prompt(list(prompts), device=self.pipe.text_encoder.device)
        ends = [embeds.shape[1]] * len(embeds) if mask is None else mask.sum(1).tolist()
        for prompt, end in zip(prompts, ends):
            if end > length:
                raise FewstepError(
                    f"prompt {prompt[:40]!r} has {end} tokens in its template; expected at most {length}; shorten it"
                )
        return [row[:end] for row, end in zip(embeds, ends)]

    def null(self) -> Cond:
        return self.encode([GUIDING[self.pipeline_class].negative or ""])

    @staticmethod
    def call(net: Any, x_t: Tensor, time: Tensor, cond: Cond) -> Tensor:
        rows = zip(x_t.split(1), time.split(1), apart(cond))
        return torch.cat([_row(net, *row) for row in rows])

    @staticmethod
    def image_of(count: int, features: Tensor, cond: Cond) -> Tensor:
        return features[:, -count:]

    @staticmethod
    def pack(latents: Tensor) -> Tensor:
        return latents.flatten(2).transpose(1, 2)

    def unpack(self, latents: Tensor) -> Tensor:
        return latents.transpose(1, 2).unflatten(2, self.latent_shape[1:])


def _row(net: Any, x_t: Tensor, time: Tensor, text: Tensor) -> Tensor:
    """One sample (1, C, h, w) with its text (n, D)."""
    height, width = x_t.shape[-2:]
    # Slots of four latents each, behind the text.
    slots = torch.arange(len(text) + height * width // 4, device=x_t.device)
    out = net(
        QwenImage21.pack(x_t),
        encoder_hidden_states=text[None],
        timestep=(time / 1000).to(x_t.dtype),
        img_shapes=[[(1, height, width)]],
        img_mask=(slots >= len(text))[None],
        return_dict=False,
    )[0]
    image = out[:, -height * width :].transpose(1, 2)
    return image.unflatten(2, (height, width))
