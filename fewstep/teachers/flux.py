"""Flux, a flow whose network is told the guidance scale."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..diffusion.cond import Cond
from ..diffusion.denoiser import EMBEDDED
from .base import Teacher


class Flux(Teacher):
    """FLUX.1: the pooled embedding of CLIP, the tokens of T5; 2x2 latents are packed into one token.

    "dev" was distilled from a guided network and is told the scale, as the pipeline's ``guidance_scale``; so are its
    students and critics, the method's scale, which their exports' calls name. "schnell" is not told any, and is guided
    by the empty prompt, if at all.
    """

    pipeline_class = "FluxPipeline"
    network = "transformer"
    encoders = ("text_encoder", "text_encoder_2")
    packing = 2
    shifts_latents = True
    encoded_at: ClassVar[dict[str, int]] = {"pooled": 1, "embeds": 0}
    comfyui = "lora_transformer_"

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Cond:
        embeds, pooled, _ = self.pipe.encode_prompt(list(prompts), device=self.pipe.text_encoder.device)
        return Cond({"embeds": embeds.float(), "pooled": pooled.float()})

    def blank(self, rows: int) -> Cond:
        c = self.net.config
        embeds = torch.zeros(rows, 512, c.joint_attention_dim)
        return Cond({"embeds": embeds, "pooled": torch.zeros(rows, c.pooled_projection_dim)})

    @staticmethod
    def call(net: nn.Module, x_t: Tensor, time: Tensor, cond: Cond) -> Tensor:
        tokens = pack(x_t)
        out = net(
            tokens,
            timestep=(time / 1000).to(tokens.dtype),
            encoder_hidden_states=cond["embeds"],
            pooled_projections=cond["pooled"],
            guidance=cond.tensors.get(EMBEDDED),
            txt_ids=torch.zeros(cond["embeds"].shape[1], 3, device=x_t.device),
            img_ids=positions(x_t.shape[-2], x_t.shape[-1], x_t.device),
            return_dict=False,
        )[0]
        return unpack(out, *x_t.shape[-2:])

    @staticmethod
    def image_of(count: int, features: Tensor, cond: Cond) -> Tensor:
        """Behind the text's in blocks of one stream; others give it apart."""
        return features[:, -count:]

    @staticmethod
    def pack(latents: Tensor) -> Tensor:
        return pack(latents)

    def unpack(self, latents: Tensor) -> Tensor:
        return unpack(latents, *self.latent_shape[1:])


def pack(latents: Tensor) -> Tensor:
    """(B, C, h, w) -> tokens (B, h w / 4, 4 C), one of each 2x2 latents."""
    return nn.functional.pixel_unshuffle(latents, 2).flatten(2).transpose(1, 2)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """Tokens (B, h w / 4, 4 C) -> latents (B, C, h, w)."""
    grid = tokens.transpose(1, 2).unflatten(2, (height // 2, width // 2))
    return nn.functional.pixel_shuffle(grid, 2)


def positions(height: int, width: int, device: torch.device) -> Tensor:
    """(h w / 4, 3): zero, row and column of every token."""
    rows, columns = torch.arange(height // 2, device=device), torch.arange(width // 2, device=device)
    grid = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), -1).flatten(0, 1).float()
    return nn.functional.pad(grid, (1, 0))
