"""Tokenizers that need no data files, and configurations of what reads their tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def clip_tokenizer(folder: Path):
    """Character level: 256 bytes with and without CLIP's end-of-word mark, no merges, no data files."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    alphabet = sorted(ByteLevel.alphabet())
    symbols = [*alphabet, *(a + "</w>" for a in alphabet), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({s: i for i, s in enumerate(symbols)}, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "CLIPTokenizer", "model_max_length": 77})
    )
    return CLIPTokenizer.from_pretrained(folder)


# What the published tokenizers have as one token of Qwen-Image's instruction, which is cut off by their number.
WORDS = (
    *(
        "<|im_start|>",
        "system",
        "Describe",
        " the",
        " image",
        " by",
        " detailing",
        " color",
        " shape",
        " size",
    ),
    *(
        " texture",
        " quantity",
        " text",
        " spatial",
        " relationships",
        " of",
        " objects",
        " and",
        " background",
    ),
    *("<|im_end|>", "user", "assistant"),
)


# The same of its editing model's, and what stands for an image.
EDITING = (
    "Describe the key features of the input image color shape size texture objects background then explain how",
    "the user s text instruction should alter or modify the image Generate a new image that meets the user s",
    "requirements while maintaining consistency with the original input where appropriate",
)


VISION = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")


VISION_IDS = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")


CHAT = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{{ '<|im_start|>assistant\\n' }}"
)


def qwen_tokenizer(folder: Path):
    """Character level but for the words of an instruction."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer

    vocab = {s: i for i, s in enumerate(["<|endoftext|>", *sorted(ByteLevel.alphabet())])}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    options = {"tokenizer_class": "Qwen2Tokenizer", "model_max_length": 1100, "chat_template": CHAT}
    (folder / "tokenizer_config.json").write_text(json.dumps(options))
    tokenizer = Qwen2Tokenizer.from_pretrained(folder)
    tokenizer.add_tokens(list(WORDS), special_tokens=True)
    return tokenizer


def language_model(tokenizer) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), tokenizer.pad_token_id),
    }


def stacked(tokenizer, layers: int) -> dict[str, Any]:
    """A language model of one head, whose layers give what differs."""
    sizes = {"num_hidden_layers": layers, "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 8}
    return {**language_model(tokenizer), **sizes, "initializer_range": 0.3}


MESSAGES = (
    "{% for m in messages %}{% if m['role'] == 'system' %}[SYSTEM]{{ m['content'][0]['text'] }}[/SYSTEM]"
    "{% else %}[INST]{{ m['content'][0]['text'] }}[/INST]{% endif %}{% endfor %}"
)


def text_config(tokenizer, width: int = 16, **options):
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **options,
    )


def gemma():
    """Character level: (tokenizer, encoder)."""
    import tokenizers
    import transformers
    from packaging.version import Version
    from transformers import Gemma2Config, Gemma2Model

    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    symbols = [*special, *(chr(i) for i in range(32, 127)), "\u2581"]
    vocab = {symbol: i for i, symbol in enumerate(symbols)}
    if Version(transformers.__version__).major >= 5:
        tokenizer = transformers.GemmaTokenizer(vocab=vocab, merges=[], model_max_length=300)
    else:
        model = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [], unk_token="<unk>"))
        model.normalizer = tokenizers.normalizers.Replace(" ", "\u2581")
        tokenizer = transformers.GemmaTokenizerFast(tokenizer_object=model, model_max_length=300)
    config = Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        bos_token_id=special.index("<bos>"),
        eos_token_id=special.index("<eos>"),
        pad_token_id=special.index("<pad>"),
    )
    return tokenizer, Gemma2Model(config)


def tiny_t5(width: int = 16):
    """Character level, without the library for data files: (tokenizer, encoder)."""
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    pieces = ["<pad>", "</s>", "<unk>", "\u2581", *(chr(i) for i in range(33, 127))]
    tokenizer = T5Tokenizer(vocab=[(piece, -1.0) for piece in pieces], extra_ids=0)
    config = T5Config(vocab_size=len(tokenizer), d_model=width, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    return tokenizer, T5EncoderModel(config)
