"""Autoencoders, networks and schedulers that several pipelines have."""

from __future__ import annotations

from typing import Any

SIZES = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}


def film_autoencoder(sizes: dict[str, Any] | None = None):
    import diffusers

    small = {"base_dim": 8, "dim_mult": [1, 1, 1], "temperal_downsample": [False, True]}
    return diffusers.AutoencoderKLQwenImage(
        z_dim=4,
        num_res_blocks=1,
        latents_mean=[-0.7571, 0.1075, 1.5508, 0.2503],
        latents_std=[2.8184, 1.2196, 0.5, 1.916],
        **(sizes or small),
    )


def euler_scheduler(options):
    from diffusers import EulerDiscreteScheduler

    return EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=options.pop("prediction_type", "epsilon"),
        timestep_spacing="leading",
        steps_offset=1,
    )


def autoencoder(levels: int = 2, **options):
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8,) * levels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        latent_channels=4,
        norm_num_groups=4,
        layers_per_block=1,
        sample_size=32,
        **{"scaling_factor": 0.18215, **options},
    )


def conditional_unet(cross: int, **options):
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        **{
            **SIZES,
            "sample_size": 16,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "attention_head_dim": (2, 2),
            "cross_attention_dim": cross,
            **options,
        }
    )


def awake(net: Any) -> None:
    """What begins at zero is filled, so that every weight moves the output."""
    import torch

    for parameter in net.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
