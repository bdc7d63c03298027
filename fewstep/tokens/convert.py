"""Published checkpoints of autoregressive models turned into pipelines."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import FewstepError
from . import released
from .llamagen import GPT, LlamaGenVQ
from .pipeline import LlamaGenPipeline, VARPipeline, codes_of
from .state import load_weights, read_weights
from .var import PATCHES, PATCHES_512, VAR, MultiScaleVQ

MASKS = ("lvl_1L", "attn_bias_for_masking")  # constants that VAR's files carry


def _count(state: dict[str, Tensor], prefix: str) -> int:
    """How many numbered parts there are."""
    return 1 + max((int(k[len(prefix) :].split(".")[0]) for k in state if k.startswith(prefix)), default=-1)


def _multiples(state: dict[str, Tensor], name: str, ch: int) -> tuple[int, ...]:
    """Channels of each level, as multiples of the first convolution's."""
    found: list[int] = []
    while (weight := state.get(name.format(len(found)))) is not None:
        found.append(weight.shape[0] // ch)
    return tuple(found)


def _shape(state: dict[str, Tensor], name: str, source: str) -> tuple[int, ...]:
    if name not in state:
        raise FewstepError(f"{source}: missing {name}; these are the weights of another model")
    return tuple(state[name].shape)


def llamagen(
    transformer: str | Path,
    tokenizer: str | Path,
    *,
    tokens: int = 256,
    top_k: int | None = None,
    top_p: float = 1.0,
    text_encoder: str | Path | None = None,
    split: int | None = None,
    entries: Sequence[int] | None = None,
) -> LlamaGenPipeline:
    """LlamaGen from its published files, e.g. ``c2i_L_256.pt`` and ``vq_ds16_c2i.pt``, or, conditioned on text,
    ``t2i_XL_stage1_256.pt`` and ``vq_ds16_t2i.pt``; or its student by Distilled Decoding, ``llamagen-L.pt``.

    Args:
        tokens: of an image, 256 at 256 px, 576 at 384 px, 1024 at 512 px; the files do not say.
        top_k, top_p: how tokens are drawn; by default the 8000 likeliest for classes (Distilled Decoding's, arXiv
            2510.21003, appendix B.4), the 1000 likeliest for texts (LlamaGen's own).
        text_encoder: folder or hub id of the T5 encoder that a text model was trained with, google/flan-t5-xl.
        split, entries: of a student, see :func:`fewstep.tokens.released.student`.

    Raises:
        FewstepError: files of another model, or of sizes that do not go together.
    """
    gpt, vq, source = read_weights(transformer), read_weights(tokenizer), str(transformer)
    size, dim = _shape(gpt, "output.weight", source)
    condition, texts = _condition(gpt, text_encoder, source)
    vqvae = _llamagen_tokenizer(vq, str(tokenizer))
    _same_codes(vqvae.config.num_codes, size, tokenizer, transformer)
    net = GPT(
        vocab_size=size,
        dim=dim,
        n_layer=_count(gpt, "layers."),
        n_head=32 if dim == 3200 else max(1, dim // 64),
        block_size=tokens,
        multiple_of=math.gcd(_shape(gpt, "layers.0.feed_forward.w1.weight", source)[0], 256),
        code_dim=vqvae.config.code_dim if released.is_student(gpt) else None,
        **condition,
    )
    if released.is_student(gpt):
        made, steps = released.student(net, codes_of(vqvae), gpt, source, dim, split, entries)
        return LlamaGenPipeline(made, vqvae, entries=steps)
    load_weights(net, gpt, source)
    if top_k is None:
        top_k = 1000 if texts else 8000
    return LlamaGenPipeline(net.eval(), vqvae, **texts, top_k=top_k, top_p=top_p)


def _llamagen_tokenizer(vq: dict[str, Tensor], source: str) -> LlamaGenVQ:
    codes, code_dim = _shape(vq, "quantize.embedding.weight", source)
    ch = vq["encoder.conv_in.weight"].shape[0]
    vqvae = LlamaGenVQ(
        codes,
        code_dim,
        ch=ch,
        ch_mult=_multiples(vq, "encoder.conv_blocks.{}.res.0.conv1.weight", ch),
        blocks=_count(vq, "encoder.conv_blocks.0.res."),
        z_channels=vq["encoder.conv_out.weight"].shape[0],
    )
    if "quantize.codebook_used" not in vq:
        vq["quantize.codebook_used"] = torch.zeros(65536)  # a counter that some files lack
    load_weights(vqvae, vq, source)
    return vqvae.eval()


def _condition(
    gpt: dict[str, Tensor], text_encoder: str | Path | None, source: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Of a published transformer: the network's options, and a pipeline's parts for texts, none for class labels."""
    if "cls_embedding.embedding_table.weight" in gpt:
        if text_encoder is not None:
            raise FewstepError(
                f"--text-encoder {text_encoder}: {source} is conditioned on class labels; leave it out"
            )
        return {"num_classes": gpt["cls_embedding.embedding_table.weight"].shape[0] - 1}, {}
    slots, width = _shape(gpt, "cls_embedding.uncond_embedding", source)
    if text_encoder is None:
        raise FewstepError(
            f"{source}: is conditioned on text: give --text-encoder, the folder of the T5 encoder that it was trained "
            "with (google/flan-t5-xl)"
        )
    from transformers import AutoTokenizer, T5EncoderModel

    try:
        encoder = T5EncoderModel.from_pretrained(text_encoder)
        tokenizer = AutoTokenizer.from_pretrained(text_encoder)
    except (OSError, ValueError) as error:
        raise FewstepError(
            f"--text-encoder {text_encoder}: holds no T5 encoder: {str(error).splitlines()[0]}"
        ) from error
    if encoder.config.d_model != width:
        raise FewstepError(
            f"--text-encoder {text_encoder}: its features have {encoder.config.d_model} numbers, and {source} reads "
            f"{width}; give the encoder that it was trained with (google/flan-t5-xl)"
        )
    condition = {"num_classes": None, "caption_dim": width, "cls_token_num": slots, "masked": True}
    return condition, {"text_encoder": encoder.eval(), "tokenizer": tokenizer}


def var(
    transformer: str | Path,
    tokenizer: str | Path,
    *,
    top_k: int = 900,
    top_p: float = 0.95,
    split: int | None = None,
    entries: Sequence[int] | None = None,
) -> VARPipeline:
    """VAR from its published files, e.g. ``var_d16.pth`` and ``vae_ch160v4096z32.pth``; or its student by Distilled
    Decoding, ``var-d16.pth``.

    Args:
        top_k, top_p: how tokens are drawn; these are Distilled Decoding's (arXiv 2510.21003, appendix B.4).
        split, entries: of a student, see :func:`fewstep.tokens.released.student`.

    Raises:
        FewstepError: files of another model, or of sizes that do not go together.
    """
    state, vq, source = read_weights(transformer), read_weights(tokenizer), str(transformer)
    width, code_dim = _shape(state, "word_embed.weight", source)
    aligned = released.is_student(state)  # with one more slot, a scale of its own
    slots = _shape(state, "pos_1LC", source)[1] - aligned
    scales = _shape(state, "lvl_embed.weight", source)[0] - aligned
    known = {sum(side * side for side in p): p for p in (PATCHES, PATCHES_512)}
    patches = known.get(slots) or _small_patches(scales, slots, source)
    vqvae = _var_tokenizer(vq, str(tokenizer), patches)
    size, depth = _shape(state, "head.weight", source)[0], _count(state, "blocks.")
    _same_codes(vqvae.config.num_codes, size, tokenizer, transformer)
    l2_norm = "blocks.0.attn.scale_mul_1H11" in state
    net = VAR(
        vocab_size=size,
        code_dim=code_dim,
        depth=depth,
        width=width,
        heads=state["blocks.0.attn.scale_mul_1H11"].shape[1] if l2_norm else depth,
        num_classes=state["class_emb.weight"].shape[0] - 1,
        patch_nums=patches,
        attn_l2_norm=l2_norm,
        mlp_ratio=state["blocks.0.ffn.fc1.weight"].shape[0] / width,
        num_codes=vqvae.config.num_codes,
        aligned=aligned,
    )
    net.pyramid.take(vqvae.quantize)
    state = {name: value for name, value in state.items() if name not in MASKS}
    if aligned:
        made, steps = released.student(net, codes_of(vqvae), state, source, depth, split, entries)
        return VARPipeline(made, vqvae, entries=steps)
    load_weights(net, state, source)
    return VARPipeline(net.eval(), vqvae, top_k=top_k, top_p=top_p)


def _var_tokenizer(vq: dict[str, Tensor], source: str, patches: Sequence[int]) -> MultiScaleVQ:
    codes, code_dim = _shape(vq, "quantize.embedding.weight", source)
    ch = vq["encoder.conv_in.weight"].shape[0]
    vqvae = MultiScaleVQ(
        codes,
        code_dim,
        ch=ch,
        ch_mult=_multiples(vq, "encoder.down.{}.block.0.conv1.weight", ch),
        blocks=_count(vq, "encoder.down.0.block."),
        patch_nums=patches,
    )
    # The tokenizer's usage counter is per scale of its own training, which was at 256 px.
    vq["quantize.ema_vocab_hit_SV"] = vqvae.quantize.ema_vocab_hit_SV
    load_weights(vqvae, vq, source)
    return vqvae.eval()


def _same_codes(tokenizer_size: int, vocabulary: int, tokenizer, transformer) -> None:
    if tokenizer_size != vocabulary:
        raise FewstepError(
            f"{tokenizer}: has a codebook of {tokenizer_size}, but {transformer} predicts {vocabulary} codes; give the "
            "tokenizer this transformer was trained with"
        )


def _small_patches(scales: int, slots: int, source: str) -> tuple[int, ...]:
    """Sides 1, 2, 3, ..., which is how small models are made."""
    patches = tuple(range(1, scales + 1))
    if sum(side * side for side in patches) != slots:
        raise FewstepError(
            f"{source}: pos_1LC has {slots} places for {scales} scales, which fits no known pyramid"
        )
    return patches


CHECKPOINTS = {"llamagen": llamagen, "var": var}
