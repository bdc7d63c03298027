"""The other transformers: SD 3, SANA, PixArt, DiT, Lumina 2, HiDream."""

from __future__ import annotations

from .parts import autoencoder
from .texts import gemma, text_config, tiny_t5


def sd3(tokenizer, _pipeline_class, options):
    """Without T5, as many run it: zeros stand in its place."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
    from transformers import CLIPTextModelWithProjection

    encoders = [CLIPTextModelWithProjection(text_config(tokenizer, projection_dim=16)) for _ in range(2)]
    network = {
        "sample_size": 16,
        "patch_size": 2,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "joint_attention_dim": 32,
        "caption_projection_dim": 16,
        "pooled_projection_dim": 32,
        "pos_embed_max_size": 16,
        "qk_norm": "rms_norm",
    }
    return StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(**{**network, **options}),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=autoencoder(scaling_factor=1.5305, shift_factor=0.0609),
        text_encoder=encoders[0],
        tokenizer=tokenizer,
        text_encoder_2=encoders[1],
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )


def sana(_tokenizer, _pipeline_class, _options):
    from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaPipeline, SanaTransformer2DModel

    vae = {
        f"{half}_{name}": value
        for half in ("encoder", "decoder")
        for name, value in {
            "block_types": "ResBlock",
            "block_out_channels": (8, 8),
            "layers_per_block": (1, 1),
            "qkv_multiscales": ((), ()),
        }.items()
    }
    tokenizer, encoder = gemma()
    return SanaPipeline(
        tokenizer=tokenizer,
        text_encoder=encoder,
        vae=AutoencoderDC(latent_channels=4, scaling_factor=0.41407, **vae),
        transformer=SanaTransformer2DModel(
            sample_size=16,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            num_attention_heads=2,
            attention_head_dim=8,
            num_cross_attention_heads=2,
            cross_attention_head_dim=8,
            cross_attention_dim=16,
            caption_channels=16,
            timestep_scale=0.001,  # as `fewstep prepare` leaves it, and SanaSprintPipeline needs it
        ),
        scheduler=DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    )


def lumina2(_tokenizer, _pipeline_class, options):
    from diffusers import FlowMatchEulerDiscreteScheduler, Lumina2Pipeline, Lumina2Transformer2DModel

    tokenizer, encoder = gemma()
    network = {
        "sample_size": 8,
        "in_channels": 4,
        "hidden_size": 24,
        "num_layers": 2,
        "num_refiner_layers": 1,
        "num_attention_heads": 2,
        "num_kv_heads": 1,
        "multiple_of": 16,
        "axes_dim_rope": (4, 4, 4),
        "axes_lens": (300, 64, 64),
        "cap_feat_dim": 16,
    }
    return Lumina2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        vae=autoencoder(4, scaling_factor=0.3611, shift_factor=0.1159),
        text_encoder=encoder,
        tokenizer=tokenizer,
        transformer=Lumina2Transformer2DModel(**{**network, **options}),
    )


def dit(_tokenizer, _pipeline_class, options):
    from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    network = {
        "sample_size": 16,
        "in_channels": 4,
        "out_channels": 8,  # the second half is the learned variance
        "num_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "num_embeds_ada_norm": 1000,  # the pipeline's null label comes after them
    }
    return DiTPipeline(
        transformer=DiTTransformer2DModel(**{**network, **options}),
        vae=autoencoder(),
        scheduler=DDIMScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="linear", clip_sample=False),
    )


def pixart(_tokenizer, pipeline_class, _options):
    import diffusers

    tokenizer, encoder = tiny_t5()
    return getattr(diffusers, pipeline_class)(
        tokenizer=tokenizer,
        text_encoder=encoder,
        vae=autoencoder(scaling_factor=0.13025),
        transformer=diffusers.PixArtTransformer2DModel(
            sample_size=16,
            in_channels=4,
            out_channels=8,  # the second half is the learned variance
            num_layers=2,
            num_attention_heads=2,
            attention_head_dim=8,
            cross_attention_dim=16,
            caption_channels=16,
            use_additional_conditions=False,
        ),
        scheduler=diffusers.DPMSolverMultistepScheduler(
            beta_start=0.0001, beta_end=0.02, beta_schedule="linear"
        ),
    )
