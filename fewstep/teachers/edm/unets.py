"""EDM's UNets: SongUNet (DDPM++ and NCSN++) and DhariwalUNet (ADM), arXiv 2206.00364, table 7 and appendix F.2.

Written from the paper, with the published names of weights, and held against the authors' outputs in tests/golden.
Both take ``(x, time, label, augment)`` with time ``ln(sigma) / 4``, and give the raw prediction, shape of x.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .layers import HEAD, Block, Fourier, ResampledConv, Style, conv, norm, sinusoids, swapped

Plan = list[tuple[int, str, int, int]]


def encoder_plan(widths: Sequence[int], width: int, blocks: int) -> Plan:
    """(level, name, channels in, channels out) of every part of an encoder, from the largest map down.

    Args:
        widths: channels of each level. width: of the first convolution, whose input, the image, is 0 here.
        blocks: of a level.
    """
    plan, now = [(0, "conv", 0, width)], width
    for level, wide in enumerate(widths):
        if level:
            plan.append((level, "down", now, now))
        for i in range(blocks):
            plan.append((level, f"block{i}", now, wide))
            now = wide
    return plan


def decoder_plan(widths: Sequence[int], encoder: Plan, blocks: int) -> Plan:
    """The same of a decoder, from the smallest map up.

    Args:
        encoder: every part of which leaves a skip. blocks: of a level of it; the decoder has one more, each fed a skip.
    """
    left, plan, now = [cout for *_, cout in encoder], [], widths[-1]
    for level in reversed(range(len(widths))):
        names = ("in0", "in1") if level == len(widths) - 1 else ("up",)
        for name in names:
            plan.append((level, name, now, now))
        for i in range(blocks + 1):
            plan.append((level, f"block{i}", now + left.pop(), widths[level]))
            now = widths[level]
    return plan


def encoder_part(name: str, channels: int, cin: int, cout: int, style: Style, attends: bool) -> nn.Module:
    """What stands at a place of an :func:`encoder_plan`, of images of so many channels."""
    if name == "conv":
        return conv(channels, cout, 3)
    return Block(cin, cout, style, "down" if name == "down" else None, attends and name != "down")


class Checkpointed(nn.Module):
    """A network whose blocks may be computed again in the backward pass, which diffusers switches on."""

    gradient_checkpointing = False
    _gradient_checkpointing_func: Callable[..., Tensor]

    def run(self, layer: nn.Module, *inputs: Tensor) -> Tensor:
        again = self.gradient_checkpointing and torch.is_grad_enabled()
        return self._gradient_checkpointing_func(layer, *inputs) if again else layer(*inputs)


class SongUNet(Checkpointed):
    """DDPM++ (``fourier`` false) and NCSN++ (true) as EDM has them.

    Args:
        size, channels: of images. classes, augments: numbers of labels and of augmentation inputs, 0 for none.
        width, multiples, blocks: channels of the first level, their multiples on each, residual blocks of each.
        attention: sides of maps whose blocks attend. dropout: of training.
        embedding: its channels, as a multiple of ``width``.
        fourier: random Fourier features of time, the image itself fed to every level, and a wider filter.
    """

    def __init__(
        self,
        size: int,
        channels: int,
        classes: int,
        augments: int,
        width: int = 128,
        multiples: Sequence[int] = (2, 2, 2),
        blocks: int = 4,
        attention: Sequence[int] = (16,),
        dropout: float = 0.1,
        embedding: int = 4,
        fourier: bool = False,
    ):
        super().__init__()
        emb, noise = embedding * width, (2 if fourier else 1) * width
        taps = (1, 3, 3, 1) if fourier else (1, 1)
        style = Style(emb, dropout, 1e-6, math.sqrt(0.5), False, True, None, taps)
        self.noise, self.fourier, self.classes = noise, fourier, classes
        if fourier:
            self.map_noise = Fourier(noise)
        self.map_label = nn.Linear(classes, noise) if classes else None
        self.map_augment = nn.Linear(augments, noise, bias=False) if augments else None
        self.map_layer0, self.map_layer1 = nn.Linear(noise, emb), nn.Linear(emb, emb)
        widths = [width * m for m in multiples]
        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        image, encoder = channels, encoder_plan(widths, width, blocks)
        for level, name, cin, cout in encoder:
            side = size >> level
            self.enc[f"{side}x{side}_{name}"] = encoder_part(
                name, channels, cin, cout, style, side in attention
            )
            if fourier and name == "down":
                fed = ResampledConv(image, cout, 3, "down", taps, fused=True)
                self.enc[f"{side}x{side}_aux_residual"], image = fed, cout
        for level, name, cin, cout in decoder_plan(widths, encoder, blocks):
            side = size >> level
            attends = name == "in0" or (name == f"block{blocks}" and side in attention)
            resample = "up" if name == "up" else None
            self.dec[f"{side}x{side}_{name}"] = Block(cin, cout, style, resample, attends)
        self.dec[f"{size}x{size}_aux_norm"] = norm(widths[0], style.eps)
        self.dec[f"{size}x{size}_aux_conv"] = out = conv(widths[0], channels, 3)
        nn.init.zeros_(out.weight)

    def embed(self, time: Tensor, label: Tensor | None, augment: Tensor | None) -> Tensor:
        """(B,), one-hot (B, classes) and (B, augments) -> (B, emb)."""
        emb = swapped(self.map_noise(time) if self.fourier else sinusoids(time, self.noise, last=True))
        if self.map_label is not None and label is not None:
            emb = emb + self.map_label(label * math.sqrt(self.classes))
        if self.map_augment is not None and augment is not None:
            emb = emb + self.map_augment(augment)
        return F.silu(self.map_layer1(F.silu(self.map_layer0(emb))))

    def forward(
        self, x: Tensor, time: Tensor, label: Tensor | None = None, augment: Tensor | None = None
    ) -> Tensor:
        emb, image = self.embed(time, label, augment).to(x.dtype), x
        skips: list[Tensor] = []
        for name, layer in self.enc.items():
            if name.endswith("aux_residual"):
                image = x = skips[-1] = (x + layer(image)) * math.sqrt(0.5)
                continue
            x = self.run(layer, x, emb) if isinstance(layer, Block) else layer(x)
            skips.append(x)
        out_norm, out_conv = list(self.dec.values())[-2:]
        for name, layer in list(self.dec.items())[:-2]:
            x = self.run(layer, torch.cat([x, skips.pop()], 1) if "block" in name else x, emb)
        return out_conv(F.silu(out_norm(x)))


class DhariwalUNet(Checkpointed):
    """ADM's network as EDM has it; arguments as of :class:`SongUNet`."""

    def __init__(
        self,
        size: int,
        channels: int,
        classes: int,
        augments: int,
        width: int = 192,
        multiples: Sequence[int] = (1, 2, 3, 4),
        blocks: int = 3,
        attention: Sequence[int] = (32, 16, 8),
        dropout: float = 0.1,
        embedding: int = 4,
    ):
        super().__init__()
        emb = embedding * width
        style = Style(emb, dropout, 1e-5, 1.0, True, False, HEAD)
        self.width = width
        self.map_augment = nn.Linear(augments, width, bias=False) if augments else None
        self.map_layer0, self.map_layer1 = nn.Linear(width, emb), nn.Linear(emb, emb)
        self.map_label = nn.Linear(classes, emb, bias=False) if classes else None
        widths = [width * m for m in multiples]
        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        encoder = encoder_plan(widths, widths[0], blocks)
        for level, name, cin, cout in encoder:
            side = size >> level
            self.enc[f"{side}x{side}_{name}"] = encoder_part(
                name, channels, cin, cout, style, side in attention
            )
        for level, name, cin, cout in decoder_plan(widths, encoder, blocks):
            side = size >> level
            attends = name == "in0" or ("block" in name and side in attention)
            resample = "up" if name == "up" else None
            self.dec[f"{side}x{side}_{name}"] = Block(cin, cout, style, resample, attends)
        self.out_norm = norm(widths[0], style.eps)
        self.out_conv = conv(widths[0], channels, 3)
        nn.init.zeros_(self.out_conv.weight)

    def embed(self, time: Tensor, label: Tensor | None, augment: Tensor | None) -> Tensor:
        emb = sinusoids(time, self.width, last=False)
        if self.map_augment is not None and augment is not None:
            emb = emb + self.map_augment(augment)
        emb = self.map_layer1(F.silu(self.map_layer0(emb)))
        if self.map_label is not None and label is not None:
            emb = emb + self.map_label(label)
        return F.silu(emb)

    def forward(
        self, x: Tensor, time: Tensor, label: Tensor | None = None, augment: Tensor | None = None
    ) -> Tensor:
        emb, skips = self.embed(time, label, augment).to(x.dtype), []
        for layer in self.enc.values():
            x = self.run(layer, x, emb) if isinstance(layer, Block) else layer(x)
            skips.append(x)
        for name, layer in self.dec.items():
            x = self.run(layer, torch.cat([x, skips.pop()], 1) if "block" in name else x, emb)
        return self.out_conv(F.silu(self.out_norm(x)))
