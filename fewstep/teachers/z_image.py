"""Z-Image: a flow whose network runs in reversed time, to the negative of what others predict."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..diffusion.cond import Cond
from .ragged import Ragged, apart


class ZImage(Ragged):
    """Z-Image: one stream of the image's tokens and the text's, each text with its own number of them.

    The stock call's ``guidance_scale`` is g - 1 of ``u + g (c - u)``. Its options ``cfg_normalization`` and
    ``cfg_truncation`` are left at their defaults, which change nothing.
    """

    pipeline_class = "ZImagePipeline"
    needs: ClassVar[dict[str, str]] = {"diffusers": "0.36", "transformers": "4.51"}
    patch = 2
    shifts_latents = True
    width = "cap_feat_dim"
    comfyui = "lycoris_"
    comfyui_whole = False  # where queries, keys and values are one weight

    def ragged(self, prompts: Sequence[str], length: int) -> list[Tensor]:
        rows, _ = self.pipe.encode_prompt(
            list(prompts), self.pipe.text_encoder.device, False, max_sequence_length=length
        )
        return rows

    @staticmethod
    def call(net: Any, x_t: Tensor, time: Tensor, cond: Cond) -> Tensor:
        reversed_time = ((1000 - time) / 1000).to(x_t.dtype)
        out = net(list(x_t[:, :, None]), reversed_time, apart(cond), return_dict=False)[0]
        return -torch.stack(out)[:, :, 0]

    @staticmethod
    def image_of(count: int, features: Tensor, cond: Cond) -> Tensor:
        return features[:, :count]
