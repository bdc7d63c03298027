"""Discriminators on the features of a diffusion network.

Features come from forward hooks on named blocks of the network as it is: no copied forward, the gradient flows
through them, and hooks fire once under gradient checkpointing. A small head turns each map into logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import RecipeError
from .cond import Cond
from .denoiser import Guidance, NetDenoiser


class _LastTap(Exception):
    """Ends a forward once every wanted feature is there; the decoder half would be wasted work."""


def _image_of(output, first: bool = False) -> Tensor:
    """A UNet's block returns its map and a tuple of skips, Stable Diffusion 3's the text's tokens and the image's,
    HiDream's the image's ``first``."""
    if not isinstance(output, tuple):
        return output
    return output[1] if not first and len(output) > 1 and isinstance(output[1], Tensor) else output[0]


def _tokens(denoiser: NetDenoiser, cond: Cond, x_t: Tensor, output) -> Tensor:
    return denoiser.image_of(_image_of(output, denoiser.image_first), cond, x_t)


@contextmanager
def _taps(
    net: nn.Module,
    names: Sequence[str],
    stop: bool,
    image_of: Callable[[Any], Tensor] = _image_of,
    rows: int = 1,
) -> Iterator[dict[str, Tensor]]:
    """Features by name. After the last one the forward stops, or goes on without a graph, which nothing would use.

    Args:
        rows: to wait for, of a network that may be called with some of them at a time.
    """
    features: dict[str, Tensor] = {}
    grad = torch.is_grad_enabled()

    def keep(name: str):
        def hook(_module, _inputs, output):
            have = features.get(name)
            if have is not None and len(have) >= rows:  # another call, of the null for instance
                return
            found = image_of(output).float()
            features[name] = found if have is None else torch.cat([have, found])
            if all(name in features and len(features[name]) >= rows for name in names):
                if stop:
                    raise _LastTap
                torch.set_grad_enabled(False)

        hook.taps = True  # type: ignore[attr-defined]  # by which it is told from other hooks
        return hook

    handles = [net.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    try:
        yield features
    finally:
        torch.set_grad_enabled(grad)
        for handle in handles:
            handle.remove()


def check_taps(denoiser: NetDenoiser, names: Sequence[str], option: str) -> None:
    """Refuses, by the name of the method's option, what is no block of the network."""
    modules = dict(denoiser.net.named_modules())
    for name in names:
        if name not in modules:
            known = ", ".join(n for n, _ in denoiser.net.named_children())
            raise RecipeError(
                f"method.{option}: {name!r} is no block of the network; top-level blocks: {known}"
            )


def tap_features(
    denoiser: NetDenoiser, names: Sequence[str], x_t: Tensor, t: Tensor, cond: Cond
) -> list[Tensor]:
    """Features of the named blocks in fp32, in the order of ``names``; gradient reaches x_t."""
    # A sharded module frees its gathered weights in a hook after its forward, so it has to finish.
    stop = not hasattr(denoiser.net, "unshard")
    with (
        _taps(denoiser.net, names, stop, partial(_tokens, denoiser, cond, x_t), len(x_t)) as features,
        suppress(_LastTap),
    ):
        denoiser.predict(x_t, t, cond)
    return [features[name] for name in names]


