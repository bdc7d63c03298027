"""Roles: the trainable networks of a run, as full copies or as LoRA shells on one shared frozen base.

A *shell* is a copy of the module tree whose frozen weights are the very tensors of the original; each role adds
its own adapter to its own shell. Nothing is ever switched on a module inside a step, which would drop gradients
or, under gradient checkpointing, compute wrong ones.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..configs import RoleConfig
from ..diffusion import frozen
from ..diffusion.kernels import checkpoint_blocks
from ..errors import RecipeError
from .sharding import assign, settle, shards

# DMD2's list for SDXL (arXiv 2405.14867, released code): 788 layers of the UNet.
UNET_TARGETS = [
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "proj_in",
    "proj_out",
    "ff.net.0.proj",
    "ff.net.2",
    "conv1",
    "conv2",
    "conv_shortcut",
    "downsamplers.0.conv",
    "upsamplers.0.conv",
    "time_emb_proj",
]
# Attention and feed-forward of every block, the text's own stream (SD 3) and SANA's convolutions included.
TRANSFORMER_TARGETS = [
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "add_q_proj",
    "add_k_proj",
    "add_v_proj",
    "to_add_out",
    "ff.net.0.proj",
    "ff.net.2",
    "ff_context.net.0.proj",
    "ff_context.net.2",
    *(
        "ff.linear_in",
        "ff.linear_out",
        "ff_context.linear_in",
        "ff_context.linear_out",
        "to_qkv_mlp_proj",
    ),  # FLUX.2
    *("ff.gate", "ff.up", "ff.down", "to_gate"),  # Krea 2
    "ff.conv_inverted",
    "ff.conv_point",
    *("img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2"),  # Qwen-Image
    *("img_mlp.proj", "img_mlp.gate_layer", "img_mlp.out"),  # Qwen-Image-2.1
    *("feed_forward.w1", "feed_forward.w2", "feed_forward.w3"),  # Z-Image
    *("feed_forward.linear_1", "feed_forward.linear_2", "feed_forward.linear_3"),  # Lumina
    *("to_q_t", "to_k_t", "to_v_t", "to_out_t", "ff_t.w1", "ff_t.w2", "ff_t.w3"),  # HiDream, its text
    *(f"{name}.w{i}" for name in ("ff_i", "ff_i.shared_experts") for i in (1, 2, 3)),  # not what is routed
]


class Role:
    """A module and those of its weights that are trained.

    Attributes:
        name, module, config: as built. weights: name -> trained parameter, a fixed order.
        average: name -> moving average of the same weights, or None.
        start: name -> what :meth:`restart` goes back to, or None for the teacher; see :meth:`remember`.
    """

    def __init__(self, name: str, module: nn.Module, config: RoleConfig, base: nn.Module | None = None):
        self.name, self.module, self.config, self.base = name, module, config, base
        self.start: dict[str, Tensor] | None = None
        self.collect()

    def collect(self) -> None:
        """(Re)reads the trained weights; sharding replaces parameter objects."""
        self.weights = {n: p for n, p in self.module.named_parameters() if p.requires_grad}
        self.average: dict[str, Tensor] | None = None
        if self.config.ema or self.config.ema_images:
            device = self.config.ema_device
            if device and any(hasattr(p, "device_mesh") for p in self.weights.values()):
                raise RecipeError(
                    f"roles.{self.name}.ema_device: {device}: expected null with several processes, among which an "
                    "average is split as the weights are"
                )
            self.average = {n: p.detach().clone().to(device or p.device) for n, p in self.weights.items()}

    def requires_grad_(self, on: bool) -> None:
        settle(self.module)
        for parameter in self.weights.values():
            parameter.requires_grad_(on)

    def remember(self) -> None:
        """Of a role that will start again: keeps its weights, where they came from elsewhere than the teacher."""
        if self.config.start_from is not None:
            self.start = {name: weight.detach().clone() for name, weight in self.weights.items()}

    @torch.no_grad()
    def restart(self) -> None:
        """Back to what it was built from: what ``start_from`` gave, else the teacher, an adapter as the identity."""
        settle(self.module)
        whole = self.base is not None and self.config.kind == "full"
        begun = self.base.state_dict() if self.base is not None and whole else {}
        for name, weight in self.weights.items():
            if self.start is not None:
                weight.copy_(self.start[name])
            elif self.config.kind == "full":
                assign(weight, begun[name].float())
            elif ".lora_B." in name:
                weight.zero_()
        for name, value in (self.average or {}).items():
            value.copy_(self.weights[name])

    @torch.no_grad()
    def follow(self, other: Role, decay: float) -> None:
        """``decay`` times its own weights plus the rest of another role's, which is built alike; or of its own moving
        average, where there is one."""
        for role in (self, other):
            settle(role.module)
        weights: list[Tensor] = list(self.weights.values())
        theirs: list[Tensor] = list(other.weights.values())
        if other is self and self.average is not None:
            theirs = [value.to(weight.device) for value, weight in zip(self.average.values(), weights)]
        torch._foreach_lerp_(shards(weights), shards(theirs), 1 - decay)

    @torch.no_grad()
    def update_average(self, updates: int, images: int = 1, seen: int = 0) -> None:
        """After an update, see :meth:`RoleConfig.memory`."""
        decay = self.config.memory(updates, images, seen)
        if self.average is not None and decay is not None:
            weights: list[Tensor] = list(self.weights.values())
            if self.config.ema_device:
                weights = [weight.to(self.config.ema_device) for weight in weights]
            torch._foreach_lerp_(shards(self.average.values()), shards(weights), 1 - decay)

    def settle_weights(self) -> None:
        """After an update: whole networks of EDM2 store their weights with rows of unit magnitude."""
        module: Any = self.module
        if self.config.kind == "full" and hasattr(module, "normalise_weights"):
            module.normalise_weights()

    def final_weights(self) -> dict[str, Tensor]:
        """What is exported: the moving average where there is one."""
        return dict(self.average or self.weights)


class averaged:
    """``with averaged(*roles):`` modules carry their moving averages; the trained weights come back after."""

    def __init__(self, *roles: Role):
        self.averages = [(role, role.average) for role in roles if role.average is not None]

    def _swap(self) -> None:
        for role, average in self.averages:
            settle(role.module)
            for name, weight in role.weights.items():
                held = weight.detach().clone()
                weight.data.copy_(average[name])
                average[name].copy_(held)

    def __enter__(self) -> None:
        self._swap()

    def __exit__(self, *_exc: object) -> None:
        self._swap()


def shell(module: nn.Module) -> nn.Module:
    """A copy of the module tree that shares every parameter and buffer with the original."""
    tensors = itertools.chain(module.parameters(), module.buffers())
    return copy.deepcopy(module, {id(tensor): tensor for tensor in tensors})


def build_role(name: str, base: nn.Module, config: RoleConfig, seed: int = 0) -> Role:
    """A role initialised from a frozen network: its LoRA shell or its full copy in fp32.

    Raises:
        RecipeError: no layer matches ``targets``, or the rank is larger than a layer.
    """
    if config.kind == "full":
        if any(layer.store.kind for layer in frozen.stored(base)):
            raise RecipeError(
                f"{name}.kind: full: the base is in fewer bits (teacher.quantization); expected lora"
            )
        module = frozen.plain(copy.deepcopy(base)).requires_grad_(True)
        _in_fp32([*module.parameters(), *module.buffers()])
        _recompute(module, config)
        return Role(name, module, config, base)
    module = shell(base)
    config = replace(config, targets=config.targets or default_targets(base))
    _check_lora(name, module, config)
    from peft import LoraConfig, inject_adapter_in_model

    lora = LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules=config.targets)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(lora, module, adapter_name="default")
    _in_fp32([p for p in module.parameters() if p.requires_grad])  # the shared frozen ones stay as they are
    _recompute(module, config)
    return Role(name, module, config, base)


def _recompute(module: nn.Module, config: RoleConfig) -> None:
    """A role's own choice; copies and shells have the teacher's."""
    if config.gradient_checkpointing:
        checkpoint_blocks(module)
    elif config.gradient_checkpointing is False and getattr(module, "is_gradient_checkpointing", False):
        network: Any = module
        network.disable_gradient_checkpointing()


def _in_fp32(tensors: Iterable[Tensor]) -> None:
    for tensor in tensors:
        if tensor.is_floating_point():
            tensor.data = tensor.data.float()


def default_targets(module: nn.Module) -> list[str]:
    """Layers that are adapted unless a recipe says otherwise: a network's own, DMD2's for UNets, attention and
    feed-forward else."""
    if (own := getattr(module, "lora_targets", None)) is not None:
        return list(own)
    if "UNet" in type(module).__name__:
        return list(UNET_TARGETS)
    # One layer where others have a list of two, whose first is adapted (FLUX.2's blocks of one stream, HiDream).
    alone = [
        n
        for n, layer in module.named_modules()
        if n.endswith(("attn.to_out", "attn1.to_out")) and isinstance(layer, nn.Linear)
    ]
    return [*TRANSFORMER_TARGETS, *alone]


def lora_targets(module: nn.Module, targets: list[str] | None) -> dict[str, nn.Module]:
    """Layers whose name ends in one of ``targets``, as peft matches them; None takes the defaults of the class."""
    targets = default_targets(module) if targets is None else targets
    return {
        name: layer
        for name, layer in module.named_modules()
        if any(name == target or name.endswith("." + target) for target in targets)
    }


def _check_lora(name: str, module: nn.Module, config: RoleConfig) -> None:
    if getattr(module, "lora_targets", None) == []:
        raise RecipeError(f"{name}.kind: lora: a {type(module).__name__} takes no adapters; expected full")
    layers = lora_targets(module, config.targets)
    if not layers:
        raise RecipeError(f"{name}.targets: {config.targets} match no layer of {type(module).__name__}")
    kept = set(frozen.stored(module))
    for path, layer in layers.items():
        if not isinstance(layer, (nn.Linear, nn.Conv2d)):
            raise RecipeError(
                f"{name}.targets: {path} is a {type(layer).__name__}; LoRA adapts Linear and Conv2d"
            )
        shape: Any = layer.store.shape if layer in kept else layer.weight.shape
        outputs, inputs = shape[0], shape[1:].numel()
        if config.rank > min(outputs, inputs):
            raise RecipeError(
                f"{name}.rank: {config.rank} is larger than layer {path} ({outputs} outputs, {inputs} inputs); use a "
                f"rank of at most {min(outputs, inputs)} or leave that layer out of targets"
            )
