"""Stable Diffusion 1.5 / 2.x and Stable Diffusion XL."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..diffusion.cond import Cond
from .base import Teacher


class StableDiffusion(Teacher):
    """SD 1.5 and 2.x, eps or v-prediction; the null condition is the encoded empty prompt."""

    pipeline_class = "StableDiffusionPipeline"
    comfyui = "lora_unet_"

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Cond:
        embeds, _ = self.pipe.encode_prompt(list(prompts), self.pipe.text_encoder.device, 1, False)
        return Cond({"embeds": embeds.float()})

    def blank(self, rows: int) -> Cond:
        return Cond({"embeds": torch.zeros(rows, 77, self.net.config.cross_attention_dim)})

    @staticmethod
    def call(net: nn.Module, x_t: Tensor, time: Tensor, cond: Cond) -> Tensor:
        time = time.to(x_t.dtype)
        return net(x_t, time, encoder_hidden_states=cond["embeds"], return_dict=False)[0]


class StableDiffusionXL(Teacher):
    """SDXL: two text encoders, pooled embedding and size conditioning ``time_ids`` (6 numbers)."""

    pipeline_class = "StableDiffusionXLPipeline"
    comfyui = "lora_unet_"
    encoders = ("text_encoder", "text_encoder_2")
    normalises = True

    def time_ids(self, rows: int) -> Tensor:
        """(rows, 6): what the stock call says of an image that was neither resized nor cropped: its height and width,
        where the crop begins, height and width again."""
        height, width = map(float, self.shape)
        return torch.tensor([[height, width, 0.0, 0.0, height, width]]).expand(rows, -1).contiguous()

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Cond:
        embeds, _, pooled, _ = self.pipe.encode_prompt(
            list(prompts),
            device=self.pipe.text_encoder_2.device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=False,
        )
        return self.sized(Cond({"embeds": embeds.float(), "pooled": pooled.float()}))

    def sizes(self, rows: int) -> dict[str, Tensor]:
        return {"time_ids": self.time_ids(rows)}

    def blank(self, rows: int) -> Cond:
        c, ids = self.net.config, self.time_ids(rows)
        pooled = c.projection_class_embeddings_input_dim - ids.shape[1] * c.addition_time_embed_dim
        embeds = torch.zeros(rows, 77, c.cross_attention_dim)
        return Cond({"embeds": embeds, "pooled": torch.zeros(rows, pooled), "time_ids": ids})

    def null(self) -> Cond:
        encoded = self.encode([""])
        if not self.pipe.config.get("force_zeros_for_empty_prompt", True):
            return encoded
        # SDXL's pipeline uses zeros, not the empty prompt; the size conditioning stays.
        zeros = {name: torch.zeros_like(encoded[name]) for name in ("embeds", "pooled")}
        return Cond({**zeros, "time_ids": encoded["time_ids"]})

    @staticmethod
    def call(net: nn.Module, x_t: Tensor, time: Tensor, cond: Cond) -> Tensor:
        added = {"text_embeds": cond["pooled"], "time_ids": cond["time_ids"]}
        return net(
            x_t,
            time.to(x_t.dtype),
            encoder_hidden_states=cond["embeds"],
            added_cond_kwargs=added,
            return_dict=False,
        )[0]
