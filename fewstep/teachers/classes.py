"""Teachers that know class labels, or nothing: DiT in latents, UNet2DModel in pixels. A prompt is a label."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..diffusion.cond import Cond
from ..errors import FewstepError
from .base import Teacher
from .pipelines import network_of


def num_classes(pipe: Any) -> int | None:
    """How many labels the network of a pipeline knows; None where it knows none, as for texts."""
    config = network_of(pipe).config
    if type(pipe).__name__ == "DiTPipeline":
        return config.num_embeds_ada_norm
    return config.get("num_class_embeds") if type(pipe).__name__ in ("DDPMPipeline", "EDMPipeline") else None


def labels_of(pipe: Any, prompts: Sequence[str]) -> list[int]:
    """Class labels of prompts: numbers, or the names that the pipeline has for them (DiT).

    Raises:
        FewstepError: a prompt that is no class of this network.
    """
    classes, names = num_classes(pipe) or 0, getattr(pipe, "labels", {})
    for prompt in prompts:
        if prompt not in names and not (str(prompt).isdecimal() and int(prompt) < classes):
            known = " or a name in the pipeline's id2label" if names else ""
            some = " (data.prompts builtin:imagenet-classes has 0 to 999)" if classes == 1000 else ""
            raise FewstepError(
                f"class label {prompt!r}: expected a number from 0 to {classes - 1}{known}; this teacher is "
                f"conditioned on class labels{some}"
            )
    return [names[prompt] if prompt in names else int(prompt) for prompt in prompts]


class DiT(Teacher):
    """DiT: eps and a learned variance, which is left out; the null label comes after the last class."""

    pipeline_class = "DiTPipeline"
    network = "transformer"
    encoders = ()

    def encode(self, prompts: Sequence[str]) -> Cond:
        return Cond({"label": torch.tensor(labels_of(self.pipe, prompts), device=self.device)})

    def blank(self, rows: int) -> Cond:
        return Cond({"label": torch.zeros(rows, dtype=torch.long)})

    def null(self) -> Cond:
        return Cond({"label": torch.tensor([self.net.config.num_embeds_ada_norm], device=self.device)})

    @staticmethod
    def call(net: nn.Module, x_t: Tensor, time: Tensor, cond: Cond) -> Tensor:
        return net(x_t, timestep=time.to(x_t.dtype), class_labels=cond["label"], return_dict=False)[0]


class DDPM(Teacher):
    """UNet2DModel in pixels, with class labels where it has ``num_class_embeds``, else whatever the prompt.

    Neither kind has a null condition. Samples are not clipped on the way, whatever the scheduler says. A DDIMPipeline
    is loaded as a DDPMPipeline, which holds the same parts and keeps its scheduler.
    """

    pipeline_class = "DDPMPipeline"
    autoencoder = None
    encoders = ()

    def __init__(self, pipe: Any, source: str, *args: Any):
        config = pipe.unet.config
        if config.out_channels != config.in_channels:
            raise FewstepError(
                f"{source}: unet of {config.in_channels} channels in, {config.out_channels} out: a learned variance, "
                "which no stock scheduler of students takes; drop the second half of its conv_out"
            )
        super().__init__(pipe, source, *args)
        # Attention hands on tokens turned into channels, of which torch's group norm has no forward-mode derivative;
        # the copy is one that the norm itself would make.
        for module in self.net.modules():
            if isinstance(module, nn.GroupNorm):
                module.register_forward_pre_hook(_contiguous)

    def encode(self, prompts: Sequence[str]) -> Cond:
        if num_classes(self.pipe) is None:
            return Cond({})
        return Cond({"label": torch.tensor(labels_of(self.pipe, prompts), device=self.device)})

    def blank(self, rows: int) -> Cond:
        return Cond({} if num_classes(self.pipe) is None else {"label": torch.zeros(rows, dtype=torch.long)})

    def null(self) -> None:
        return None

    def example(self) -> Cond:
        return self.encode(["0"])

    @staticmethod
    def call(net: nn.Module, x_t: Tensor, time: Tensor, cond: Cond) -> Tensor:
        return net(x_t, time.to(x_t.dtype), class_labels=cond.tensors.get("label"), return_dict=False)[0]

    def latents(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return images.to(self.device).permute(0, 3, 1, 2).float() / 127.5 - 1

    def decode_pixels(self, latents: Tensor) -> Tensor:
        return latents.float().clamp(-1, 1)


def _contiguous(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (inputs[0].contiguous(), *inputs[1:])
