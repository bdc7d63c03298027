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


class Resample(nn.Module):
    """Halves or doubles the side of a map by a fixed filter.

    Args:
        direction: "up" or "down". taps: the filter's, along one side.
    """

    resample_filter: Tensor

    def __init__(self, direction: str, taps: Sequence[int] = (1, 1)):
        super().__init__()
        self.direction = direction
        self.register_buffer("resample_filter", _filter(taps))

    def forward(self, x: Tensor) -> Tensor:
        return resampled(x, self.resample_filter, self.direction)


class ResampledConv(nn.Conv2d):
    """The same, then a convolution; or before it where ``fused``, whose padding is widened instead of the filter's."""

    resample_filter: Tensor

    def __init__(
        self,
        cin: int,
        cout: int,
        kernel: int,
        direction: str,
        taps: Sequence[int] = (1, 1),
        fused: bool = False,
    ):
        super().__init__(cin, cout, kernel, padding=kernel // 2 + (_reach(len(taps)) if fused else 0))
        self.direction, self.fused = direction, fused
        self.register_buffer("resample_filter", _filter(taps))

    def forward(self, x: Tensor) -> Tensor:
        if self.fused:
            return resampled(super().forward(x), self.resample_filter, self.direction, 0)
        return super().forward(resampled(x, self.resample_filter, self.direction))


def resampled(x: Tensor, taps: Tensor, direction: str, padding: int | None = None) -> Tensor:
    """A map (B, C, H, W) of half or twice the side, by a filter (1, 1, k, k) on each channel."""
    channels, padding = x.shape[1], _reach(taps.shape[-1]) if padding is None else padding
    taps = taps.to(x.dtype).expand(channels, 1, -1, -1)
    if direction == "down":
        return F.conv2d(x, taps, stride=2, padding=padding, groups=channels)
    return F.conv_transpose2d(x, 4 * taps, stride=2, padding=padding, groups=channels)


def _filter(taps: Sequence[int]) -> Tensor:
    row = torch.tensor(taps, dtype=torch.float32)
    return (torch.outer(row, row) / row.sum() ** 2)[None, None]


def _reach(taps: int) -> int:
    return (taps - 1) // 2


def conv(cin: int, cout: int, kernel: int) -> nn.Conv2d:
    return nn.Conv2d(cin, cout, kernel, padding=kernel // 2)


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

    def __init__(
        self, cin: int, cout: int, style: Style, resample: str | None = None, attention: bool = False
    ):
        super().__init__()
        self.style, self.attention = style, attention
        self.norm0 = norm(cin, style.eps)
        self.conv0: nn.Module = (
            ResampledConv(cin, cout, 3, resample, style.taps) if resample else conv(cin, cout, 3)
        )
        self.affine = nn.Linear(style.emb, cout * (2 if style.modulates else 1))
        self.norm1 = norm(cout, style.eps)
        self.dropout = nn.Dropout(style.dropout)
        self.conv1 = conv(cout, cout, 3)
        nn.init.zeros_(self.conv1.weight)
        self.skip: nn.Module | None = None
        if resample and (style.resamples_by_weights or cin != cout):
            self.skip = ResampledConv(cin, cout, 1, resample, style.taps)
        elif resample:
            self.skip = Resample(resample, style.taps)
        elif cin != cout:
            self.skip = conv(cin, cout, 1)
        if attention:
            self.norm2 = norm(cout, style.eps)
            self.qkv, self.proj = conv(cout, 3 * cout, 1), conv(cout, cout, 1)
            nn.init.zeros_(self.proj.weight)

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
