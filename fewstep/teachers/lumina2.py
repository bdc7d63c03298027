"""Lumina-Image 2.0: a flow whose network runs in reversed time; Gemma reads the prompt behind a system prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..diffusion.cond import Cond
from ..diffusion.denoiser import Guidance
from .base import Teacher
from .norms import keeping_norm

LENGTH = 256  # tokens that the stock call reads, those of its system prompt included


class Lumina2(Teacher):
    """Lumina-Image 2.0: guided by the empty prompt, which has no system prompt before it.

    The stock pipeline gives the guided prediction, row by row of the latents, the norm of the conditional one.
    """

    pipeline_class = "Lumina2Pipeline"
    needs: ClassVar[dict[str, str]] = {"diffusers": "0.33", "transformers": "4.42"}
    network = "transformer"
    patch = 2
    shifts_latents = True

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Cond:
        embeds, mask, *_ = self.pipe.encode_prompt(list(prompts), False, device=self.pipe.text_encoder.device)
        return Cond({"embeds": embeds.float(), "mask": mask})

    @torch.no_grad()
    def null(self) -> Cond:
        *_, embeds, mask = self.pipe.encode_prompt([""], device=self.pipe.text_encoder.device)
        return Cond({"embeds": embeds.float(), "mask": mask})

    def blank(self, rows: int) -> Cond:
        embeds = torch.zeros(rows, LENGTH, self.net.config.cap_feat_dim)
        return Cond({"embeds": embeds, "mask": torch.ones(rows, LENGTH, dtype=torch.long)})

    @staticmethod
    def call(net: Any, x_t: Tensor, time: Tensor, cond: Cond) -> Tensor:
        return -net(
            x_t,
            timestep=(1 - time / 1000).to(x_t.dtype),
            encoder_hidden_states=cond["embeds"],
            encoder_attention_mask=cond["mask"],
            return_dict=False,
        )[0]

    @staticmethod
    def guide(unconditional: Tensor, conditional: Tensor, guidance: Guidance) -> Tensor:
        return keeping_norm(unconditional, conditional, guidance)

    @staticmethod
    def image_of(count: int, features: Tensor, cond: Cond) -> Tensor:
        """Behind each row's own text in the blocks that read it; padding is at the end of the row."""
        if features.shape[1] == count:
            return features
        places = cond["mask"].sum(1, keepdim=True) + torch.arange(count, device=features.device)
        return features.gather(1, places[..., None].expand(-1, -1, features.shape[2]))
