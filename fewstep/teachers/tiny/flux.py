"""FLUX.1, FLUX.2 and Chroma."""

from __future__ import annotations

from .parts import autoencoder
from .texts import MESSAGES, stacked, text_config, tiny_t5


def flux2_parts(guided: bool, options):
    """Scheduler, VAE and network of FLUX.2."""
    import diffusers

    vae = diffusers.AutoencoderKLFlux2(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        layers_per_block=1,
        sample_size=32,
    )
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.3, 3.0)
    network = {
        "in_channels": 16,  # four latents of four channels
        "num_layers": 2,
        "num_single_layers": 1,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "joint_attention_dim": 48,  # three layers
        "timestep_guidance_channels": 16,
        "axes_dims_rope": (2, 2, 2, 2),
        "guidance_embeds": guided,
    }
    transformer = diffusers.Flux2Transformer2DModel(**{**network, **options})
    for name in ("double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation"):
        getattr(transformer, name).linear.weight.data.mul_(8)  # or blocks would hardly count
    return {
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        "vae": vae,
        "transformer": transformer,
    }


def flux2_klein(tokenizer, _pipeline_class, options):
    """Its encoder has as many layers as are read, which differ."""
    import diffusers
    from transformers import Qwen3Config, Qwen3ForCausalLM

    encoder = Qwen3ForCausalLM(Qwen3Config(**stacked(tokenizer, 28)))
    parts = flux2_parts(False, options)
    return diffusers.Flux2KleinPipeline(text_encoder=encoder, tokenizer=tokenizer, **parts)


def flux2(tokenizer, _pipeline_class, options):
    """As :func:`flux2_klein`, told the guidance scale; its processor reads texts alone."""
    import diffusers
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration

    from ..processor import TextProcessor

    texts = {**stacked(tokenizer, 31), "model_type": "mistral"}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Mistral3Config(
        text_config=texts,
        vision_config={**vision, "head_dim": 8, "image_size": 32, "model_type": "pixtral"},
    )
    return diffusers.Flux2Pipeline(
        text_encoder=Mistral3ForConditionalGeneration(config),
        tokenizer=TextProcessor(tokenizer, chat_template=MESSAGES),
        **flux2_parts(True, options),
    )


def flux(tokenizer, _pipeline_class, options):
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import CLIPTextModel

    t5_tokenizer, t5 = tiny_t5()
    network = {
        "patch_size": 1,
        "in_channels": 16,  # four latents of four channels
        "num_layers": 2,
        "num_single_layers": 1,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "joint_attention_dim": 16,
        "pooled_projection_dim": 16,
        "guidance_embeds": True,
        "axes_dims_rope": (2, 2, 4),
    }
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=autoencoder(scaling_factor=0.3611, shift_factor=0.1159),
        text_encoder=CLIPTextModel(text_config(tokenizer)),
        tokenizer=tokenizer,
        text_encoder_2=t5,
        tokenizer_2=t5_tokenizer,
        transformer=FluxTransformer2DModel(**{**network, **options}),
    )


def chroma(_tokenizer, _pipeline_class, options):
    from diffusers import ChromaPipeline, ChromaTransformer2DModel, FlowMatchEulerDiscreteScheduler

    tokenizer, t5 = tiny_t5()
    network = {
        "in_channels": 16,  # four latents of four channels
        "num_layers": 2,
        "num_single_layers": 1,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "joint_attention_dim": 16,
        "axes_dims_rope": (2, 2, 4),
        "approximator_num_channels": 16,
        "approximator_hidden_dim": 16,
        "approximator_layers": 1,
    }
    return ChromaPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=autoencoder(scaling_factor=0.3611, shift_factor=0.1159),
        text_encoder=t5,
        tokenizer=tokenizer,
        transformer=ChromaTransformer2DModel(**{**network, **options}),
    )