def mean_logits(denoiser: NetDenoiser, taps: Sequence[str], x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
    """Logits (B, n) without weights of their own: features averaged over channels (SiDA, arXiv 2410.14919)."""
    features = tap_features(denoiser, taps, x_t, t, cond)
    return torch.cat([f.mean(1 if f.ndim == 4 else -1).reshape(len(f), -1) for f in features], 1)


def _groups(channels: int) -> int:
    # The last map is 1x1, where a group of one channel would be normalised to zero and the head be blind.
    return max(g for g in (1, 2, 4, 8, 16, 32) if g == 1 or (channels % g == 0 and channels >= 4 * g))


class ConvHead(nn.Module):
    """Feature map (B, C, H, W) -> logits (B, 1); DMD2's head (arXiv 2405.14867, appendix).

    ``k = log2(H / 4)`` stages of Conv4x4 stride 2, GroupNorm, SiLU down to 4x4, one Conv4x4 to 1x1, one Conv1x1.
    k comes from the map of ``teacher.resolution``; sizes that do not halve down to 4x4 are pooled there.
    """

    def __init__(self, channels: int, height: int, width: int):
        super().__init__()
        stages = max(0, int(math.log2(min(height, width) / 4))) if min(height, width) >= 4 else 0

        def conv(stride: int, padding: int) -> list[nn.Module]:
            return [
                nn.Conv2d(channels, channels, 4, stride, padding),
                nn.GroupNorm(_groups(channels), channels),
                nn.SiLU(),
            ]

        halved = [layer for _ in range(stages) for layer in conv(2, 1)]
        exact = (height >> stages, width >> stages) == (4, 4)
        pool = [] if exact else [nn.AdaptiveAvgPool2d(4)]
        self.layers = nn.Sequential(*halved, *pool, *conv(4, 0), nn.Conv2d(channels, 1, 1), nn.Flatten())

    def forward(self, x: Tensor, told: Tensor | None = None) -> Tensor:
        last: Any = self.layers[-2]
        x = self.layers[:-5](x)
        if x.shape[2:] != (4, 4):  # a map of another shape than the head was made for
            x = nn.functional.adaptive_avg_pool2d(x, 4)
        return _logits(self.layers[-5:-2](x).flatten(1)[:, None], last.weight.flatten(1), last.bias, told)


class TokenHead(nn.Module):
    """Tokens (B, N, C) or vectors (B, C) -> logits (B, N) or (B, 1)."""

    def __init__(self, channels: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.LayerNorm(channels), nn.Linear(channels, channels), nn.SiLU(), nn.Linear(channels, 1)
        )

    def forward(self, x: Tensor, told: Tensor | None = None) -> Tensor:
        hidden = self.layers[:-1](x)
        last: Any = self.layers[-1]
        return _logits(hidden if x.ndim == 3 else hidden[:, None], last.weight, last.bias, told)


class ConvTokenHead(nn.Module):
    """Tokens (B, N, C) -> logits (B, N), each of its neighbourhood along the sequence, which closes to a ring.

    The head of SANA-Sprint's published code, which is StyleGAN-T's: a convolution over one token, a residual one over
    nine, a linear map, all of spectral norm 1. Normalisation is over a sample's own groups of channels, where that code
    has statistics of a virtual batch of eight: a sample's logits depend on itself alone here.

    Args:
        tokens: N; nine neighbours are as many as there are, where there are fewer.
    """

    def __init__(self, channels: int, tokens: int):
        super().__init__()
        width = min(9, tokens - 1 + tokens % 2)
        self.one = nn.Conv1d(channels, channels, 1)
        self.near = nn.Conv1d(channels, channels, width)
        self.norms = nn.ModuleList(nn.GroupNorm(_groups(channels), channels) for _ in range(2))
        self.last = nn.Linear(channels, 1)

    def forward(self, x: Tensor, told: Tensor | None = None) -> Tensor:
        one = self._act(x.transpose(1, 2), self.one, self.norms[0])
        both = (one + self._act(one, self.near, self.norms[1])) / math.sqrt(2)
        return _logits(both.transpose(1, 2), spectral(self.last.weight), self.last.bias, told)

    @staticmethod
    def _act(x: Tensor, conv: nn.Conv1d, norm: nn.Module) -> Tensor:
        padding = conv.kernel_size[0] // 2
        ring = nn.functional.pad(x, (padding, padding), mode="circular")
        return nn.functional.leaky_relu(
            norm(nn.functional.conv1d(ring, spectral(conv.weight), conv.bias)), 0.2
        )


def spectral(weight: Tensor, iterations: int = 8) -> Tensor:
    """A weight (n, ...) over its largest singular value as a matrix (n, m), by power iteration (arXiv 1802.05957).

    It starts from the same vector each time, so that a head has no state beside its weights; the vectors are constants
    to the gradient.
    """
    matrix = weight.flatten(1)
    with torch.no_grad():
        u = torch.cos(torch.arange(len(matrix), device=matrix.device, dtype=matrix.dtype))
        for _ in range(iterations):
            v = nn.functional.normalize(u @ matrix, dim=0)
            u = nn.functional.normalize(matrix @ v, dim=0)
    return weight / (u @ matrix @ v)


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor, told: Tensor | None) -> Tensor:
    """(B, n, C) -> (B, n) by the last layer, to whose weights each sample's condition adds ``told`` (B, C)."""
    logits = nn.functional.linear(hidden, weight, bias)[..., 0]
    return logits if told is None else logits + (hidden @ told[:, :, None])[..., 0]


Heads = Literal["mlp", "conv"]


def _head(features: Tensor, kind: Heads) -> nn.Module:
    if features.ndim == 4:
        return ConvHead(*features.shape[1:])
    channels = features.shape[-1]
    return (
        ConvTokenHead(channels, features.shape[1])
        if kind == "conv" and features.ndim == 3
        else TokenHead(channels)
    )


LEVELS = 16  # cosines of the noise level


