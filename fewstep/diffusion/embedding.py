"""The time embedding of diffusers networks, and scalars that a student is told beside its time.

An embedded scalar is a small network of its own whose output is added to that of the time embedding's last layer; it
starts at zero, so the student starts as the teacher. At one value it is a constant: :func:`fewstep.export.fold.folded`
adds it to that layer's bias, and what is left is a network of the teacher's own class.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import RecipeError
from .cond import Cond
from .denoiser import NetCall, NetDenoiser, Scalar
from .schedules import repeated

# Where networks keep the pair of modules `time_proj` (sinusoids) and the MLP on them, by the MLP's path.
TIME_EMBEDDERS = (
    "time_embedding",  # UNets
    "time_text_embed.timestep_embedder",  # SD3, Flux
    "time_embed.emb.timestep_embedder",  # SANA
    "adaln_single.emb.timestep_embedder",  # PixArt
    "t_embedder.timestep_embedder",  # HiDream
)
EDM = "model.map_layer1"  # the last layer before the blocks of EDM's networks; EDM2's have no bias
CHANNELS = 256  # sinusoids of an embedded scalar, as in SANA-Sprint's class


def time_embedder(net: nn.Module) -> tuple[str, Any, Any]:
    """(path of the time MLP, the MLP, the sinusoids before it).

    Raises:
        RecipeError: the class is none of those known.
    """
    modules = dict(net.named_modules())
    for path in TIME_EMBEDDERS:
        parent = path.rpartition(".")[0]
        sinusoids = modules.get(f"{parent}.time_proj".lstrip("."))
        mlp: Any = modules.get(path)
        if mlp is not None and sinusoids is not None and mlp.linear_2.bias is not None:  # where a scalar ends
            return path, mlp, sinusoids
    raise RecipeError(
        f"method: {type(net).__name__} has no time embedding that fewstep knows; expected one of "
        f"{', '.join(TIME_EMBEDDERS)}, with a bias; choose another method, or set method.guidance_embedding false"
    )


def told_at(net: nn.Module) -> tuple[str, Any]:
    """(path, layer) to whose output, by whose bias, a scalar is added that a student is told.

    Raises:
        RecipeError: the class is none of those known.
    """
    layer = dict(net.named_modules()).get(EDM)
    if layer is not None:
        return EDM, layer
    path, mlp, _ = time_embedder(net)
    return f"{path}.linear_2", mlp.linear_2


@torch.no_grad()
def given_to_sinusoids(denoiser: NetDenoiser, latent_shape: Sequence[int], times: Sequence[float]) -> Tensor:
    """What the network hands its sinusoids at each of these times, (K,) in float64; some divide by 1000 before.

    Raises:
        RecipeError: of :func:`time_embedder`.
    """
    _, _, sinusoids = time_embedder(denoiser.net)
    seen: list[Tensor] = []
    handle = sinusoids.register_forward_pre_hook(
        lambda _module, inputs: seen.append(inputs[0][:1].cpu().double())
    )
    device = next(denoiser.net.parameters()).device
    try:
        x = torch.zeros(1, *latent_shape, device=device)
        for time in times:
            denoiser.predict(x, repeated(time, x), denoiser.example.to(device))
    finally:
        handle.remove()
    return torch.cat(seen)


class ScalarEmbedding(nn.Module):
    """(B,) -> (B, width) by sinusoids and an MLP whose last layer starts at zero."""

    def __init__(self, width: int):
        super().__init__()
        from diffusers.models.embeddings import TimestepEmbedding, Timesteps

        self.sinusoids = Timesteps(CHANNELS, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.embedder = TimestepEmbedding(CHANNELS, width)
        nn.init.zeros_(self.embedder.linear_2.weight)
        nn.init.zeros_(self.embedder.linear_2.bias)
        self.value: Tensor | None = None  # of the call in progress

    def forward(self, value: Tensor) -> Tensor:
        return self.embedder(self.sinusoids(value))

    def hook(self, _module: nn.Module, _inputs, output: Tensor) -> Tensor:
        return output if self.value is None else output + self(self.value).to(output.dtype)


class _ScalarCall:
    """Takes the scalar out of the condition, and hands it to the embedding while the network runs."""

    def __init__(self, call: NetCall, name: str, scalar: Scalar):
        self.call, self.name, self.scalar = call, name, scalar

    def __call__(self, net: nn.Module, x_t: Tensor, time: Tensor, cond: Cond) -> Tensor:
        rest = dict(cond.tensors)
        value = rest.pop(self.name, None)
        if value is None:
            value = torch.full((len(x_t),), self.scalar.default, device=x_t.device)
        embedding = getattr(net, self.name + "_embedding")
        embedding.value = self.scalar.scale * value.float()
        try:
            return self.call(net, x_t, time, Cond(rest))
        finally:
            embedding.value = None


def with_scalar(denoiser: NetDenoiser, name: str, scalar: Scalar) -> NetDenoiser:
    """The denoiser with a further input ``cond[name]`` (B,), by default the scalar's.

    The network gets a module ``{name}_embedding``, which is trained and saved with it.

    Raises:
        RecipeError: a network whose time embedding is not known.
    """
    _, layer = told_at(denoiser.net)
    embedding = ScalarEmbedding(layer.out_features).to(next(denoiser.net.parameters()).device)
    denoiser.net.add_module(name + "_embedding", embedding)
    layer.register_forward_hook(embedding.hook)
    view = denoiser.with_net(denoiser.net)
    view.call = _ScalarCall(denoiser.call, name, scalar)
    view.scalars = {**denoiser.scalars, name: scalar}
    return view
