"""What some stock pipelines make of guidance: the guided prediction keeps the norm of the conditional one."""

from __future__ import annotations

import torch
from torch import Tensor

from ..diffusion.denoiser import Guidance, plainly
from ..diffusion.schedules import expand


def keeping_norm(unconditional: Tensor, conditional: Tensor, guidance: Guidance) -> Tensor:
    """``u + g (c - u)`` with the norms of c along the last axis; at 1 and below, where those do not guide, as it is."""
    mixed = plainly(unconditional, conditional, guidance)
    scaled = mixed * (conditional.norm(dim=-1, keepdim=True) / mixed.norm(dim=-1, keepdim=True))
    if not isinstance(guidance, Tensor):
        return mixed if guidance <= 1 else scaled
    return torch.where(expand(guidance, mixed) > 1, scaled, mixed)
