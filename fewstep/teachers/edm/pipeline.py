"""A pipeline in diffusers' style for EDM's and EDM2's networks, and for their few-step students."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor

from ...errors import FewstepError
from ..classes import labels_of
from .networks import EDM2Precond, EDMPrecond
from .scheduler import EDMScheduler


class EDMPipeline(DiffusionPipeline):
    """Class labels, or nothing, to images.

    Args:
        unet: the network. scheduler: a teacher's solver, or its student's steps.
        vae: of EDM2 in latents: Stable Diffusion's autoencoder with the mean and spread of each of its channels
            (``latents_mean``, ``latents_std``), which the network sees at 0 and ``scaling_factor``; None in pixels.
        id2label: names of classes by number, several of one with commas between them.
    """

    model_cpu_offload_seq = "unet->vae"
    _optional_components = ["vae"]  # noqa: RUF012  (diffusers reads this list)

    def __init__(
        self,
        unet: EDMPrecond | EDM2Precond,
        scheduler: EDMScheduler,
        vae: Any = None,
        id2label: Mapping[Any, str] | None = None,
    ):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler, vae=vae)
        self.register_to_config(id2label={str(k): str(v) for k, v in (id2label or {}).items()})
        named = self.config.id2label.items()
        self.labels = {name: int(number) for number, names in named for name in names.split(", ")}

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | int | Sequence[str | int] = "",
        *,
        num_inference_steps: int | None = None,
        sigmas: Sequence[float] | None = None,
        guidance_scale: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict[str, Any]] | None = None,
    ):
        """Images of class labels.

        Args:
            prompt: numbers or names of classes; of a network without classes only their count matters.
            num_inference_steps: a student's own, and 18 of a teacher, by default; Heun calls the network ``2 K - 1``
                times. sigmas: levels at which its steps begin, in place of the scheduler's own.
            guidance_scale: ``u + g (c - u)``; 0 and 1 are none, others need a network with a null label.
            generator: one, or one per image. latents: unit noise (B, C, H, W).
            output_type: "pil", "np" (B, H, W, 3) in [0, 1], "pt" (B, 3, H, W), or "latent", what the solver ends at.
            callback_on_step_end: ``f(pipe, step, sigma, {})`` after each call of the network.

        Raises:
            FewstepError: a label of no class, or guidance without a null label.
            ValueError: no step, or levels that do not fall.
        """
        prompts = [str(p) for p in ([prompt] if isinstance(prompt, (str, int)) else prompt)]
        device, config, scheduler = self._execution_device, self.unet.config, self.scheduler
        labels = torch.tensor(labels_of(self, prompts), device=device) if config.num_class_embeds else None
        levels = {} if sigmas is None else {"sigmas": sigmas}  # which not every scheduler of diffusers takes
        steps = scheduler.default_steps if num_inference_steps is None else num_inference_steps
        scheduler.set_timesteps(steps, device=device, **levels)
        shape = (len(prompts), config.in_channels, config.sample_size, config.sample_size)
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        if tuple(latents.shape) != shape:
            raise FewstepError(f"latents: shape {tuple(latents.shape)}: expected {shape}")
        x = latents.to(device, torch.float32) * scheduler.init_noise_sigma
        for k, sigma in enumerate(self.progress_bar(scheduler.timesteps)):
            x0 = self._denoised(x, sigma, labels, guidance_scale)
            x = scheduler.step(x0, sigma, x, generator=generator, return_dict=False)[0]
            if callback_on_step_end is not None:
                callback_on_step_end(self, k, sigma, {})
        images = x if output_type == "latent" else self._images(x, output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _denoised(self, x: Tensor, sigma: Tensor, labels: Tensor | None, scale: float) -> Tensor:
        config = self.unet.config
        if labels is None or scale in (0, 1):
            return self.unet(x, sigma, labels)[0]
        if not config.null_label:
            raise FewstepError(
                f"guidance_scale: {scale}: this EDMPipeline has no guidance: its network was trained without a null "
                "label; expected 1"
            )
        none = torch.full_like(labels, config.num_class_embeds)
        without, told = self.unet(torch.cat([x, x]), sigma, torch.cat([none, labels]))[0].chunk(2)
        return torch.lerp(without, told, scale)

    def _images(self, x: Tensor, output_type: str) -> Any:
        if self.vae is not None:
            config = self.vae.config
            mean, std = (x.new_tensor(v)[:, None, None] for v in (config.latents_mean, config.latents_std))
            x = self.vae.decode((x / config.scaling_factor * std + mean).to(self.vae.dtype)).sample
        images: Any = (x.float() / 2 + 0.5).clamp(0, 1)
        if output_type == "pt":
            return images
        images = images.permute(0, 2, 3, 1).cpu().numpy()
        if output_type == "pil":
            return [Image.fromarray((image * 255).round().astype(np.uint8)) for image in images]
        return images
