"""Checkpoints: trained weights, averages, optimiser moments and the iteration, as safetensors and JSON.

Randomness and the position in the data are functions of the iteration (see :mod:`fewstep.rng`), so nothing else
has a state. Files are written beside and renamed, so a checkpoint is whole or absent; tensors are stored whole,
so a run may resume on another number of processes.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from .distributed import Process, assign, whole
from .errors import FewstepError
from .files import replacing, write_json, write_tensors
from .roles import Role

Optimizers = Mapping[str, torch.optim.Optimizer]


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return (
            hashlib.file_digest(file, "sha256").hexdigest()
            if hasattr(hashlib, "file_digest")
            else _digest(file)
        )


def _digest(file) -> str:  # Python 3.10
    state = hashlib.sha256()
    while block := file.read(1 << 20):
        state.update(block)
    return state.hexdigest()


def _tensors(roles: Mapping[str, Role], optimizers: Optimizers) -> dict[str, Tensor]:
    """Every tensor of the training state by a flat name; a collective on sharded roles."""
    tensors: dict[str, Tensor] = {}
    for role in roles.values():
        state = optimizers[role.name].state
        for name, weight in role.weights.items():
            tensors[f"{role.name}/weight/{name}"] = whole(weight)
            for key, value in state.get(weight, {}).items():
                tensors[f"{role.name}/optimizer/{key}/{name}"] = whole(value)
        for name, value in (role.average or {}).items():
            tensors[f"{role.name}/average/{name}"] = whole(value)
    return tensors


def save(
    folder: Path, roles: Mapping[str, Role], optimizers: Optimizers, state: dict, process: Process
) -> None:
    """Writes ``folder`` atomically; every rank takes part, the first one writes."""
    tensors = _tensors(roles, optimizers)
    if process.main:
        with replacing(folder) as part:
            write_tensors(part / "state.safetensors", tensors)
            write_json(part / "state.json", {**state, "sha256": digest(part / "state.safetensors")})
    process.barrier()


def load(folder: Path, roles: Mapping[str, Role], optimizers: Optimizers) -> dict:
    """Restores roles and optimisers exactly; returns the state's JSON.

    Raises:
        FewstepError: the checkpoint is of another run: names of weights differ.
    """
    from safetensors import safe_open

    state = json.loads((folder / "state.json").read_text())
    with safe_open(folder / "state.safetensors", framework="pt") as file:
        names = set(file.keys())
        expected = {f"{r.name}/weight/{n}" for r in roles.values() for n in r.weights}
        found = {n for n in names if "/weight/" in n}
        if expected != found:
            odd = sorted(expected ^ found)[:3]
            raise FewstepError(
                f"{folder}: holds other weights than this recipe trains, e.g. {odd}; resume its own run"
            )
        for role in roles.values():
            for name, weight in role.weights.items():
                assign(weight, file.get_tensor(f"{role.name}/weight/{name}"))
                if role.average is not None:
                    assign(role.average[name], file.get_tensor(f"{role.name}/average/{name}"))
                moments = optimizers[role.name].state[weight]
                for key in ("step", "exp_avg", "exp_avg_sq"):
                    stored = f"{role.name}/optimizer/{key}/{name}"
                    if stored in names:
                        moments[key] = torch.zeros(()) if key == "step" else torch.zeros_like(weight)
                        assign(moments[key], file.get_tensor(stored))
    return state


def is_whole(folder: Path) -> bool:
    """Whether a checkpoint can be trusted: its files are there and their checksum is right."""
    try:
        record = json.loads((folder / "state.json").read_text())
        return record["sha256"] == digest(folder / "state.safetensors")
    except (OSError, ValueError, KeyError):
        return False


def newest(checkpoints: Path) -> Path | None:
    """The newest whole checkpoint; damaged ones are named and passed over."""
    for folder in sorted(checkpoints.glob("step_*[0-9]"), reverse=True):
        if is_whole(folder):
            return folder
        print(f"fewstep: checkpoint {folder} is damaged; using the one before it")
    return None


def rotate(checkpoints: Path, keep: int) -> None:
    for folder in sorted(checkpoints.glob("step_*[0-9]"))[:-keep]:
        shutil.rmtree(folder, ignore_errors=True)
