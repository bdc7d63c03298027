"""EDM2's magnitude-preserving UNet (arXiv 2312.02696, appendix A and B), from the paper, with the published names.

Gains, which published files have as scalars, are (1,): torch shards no scalar over processes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .unets import Checkpointed, decoder_plan, encoder_plan

EPS = 1e-4


def unit(x: Tensor, dims: Sequence[int]) -> Tensor:
    """Root mean square 1 over the given dimensions (eq. 47 and 51), computed in fp32."""
    length = torch.linalg.vector_norm(x, dim=tuple(dims), keepdim=True, dtype=torch.float32)
    count = math.prod(x.shape[d] for d in dims)
    return x / (EPS + length / math.sqrt(count)).to(x.dtype)


def silu(x: Tensor) -> Tensor:
    """SiLU that keeps the magnitude of normal inputs (eq. 81)."""
    return F.silu(x) / 0.596


def blend(a: Tensor, b: Tensor, share: float) -> Tensor:
    """A sum of unit magnitude, of which b has this share (eq. 88)."""
    return torch.lerp(a, b, share) / math.hypot(1 - share, share)


def join(a: Tensor, b: Tensor, share: float) -> Tensor:
    """Channels side by side, b's with this share of the magnitude whatever their numbers (eq. 103)."""
    na, nb = a.shape[1], b.shape[1]
    whole = math.sqrt(na + nb) / math.hypot(1 - share, share)
    return torch.cat([a * (whole * (1 - share) / math.sqrt(na)), b * (whole * share / math.sqrt(nb))], 1)


