"""Layers that EDM's two UNets share (arXiv 2206.00364, appendix F.2), with the published names of their weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

HEAD = 64  # channels of an attention head of ADM; DDPM++ and NCSN++ have one head


def sinusoids(time: Tensor, channels: int, last: bool) -> Tensor:
    """(B,) -> (B, C): cosines, then sines, of frequencies from 1 down to 1e-4.

    Args:
        last: whether 1e-4 itself is the lowest of them.
    """
    half = channels // 2
    steps = torch.arange(half, dtype=torch.float32, device=time.device) / (half - last)
    angles = torch.outer(time, (1e-4**steps).to(time.dtype))
    return torch.cat([angles.cos(), angles.sin()], 1)


def swapped(embedding: Tensor) -> Tensor:
    """Sines first: the order that the weights of DDPM++ and NCSN++ were trained with."""
    return torch.cat(embedding.chunk(2, 1)[::-1], 1)


class Fourier(nn.Module):
    """Random Fourier features of a time, NCSN++'s: (B,) -> (B, C)."""

    freqs: Tensor

    def __init__(self, channels: int, scale: float = 16.0):
        super().__init__()
        self.register_buffer("freqs", torch.randn(channels // 2) * scale)

    def forward(self, time: Tensor) -> Tensor:
        angles = torch.outer(time, 2 * math.pi * self.freqs.to(time.dtype))
        return torch.cat([angles.cos(), angles.sin()], 1)


def norm(channels: int, eps: float) -> nn.GroupNorm:
    """At least four channels in each of at most 32 groups."""
    return nn.GroupNorm(min(32, channels // 4), channels, eps)


class Conv(nn.Module):
    """A convolution that also halves or doubles the side, by a fixed filter; without weights where ``kernel`` is 0.

    Args:
        resample: "up", "down" or None. taps: the filter's, along one side.
        fused: halves behind the convolution rather than before it, where its own padding has been widened.
    """

    resample_filter: Tensor

    def __init__(
        self,
        cin: int,
        cout: int,
        kernel: int,
        resample: str | None = None,
        taps: Sequence[int] = (1, 1),
        fused: bool = False,
    ):
        super().__init__()
        self.resample, self.fused, self.padding = resample, fused, kernel // 2
        if kernel:
            bound = 1 / math.sqrt(cin * kernel**2)
            self.weight = nn.Parameter(torch.empty(cout, cin, kernel, kernel).uniform_(-bound, bound))
            self.bias = nn.Parameter(torch.zeros(cout))
        if resample:
            row = torch.tensor(taps, dtype=torch.float32)
            self.register_buffer("resample_filter", (torch.outer(row, row) / row.sum() ** 2)[None, None])

    def forward(self, x: Tensor) -> Tensor:
        wide = (self.resample_filter.shape[-1] - 1) // 2 if self.resample else 0
        if self.resample and not self.fused:
            x = self._resampled(x, wide)
        if hasattr(self, "weight"):
            padding = self.padding + (wide if self.fused else 0)
            x = F.conv2d(x, self.weight.to(x.dtype), self.bias.to(x.dtype), padding=padding)
        return self._resampled(x, 0) if self.resample and self.fused else x

    def _resampled(self, x: Tensor, padding: int) -> Tensor:
        taps = self.resample_filter.to(x.dtype).expand(x.shape[1], 1, -1, -1)
        options = {"stride": 2, "padding": padding, "groups": x.shape[1]}
        return F.conv2d(x, taps, **options) if self.resample == "down" else F.conv_transpose2d(x, 4 * taps, **options)


@dataclass(frozen=True)
class Style:
    """What differs between the blocks of the two families.

    Attributes:
        emb: channels of the embedding. dropout: of training. eps: of the norms. scale: of a sum of two branches.
        modulates: whether the embedding scales and shifts after the norm (ADM), or is added before it.
        resamples_by_weights: whether the skip of a block that changes the side always has a convolution.
        head: channels of an attention head; None is one head. taps: of the resampling filter.
    """

    emb: int
    dropout: float
    eps: float
    scale: float
    modulates: bool
    resamples_by_weights: bool
    head: int | None
    taps: Sequence[int] = (1, 1)


class Block(nn.Module):
    """A residual block, behind it self-attention where ``attention``."""

    def __init__(self, cin: int, cout: int, style: Style, resample: str | None = None, attention: bool = False):
        super().__init__()
        self.style, self.attention = style, attention
        self.norm0 = norm(cin, style.eps)
        self.conv0 = Conv(cin, cout, 3, resample, style.taps)
        self.affine = nn.Linear(style.emb, cout * (2 if style.modulates else 1))
        self.norm1 = norm(cout, style.eps)
        self.dropout = nn.Dropout(style.dropout)
        self.conv1 = Conv(cout, cout, 3)
        _begin_at_zero(self.conv1)
        self.skip: Conv | None = None
        if cin != cout or resample:
            weighted = style.resamples_by_weights or cin != cout
            self.skip = Conv(cin, cout, 1 if weighted else 0, resample, style.taps)
        if attention:
            self.norm2 = norm(cout, style.eps)
            self.qkv = Conv(cout, 3 * cout, 1)
            self.proj = Conv(cout, cout, 1)
            _begin_at_zero(self.proj)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        told = self.affine(emb)[:, :, None, None].to(x.dtype)
        y = self.conv0(F.silu(self.norm0(x)))
        if self.style.modulates:
            scale, shift = told.chunk(2, 1)
            y = torch.addcmul(shift, self.norm1(y), 1 + scale)
        else:
            y = self.norm1(y + told)
        y = self.conv1(self.dropout(F.silu(y)))
        x = (y + (x if self.skip is None else self.skip(x))) * self.style.scale
        return (x + self.attend(x)) * self.style.scale if self.attention else x

    def attend(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        heads = c // self.style.head if self.style.head else 1
        # Query, key and value of a channel lie side by side.
        q, k, v = self.qkv(self.norm2(x)).reshape(b, heads, c // heads, 3, h * w).transpose(2, 4).unbind(3)
        out = F.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(2, 3).reshape(b, c, h, w))


def _begin_at_zero(layer: Conv) -> None:
    nn.init.zeros_(layer.weight)
