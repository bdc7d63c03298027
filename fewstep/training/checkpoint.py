"""Checkpoints: trained weights, averages, optimiser moments and the iteration, as safetensors and JSON.

    state.safetensors  trained weights, moving averages, optimiser moments; of several processes each writes the
                       shards it holds (torch's distributed checkpoint), and any number of them resumes
    state.json         the iteration, updates done, means since the last record, what was best
    SHA256SUMS         checksums of all

Randomness and the position in the data are functions of the iteration (see :mod:`diffusion.rng`), so nothing else
has a state. A checkpoint is there whole or not at all.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from ..errors import FewstepError, why
from ..files import WriteError, replacing, write, write_json, write_tensors
from ..process import Process
from .optimizers import empty_8bit, plain
from .roles import Role
from .sharding import settle

MANIFEST = "SHA256SUMS"  # as ``sha256sum -c`` reads it
FILES = (MANIFEST, "state.json", "state.safetensors")  # of a damaged one some may be gone
MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # of AdamW

Optimizers = Mapping[str, torch.optim.Optimizer]


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return (
            hashlib.file_digest(file, "sha256").hexdigest()
            if hasattr(hashlib, "file_digest")
            else _digest(file)
        )


def _digest(file: IO[bytes]) -> str:  # Python 3.10
    state = hashlib.sha256()
    while block := file.read(1 << 20):
        state.update(block)
    return state.hexdigest()


def _tensors(roles: Mapping[str, Role], optimizers: Optimizers) -> dict[str, Tensor]:
    """Every tensor of the training state, or this rank's shard of it, by a flat name."""
    tensors: dict[str, Tensor] = {}
    for role in roles.values():
        state = optimizers[role.name].state
        for name, weight in role.weights.items():
            tensors[f"{role.name}/weight/{name}"] = weight.detach()
            for key, value in state.get(weight, {}).items():
                for part, tensor in plain(key, value).items():
                    tensors[f"{role.name}/optimizer/{part}/{name}"] = tensor.detach()
        for name, value in (role.average or {}).items():
            tensors[f"{role.name}/average/{name}"] = value.detach()
        for name, value in (role.start or {}).items():
            tensors[f"{role.name}/start/{name}"] = value.detach()
    return tensors


def save(
    folder: Path, roles: Mapping[str, Role], optimizers: Optimizers, state: dict[str, Any], process: Process
) -> None:
    """Writes ``folder`` atomically; every rank writes what it holds, the first one the rest."""
    tensors = _tensors(roles, optimizers)
    with _replacing(folder, process) as part:
        mine = [_write(part, tensors, process)]
        if process.main:
            write_json(part / "state.json", state)
            mine.append(part / "state.json")
        sums = process.collect([f"{digest(path)}  {path.name}\n" for path in mine if path.exists()])
        if process.main:
            write(part / MANIFEST, "".join(line for lines in sums for line in lines))


def _write(part: Path, tensors: dict[str, Tensor], process: Process) -> Path:
    """This rank's file of weights; there is none where it holds nothing that others do not."""
    if process.world == 1:
        write_tensors(part / "state.safetensors", {name: value.cpu() for name, value in tensors.items()})
        return part / "state.safetensors"
    from torch.distributed.checkpoint import CheckpointException, HuggingFaceStorageWriter
    from torch.distributed.checkpoint import save as save_shards

    writer = HuggingFaceStorageWriter(str(part), save_distributed=True)
    try:
        save_shards(tensors, storage_writer=writer, process_group=process.control)
    except CheckpointException as error:  # raised by all ranks if one cannot write
        reasons = {rank: why(failure[0]) for rank, failure in error.failures.items()}
        rank = next((rank for rank, reason in reasons.items() if reason), None)
        if rank is None:
            raise
        raise WriteError(f"{part.parent}: process {rank} cannot write: {reasons[rank]}") from error
    return next(part.glob(f"shard-{process.rank + 1:05d}-*"), part / "none")


@contextlib.contextmanager
def _replacing(folder: Path, process: Process) -> Iterator[Path]:
    """:func:`replacing` of the first rank, in whose folder all of them write."""
    if process.world == 1:
        with replacing(folder, record=FILES) as part:
            yield part
        return
    with replacing(folder, record=FILES) if process.main else contextlib.nullcontext() as part:
        part = process.collect(part)[0]
        yield part
        process.collect(None)
    process.barrier()


def load(
    folder: Path, roles: Mapping[str, Role], optimizers: Optimizers, process: Process | None = None
) -> dict[str, Any]:
    """Restores roles and optimisers exactly; returns the state's JSON.

    Raises:
        FewstepError: the checkpoint is of another run: weights differ in names or shapes.
    """
    state: dict[str, Any] = json.loads((folder / "state.json").read_text())
    entries = sizes(folder)
    expected = {f"{r.name}/weight/{n}": w.shape for r in roles.values() for n, w in r.weights.items()}
    expected |= {f"{r.name}/start/{n}": w.shape for r in roles.values() for n, w in (r.start or {}).items()}
    found = {n: size for n, size in entries.items() if n.split("/")[1] in ("weight", "start")}
    if expected != found:
        odd = sorted(n for n in expected | found if expected.get(n) != found.get(n))[:3]
        raise FewstepError(
            f"{folder}: holds other weights than this recipe trains, e.g. {odd}; resume its own run"
        )
    for role in roles.values():
        settle(role.module)
        optimizer = optimizers[role.name]
        optimizer.state.clear()
        for name, weight in role.weights.items():
            for key in MOMENTS:
                if f"{role.name}/optimizer/{key}/{name}" in entries:
                    # The fused kernel reads the step where the weights are.
                    like = (
                        torch.zeros((), device=weight.device) if key == "step" else torch.zeros_like(weight)
                    )
                    optimizer.state[weight][key] = like.detach()
                elif f"{role.name}/optimizer/{key}.codes/{name}" in entries:
                    optimizer.state[weight][key] = empty_8bit(optimizer, weight, key)
    read(folder, _tensors(roles, optimizers), process)
    return state


def sizes(folder: Path) -> dict[str, torch.Size]:
    """Whole shape of every tensor by its flat name: role, what of it, weight."""
    from torch.distributed.checkpoint import HuggingFaceStorageReader

    entries: dict[str, Any] = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    return {name: entry.size for name, entry in entries.items()}


def read(folder: Path, tensors: dict[str, Tensor], process: Process | None = None) -> None:
    """Fills tensors by their flat names, whatever number of processes wrote them.

    Args:
        process: None where each process reads by itself, and tensors are whole.
    """
    from torch.distributed.checkpoint import HuggingFaceStorageReader
    from torch.distributed.checkpoint import load as load_shards

    several = process is not None and process.world > 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns where there is one process only
        load_shards(
            tensors,
            storage_reader=HuggingFaceStorageReader(str(folder)),
            process_group=process.control if process is not None and several else None,
            no_dist=not several,
        )


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


def at(checkpoints: Path, step: str, best: Mapping[str, float]) -> Path:
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


def _is_sound(state: dict[str, Any]) -> bool:
    return not any(state["skipped"].values()) and all(state["last"]["finite"].values())


def rotate(checkpoints: Path, keep: int, best: float | None = None) -> None:
    """Removes all but the newest and the one of step ``best``."""
    for folder in every(checkpoints)[:-keep]:
        if step_of(folder) != best:
            shutil.rmtree(folder, ignore_errors=True)


def drop_after(checkpoints: Path, step: int) -> None:
    for folder in every(checkpoints):
        if step_of(folder) > step:
            shutil.rmtree(folder, ignore_errors=True)
