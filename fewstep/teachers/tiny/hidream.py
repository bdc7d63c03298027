"""The tiny random HiDream-I1."""

from __future__ import annotations

from typing import Any

from .parts import autoencoder
from .texts import stacked, text_config, tiny_t5


def llama_tokenizer():
    """Character level, with a token before each text, as Llama's has."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    begin, end = "<|begin_of_text|>", "<|eot_id|>"
    symbols = [begin, end, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(symbols)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A", special_tokens=[(begin, symbols.index(begin))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=begin, eos_token=end, pad_token=end, model_max_length=2048
    )


def hidream(tokenizer: Any, _pipeline_class: str, options: dict[str, Any]) -> Any:
    """Patches of 16 x 16 latents, for its stock call makes latents of 128 x 128 whatever it is told.

    Blocks read three of Llama's four layers, one of them twice.
    """
    import diffusers
    from transformers import CLIPTextModelWithProjection, LlamaConfig, LlamaForCausalLM

    own = {"max_position_embeddings": 128}
    first, second = (
        CLIPTextModelWithProjection(text_config(tokenizer, projection_dim=width, **own)) for width in (12, 20)
    )
    llama = llama_tokenizer()
    language = LlamaForCausalLM(LlamaConfig(**{**stacked(llama, 4), "hidden_size": 24}))
    # Without attention among its 16384 latents.
    vae = autoencoder(scaling_factor=0.3611, shift_factor=0.1159, mid_block_add_attention=False)
    tokenizer_3, t5 = tiny_t5()
    network = {
        "patch_size": 16,
        "in_channels": 4,
        "num_layers": 2,
        "num_single_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "caption_channels": [16, 24],
        "text_emb_dim": 32,
        "axes_dims_rope": (8, 4, 4),
        "llama_layers": [0, 1, 3, 3],
    }
    return diffusers.HiDreamImagePipeline(
        scheduler=diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        vae=vae,
        text_encoder=first,
        tokenizer=tokenizer,
        text_encoder_2=second,
        tokenizer_2=tokenizer,
        text_encoder_3=t5,
        tokenizer_3=tokenizer_3,
        text_encoder_4=language,
        tokenizer_4=llama,
        transformer=diffusers.HiDreamImageTransformer2DModel(**{**network, **options}),
    )
