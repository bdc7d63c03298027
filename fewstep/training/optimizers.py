"""Optimisers of roles: torch's fused AdamW, or torchao's with moments in 8 bits."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..errors import RecipeError
from .roles import Role
from .sharding import shards


class AdamW(torch.optim.AdamW):
    """torch's, which works on what this rank holds of sharded weights; its state is sharded as they are."""

    def _init_group(self, group: dict[str, Any], *lists: list[Tensor]) -> bool:
        base: Any = super()
        complex_numbers: bool = base._init_group(group, *lists)
        for tensors in lists:
            tensors[:] = shards(tensors)
        return complex_numbers


def optimizer_of(role: Role, entries: int = 1) -> torch.optim.Optimizer:
    """AdamW of a role's trained weights.

    Adam forgives any scale of a loss but for its eps. Where published code sums over the entries of a sample and the
    loss here is their mean, gradients are that many times smaller, and so eps has to be.

    Args:
        entries: over which a loss is a mean here and a sum where ``RoleConfig.eps`` comes from.

    Raises:
        RecipeError: 8 bits without torchao, or of sharded weights.
    """
    c, weights = role.config, list(role.weights.values())
    options: dict[str, Any] = {
        "lr": c.lr,
        "betas": c.betas,
        "eps": c.eps / entries,
        "weight_decay": c.weight_decay,
    }
    if c.optimizer == "adamw":
        return AdamW(weights, **options, fused=True)
    try:
        from torchao.optim import AdamW8bit
    except ImportError as error:
        raise RecipeError(
            f"roles.{role.name}.optimizer: adamw8bit: torchao is not installed; pip install 'fewstep[8bit]'"
        ) from error
    if any(hasattr(weight, "device_mesh") for weight in weights):
        raise RecipeError(
            f"roles.{role.name}.optimizer: adamw8bit: expected adamw with several processes, whose moments train.shard "
            "splits instead"
        )
    made: torch.optim.Optimizer = AdamW8bit(weights, **options)
    return made


def take_step(optimizer: Any, lr: float, found_inf: Tensor) -> None:
    """One update, which leaves weights and moments alone where ``found_inf`` is 1.

    The fused kernel reads that on the device. torchao's cannot, so the host waits for it.
    """
    group = optimizer.param_groups[0]
    if not isinstance(group["lr"], Tensor):
        group["lr"], optimizer.found_inf = lr, found_inf
        optimizer.step()
    elif not found_inf:
        group["lr"].fill_(lr)
        optimizer.step()


def plain(key: str, moment: Any) -> dict[str, Tensor]:
    """A moment as tensors that a file can hold, by name: 8 bits are codes and scales of blocks."""
    if not hasattr(moment, "codes"):
        return {key: moment}
    return {f"{key}.codes": moment.codes, f"{key}.scale": moment.scale}


def bytes_8bit(weights: Iterable[Tensor]) -> int:
    """Of both moments: a byte per weight and four per block of 256; small or odd tensors stay in fp32."""
    sizes = [weight.numel() for weight in weights]
    return sum(2 * (n + n // 64) if n >= 4096 and n % 256 == 0 else 8 * n for n in sizes)


def empty_8bit(optimizer: Any, weight: Tensor, key: str) -> Tensor:
    """What :func:`plain` took apart, ready to be filled."""
    buffer: Tensor = optimizer._new_buffer(weight, key == "exp_avg")
    return buffer
