"""Trained weights as files of diffusers: a LoRA, Kohya's keys, a whole pipeline."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..configs import RoleConfig
from ..diffusion.frozen import plain, whole_weights
from ..files import write_tensors
from ..teachers.base import Teacher
from ..teachers.pipelines import hushed

LORA_FILE = "pytorch_lora_weights.safetensors"


def adapters(record: Mapping[str, Any]) -> list[str]:
    """Subfolders with a LoRA each: of the experts, of the parts, or the export itself, ""."""
    return list(dict.fromkeys(record.get("parts") or record.get("experts") or [""]))


def lora_state_dict(weights: Mapping[str, Tensor], config: RoleConfig) -> dict[str, Tensor]:
    """PEFT keys with the strength ``alpha / rank`` folded into B, so that no reader can lose it."""
    scale = config.alpha / config.rank
    folded = {}
    for name, value in weights.items():
        value = value.float() * scale if ".lora_B." in name else value.float()
        folded[name.replace(".default.", ".")] = value.contiguous()
    return folded


def has_lora_files(teacher: Teacher) -> bool:
    """Whether diffusers reads a LoRA of this pipeline; PixArt's students are exported as merged weights instead."""
    return hasattr(type(teacher.pipe), "save_lora_weights")


def merged(net: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All weights of the network with a folded LoRA added to them, fp32: ``W + B A``, for convolutions as well."""
    weights = {name: value.detach().cpu().float() for name, value in whole_weights(net).items()}
    for name in (n for n in state if ".lora_A." in n):
        down, up = state[name].cpu(), state[name.replace(".lora_A.", ".lora_B.")].cpu()
        target = name.split(".lora_A.")[0] + ".weight"
        delta = up.flatten(1) @ down.flatten(1)
        weights[target] = weights[target] + delta.view_as(weights[target])
    return weights


def save_lora(
    teacher: Teacher, state: dict[str, Tensor], config: RoleConfig, dtype: torch.dtype, folder: Path
) -> None:
    from peft import LoraConfig

    ranks = {name.split(".lora_A.")[0]: len(value) for name, value in state.items() if ".lora_A." in name}
    other = {name: rank for name, rank in ranks.items() if rank != config.rank}
    lora = LoraConfig(
        r=config.rank,
        lora_alpha=config.rank,
        target_modules=list(dict.fromkeys([*(config.targets or ()), *other])),
        rank_pattern=other,
        alpha_pattern=other,
    )
    type(teacher.pipe).save_lora_weights(
        folder,
        **{
            f"{teacher.lora_prefix}_lora_layers": {k: v.to(dtype) for k, v in state.items()},
            f"{teacher.lora_prefix}_lora_adapter_metadata": lora.to_dict(),
        },
    )


def save_kohya(teacher: Teacher, state: dict[str, Tensor], dtype: torch.dtype, path: Path) -> None:
    """The LoRA under the names that ComfyUI and A1111 read, and for each layer alpha, which is the rank."""
    named: dict[str, Tensor] = {}
    for name, value in state.items():
        layer, side, _ = name.rsplit(".", 2)
        key = kohya_name(teacher, layer)
        named[f"{key}.{'lora_down' if side == 'lora_A' else 'lora_up'}.weight"] = value.to(dtype)
        if side == "lora_A":
            named[f"{key}.alpha"] = torch.tensor(len(value))
    write_tensors(path, named)


def kohya_name(teacher: Teacher, layer: str) -> str:
    return f"{teacher.comfyui}{layer.replace('.', '_')}"


def resized(teacher: Teacher, net: Any) -> bool:
    """Whether a student's network is of another size than the teacher's."""
    own, theirs = ({k: v for k, v in n.config.items() if not k.startswith("_")} for n in (net, teacher.net))
    return own != theirs


def network_with(
    teacher: Teacher, net: nn.Module, weights: Mapping[str, Tensor], dtype: torch.dtype
) -> nn.Module:
    """The student's network as a model of diffusers.

    Args:
        net: the student's, for its size.
    """
    small = resized(teacher, net)
    with hushed():
        made = (
            type(teacher.net).from_config(net.config)
            if small
            else plain(copy.deepcopy(teacher.net)).cpu().float()
        )
        # Buffers are never trained, so they stay the teacher's; random features of another network are its own.
        kept: dict[str, Tensor] = made.state_dict()
        own = {name: value for name, value in net.named_buffers() if small and name in kept}
        kept = {**kept, **own, **weights}
        made.load_state_dict({name: value.float() for name, value in kept.items()})
        return made.to(dtype)


def save_network(
    teacher: Teacher, net: nn.Module, scheduler, folder: Path, pipeline: type | None = None
) -> None:
    """The stock pipeline, or one of another class, with another network and scheduler in place of the teacher's."""
    with hushed():  # text encoders have a bar of their own, for each file
        pipeline_with(teacher, net, scheduler, pipeline).save_pretrained(folder)


def pipeline_with(teacher: Teacher, net: nn.Module, scheduler, pipeline: type | None = None):
    """The same in memory, with the teacher's other parts."""
    cls = pipeline or type(teacher.pipe)
    parts = {**teacher.pipe.components, teacher.network: net, "scheduler": scheduler}
    made = cls(**parts, **_options(teacher.pipe))
    if labels := getattr(teacher.pipe, "labels", None):  # DiT's names of classes, which it would not save
        names: dict[int, list[str]] = {}
        for name, label in labels.items():
            names.setdefault(label, []).append(name)
        made.register_to_config(id2label={label: ", ".join(group) for label, group in names.items()})
    return made


def _options(pipe) -> dict[str, Any]:
    """What a pipeline was made with beside its modules, such as the layers of PAG."""
    known = {**{name: getattr(pipe, name) for name in vars(pipe) if name[0] != "_"}, **pipe.config}
    return {name: known[name] for name in pipe._get_signature_keys(pipe)[1] if name in known}
