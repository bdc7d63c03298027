"""Convolutional VQ tokenizers in two published layouts, LlamaGen's and VAR's; both are VQGANs (arXiv 2012.09841)."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

GROUPS = 32  # of every normalisation


class Resnet(nn.Module):
    def __init__(self, inner: int, outer: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(GROUPS, inner, 1e-6)
        self.conv1 = nn.Conv2d(inner, outer, 3, padding=1)
        self.norm2 = nn.GroupNorm(GROUPS, outer, 1e-6)
        self.conv2 = nn.Conv2d(outer, outer, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(inner, outer, 1) if inner != outer else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return self.nin_shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class SpatialAttention(nn.Module):
    """One head over all places; ``fused`` is how VAR stores the three projections."""

    def __init__(self, channels: int, fused: bool):
        super().__init__()
        self.norm = nn.GroupNorm(GROUPS, channels, 1e-6)
        self.fused = fused
        if fused:
            self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        else:
            self.q, self.k, self.v = (nn.Conv2d(channels, channels, 1) for _ in range(3))
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        parts = self.qkv(h).chunk(3, 1) if self.fused else (self.q(h), self.k(h), self.v(h))
        q, k, v = (part.flatten(2).transpose(1, 2)[:, None] for part in parts)
        out = F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2).reshape(x.shape)
        return x + self.proj_out(out)


class Resample(nn.Module):
    def __init__(self, channels: int, up: bool):
        super().__init__()
        self.up = up
        self.conv = nn.Conv2d(channels, channels, 3, padding=1) if up else nn.Conv2d(channels, channels, 3, 2)

    def forward(self, x: Tensor) -> Tensor:
        if self.up:
            return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Coder(nn.Module):
    """Encoder or decoder: residual blocks on several scales, attention on the coarsest.

    Args:
        inner, outer: channels in and out. ch: of the finest scale. mult: factors of the scales, fine to coarse.
        blocks: residual blocks per scale. up: a decoder. layout: "llamagen" or "var", the names of its parts.
    """

    def __init__(
        self, inner: int, outer: int, ch: int, mult: Sequence[int], blocks: int, up: bool, layout: str
    ):
        super().__init__()
        fused = layout == "var"
        widths = [ch * m for m in mult]
        order = list(reversed(range(len(mult)))) if up else list(range(len(mult)))
        width = widths[-1] if up else ch
        self.conv_in = nn.Conv2d(inner, width, 3, padding=1)
        stages = []
        for level in order:
            res, attention = nn.ModuleList(), nn.ModuleList()
            for _ in range(blocks):
                res.append(Resnet(width, widths[level]))
                width = widths[level]
                if level == len(mult) - 1:
                    attention.append(SpatialAttention(width, fused))
            stage = nn.Module()
            stage.add_module("block" if fused else "res", res)
            stage.add_module("attn", attention)
            if level != order[-1]:
                stage.add_module("upsample" if up else "downsample", Resample(width, up))
            stages.append(stage)
        self.middle_names = ("block_1", "attn_1", "block_2") if fused else ("0", "1", "2")
        self.mid = nn.Module() if fused else nn.ModuleList()
        coarse = widths[-1]
        middle = (Resnet(coarse, coarse), SpatialAttention(coarse, fused), Resnet(coarse, coarse))
        for name, part in zip(self.middle_names, middle):
            self.mid.add_module(name, part)
        self.stages_name = ("up" if up else "down") if fused else "conv_blocks"
        # VAR numbers the scales of its decoder from fine to coarse, LlamaGen in the order they run.
        self.backwards = fused and up
        self.add_module(self.stages_name, nn.ModuleList(stages[::-1] if self.backwards else stages))
        self.is_decoder = up
        self.norm_out = nn.GroupNorm(GROUPS, width, 1e-6)
        self.conv_out = nn.Conv2d(width, outer, 3, padding=1)

    def _middle(self, h: Tensor) -> Tensor:
        for name in self.middle_names:
            h = getattr(self.mid, name)(h)
        return h

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        if self.is_decoder:
            h = self._middle(h)
        stages = list(getattr(self, self.stages_name))
        for stage in stages[::-1] if self.backwards else stages:
            res = getattr(stage, "res", None) or stage.block
            for i, block in enumerate(res):
                h = block(h)
                if len(stage.attn):
                    h = stage.attn[i](h)
            resample = getattr(stage, "upsample", None) or getattr(stage, "downsample", None)
            h = resample(h) if resample is not None else h
        if not self.is_decoder:
            h = self._middle(h)
        return self.conv_out(F.silu(self.norm_out(h)))


def nearest(z: Tensor, codes: Tensor) -> Tensor:
    """Indices (B, h, w) of the codes (V, C) nearest to z (B, C, h, w)."""
    from .codes import nearest_code

    return nearest_code(z.permute(0, 2, 3, 1), codes)


def grid(q: Tensor) -> Tensor:
    """Embeddings (B, n, C) of a square map -> (B, C, h, w)."""
    side = round(q.shape[1] ** 0.5)
    return q.transpose(1, 2).unflatten(-1, (side, side))


class Codebook(nn.Module):
    """Holds ``embedding.weight`` (V, C)."""

    def __init__(self, size: int, dim: int):
        super().__init__()
        self.embedding = nn.Embedding(size, dim)
        nn.init.uniform_(self.embedding.weight, -1.0, 1.0)

    def codes(self, l2_norm: bool = False) -> Tensor:
        codes = self.embedding.weight.float()
        return F.normalize(codes, dim=-1) if l2_norm else codes
