"""Checkpoints: trained weights, averages, optimiser moments and the iteration, as safetensors and JSON.

    state.safetensors  trained weights, moving averages, optimiser moments, whole: any number of processes resumes
    state.json         the iteration, updates done, means since the last record, what was best
    SHA256SUMS         checksums of both

Randomness and the position in the data are functions of the iteration (see :mod:`fewstep.rng`), so nothing else
has a state. A checkpoint is there whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from .distributed import Process, assign, whole
from .errors import FewstepError
from .files import replacing, write, write_json, write_tensors
from .optimizers import empty_8bit, plain
from .roles import Role

MANIFEST = "SHA256SUMS"  # as ``sha256sum -c`` reads it

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
                for part, tensor in plain(key, value).items():
                    tensors[f"{role.name}/optimizer/{part}/{name}"] = whole(tensor)
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
            write_json(part / "state.json", state)
            sums = [f"{digest(part / name)}  {name}\n" for name in ("state.safetensors", "state.json")]
            write(part / MANIFEST, "".join(sums))
    process.barrier()


def load(folder: Path, roles: Mapping[str, Role], optimizers: Optimizers) -> dict:
    """Restores roles and optimisers exactly; returns the state's JSON.

    Raises:
        FewstepError: the checkpoint is of another run: weights differ in names or shapes.
    """
    from safetensors import safe_open

    state = json.loads((folder / "state.json").read_text())
    with safe_open(folder / "state.safetensors", framework="pt") as file:
        names = set(file.keys())
        expected = {
            f"{r.name}/weight/{n}": list(w.shape) for r in roles.values() for n, w in r.weights.items()
        }
        found = {n: file.get_slice(n).get_shape() for n in names if "/weight/" in n}
        if expected != found:
            odd = sorted(n for n in expected | found if expected.get(n) != found.get(n))[:3]
            raise FewstepError(
                f"{folder}: holds other weights than this recipe trains, e.g. {odd}; resume its own run"
            )
        for role in roles.values():
            optimizers[role.name].state.clear()
            for name, weight in role.weights.items():
                assign(weight, file.get_tensor(f"{role.name}/weight/{name}"))
                if role.average is not None:
                    assign(role.average[name], file.get_tensor(f"{role.name}/average/{name}"))
                for key in ("step", "exp_avg", "exp_avg_sq"):
                    stored = f"{role.name}/optimizer/{key}/{name}"
                    if stored in names:
                        # The fused kernel reads the step where the weights are.
                        like = (
                            torch.zeros((), device=weight.device)
                            if key == "step"
                            else torch.zeros_like(weight)
                        )
                        assign(like, file.get_tensor(stored))
                        optimizers[role.name].state[weight][key] = like
                    elif f"{role.name}/optimizer/{key}.codes/{name}" in names:
                        like = empty_8bit(optimizers[role.name], weight, key)
                        for part, tensor in plain(key, like).items():
                            assign(tensor, file.get_tensor(f"{role.name}/optimizer/{part}/{name}"))
                        optimizers[role.name].state[weight][key] = like
    return state


def fault(folder: Path) -> str | None:
    """Why a checkpoint cannot be trusted, or None: every file is there and has its checksum."""
    try:
        lines = (folder / MANIFEST).read_text().splitlines()
        for sha256, name in (line.split("  ", 1) for line in lines):
            if digest(folder / name) != sha256:
                return f"{name} is damaged"
        return None if lines else f"{MANIFEST} is empty"
    except OSError as error:
        return f"{Path(error.filename or folder).name}: {error.strerror}"
    except ValueError:
        return f"{MANIFEST} is damaged"


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))


def every(checkpoints: Path) -> list[Path]:
    """From the oldest to the newest, whole or not."""
    return sorted(checkpoints.glob("step_*[0-9]"))


def newest(checkpoints: Path, sound: bool = False) -> Path | None:
    """The newest whole checkpoint; damaged ones are named and passed over. None where there is none at all.

    Args:
        sound: pass over those written while gradients were not finite, too.

    Raises:
        FewstepError: there are checkpoints, and all are damaged.
    """
    found, faults = every(checkpoints), 0
    for folder in reversed(found):
        if reason := fault(folder):
            faults += 1
            print(f"fewstep: checkpoint {folder}: {reason}; using the one before it", file=sys.stderr)
        elif not sound or _is_sound(json.loads((folder / "state.json").read_text())):
            return folder
    if found and faults == len(found):
        raise FewstepError(
            f"{checkpoints}: none of its {faults} checkpoints is whole; put back a good copy, or remove that folder to "
            "begin again"
        )
    return None


def at(checkpoints: Path, step: str, best: dict) -> Path:
    """The checkpoint of a step, or of the "best" one.

    Raises:
        FewstepError: it is not there, or damaged.
    """
    if step == "best" and not best:
        raise FewstepError(
            f"{checkpoints}: no best one is known; set train.best before training, or give a step"
        )
    wanted = checkpoints / f"step_{int(best['step'] if step == 'best' else step):08d}"
    kept = ", ".join(str(step_of(folder)) for folder in every(checkpoints))
    if wanted not in every(checkpoints):
        raise FewstepError(f"{checkpoints}: no checkpoint of step {step}; there are those of {kept}")
    if reason := fault(wanted):
        raise FewstepError(f"{wanted}: {reason}; choose another of {kept}")
    return wanted


def _is_sound(state: dict) -> bool:
    return not any(state["skipped"].values()) and all(state["last"]["finite"].values())


def rotate(checkpoints: Path, keep: int, best: int | None = None) -> None:
    """Removes all but the newest and the one of step ``best``."""
    for folder in every(checkpoints)[:-keep]:
        if step_of(folder) != best:
            shutil.rmtree(folder, ignore_errors=True)


def drop_after(checkpoints: Path, step: int) -> None:
    for folder in every(checkpoints):
        if step_of(folder) > step:
            shutil.rmtree(folder, ignore_errors=True)
