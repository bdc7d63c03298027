"""Scalars that a student is told, folded into what a stock network or a LoRA can hold."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..diffusion.denoiser import Scalar
from ..diffusion.embedding import ScalarEmbedding, time_embedder, told_at


def folded(weights: Mapping[str, Tensor], net: nn.Module, name: str, scalar: Scalar) -> dict[str, Tensor]:
    """Weights of the network's own class with the scalar at its default: its embedding becomes a part of a bias.

    Args:
        weights: of a network with :func:`fewstep.diffusion.embedding.with_scalar`, by name. net: of the plain class.
    """
    path, _ = told_at(net)
    plain, added = _split(weights, name, scalar)
    bias = f"{path}.bias"
    plain[bias] = plain[bias] + added.to(plain[bias])
    return plain


@torch.no_grad()
def _split(state: Mapping[str, Tensor], name: str, scalar: Scalar) -> tuple[dict[str, Tensor], Tensor]:
    """The weights without the scalar's embedding, and the vector that it adds to the time embedding's output."""
    prefix = name + "_embedding."
    own = {k[len(prefix) :]: v.float() for k, v in state.items() if k.startswith(prefix)}
    embedding = ScalarEmbedding(len(own["embedder.linear_2.bias"]))
    embedding.load_state_dict(own)
    added = embedding(torch.tensor([scalar.scale * scalar.default]))[0]
    return {k: v for k, v in state.items() if not k.startswith(prefix)}, added


def folded_lora(
    state: Mapping[str, Tensor],
    net: nn.Module,
    name: str,
    scalar: Scalar,
    times: Tensor,
) -> dict[str, Tensor]:
    """A LoRA with the scalar at its default: its embedding becomes one more rank of the time embedding's last layer.

    A LoRA carries no bias. But a few-step student is called at K times only, where that layer is given K known vectors
    h_k; with ``a`` the smallest vector for which ``a h_k = 1`` at all of them, the update ``c a`` adds the constant c.

    Args:
        state: PEFT names and tensors of strength 1, and those of the embedding. net: the frozen network.
            The layer before the last must not be adapted.
        times: (K,) as :func:`fewstep.diffusion.embedding.given_to_sinusoids` has them, all that there will ever be.
    """
    path, mlp, sinusoids = time_embedder(net)
    plain, added = _split(state, name, scalar)
    with torch.no_grad():
        weight = mlp.linear_1.weight
        hidden = (
            mlp.act(mlp.linear_1(sinusoids(times.to(weight.device, torch.float32)).to(weight.dtype)))
            .cpu()
            .double()
        )
        one = torch.linalg.pinv(hidden) @ torch.ones(len(hidden), dtype=torch.float64)
    layer = f"{path}.linear_2.lora_"
    for side, rank, axis in (("A", one.float()[None], 0), ("B", added[:, None], 1)):
        key = f"{layer}{side}.weight"
        plain[key] = torch.cat([plain[key], rank.to(plain[key])], axis) if key in plain else rank.contiguous()
    return plain
