"""Weights as others publish them: read by name, and loaded strictly."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import FewstepError

MARKS = "n_d_embed.weight"  # which students of Distilled Decoding have, and no teacher
AVERAGES = ("ema", "ema_parameters")  # what those are sampled with; teachers are with their own weights
PYRAMID = re.compile(r"(^|\.)pyramid\.")  # the tokenizer's, in a transformer


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file, or of a torch file read with ``weights_only`` (bare, or under a usual name).

    Raises:
        FewstepError: no such file, or one that holds no tensors by name.
    """
    path = Path(path)
    if not path.is_file():
        raise FewstepError(f"{path} does not exist; expected a .safetensors, .pt or .pth file")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # each loader raises its own kinds
        raise FewstepError(f"{path}: cannot be read as weights: {str(error).splitlines()[0]}") from error
    for names in (("trainer",), AVERAGES, ("model", "module", "state_dict", "var_wo_ddp", "ema")):
        for name in names:
            part = state.get(name) if isinstance(state, dict) else None
            if isinstance(part, dict) and (names != AVERAGES or MARKS in part):
                state = part
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise FewstepError(
            f"{path}: expected tensors by name, at the top or under model, module or state_dict"
        )
    return state


def load_weights(module: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Strictly, with every fault listed at once.

    Raises:
        FewstepError: keys are missing, left over, or of another shape.
    """
    mine = {name: value for name, value in module.state_dict().items() if not PYRAMID.search(name)}
    faults = [f"missing {name}" for name in mine if name not in state]
    faults += [f"left over {name}" for name in state if name not in mine]
    faults += [
        f"{name} is {tuple(state[name].shape)}, not {tuple(value.shape)}"
        for name, value in mine.items()
        if name in state and state[name].shape != value.shape
    ]
    if faults:
        more = f" and {len(faults) - 20} more" if len(faults) > 20 else ""
        raise FewstepError(
            f"{source}: does not fit {type(module).__name__}, {len(faults)} keys: {'; '.join(faults[:20])}{more}"
        )
    module.load_state_dict({name: value.float() for name, value in state.items()}, strict=False)
