"""A network of the teacher's class in another size."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..diffusion.kernels import checkpoint_blocks
from ..errors import RecipeError

if TYPE_CHECKING:
    from .base import Teacher


@torch.no_grad()
def resize(teacher: Teacher, changes: Mapping[str, Any], option: str) -> nn.Module:
    """A new network of the teacher's class whose configuration differs in ``changes``, in fp32.

    Weights of equal name and shape are the teacher's, the others random, the same in every call.

    Args:
        option: the recipe's field, for errors.

    Raises:
        RecipeError: an unknown entry, an impossible network, or one that cannot stand where the teacher's stands.
    """
    net, denoiser = teacher.net, teacher.denoiser
    known = [name for name in net.config if not name.startswith("_")]
    for name in changes:
        if name not in known:
            close = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(known)}"
            raise RecipeError(f"{option}.{name}: no entry of {type(net).__name__}'s configuration; {hint}")
    parameter = next(net.parameters())
    x = torch.zeros(1, *teacher.latent_shape, device=parameter.device)
    time = torch.full((1,), float(denoiser.schedule.t_max), device=x.device)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            small = type(net).from_config({**net.config, **changes}).to(x.device)
        teacher.prepare(small)
        if denoiser.null is not None:  # one forward tells whether it fits
            made = denoiser.with_net(small).predict(x, time, denoiser.example.to(x.device))
            if made.shape != x.shape:
                raise ValueError(f"it makes {tuple(made.shape)} of {tuple(x.shape)}")
    except Exception as error:  # each layer has its own way to say no
        summary = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RecipeError(
            f"{option}: {dict(changes)}: {type(net).__name__} cannot take the teacher's place with it: {summary}"
        ) from error
    own, theirs = small.state_dict(), net.state_dict()
    same = {name: value for name, value in theirs.items() if name in own and own[name].shape == value.shape}
    small.load_state_dict({**own, **same})
    if getattr(net, "is_gradient_checkpointing", False):
        checkpoint_blocks(small)
    frozen: nn.Module = small.requires_grad_(False).eval()
    return frozen
