"""HiDream-I1: a flow with four text encoders, whose blocks each read a layer of Llama, some through experts."""

from __future__ import annotations

from collections.abc import Sequence
from types import MethodType
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ..diffusion.cond import Cond
from .base import Teacher

LENGTH = 128  # tokens that each encoder reads in a stock call, and the network sees, padding included


class HiDream(Teacher):
    """HiDream-I1: guided by the empty prompt; the network's output is the negative of a flow's.

    Each layer of Llama that blocks read is kept once, though the published network reads the last one 17 times. The
    stock call makes square images of one size only.
    """

    pipeline_class = "HiDreamImagePipeline"
    needs: ClassVar[dict[str, str]] = {"diffusers": "0.34"}
    network = "transformer"
    encoders = ("text_encoder", "text_encoder_2", "text_encoder_3", "text_encoder_4")
    shifts_latents = True
    image_first = True
    encoded_at: ClassVar[dict[str, int]] = {"pooled": 4, "embeds": 0}
    comfyui = "lycoris_"

    def __init__(self, pipe: Any, source: str, *args: Any):
        self.patch = pipe.transformer.config.patch_size
        super().__init__(pipe, source, *args)

    @staticmethod
    def prepare(net: Any) -> None:
        """Its experts are those of inference in either mode, with a gradient."""
        for module in net.modules():
            if hasattr(module, "_force_inference_output"):  # of experts, and of what chooses them
                module._force_inference_output = True
            if hasattr(module, "moe_infer"):
                module.moe_infer = MethodType(experts, module)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Cond:
        device = self.pipe.text_encoder.device
        t5, _, llama, _, pooled, _ = self.pipe.encode_prompt(
            list(prompts), device=device, do_classifier_free_guidance=False
        )
        layers = llama[layers_of(self.net)].transpose(0, 1)
        return Cond({"embeds": t5.float(), "layers": layers.float(), "pooled": pooled.float()})

    def blank(self, rows: int) -> Cond:
        c = self.net.config
        t5, llama = c.caption_channels
        layers = torch.zeros(rows, len(layers_of(self.net)), LENGTH, llama)
        pooled = torch.zeros(rows, c.text_emb_dim)
        return Cond({"embeds": torch.zeros(rows, LENGTH, t5), "layers": layers, "pooled": pooled})

    @staticmethod
    def call(net: Any, x_t: Tensor, time: Tensor, cond: Cond) -> Tensor:
        out = net(
            x_t,
            timesteps=time.to(x_t.dtype),
            encoder_hidden_states_t5=cond["embeds"],
            encoder_hidden_states_llama3=dict(zip(layers_of(net), cond["layers"].unbind(1))),
            pooled_embeds=cond["pooled"],
            return_dict=False,
        )[0]
        if out.shape[2:] != x_t.shape[2:]:  # patches (B, C, n, p p), which train mode leaves apart
            patch = net.config.patch_size
            grid = out.unflatten(3, (patch, patch)).unflatten(2, (-1, x_t.shape[-1] // patch))
            out = grid.transpose(3, 4).reshape(len(x_t), -1, *x_t.shape[2:])
        return -out

    @staticmethod
    def image_of(count: int, features: Tensor, cond: Cond) -> Tensor:
        """Before the text's in blocks of one stream; others give it apart."""
        return features[:, :count]


def layers_of(net: Any) -> list[int]:
    """Those of Llama that the network reads, each once."""
    return sorted(set(net.config.llama_layers))


def experts(self: Any, tokens: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """In place of the stock network's `moe_infer`: the same numbers, and a gradient.

    Args:
        self: the layer. tokens: (n, D). chosen: (n k,) experts, k of each token. weights: (n k, 1), theirs.

    Returns:
        (n, D), each token's k experts summed with their weights.
    """
    most, count = self.num_activated_experts, len(self.experts)
    if isinstance(chosen, FakeTensor):  # of a plan: as many tokens for each
        shares = [len(chosen) // count + (i < len(chosen) % count) for i in range(count)]
    else:
        shares = torch.bincount(chosen, minlength=count).tolist()
    order = chosen.argsort()
    given = tokens[order // most].split(shares)
    # One that no token has chosen runs on none, for every weight to have a gradient.
    made = torch.cat([expert(part) for expert, part in zip(self.experts, given)])
    made = (made * weights[order]).to(made.dtype)
    return made[order.argsort()].unflatten(0, (-1, most)).sum(1).to(made.dtype)
