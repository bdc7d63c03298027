"""Chroma, a Flux that is told no scale and reads T5 alone, behind a mask."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..diffusion.cond import Cond
from .base import Teacher
from .flux import pack, positions, unpack


class Chroma(Teacher):
    """Chroma: T5's tokens alone, guided by the empty prompt; 2x2 latents are packed into one token.

    The stock pipeline's mask is of numbers, which attention adds to its logits: 1 where both tokens are of the image,
    of the text or the first of the padding, else 0. It has to be the very same, padding included.
    """

    pipeline_class = "ChromaPipeline"
    needs: ClassVar[dict[str, str]] = {"diffusers": "0.34"}
    network = "transformer"
    packing = 2
    shifts_latents = True
    comfyui = "lora_transformer_"
    comfyui_whole = False  # whose layers it keeps by other names

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Cond:
        embeds, _, mask, *_ = self.pipe.encode_prompt(
            list(prompts), device=self.pipe.text_encoder.device, do_classifier_free_guidance=False
        )
        return Cond({"embeds": embeds.float(), "mask": mask.float()})

    def blank(self, rows: int) -> Cond:
        embeds = torch.zeros(rows, 512, self.net.config.joint_attention_dim)
        return Cond({"embeds": embeds, "mask": torch.ones(rows, 512)})

    @staticmethod
    def call(net: Any, x_t: Tensor, time: Tensor, cond: Cond) -> Tensor:
        tokens, embeds = pack(x_t), cond["embeds"]
        mask = torch.cat([cond["mask"].to(x_t.dtype), tokens.new_ones(tokens.shape[:2])], 1)
        with _masked(net, mask):
            out = net(
                tokens,
                timestep=(time / 1000).to(tokens.dtype),
                encoder_hidden_states=embeds,
                txt_ids=torch.zeros(embeds.shape[1], 3, device=x_t.device),
                img_ids=positions(x_t.shape[-2], x_t.shape[-1], x_t.device),
                attention_mask=mask,
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


@contextmanager
def _masked(net: Any, mask: Tensor) -> Iterator[None]:
    """Blocks of one stream have the mask where they are checkpointed too: diffusers hands it to the others alone."""
    checkpoint = vars(net).get("_gradient_checkpointing_func")
    if checkpoint is None:
        yield
        return
    net._gradient_checkpointing_func = lambda block, *args: checkpoint(
        block, *args, *([mask] if len(args) == 3 else [])
    )
    try:
        yield
    finally:
        net._gradient_checkpointing_func = checkpoint
