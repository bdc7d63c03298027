"""Pipelines whose network is a transformer: Stable Diffusion 3, SANA, PixArt-alpha and PixArt-Sigma."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..diffusion.cond import Cond
from .base import Teacher


class StableDiffusion3(Teacher):
    """SD 3 and 3.5: a flow; two CLIP encoders and T5, whose place zeros take where it is left out."""

    pipeline_class = "StableDiffusion3Pipeline"
    network = "transformer"
    encoders = ("text_encoder", "text_encoder_2", "text_encoder_3")
    shifts_latents = True
    comfyui = "lora_transformer_"

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Cond:
        embeds, _, pooled, _ = self.pipe.encode_prompt(
            list(prompts), None, None, self.pipe.text_encoder.device, do_classifier_free_guidance=False
        )
        return Cond({"embeds": embeds.float(), "pooled": pooled.float()})

    def blank(self, rows: int) -> Cond:
        c = self.net.config  # 77 tokens of the CLIP encoders and 256 of T5
        embeds = torch.zeros(rows, 77 + 256, c.joint_attention_dim)
        return Cond({"embeds": embeds, "pooled": torch.zeros(rows, c.pooled_projection_dim)})

    @staticmethod
    def call(net: Any, x_t: Tensor, time: Tensor, cond: Cond) -> Tensor:
        return net(
            x_t,
            timestep=time.to(x_t.dtype),
            encoder_hidden_states=cond["embeds"],
            pooled_projections=cond["pooled"],
            return_dict=False,
        )[0]


def text_length(pipe: Any) -> int:
    """Tokens of a text in a pipeline of this file that masks the padding behind it.

    A tokenizer with a shorter limit than the pipeline's call saves work, and changes nothing for texts within it.
    """
    default = inspect.signature(type(pipe).__call__).parameters["max_sequence_length"].default
    return min(default, pipe.tokenizer.model_max_length)


class _Masked(Teacher):
    """One text encoder whose padding is masked."""

    network = "transformer"
    max_tokens: int  # default of the stock pipeline's call

    def encoding(self) -> dict[str, Any]:
        return {**super().encoding(), "max_sequence_length": text_length(self.pipe)}

    def _encode(self, prompts: Sequence[str], **options: Any) -> Cond:
        device, options = self.pipe.text_encoder.device, {**self.encoding(), **options}
        embeds, mask, _, _ = self.pipe.encode_prompt(list(prompts), device=device, **options)
        return Cond({"embeds": embeds.float(), "mask": mask})

    def blank(self, rows: int) -> Cond:
        embeds = torch.zeros(rows, self.max_tokens, self.net.config.caption_channels)
        return Cond({"embeds": embeds, "mask": torch.ones(rows, self.max_tokens, dtype=torch.long)})


class Sana(_Masked):
    """SANA: a flow; the prompt goes behind the pipeline's instruction to its language model, the null does not."""

    pipeline_class = "SanaPipeline"
    max_tokens = 300

    def encoding(self) -> dict[str, Any]:
        instruction = inspect.signature(type(self.pipe).__call__).parameters["complex_human_instruction"]
        return {**super().encoding(), "complex_human_instruction": instruction.default}

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Cond:
        return self._encode(prompts)

    @torch.no_grad()
    def null(self) -> Cond:
        return self._encode([""], complex_human_instruction=None)

    @staticmethod
    def call(net: Any, x_t: Tensor, time: Tensor, cond: Cond) -> Tensor:
        return net(
            x_t,
            encoder_hidden_states=cond["embeds"],
            encoder_attention_mask=cond["mask"],
            timestep=time.to(x_t.dtype) * net.config.timestep_scale,
            return_dict=False,
        )[0]


class PixArtAlpha(_Masked):
    """PixArt-alpha: eps and a learned variance, which is left out; the size is a condition at 1024 px."""

    pipeline_class = "PixArtAlphaPipeline"
    max_tokens = 120

    def encoding(self) -> dict[str, Any]:
        return {**super().encoding(), "clean_caption": True}

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Cond:
        return self.sized(self._encode(prompts))

    def blank(self, rows: int) -> Cond:
        return self.sized(super().blank(rows))

    def sizes(self, rows: int) -> dict[str, Tensor]:
        if not self.net.use_additional_conditions:
            return {}
        height, width = self.shape
        size = torch.tensor([[float(height), float(width)]]).expand(rows, -1).contiguous()
        return {"resolution": size, "aspect_ratio": torch.full((rows, 1), height / width)}

    @staticmethod
    def call(net: Any, x_t: Tensor, time: Tensor, cond: Cond) -> Tensor:
        added = {name: cond.tensors.get(name) for name in ("resolution", "aspect_ratio")}
        return net(
            x_t,
            encoder_hidden_states=cond["embeds"],
            encoder_attention_mask=cond["mask"],
            timestep=time.to(x_t.dtype),
            added_cond_kwargs=added,
            return_dict=False,
        )[0]


class PixArtSigma(PixArtAlpha):
    """PixArt-Sigma: as alpha, without the size."""

    pipeline_class = "PixArtSigmaPipeline"
    max_tokens = 300
