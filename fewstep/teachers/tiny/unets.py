"""Pipelines with U-Nets: Stable Diffusion, SDXL, DDPM, and EDM."""

from __future__ import annotations

from typing import Any

from .parts import SIZES, autoencoder, awake, conditional_unet, euler_scheduler
from .texts import text_config


def sd(tokenizer, _pipeline_class, options):
    from diffusers import StableDiffusionPipeline
    from transformers import CLIPTextModel

    scheduler = euler_scheduler(options)
    return StableDiffusionPipeline(
        vae=autoencoder(),
        text_encoder=CLIPTextModel(text_config(tokenizer)),
        tokenizer=tokenizer,
        unet=conditional_unet(16, **options),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl(tokenizer, _pipeline_class, options):
    from diffusers import StableDiffusionXLPipeline
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    scheduler = euler_scheduler(options)
    sdxl = {
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 16 + 6 * 4,
    }
    return StableDiffusionXLPipeline(
        vae=autoencoder(),
        text_encoder=CLIPTextModel(text_config(tokenizer)),
        text_encoder_2=CLIPTextModelWithProjection(text_config(tokenizer, projection_dim=16)),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=conditional_unet(32, **sdxl, **options),
        scheduler=scheduler,
        add_watermarker=False,
    )


def unet2d(_tokenizer, pipeline_class, options):
    import diffusers

    network = {
        **SIZES,
        "sample_size": 16,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": 4,
    }
    scheduler = {"DDPMPipeline": diffusers.DDPMScheduler, "DDIMPipeline": diffusers.DDIMScheduler}
    return getattr(diffusers, pipeline_class)(
        unet=diffusers.UNet2DModel(**{**network, **options}),
        scheduler=scheduler[pipeline_class](beta_schedule="linear"),
    )


def edm(_tokenizer, _pipeline_class, options):
    from ..edm.networks import EDM2Precond, EDMPrecond
    from ..edm.pipeline import EDMPipeline
    from ..edm.scheduler import EDMScheduler

    network: dict[str, Any] = {
        "sample_size": 16,
        "model_channels": 16,
        "channel_mult": (1, 2),
        "num_blocks": 1,
    }
    network |= {"attn_resolutions": (8,), **options}
    kind = network.pop("model_type", "ddpm++")
    if kind == "edm2":
        own = {"in_channels": 4, "num_class_embeds": 10, "channels_per_head": 16, "logvar_channels": 16}
        vae = autoencoder(
            scaling_factor=0.5, latents_mean=[5.81, 3.25, 0.12, -2.15], latents_std=[4.17, 4.62, 3.71, 3.28]
        )
        net = EDM2Precond(**{**own, **network})
    else:
        vae, net = None, EDMPrecond(model_type=kind, **network)
    awake(net)
    return EDMPipeline(net, EDMScheduler(), vae)
