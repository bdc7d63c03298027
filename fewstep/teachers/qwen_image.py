"""Qwen-Image: a flow in the latents of a VAE of films, its text from a language model that reads an instruction too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor, nn

from ..diffusion.cond import Cond
from ..diffusion.denoiser import Guidance
from .flux import pack, unpack
from .norms import keeping_norm
from .pipelines import GUIDING
from .ragged import Ragged, together


class QwenImage(Ragged):
    """Qwen-Image: 2x2 latents are one token; guided by the blank negative prompt of its model card.

    The stock pipeline gives the guided prediction, token by token, the norm of the conditional one.
    """

    pipeline_class = "QwenImagePipeline"
    needs: ClassVar[dict[str, str]] = {"diffusers": "0.35", "transformers": "4.49"}
    packing = 2
    normalises = True
    films = True
    width = "joint_attention_dim"
    comfyui = "lora_unet_"

    def ragged(self, prompts: Sequence[str], length: int) -> list[Tensor]:
        embeds, mask = self.pipe.encode_prompt(
            list(prompts), device=self.pipe.text_encoder.device, max_sequence_length=length
        )
        ends = [embeds.shape[1]] * len(embeds) if mask is None else mask.sum(1).tolist()
        return [row[:end] for row, end in zip(embeds, ends)]

    def null(self) -> Cond:
        return self.encode([GUIDING[self.pipeline_class].negative or ""])

    @staticmethod
    def call(net: nn.Module, x_t: Tensor, time: Tensor, cond: Cond) -> Tensor:
        tokens, (height, width) = pack(x_t), x_t.shape[-2:]
        embeds, mask = together(cond)
        out = net(
            tokens,
            timestep=(time / 1000).to(tokens.dtype),
            encoder_hidden_states=embeds,
            encoder_hidden_states_mask=mask,
            img_shapes=[[(1, height // 2, width // 2)]] * len(x_t),
            return_dict=False,
        )[0]
        return unpack(out, height, width)

    @staticmethod
    def guide(unconditional: Tensor, conditional: Tensor, guidance: Guidance) -> Tensor:
        tokens = keeping_norm(pack(unconditional), pack(conditional), guidance)
        return unpack(tokens, *conditional.shape[-2:])

    @staticmethod
    def pack(latents: Tensor) -> Tensor:
        return pack(latents)

    def unpack(self, latents: Tensor) -> Tensor:
        return unpack(latents, *self.latent_shape[1:])
