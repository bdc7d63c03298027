"""VAR (Tian et al., NeurIPS 2024, arXiv 2404.02905): next-scale prediction over a residual pyramid of token maps.

Parameters carry the names of the published checkpoints. Tokens of one scale are independent given the scales before.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from ..diffusion.cond import Cond
from .vq import Codebook, Coder, grid

PATCHES = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)  # sides of the token maps at 256 px
PATCHES_512 = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)
PHIS = 4  # convolutions shared by all scales


def phi_of(scale: int, scales: int, phis: int = PHIS) -> int:
    """Which of the shared convolutions a scale uses: the nearest of evenly spaced ticks."""
    margin = 1 / 3 / phis if phis == 4 else 1 / 2 / phis
    # Two scales of ten lie midway between ticks, where rounding decides; numpy's is that of the released code.
    ticks = np.linspace(margin, 1 - margin, phis)
    return int(np.argmin(np.abs(ticks - scale / (scales - 1))))


class Pyramid(nn.Module):
    """Sums token maps of all scales up to one feature map; codes and convolutions are the tokenizer's.

    They are buffers: no transformer trains them.
    """

    codes: Tensor
    weight: Tensor
    bias: Tensor

    def __init__(self, patches: Sequence[int], size: int, dim: int, device: torch.device | None = None):
        super().__init__()
        self.patches = tuple(patches)
        self.register_buffer("codes", torch.zeros(size, dim, device=device))
        self.register_buffer("weight", torch.zeros(PHIS, dim, dim, 3, 3, device=device))
        self.register_buffer("bias", torch.zeros(PHIS, dim, device=device))

    @torch.no_grad()
    def take(self, quantize: Quantizer) -> None:
        """Codes and convolutions of a tokenizer."""
        phis: Any = quantize.quant_resi.qresi_ls
        self.codes.copy_(quantize.embedding.weight)
        self.weight.copy_(torch.stack([phi.weight for phi in phis]))
        self.bias.copy_(torch.stack([phi.bias for phi in phis]))

    def up(self, q: Tensor, scale: int) -> Tensor:
        """What the embeddings (B, p * p, C) of one scale add to the map: (B, C, P, P)."""
        h, size = grid(q), self.patches[-1]
        if self.patches[scale] != size:
            h = F.interpolate(h, size=(size, size), mode="bicubic")
        k = phi_of(scale, len(self.patches))
        return 0.5 * h + 0.5 * F.conv2d(h, self.weight[k].to(h), self.bias[k].to(h), padding=1)

    def down(self, total: Tensor, scale: int) -> Tensor:
        """The map seen at a scale: (B, p * p, C)."""
        size = self.patches[scale]
        if size != self.patches[-1]:
            total = F.interpolate(total, size=(size, size), mode="area")
        return total.flatten(2).transpose(1, 2)

    def split(self, q: Tensor) -> list[Tensor]:
        """Embeddings (B, m, C) by scale; whole scales."""
        sizes, left = [], q.shape[1]
        for side in self.patches:
            if left:
                sizes.append(side * side)
                left -= side * side
        return list(q.split(sizes, 1))

    def inputs(self, q: Tensor) -> tuple[list[Tensor], Tensor]:
        """What the scales after those of q (B, m, C) see, each (B, p * p, C), and the sum so far."""
        seen, total = [], q.new_zeros(len(q), q.shape[2], self.patches[-1], self.patches[-1])
        for scale, part in enumerate(self.split(q)):
            total = total + self.up(part, scale)
            if scale + 1 < len(self.patches):
                seen.append(self.down(total, scale + 1))
        return seen, total


# -------------------------------------------------------------------------------------------------- the transformer
class Attention(nn.Module):
    def __init__(self, width: int, heads: int, l2_norm: bool):
        super().__init__()
        self.heads, self.l2_norm = heads, l2_norm
        if l2_norm:
            self.scale_mul_1H11 = nn.Parameter(torch.full((1, heads, 1, 1), math.log(4.0)))
        self.mat_qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(width))
        self.zero_k_bias: Tensor
        self.register_buffer("zero_k_bias", torch.zeros(width))
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None, cache: list | None) -> Tensor:
        bias = torch.cat([self.q_bias, self.zero_k_bias, self.v_bias])
        q, k, v = (
            F.linear(x, self.mat_qkv.weight, bias).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        )
        scale = 0.25 / math.sqrt(q.shape[-1])
        if self.l2_norm:
            q = F.normalize(q, dim=-1) * self.scale_mul_1H11.clamp(max=math.log(100.0)).exp()
            k, scale = F.normalize(k, dim=-1), 1.0
        if cache is not None:
            cache[:] = [k, v] if not cache else [torch.cat(pair, 2) for pair in zip(cache, (k, v))]
            k, v = cache
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
        return self.proj(out.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, hidden: int, l2_norm: bool):
        super().__init__()
        self.attn = Attention(width, heads, l2_norm)
        self.ffn = FeedForward(width, hidden)
        self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(
        self,
        x: Tensor,
        condition: Tensor,
        mask: Tensor | None,
        cache: list | None,
        marks: Tensor | float = 0.0,
    ) -> Tensor:
        gate1, gate2, scale1, scale2, shift1, shift2 = self.ada_lin(condition)[:, None].chunk(6, -1)
        x = x + gate1 * self.attn(_norm(x) * (1 + scale1) + shift1, mask, cache) + marks
        return x + gate2 * self.ffn(_norm(x) * (1 + scale2) + shift2)


class HeadNorm(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        scale, shift = self.ada_lin(condition)[:, None].chunk(2, -1)
        return _norm(x) * (1 + scale) + shift


def _norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


class VAR(ModelMixin, ConfigMixin):
    """A transformer over the slots of all scales, block-causal by scale.

    Args:
        vocab_size: V; 0 leaves the logits out. code_dim: C. depth, width, heads: of the transformer (published: width
            64 depth, as many heads as blocks). num_classes: classes; the row after the last is the null condition.
        patch_nums: sides of the token maps, coarse to fine. attn_l2_norm: cosine attention, as in the released models.
        num_codes: size of the tokenizer's codebook. aligned: with a slot for the class before those of the tokens,
            which then read their own token (DD1's student).
    """

    reads_codes = True

    _repeated_blocks = ("Block",)  # what ``teacher.compile`` compiles

    @register_to_config
    def __init__(
        self,
        vocab_size: int = 4096,
        code_dim: int = 32,
        depth: int = 16,
        width: int = 1024,
        heads: int = 16,
        num_classes: int = 1000,
        patch_nums: Sequence[int] = PATCHES,
        attn_l2_norm: bool = True,
        mlp_ratio: float = 4.0,
        num_codes: int = 4096,
        aligned: bool = False,
    ):
        super().__init__()
        self.groups = tuple(side * side for side in patch_nums)
        # Guidance grows with the scale, from none at the first.
        self.ramp = tuple(k / (len(patch_nums) - 1) for k in range(len(patch_nums)))
        first, slots = self.groups[0], sum(self.groups) + aligned
        std = math.sqrt(1 / width / 3)
        self.word_embed = nn.Linear(code_dim, width)
        self.class_emb = nn.Embedding(num_classes + 1, width)
        self.pos_start = nn.Parameter(std * torch.randn(1, first, width))
        self.pos_1LC = nn.Parameter(std * torch.randn(1, slots, width))
        self.lvl_embed = nn.Embedding(len(patch_nums) + aligned, width)
        for table in (self.class_emb, self.lvl_embed):
            nn.init.normal_(table.weight, std=std)
        self.blocks = nn.ModuleList(
            Block(width, heads, round(width * mlp_ratio), attn_l2_norm) for _ in range(depth)
        )
        if vocab_size:
            self.head_nm, self.head = HeadNorm(width), nn.Linear(width, vocab_size)
        if aligned:  # the marks of what is known enter within every block, and once more at the end
            self.layerwise_n_d_embed = nn.ModuleList(nn.Linear(width, width) for _ in range(depth + 1))
            for parameter in self.layerwise_n_d_embed.parameters():
                nn.init.zeros_(parameter)
        self.pyramid = Pyramid(patch_nums, num_codes, code_dim)
        sizes = ([1] if aligned else []) + list(self.groups)
        level = torch.cat([torch.full((size,), k) for k, size in enumerate(sizes)])
        mask = level[:, None] > level if aligned else level[:, None] >= level
        self.register_buffer("level", level, persistent=False)
        self.register_buffer("mask", mask | torch.eye(len(level), dtype=torch.bool), persistent=False)

    @property
    def width(self) -> int:
        return self.config["width"]

    @property
    def slots(self) -> int:
        """How many slots the condition has of its own before those of tokens, in :meth:`aligned_features`."""
        return 1

    def condition(self, cond: Cond) -> Tensor:
        """One vector per sample (B, width)."""
        return self.class_emb(cond["label"])

    def _places(self, begin: int, end: int) -> Tensor:
        return self.lvl_embed(self.level[begin:end]) + self.pos_1LC[:, begin:end]

    def _slots(self, tokens: Tensor, cond: Cond) -> tuple[Tensor, Tensor]:
        """Inputs of the slots of all scales up to the one after the given tokens (whole scales), and their sum."""
        q = self.pyramid.codes[tokens] if tokens.ndim == 2 else tokens
        seen, total = self.pyramid.inputs(q)
        start = self.condition(cond)[:, None] + self.pos_start
        x = torch.cat([start, *(self.word_embed(part) for part in seen)], 1)
        return x + self._places(0, x.shape[1]), total

    def _run(self, x: Tensor, cond: Cond, mask: Tensor | None, cache: list | None = None) -> Tensor:
        condition = self.condition(cond)
        for i, block in enumerate(self.blocks):
            x = block(x, condition, mask, None if cache is None else cache[i])
        return x

    def features(self, tokens: Tensor, cond: Cond) -> Tensor:
        """(B, n, width); those of a scale depend on the condition and on the tokens of the scales before.

        Args:
            tokens: indices (B, n) or embeddings (B, n, C). The last scale is never seen.
        """
        x, _ = self._slots(tokens[:, : -self.groups[-1]], cond)
        return self._run(x, cond, self.mask)

    def aligned_features(self, tokens: Tensor, marks: Tensor, cond: Cond) -> Tensor:
        """(B, n, width); feature i depends on the tokens of earlier scales and on token i, not on others of its scale.

        Args:
            tokens: embeddings (B, n, C), as they are: nothing is summed up. marks: (B, 1 + n, width), of the class slot
                too.
        """
        condition = self.condition(cond)
        x = torch.cat([condition[:, None] + self.pos_start[:, :1], self.word_embed(tokens)], 1)
        x = x + self._places(0, x.shape[1]) + marks
        for block, layer in zip(self.blocks, self.layerwise_n_d_embed):
            x = block(x, condition, self.mask, None, layer(marks))
        return (x + self.layerwise_n_d_embed[-1](marks))[:, 1:]

    def logits(self, features: Tensor, cond: Cond) -> Tensor:
        return self.head(self.head_nm(features.float(), self.condition(cond))).float()

    def forward(self, tokens: Tensor, cond: Cond) -> Tensor:
        """Logits (B, n, V)."""
        return self.logits(self.features(tokens, cond), cond)

    # ------------------------------------------------------------------------------------------------- generation
    def start(self, cond: Cond, prefix: Tensor | None = None) -> tuple[Tensor, list]:
        """Logits of the first scale after the prefix (B, m), which is whole scales, and the cache."""
        if prefix is None:
            prefix = torch.empty(len(cond), 0, dtype=torch.long, device=self.pos_start.device)
        x, total = self._slots(prefix, cond)
        kept: list = [[] for _ in self.blocks]
        x = self._run(x, cond, self.mask[: x.shape[1], : x.shape[1]], kept)
        size = x.shape[1] - prefix.shape[1]
        return self.logits(x[:, -size:], cond), [kept, total]

    def step(self, tokens: Tensor, group: int, cond: Cond, cache: list) -> Tensor:
        """Logits of scale ``group + 1`` given the tokens of scale ``group``; earlier ones are in the cache."""
        cache[1] = cache[1] + self.pyramid.up(self.pyramid.codes[tokens], group)
        begin = sum(self.groups[: group + 1])
        x = self.word_embed(self.pyramid.down(cache[1], group + 1))
        x = x + self._places(begin, begin + x.shape[1])
        return self.logits(self._run(x, cond, None, cache[0]), cond)

    # --------------------------------------------------------------------------------------------------- students
    def reading_codes(self, codes: Tensor, aligned: bool) -> VAR:
        """A copy for a student. It reads embeddings as it is. Aligned ones have one more slot in both tables: the class
        keeps the first scale's, where it was read, and the first token, which nothing read, has a fresh one."""
        if not aligned:
            return copy.deepcopy(self)
        config = {k: v for k, v in self.config.items() if not k.startswith("_")}
        other = VAR(**{**config, "aligned": True})
        mine, fresh = self.state_dict(), other.state_dict()
        places, levels = mine.pop("pos_1LC"), mine.pop("lvl_embed.weight")
        fresh["pos_1LC"][:, 0], fresh["pos_1LC"][:, 2:] = places[:, 0], places[:, 1:]
        fresh["lvl_embed.weight"][0], fresh["lvl_embed.weight"][2:] = levels[0], levels[1:]
        other.load_state_dict({**fresh, **mine})
        return other.to(codes.device)

    def drop_head(self) -> None:
        """Without logits: for features only."""
        self.register_to_config(vocab_size=0)
        del self.head_nm, self.head


# ---------------------------------------------------------------------------------------------------- the tokenizer
class Quantizer(Codebook):
    """Codes shared by all scales, and the convolutions that follow upsampling; in the published layout."""

    def __init__(self, patches: Sequence[int], size: int, dim: int):
        super().__init__(size, dim)
        self.quant_resi = nn.Module()
        self.quant_resi.qresi_ls = nn.ModuleList(nn.Conv2d(dim, dim, 3, padding=1) for _ in range(PHIS))
        self.register_buffer("ema_vocab_hit_SV", torch.zeros(len(patches), size))


class MultiScaleVQ(ModelMixin, ConfigMixin):
    """VAR's tokenizer.

    Args:
        num_codes, code_dim: V and C. ch, ch_mult, blocks: of the convolutions. patch_nums: sides of the token maps.
    """

    @register_to_config
    def __init__(
        self,
        num_codes: int = 4096,
        code_dim: int = 32,
        ch: int = 160,
        ch_mult: Sequence[int] = (1, 1, 2, 2, 4),
        blocks: int = 2,
        patch_nums: Sequence[int] = PATCHES,
    ):
        super().__init__()
        self.encoder = Coder(3, code_dim, ch, ch_mult, blocks, up=False, layout="var")
        self.decoder = Coder(code_dim, 3, ch, ch_mult, blocks + 1, up=True, layout="var")
        self.quantize = Quantizer(patch_nums, num_codes, code_dim)
        self.quant_conv = nn.Conv2d(code_dim, code_dim, 3, padding=1)
        self.post_quant_conv = nn.Conv2d(code_dim, code_dim, 3, padding=1)

    def pyramid(self) -> Pyramid:
        codes = self.quantize.embedding.weight
        size, dim = codes.shape
        pyramid = Pyramid(self.config.patch_nums, size, dim, codes.device)
        pyramid.take(self.quantize)
        return pyramid

    @torch.no_grad()
    def encode_tokens(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> tokens (B, n): each scale codes what the ones before left over."""
        from .codes import nearest_code

        pyramid, left, tokens = self.pyramid(), self.quant_conv(self.encoder(images)), []
        for scale in range(len(self.config.patch_nums)):
            tokens.append(nearest_code(pyramid.down(left, scale), pyramid.codes))
            left = left - pyramid.up(pyramid.codes[tokens[-1]], scale)
        return torch.cat(tokens, 1)

    def decode_tokens(self, q: Tensor) -> Tensor:
        """Embeddings (B, n, C) of all scales -> images (B, 3, H, W) in about [-1, 1]."""
        _, total = self.pyramid().inputs(q)
        return self.decoder(self.post_quant_conv(total)).float()