class Weighted(nn.Module):
    """A linear layer (``kernel`` None) or convolution whose rows count by direction alone (eq. 66).

    Rows are normalised in each call and gradients flow through that; :func:`normalise_weights` stores them so, which is
    the paper's forced normalisation and belongs behind an optimizer's step.
    """

    def __init__(self, cin: int, cout: int, kernel: int | None = None):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(cout, cin, *([kernel] * 2 if kernel else [])))

    def forward(self, x: Tensor, gain: Tensor | float = 1.0) -> Tensor:
        weight = self.weight.float()
        rows = range(1, weight.ndim)
        weight = unit(weight, rows) * (gain / math.sqrt(math.prod(weight.shape[1:])))
        weight = weight.to(x.dtype)
        return F.linear(x, weight) if weight.ndim == 2 else F.conv2d(x, weight, padding=weight.shape[-1] // 2)


@torch.no_grad()
def normalise_weights(net: nn.Module) -> None:
    """Stores every weight of EDM2's layers with rows of unit magnitude (arXiv 2312.02696, section 2.3)."""
    for layer in net.modules():
        if isinstance(layer, Weighted):
            layer.weight.copy_(unit(layer.weight, range(1, layer.weight.ndim)))


class MPFourier(nn.Module):
    """Features of a time, (B,) -> (B, C) of magnitude 1: random ones (eq. 75), or slow ones of an angle.

    Args:
        turns: None, or how often the fastest turns while an angle goes from 0 to pi / 2. Then they are cosines and
            sines of frequencies that fall by 10,000, a positional embedding (sCM, arXiv 2410.11081, section 4.1).
    """

    freqs: Tensor
    phases: Tensor

    def __init__(self, channels: int, turns: float | None = None):
        super().__init__()
        freqs, phases = 2 * math.pi * torch.randn(channels), 2 * math.pi * torch.rand(channels)
        if turns is not None:
            half = channels // 2
            falling = 4 * turns * 10_000.0 ** (-torch.arange(half) / half)
            freqs = torch.cat([falling, falling, torch.zeros(channels % 2)])
            phases = torch.cat(
                [torch.zeros(half), torch.full((half,), -math.pi / 2), torch.zeros(channels % 2)]
            )
        self.register_buffer("freqs", freqs)
        self.register_buffer("phases", phases)

    def forward(self, time: Tensor) -> Tensor:
        angles = torch.outer(time.float(), self.freqs.float()) + self.phases.float()
        return (angles.cos() * math.sqrt(2)).to(time.dtype)


@dataclass(frozen=True)
class Balance:
    """Shares and sizes of EDM2's blocks: of the residual, of attention, the clip of activations, channels of a head;
    and whether what time and label multiply activations by is normalised over channels, as sCM has it.
    """

    emb: int
    dropout: float = 0.0
    residual: float = 0.3
    attention: float = 0.3
    clip: float | None = 256.0
    head: int = 64
    pixel_norm: bool = False


class Block2(nn.Module):
    """A residual block of the encoder or the decoder, with attention where ``attention``."""

    def __init__(
        self,
        cin: int,
        cout: int,
        balance: Balance,
        decodes: bool,
        resample: str | None = None,
        attention: bool = False,
    ):
        super().__init__()
        self.balance, self.decodes, self.resample, self.attention = balance, decodes, resample, attention
        self.emb_gain = nn.Parameter(torch.zeros(1))
        self.conv_res0 = Weighted(cin if decodes else cout, cout, 3)
        self.emb_linear = Weighted(balance.emb, cout)
        self.dropout = nn.Dropout(balance.dropout)
        self.conv_res1 = Weighted(cout, cout, 3)
        self.conv_skip = Weighted(cin, cout, 1) if cin != cout else None
        if attention:
            self.attn_qkv = Weighted(cout, 3 * cout, 1)
            self.attn_proj = Weighted(cout, cout, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        if self.resample == "down":
            x = F.avg_pool2d(x, 2)
        elif self.resample == "up":
            x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
        if not self.decodes:
            x = unit(x if self.conv_skip is None else self.conv_skip(x), [1])
        told = self.emb_linear(emb, self.emb_gain) + 1
        told = unit(told, [1]) if self.balance.pixel_norm else told
        y = silu(self.conv_res0(silu(x)) * told[:, :, None, None].to(x.dtype))
        y = self.conv_res1(self.dropout(y))
        if self.decodes and self.conv_skip is not None:
            x = self.conv_skip(x)
        x = blend(x, y, self.balance.residual)
        if self.attention:
            x = blend(x, self.attend(x), self.balance.attention)
        clip = self.balance.clip
        return x if clip is None else x.clamp(-clip, clip)

    def attend(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        heads = c // self.balance.head
        # Query, key and value of a channel lie side by side, each of magnitude 1.
        parts = unit(self.attn_qkv(x).reshape(b, heads, c // heads, 3, h * w), [2])
        q, k, v = parts.transpose(2, 4).unbind(3)
        out = F.scaled_dot_product_attention(q, k, v)
        return self.attn_proj(out.transpose(2, 3).reshape(b, c, h, w))


class MagnitudeUNet(Checkpointed):
    """EDM2's network, configuration G: ``(x, time, label)`` -> the raw prediction, shape of x.

    Args:
        size, channels: of samples. classes: labels, 0 for none.
        width, multiples, blocks: channels of the first level, their multiples on each, residual blocks of each.
        attention: sides of maps whose blocks attend.
        noise, emb: channels of the features of time and of the embedding, as multiples of ``width``; by default of
            the first level and of the widest.
        label_balance, concat_balance: share of the label in the embedding, of skips in the decoder.
        dropout, residual_balance, attention_balance, clip, head, pixel_norm: see :class:`Balance`.
        turns: of the features of time, see :class:`MPFourier`.
    """

    def __init__(
        self,
        size: int,
        channels: int,
        classes: int,
        width: int = 192,
        multiples: Sequence[int] = (1, 2, 3, 4),
        blocks: int = 3,
        attention: Sequence[int] = (16, 8),
        noise: int | None = None,
        emb: int | None = None,
        label_balance: float = 0.5,
        concat_balance: float = 0.5,
        dropout: float = 0.0,
        residual_balance: float = 0.3,
        attention_balance: float = 0.3,
        clip: float | None = 256.0,
        head: int = 64,
        turns: float | None = None,
        pixel_norm: bool = False,
    ):
        super().__init__()
        widths = [width * m for m in multiples]
        noisy, told = width * noise if noise else widths[0], width * emb if emb else max(widths)
        balance = Balance(told, dropout, residual_balance, attention_balance, clip, head, pixel_norm)
        self.classes, self.label_balance, self.concat_balance = classes, label_balance, concat_balance
        self.out_gain = nn.Parameter(torch.zeros(1))
        self.emb_fourier = MPFourier(noisy, turns)
        self.emb_noise = Weighted(noisy, told)
        self.emb_label = Weighted(classes, told) if classes else None
        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        encoder = encoder_plan(widths, widths[0], blocks)
        for level, name, cin, cout in encoder:
            side, down = size >> level, "down" if name == "down" else None
            self.enc[f"{side}x{side}_{name}"] = (
                Weighted(channels + 1, cout, 3)
                if name == "conv"
                else Block2(cin, cout, balance, False, down, side in attention and not down)
            )
        for level, name, cin, cout in decoder_plan(widths, encoder, blocks):
            side = size >> level
            attends = name == "in0" or ("block" in name and side in attention)
            resample = "up" if name == "up" else None
            self.dec[f"{side}x{side}_{name}"] = Block2(cin, cout, balance, True, resample, attends)
        self.out_conv = Weighted(widths[0], channels, 3)

    def forward(self, x: Tensor, time: Tensor, label: Tensor | None = None) -> Tensor:
        emb = self.emb_noise(self.emb_fourier(time))
        if self.emb_label is not None and label is not None:
            emb = blend(emb, self.emb_label(label * math.sqrt(self.classes)), self.label_balance)
        emb = silu(emb).to(x.dtype)
        x, skips = torch.cat([x, torch.ones_like(x[:, :1])], 1), []
        for layer in self.enc.values():
            x = self.run(layer, x, emb) if isinstance(layer, Block2) else layer(x)
            skips.append(x)
        for name, layer in self.dec.items():
            x = self.run(layer, join(x, skips.pop(), self.concat_balance) if "block" in name else x, emb)
        return self.out_conv(x, self.out_gain)
