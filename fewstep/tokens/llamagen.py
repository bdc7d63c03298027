"""LlamaGen (Sun et al., 2024, arXiv 2406.06525): a raster-order GPT over the codes of a VQ tokenizer.

Parameters carry the names of the published checkpoints, so those load without a map of keys.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from ..diffusion.cond import Cond
from .vq import Codebook, Coder, grid, nearest


# -------------------------------------------------------------------------------------------------- the transformer
class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), (x.shape[-1],), self.weight.float(), self.eps).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, dim: int, n_head: int):
        super().__init__()
        self.n_head = n_head
        self.wqkv = nn.Linear(dim, 3 * dim, bias=False)
        self.wo = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, rotation: Tensor, mask: Tensor | None, cache: list | None) -> Tensor:
        q, k, v = self.wqkv(x).unflatten(-1, (3, self.n_head, -1)).permute(2, 0, 3, 1, 4)
        q, k = rotate(q, rotation), rotate(k, rotation)
        first = cache is None or not cache
        if cache is not None:
            cache[:] = [k, v] if first else [torch.cat(pair, 2) for pair in zip(cache, (k, v))]
            k, v = cache
        # Later calls bring one token, which sees everything before it that is not masked.
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=first and mask is None)
        return self.wo(out.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self, dim: int, multiple_of: int):
        super().__init__()
        hidden = -(-int(2 * 4 * dim / 3) // multiple_of) * multiple_of
        self.w1 = nn.Linear(dim, hidden, bias=False)
        self.w3 = nn.Linear(dim, hidden, bias=False)
        self.w2 = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    def __init__(self, dim: int, n_head: int, multiple_of: int, eps: float):
        super().__init__()
        self.attention = Attention(dim, n_head)
        self.feed_forward = FeedForward(dim, multiple_of)
        self.attention_norm = RMSNorm(dim, eps)
        self.ffn_norm = RMSNorm(dim, eps)

    def forward(self, x: Tensor, rotation: Tensor, mask: Tensor | None, cache: list | None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rotation, mask, cache)
        return x + self.feed_forward(self.ffn_norm(x))


class LabelEmbedder(nn.Module):
    """Class labels; the row after the last class is the null condition."""

    def __init__(self, num_classes: int, dim: int):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, dim)

    def forward(self, cond: Cond) -> Tensor:
        return self.embedding_table(cond["label"])[:, None]


class CaptionMLP(nn.Module):
    def __init__(self, inner: int, dim: int):
        super().__init__()
        self.fc1 = nn.Linear(inner, dim, bias=False)
        self.fc2 = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class CaptionEmbedder(nn.Module):
    """Features of a text encoder; ``uncond_embedding`` takes their place for the null condition."""

    uncond_embedding: Tensor

    def __init__(self, inner: int, dim: int, slots: int):
        super().__init__()
        self.cap_proj = CaptionMLP(inner, dim)
        self.register_buffer("uncond_embedding", torch.randn(slots, inner) / inner**0.5)

    def forward(self, cond: Cond) -> Tensor:
        null = cond["null"].bool()[:, None, None]
        return self.cap_proj(torch.where(null, self.uncond_embedding, cond["embeds"]))


class GPT(ModelMixin, ConfigMixin):
    """A causal transformer over condition slots and then the tokens of a square map, row by row.

    Args:
        vocab_size: V; 0 leaves the logits out. dim, n_layer, n_head: of the transformer (B 768/12/12, L 1024/24/16, XL
            1280/36/20).
        block_size: n, the tokens of an image; a square number.
        num_classes: for class conditions (``label``, (B,)), or None for text.
        caption_dim, cls_token_num: width of text features and how many slots they fill (``embeds``,
            (B, cls_token_num, caption_dim), and ``null``, (B,)).
        masked: texts come with a ``mask`` (B, cls_token_num), 0 where a slot is padding: nothing but the slot itself
            sees it. So the published text models were trained.
        multiple_of: the feed-forward width is rounded up to it.
        rotated_condition: False as published: queries and keys of condition slots are zero, so every token weighs them
            equally. True leaves them as they are, without a rotation.
        code_dim: if given, tokens are read as code embeddings (B, n, code_dim) through a linear layer, not as indices.
    """

    _repeated_blocks = ("Block",)  # what ``teacher.compile`` compiles

    @register_to_config
    def __init__(
        self,
        vocab_size: int = 16384,
        dim: int = 768,
        n_layer: int = 12,
        n_head: int = 12,
        block_size: int = 256,
        num_classes: int | None = 1000,
        caption_dim: int = 2048,
        cls_token_num: int = 1,
        multiple_of: int = 256,
        norm_eps: float = 1e-5,
        rope_base: float = 10000.0,
        rotated_condition: bool = False,
        code_dim: int | None = None,
        masked: bool = False,
    ):
        super().__init__()
        if num_classes is None:
            self.cls_embedding: nn.Module = CaptionEmbedder(caption_dim, dim, cls_token_num)
        else:
            self.cls_embedding = LabelEmbedder(num_classes, dim)
        self.tok_embeddings = nn.Linear(code_dim, dim) if code_dim else nn.Embedding(vocab_size, dim)
        self.layers = nn.ModuleList(Block(dim, n_head, multiple_of, norm_eps) for _ in range(n_layer))
        self.norm = RMSNorm(dim, norm_eps)
        self.output = nn.Linear(dim, vocab_size, bias=False) if vocab_size else nn.Identity()
        rotation = rotations(block_size, dim // n_head, cls_token_num, rope_base, rotated_condition)
        self.register_buffer("rotation", rotation, persistent=False)
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.02)
        if vocab_size:
            for parameter in self.output.parameters():
                nn.init.zeros_(parameter)

    @property
    def groups(self) -> tuple[int, ...]:
        """Sizes of the groups of tokens that are decoded together, in order."""
        return (1,) * self.config.block_size

    @property
    def width(self) -> int:
        return self.config.dim

    @property
    def slots(self) -> int:
        """How many slots the condition has before those of tokens."""
        return self.config.cls_token_num

    def _run(self, x: Tensor, cond: Cond, start: int = 0, cache: list | None = None) -> Tensor:
        rotation = self.rotation[:, start : start + x.shape[1]].to(x.dtype)
        mask = self._mask(cond, start, start + x.shape[1])
        for i, layer in enumerate(self.layers):
            x = layer(x, rotation, mask, None if cache is None else cache[i])
        return x

    def _mask(self, cond: Cond, start: int, end: int) -> Tensor | None:
        """Which slots before ``end`` each from ``start`` on sees, (B, 1, end - start, end); None: all up to itself."""
        if not self.config.masked:
            return None
        given = cond["mask"].bool()
        there = torch.cat([given, given.new_ones(len(given), end - given.shape[1])], 1)
        slots = torch.arange(end, device=given.device)
        rows = slots[start:, None]
        return ((slots <= rows) & there[:, None] | (slots == rows))[:, None]

    def condition(self, cond: Cond) -> Tensor:
        """One vector per sample (B, dim), the mean of its slots."""
        slots = self.cls_embedding(cond)
        if not self.config.masked:
            return slots.mean(1)
        weight = cond["mask"].to(slots)[..., None]
        return (slots * weight).sum(1) / weight.sum(1).clamp(min=1)

    def features(self, tokens: Tensor, cond: Cond) -> Tensor:
        """(B, n, dim); feature i depends on the condition and on the tokens before the i-th.

        Args:
            tokens: indices (B, n), or embeddings (B, n, C) where ``code_dim`` is set. The last one is never seen.
        """
        return self.norm(self._before(tokens, cond))

    def _before(self, tokens: Tensor, cond: Cond) -> Tensor:
        """As :meth:`features`, before the last norm."""
        x = torch.cat([self.cls_embedding(cond), self.tok_embeddings(tokens[:, :-1])], 1)
        return self._run(x, cond)[:, self.slots - 1 :]

    def aligned_features(self, tokens: Tensor, marks: Tensor, cond: Cond) -> Tensor:
        """(B, n, dim), before the last norm; feature i depends on the tokens up to the i-th, itself included.

        Args:
            marks: (B, slots + n, dim), added to the condition's slots and to the embedded tokens.
        """
        x = torch.cat([self.cls_embedding(cond), self.tok_embeddings(tokens)], 1) + marks
        return self._run(x, cond)[:, self.slots :]

    def logits(self, before: Tensor, cond: Cond) -> Tensor:
        """Logits (..., V), fp32, of what comes before the last norm."""
        return self.output(self.norm(before)).float()

    def forward(self, tokens: Tensor, cond: Cond) -> Tensor:
        """Logits (B, n, V) of every token given those before it."""
        return self.logits(self._before(tokens, cond), cond)

    # ------------------------------------------------------------------------------------------------- generation
    def start(self, cond: Cond, prefix: Tensor | None = None) -> tuple[Tensor, list]:
        """Logits (B, 1, V) of the first token after the prefix (B, m), and the cache of keys and values."""
        cache: list = [[] for _ in self.layers]
        x = self.cls_embedding(cond)
        if prefix is not None:
            x = torch.cat([x, self.tok_embeddings(prefix)], 1)
        return self.logits(self._run(x, cond, 0, cache)[:, -1:], cond), cache

    def step(self, tokens: Tensor, group: int, cond: Cond, cache: list) -> Tensor:
        """Logits (B, 1, V) of group ``group + 1``, given the cache and the tokens (B, 1) of group ``group``."""
        return self.logits(self._run(self.tok_embeddings(tokens), cond, self.slots + group, cache), cond)

    def reading_codes(self, codes: Tensor, aligned: bool) -> GPT:
        """A copy that reads embeddings (B, n, C) instead of indices: the linear layer closest to the table.

        Args:
            codes: (V, C). aligned: for :meth:`aligned_features`, which needs nothing more here.
        """
        config = {k: v for k, v in self.config.items() if not k.startswith("_")}
        other = type(self)(**{**config, "code_dim": codes.shape[1]})
        table = self.tok_embeddings.weight.detach().float()
        with_one = torch.cat([codes.float(), torch.ones_like(codes[:, :1])], 1)
        solution = (torch.linalg.pinv(with_one.double()) @ table.double()).float()
        state = {k: v for k, v in self.state_dict().items() if not k.startswith("tok_embeddings.")}
        state |= {"tok_embeddings.weight": solution[:-1].T, "tok_embeddings.bias": solution[-1]}
        other.load_state_dict(state)
        return other.to(codes.device)

    def drop_head(self) -> None:
        """Without logits: for features only."""
        self.register_to_config(vocab_size=0)
        self.output = nn.Identity()


def rotations(tokens: int, head_dim: int, slots: int, base: float, rotated: bool) -> Tensor:
    """Cosines and sines (2, slots + tokens, head_dim / 2): half of them turn with the row, half with the column."""
    side = math.isqrt(tokens)
    if side * side != tokens:
        raise ValueError(f"block_size {tokens}: expected a square number of tokens")
    half = head_dim // 2
    frequencies = base ** -(torch.arange(0, half, 2)[: half // 2].float() / half)
    angles = torch.arange(side).float()[:, None] * frequencies
    grid = torch.cat([angles[:, None].expand(-1, side, -1), angles[None].expand(side, -1, -1)], -1).flatten(
        0, 1
    )
    condition = torch.zeros(2, slots, half)
    condition[0] = float(rotated)
    return torch.cat([condition, torch.stack([grid.cos(), grid.sin()])], 1)


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Turns neighbouring pairs of x (B, heads, L, head_dim)."""
    cosine, sine = rotation
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cosine - b * sine, b * cosine + a * sine], -1).flatten(-2)


