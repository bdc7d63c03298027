"""Qwen-Image and its kin, whose texts language models of Qwen read."""

from __future__ import annotations

import re
from typing import Any

from .parts import autoencoder, film_autoencoder
from .texts import EDITING, VISION, VISION_IDS, language_model, stacked


def qwen_image(tokenizer, _pipeline_class, options):
    import diffusers

    return diffusers.QwenImagePipeline(tokenizer=tokenizer, **qwen_parts(tokenizer, options))


def qwen_image_edit(tokenizer, _pipeline_class, options):
    """Its VAE has few latents, for the stock call encodes references at a megapixel, whatever it makes of them."""
    import diffusers
    import transformers

    from ..processor import ImageTextProcessor

    prefix = " ".join(EDITING)
    tokenizer.add_tokens([*dict.fromkeys(re.findall(r" ?[a-z]+", prefix)), *VISION], special_tokens=True)
    # Without torchvision newer versions have this one only, under its own name.
    images = getattr(transformers, "Qwen2VLImageProcessorPil", None) or transformers.Qwen2VLImageProcessor
    ids = dict(zip(VISION_IDS, tokenizer.convert_tokens_to_ids(VISION)))
    vae = {"base_dim": 2, "dim_mult": [1] * 5, "temperal_downsample": [False, False, False, True]}
    return diffusers.QwenImageEditPlusPipeline(
        tokenizer=tokenizer,
        processor=ImageTextProcessor(images(), tokenizer),
        **qwen_parts(tokenizer, options, vae, ids),
    )


def qwen_parts(tokenizer, options, vae: dict[str, Any] | None = None, ids: dict[str, int] | None = None):
    import diffusers
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    rope = {"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    texts = {**language_model(tokenizer), "rope_scaling": rope}
    config = Qwen2_5_VLConfig(text_config=texts, vision_config=vision, **(ids or {}))
    encoder = Qwen2_5_VLForConditionalGeneration(config)
    network = {
        "in_channels": 16,  # four latents of four channels
        "out_channels": 4,
        "num_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 16,
        "axes_dims_rope": (8, 4, 4),
    }
    return {
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, max_image_seq_len=8192, max_shift=0.9, shift_terminal=0.02
        ),
        "vae": film_autoencoder(vae),
        "text_encoder": encoder,
        "transformer": diffusers.QwenImageTransformer2DModel(**{**network, **options}),
    }


def z_image(tokenizer, _pipeline_class, options):
    import diffusers
    import torch
    from transformers import Qwen3Config, Qwen3Model

    network = {
        "in_channels": 4,
        "dim": 32,
        "n_layers": 2,
        "n_refiner_layers": 1,
        "n_heads": 2,
        "n_kv_heads": 2,
        "cap_feat_dim": 16,
        "axes_dims": [8, 4, 4],
        "axes_lens": [1024, 64, 64],
    }
    transformer = diffusers.ZImageTransformer2DModel(**{**network, **options})
    for token in (transformer.x_pad_token, transformer.cap_pad_token):
        torch.nn.init.normal_(token)
    return diffusers.ZImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=6.0),
        vae=autoencoder(scaling_factor=0.3611, shift_factor=0.1159),
        text_encoder=Qwen3Model(Qwen3Config(**language_model(tokenizer), head_dim=8)),
        tokenizer=tokenizer,
        transformer=transformer,
    )


def krea2(tokenizer, _pipeline_class, options):
    import diffusers
    from transformers import Qwen3VLConfig, Qwen3VLModel

    rope = {"mrope_section": [2, 1, 1], "rope_type": "default", "mrope_interleaved": True}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    texts = {**stacked(tokenizer, 4), "rope_scaling": rope}
    network = {
        "in_channels": 16,  # four latents of four channels
        "num_layers": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 32,
        "timestep_embed_dim": 16,
        "text_hidden_dim": 16,
        "num_text_layers": 3,
        **dict.fromkeys(("text_num_attention_heads", "text_num_key_value_heads"), 2),
        "text_intermediate_size": 32,
        **dict.fromkeys(("num_layerwise_text_blocks", "num_refiner_text_blocks"), 1),
        "axes_dims_rope": (4, 2, 2),
    }
    return diffusers.Krea2Pipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, max_image_seq_len=6400
        ),
        vae=film_autoencoder(),
        text_encoder=Qwen3VLModel(
            Qwen3VLConfig(text_config=texts, vision_config={**vision, "deepstack_visual_indexes": [0]})
        ),
        tokenizer=tokenizer,
        transformer=diffusers.Krea2Transformer2DModel(**{**network, **options}),
        text_encoder_select_layers=(1, 2, 4),
    )