def condition_vector(denoiser: NetDenoiser, t: Tensor, cond: Cond) -> Tensor:
    """What heads are told, (B, n): the noise level, then the pooled text embedding or the class if there is one.

    The level enters as cosines of the TrigFlow angle ``atan2(sigma, alpha)``, the embedding by its direction, and each
    of them with a norm of at most 1, so that neither drowns the other.
    """
    angle = torch.atan2(denoiser.schedule.sigma(t), denoiser.schedule.alpha(t)).float()
    told = [torch.cos(angle[:, None] * 2 * torch.arange(LEVELS, device=t.device)) / math.sqrt(LEVELS)]
    config = getattr(denoiser.net, "config", {})
    classes = config.get("num_embeds_ada_norm") or config.get("num_class_embeds")
    if "pooled" in cond.tensors:
        told.append(nn.functional.normalize(cond["pooled"].float(), dim=1))
    elif "label" in cond.tensors and classes:  # DiT's null comes after its last class
        told.append(nn.functional.one_hot(cond["label"], classes + 1).float())
    return torch.cat(told, 1)


class Discriminator(nn.Module):
    """Heads on named blocks of a network; the network itself belongs to another role.

    Args:
        denoiser: whose network is tapped. taps: names of its blocks. latent_shape: (C, H, W) of one sample.
        heads: on tokens, "mlp" of each, or "conv" of each with its neighbours. A UNet's maps have DMD2's head.
        conditional: heads are told noise level and condition (:func:`condition_vector`) beside what the features say
            of them: ``logit = psi(h) + <V c, h>`` (projection discriminator, arXiv 1802.05637). V starts at zero.

    Raises:
        RecipeError: a tap is no block of the network; the message lists the top-level ones.
    """

    def __init__(
        self,
        denoiser: NetDenoiser,
        taps: Sequence[str],
        latent_shape: Sequence[int],
        conditional: bool = False,
        heads: Heads = "mlp",
    ):
        super().__init__()
        check_taps(denoiser, taps, "taps")
        self.taps = list(taps)
        parameter = next(denoiser.net.parameters())
        x = torch.zeros(1, *latent_shape, device=parameter.device)
        t = torch.full((1,), denoiser.schedule.t_max, device=x.device)
        example = denoiser.example.to(x.device)
        with torch.no_grad():
            maps = tap_features(denoiser, self.taps, x, t, example)
        self.heads = nn.ModuleList(_head(m, heads) for m in maps).to(x.device)
        self.projections: nn.ModuleList | None = None
        if conditional:
            told = condition_vector(denoiser, t, example).shape[1]
            widths = [m.shape[1] if m.ndim == 4 else m.shape[-1] for m in maps]
            self.projections = nn.ModuleList(nn.Linear(told, width, bias=False) for width in widths)
            for projection in self.projections.to(x.device).parameters():
                nn.init.zeros_(projection)

    def forward(self, features: Sequence[Tensor], told: Tensor | None = None) -> Tensor:
        """Logits (B, n) of all heads side by side; conditional ones want ``told`` (B, m)."""
        with torch.autocast(features[0].device.type, enabled=False):
            weights = (
                [project(told) for project in self.projections]
                if self.projections
                else [None] * len(features)
            )
            return torch.cat([head(f.float(), w) for head, f, w in zip(self.heads, features, weights)], 1)

    def logits(self, denoiser: NetDenoiser, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return self(tap_features(denoiser, self.taps, x_t, t, cond), self._told(denoiser, t, cond))

    def judged(
        self, denoiser: NetDenoiser, x_t: Tensor, t: Tensor, cond: Cond, guidance: Guidance = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Logits as of :meth:`logits` and x0 without gradient, by one forward; guidance takes one of the null too."""
        found = partial(_tokens, denoiser, cond, x_t)
        with _taps(denoiser.net, self.taps, False, found, len(x_t)) as features:
            made = denoiser.predict(x_t, t, cond).detach()
        if isinstance(guidance, Tensor) or guidance != 1.0:
            with torch.no_grad():
                if denoiser.embeds_guidance:  # its features are those of another scale
                    made = denoiser.predict(x_t, t, cond, guidance=guidance)
                else:
                    made = denoiser.guide(denoiser.predict(x_t, t, cond, guidance=0.0), made, guidance)
        x0 = denoiser.schedule.convert(made, x_t.detach(), t, denoiser.prediction, "x0")
        return self([features[name] for name in self.taps], self._told(denoiser, t, cond)), x0

    def _told(self, denoiser: NetDenoiser, t: Tensor, cond: Cond) -> Tensor | None:
        return condition_vector(denoiser, t, cond) if self.projections else None
