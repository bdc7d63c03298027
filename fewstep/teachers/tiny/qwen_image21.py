"""The tiny random stand-in of Qwen-Image-2.1."""

from __future__ import annotations

from typing import Any

from ..processor import TextProcessor
from .texts import stacked

CHAT = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}{% for part in m['content'] %}{{ part['text'] }}"
    "{% endfor %}{{ '<|im_end|>\\n' }}{% endfor %}"
)
# What the published tokenizer has as one token each.
WORDS = ("Comprehend", " and", " analyze", " the", " provided", " prompt", "<|image_pad|>")


def qwen_image21(tokenizer: Any, _pipeline_class: str, options: dict[str, Any]) -> Any:
    """With a tokenizer that is given the words of the template."""
    import diffusers
    import torch

    tokenizer.add_tokens(list(WORDS), special_tokens=True)
    encoder = _encoder(stacked(tokenizer, 2))
    # Or nobody would see that it is left out.
    torch.nn.init.uniform_(encoder.model.language_model.norm.weight, 0.2, 3.0)
    network = {
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "context_in_dim": 16,
        "axes_dims_rope": (8, 4, 4),
    }
    transformer = diffusers.QwenImage21Transformer2DModel(**{**network, **options})
    transformer.modulation[1].weight.data.mul_(8)  # or blocks would hardly count
    vae = diffusers.AutoencoderKLQwenImage21(
        base_dim=4,
        decoder_base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=[-0.7571, 0.1075, 1.5508, 0.2503],
        latents_std=[2.8184, 1.2196, 0.5, 1.916],
    )
    return diffusers.QwenImage21Pipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, max_image_seq_len=8192, max_shift=0.9, shift_terminal=0.02
        ),
        vae=vae,
        text_encoder=encoder,
        processor=TextProcessor(tokenizer, chat_template=CHAT),
        transformer=transformer,
    )


def _encoder(language_model: dict[str, Any]) -> Any:
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    rope = {"mrope_section": [2, 1, 1], "rope_type": "default", "mrope_interleaved": True}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    texts = {**language_model, "rope_scaling": rope}
    return Qwen3VLForConditionalGeneration(
        Qwen3VLConfig(text_config=texts, vision_config={**vision, "deepstack_visual_indexes": [0]})
    )
