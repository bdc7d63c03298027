"""The tiny random HiDream-I1; see :mod:`.tiny`."""

from __future__ import annotations

from typing import Any


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
        tokenizer_object=tokenizer, bos_token=begin, eos_token=end, model_max_length=2048
    )


def hidream(tokenizer, _pipeline_class, options):
    """Patches of 16 x 16 latents, for its stock call makes latents of 128 x 128 whatever it is told.

    Blocks read three of Llama's four layers, one of them twice.
    """
    import diffusers
    from transformers import CLIPTextModelWithProjection, LlamaConfig, LlamaForCausalLM

    from .tiny import _stacked, _text_config, _vae, tiny_t5

    clips = [
        CLIPTextModelWithProjection(
            _text_config(tokenizer, projection_dim=width, max_position_embeddings=128)
        )
        for width in (12, 20)
    ]
    t5_tokenizer, t5 = tiny_t5()
    llama = llama_tokenizer()
    llama.pad_token = llama.eos_token  # as the pipeline sets it
    network: dict[str, Any] = {
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
        vae=_vae(
            scaling_factor=0.3611, shift_factor=0.1159, mid_block_add_attention=False
        ),  # of 16384 tokens
        text_encoder=clips[0],
        tokenizer=tokenizer,
        text_encoder_2=clips[1],
        tokenizer_2=tokenizer,
        text_encoder_3=t5,
        tokenizer_3=t5_tokenizer,
        text_encoder_4=LlamaForCausalLM(LlamaConfig(**{**_stacked(llama, 4), "hidden_size": 24})),
        tokenizer_4=llama,
        transformer=diffusers.HiDreamImageTransformer2DModel(**{**network, **options}),
    )