# ---------------------------------------------------------------------------------------------------- the tokenizer
class Quantizer(Codebook):
    """Codes, and the usage counter that published files carry."""

    def __init__(self, size: int, dim: int):
        super().__init__(size, dim)
        self.register_buffer("codebook_used", torch.zeros(65536))


class LlamaGenVQ(ModelMixin, ConfigMixin):
    """LlamaGen's tokenizer, VQ-16; ``ch_mult`` (1, 2, 2, 4) is VQ-8.

    Args:
        num_codes, code_dim: V and C. l2_norm: codes and what they stand for have unit length.
        ch, ch_mult, blocks, z_channels: of the convolutions.
    """

    @register_to_config
    def __init__(
        self,
        num_codes: int = 16384,
        code_dim: int = 8,
        l2_norm: bool = True,
        ch: int = 128,
        ch_mult: Sequence[int] = (1, 1, 2, 2, 4),
        blocks: int = 2,
        z_channels: int = 256,
    ):
        super().__init__()
        self.encoder = Coder(3, z_channels, ch, ch_mult, blocks, up=False, layout="llamagen")
        self.decoder = Coder(z_channels, 3, ch, ch_mult, blocks + 1, up=True, layout="llamagen")
        self.quantize = Quantizer(num_codes, code_dim)
        self.quant_conv = nn.Conv2d(z_channels, code_dim, 1)
        self.post_quant_conv = nn.Conv2d(code_dim, z_channels, 1)

    @torch.no_grad()
    def encode_tokens(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> tokens (B, n), row by row."""
        z = self.quant_conv(self.encoder(images))
        z = F.normalize(z, dim=1) if self.config.l2_norm else z
        return nearest(z, self.quantize.codes(self.config.l2_norm)).flatten(1)

    def decode_tokens(self, q: Tensor) -> Tensor:
        """Embeddings (B, n, C) -> images (B, 3, H, W) in about [-1, 1]."""
        return self.decoder(self.post_quant_conv(grid(q))).float()
