"""What roles start from instead of the teacher: a finished run, one of its checkpoints, or an export."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from .. import recipe as recipes
from ..configs import RoleConfig
from ..errors import FewstepError, RecipeError
from ..export.load import read_record
from ..export.weights import LORA_FILE, adapters
from ..process import Process
from ..recipe import Recipe
from ..teachers.base import Teacher
from ..training import checkpoint
from ..training.roles import Role


@dataclass(frozen=True)
class Source:
    """One network's weights in a folder; moving averages where there are any.

    Attributes:
        folder: where they lie. sizes: shape of each, by the name that it has in a role. teacher: what an adapter is of.
        strength: of an adapter, ``alpha / rank``; exports have it folded in. read: fills tensors by these names.
        fault: why the folder cannot be trusted, or None; reads all of it.
    """

    folder: Path
    sizes: dict[str, torch.Size]
    teacher: str
    strength: float
    read: Callable[[Mapping[str, Tensor]], None]
    fault: Callable[[], str | None]

    @property
    def kind(self) -> str:
        return "lora" if any(".lora_" in name for name in self.sizes) else "full"

    @property
    def ranks(self) -> set[int]:
        return {size[0] for name, size in self.sizes.items() if ".lora_A." in name}


# ---------------------------------------------------------------------------------------------------- before a teacher
def check_starts(recipe: Recipe) -> None:
    """What can be told before anything is loaded: the folders are there, and hold adapters of the roles' ranks or whole
    weights, as they train.

    Raises:
        RecipeError: in one line with the role, the folder and the remedy.
    """
    for name in (*recipe.method_class.networks_for(recipe.method), *recipe.method_class.extras):
        config = recipe.role(name)
        if config.start_from is not None:
            source = _found(name, config.start_from, recipe)
            if name not in recipe.method_class.extras:
                _check_kind(name, config, source)


def _found(name: str, start_from: str, recipe: Recipe) -> Source:
    sought = "student" if name in recipe.method_class.followers else name
    try:
        return find(sought, Path(start_from))
    except FewstepError as error:
        raise RecipeError(f"roles.{name}.start_from: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _refused(name: str, source: Source, why: str) -> RecipeError:
    return RecipeError(f"roles.{name}.start_from: {source.folder}: {why}")


def _check_kind(name: str, config: RoleConfig, source: Source) -> None:
    held, rank = {"lora": "an adapter", "full": "whole weights"}[source.kind], max(source.ranks, default=0)
    if source.kind != config.kind:
        raise _refused(
            name,
            source,
            f"holds {held}, and roles.{name}.kind is {config.kind}; expected {source.kind}, or a run that trained this "
            f"role as {config.kind}",
        )
    if source.ranks and config.rank not in source.ranks:
        raise _refused(
            name,
            source,
            f"holds an adapter of rank {rank}, and roles.{name}.rank is {config.rank}; expected {rank}",
        )


# ------------------------------------------------------------------------------------------------------------- finding
def find(name: str, folder: Path) -> Source:
    """The weights for a role: in a run or a checkpoint those of the role of this name, or of its family (``student``
    for ``student_2``); in an export those of its only student, or of the one of this name.

    Of a run it is the newest checkpoint, as in its export; an earlier one, or the best, is named by its own folder.

    Raises:
        FewstepError: no such folder, nothing of ours, a run that has not ended, or no weights for this role.
    """
    if not folder.is_dir():
        raise FewstepError(f"{folder}: no such folder; expected a finished run or an export")
    if (folder / "fewstep.json").is_file():
        return _of_export(name, folder)
    if (folder / "state.json").is_file():
        return _of_checkpoint(name, folder, _run_of(folder))
    if not (folder / "recipe.yaml").is_file():
        raise FewstepError(
            f"{folder}: is neither a run (no recipe.yaml in it) nor an export (no fewstep.json); expected RUN or "
            "RUN/export"
        )
    run, kept = recipes.load(folder / "recipe.yaml"), checkpoint.every(folder / "checkpoints")
    if not kept:
        raise FewstepError(f"{folder}: this run has no checkpoint; train it first, or give an export")
    if (step := checkpoint.step_of(kept[-1])) < run.train.steps:
        raise FewstepError(
            f"{folder}: this run stands at step {step} of {run.train.steps}; finish it with `fewstep resume {folder}`, "
            f"or name a checkpoint: {kept[-1]}"
        )
    return _of_checkpoint(name, kept[-1], run)


def _run_of(folder: Path) -> Recipe:
    for above in folder.absolute().parents[:2]:
        if (above / "recipe.yaml").is_file():
            return recipes.load(above / "recipe.yaml")
    raise FewstepError(f"{folder}: a checkpoint outside its run; expected RUN/checkpoints/step_*")


def _of_checkpoint(name: str, folder: Path, run: Recipe) -> Source:
    try:
        sizes = checkpoint.sizes(folder)
    except Exception as error:  # each kind of damage has its own
        raise FewstepError(
            f"{folder}: cannot be read: {_one_line(error)}; give another checkpoint"
        ) from error
    held = dict.fromkeys(flat.split("/")[0] for flat in sizes)
    role = next((n for n in (name, recipes.family(name)) if n in held), None)
    if role is None:
        raise FewstepError(f"{folder}: has no role {name}; there are {', '.join(sorted(held))}")
    averaged = any(flat.startswith(f"{role}/average/") for flat in sizes)
    prefix = f"{role}/{'average' if averaged else 'weight'}/"

    def read(into: Mapping[str, Tensor]) -> None:
        checkpoint.read(folder, {prefix + n: tensor for n, tensor in into.items()})

    return Source(
        folder,
        {flat[len(prefix) :]: size for flat, size in sizes.items() if flat.startswith(prefix)},
        run.teacher.path,
        run.role(role).alpha / run.role(role).rank,
        read,
        lambda: checkpoint.fault(folder),
    )


def _of_export(name: str, folder: Path) -> Source:
    record = read_record(folder)
    parts = adapters(record)
    wanted = (name, name.replace("student_", "part_")) if len(parts) > 1 else parts
    part = next((p for p in wanted if p in parts), None)
    if part is None:
        raise FewstepError(
            f"{folder}: holds several students, and none for {name}; there are {', '.join(parts)}"
        )
    place = folder / part
    if record["kind"] == "full":
        nets = (place / "pipeline" / record.get("network", net) for net in ("unet", "transformer"))
        place = next((net for net in nets if net.is_dir()), place)
    files = sorted(place.glob("*.safetensors" if record["kind"] == "full" else LORA_FILE))
    try:
        sizes = {
            name: torch.Size(size)
            for name, size in _tensors(files, lambda t, key: t.get_slice(key).get_shape())
        }
        if not sizes:
            raise FileNotFoundError(f"no weights in {place}")
    except Exception as error:  # a damaged file raises safetensors' own kinds
        raise FewstepError(f"{folder}: cannot be read: {_one_line(error)}; export its run again") from error

    def read(into: Mapping[str, Tensor]) -> None:
        for name, value in _tensors(files, lambda tensors, key: tensors.get_tensor(key)):
            if name in into:
                into[name].copy_(value)

    return Source(folder, sizes, record["teacher"], 1.0, read, lambda: None)


def _tensors(files: list[Path], of: Callable) -> Iterator[tuple[str, Any]]:
    """What is asked of each tensor of files, by the name that it has in a role, in diffusers' files of either kind."""
    for path in files:
        with safe_open(path, "pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118
                name = key
                if path.name == LORA_FILE:  # "unet." or "transformer." before it
                    name = key.partition(".")[2].replace(".lora_A.", ".lora_A.default.")
                    name = name.replace(".lora_B.", ".lora_B.default.")
                yield name, of(tensors, key)


# ------------------------------------------------------------------------------------------------------------- loading
def start(roles: Mapping[str, Role], recipe: Recipe, teacher: Teacher, process: Process) -> None:
    """Weights of roles that start from something else than the teacher; before they are split over processes.

    Raises:
        RecipeError: as :func:`check_starts`; or other layers, another size, other constants, or damaged files.
    """
    for name, role in roles.items():
        if role.config.start_from is None:
            continue
        source = _found(name, role.config.start_from, recipe)
        if name not in recipe.method_class.extras:
            _check_kind(name, role.config, source)
        if fault := process.collect(source.fault() if process.main else None)[0]:
            raise _refused(name, source, f"{fault}; give another checkpoint of that run")
        _fill(role, source)
        if source.kind == "lora" and source.teacher not in (teacher.source, teacher.place) and process.main:
            moved = f"{source.folder} is an adapter of {source.teacher}, and goes on {teacher.source} here"
            print(f"fewstep: note: roles.{name}.start_from: {moved}", file=sys.stderr)


@torch.no_grad()
def _fill(role: Role, source: Source) -> None:
    """The weights of a source; an adapter's by this role's own ``alpha / rank``.

    What a source holds beside weights, such as a codebook, is compared: exports may round it.
    """
    own = {n: p.detach() for n, p in role.module.named_parameters() if p.requires_grad}
    constants = {n: value for n, value in role.module.named_buffers() if n in source.sizes}
    _check_sizes(role, {**own, **constants}, source)
    theirs = {n: torch.empty_like(value) for n, value in constants.items()}
    try:
        source.read({**own, **theirs})
    except Exception as error:  # a damaged file raises its reader's own kinds
        raise _refused(role.name, source, f"cannot be read: {_one_line(error)}") from error
    for name, value in constants.items():
        if not torch.allclose(value.float(), theirs[name].float(), rtol=1e-2, atol=1e-3):
            why = f"was trained with other {name} than this teacher's; expected a student of this teacher"
            raise _refused(role.name, source, why)
    ratio = source.strength / (role.config.alpha / role.config.rank)
    for name, weight in own.items():
        if ".lora_B." in name and ratio != 1:
            weight.mul_(ratio)


def _check_sizes(role: Role, tensors: Mapping[str, Tensor], source: Source) -> None:
    own = {name: tensor.shape for name, tensor in tensors.items()}
    odd = sorted(name for name in own | source.sizes if own.get(name) != source.sizes.get(name))
    if not odd:
        return
    holds, expected = (
        "holds other weights than this role trains",
        "a network of the same architecture and size",
    )
    missing, other = own.keys() - source.sizes.keys(), own.keys() ^ source.sizes.keys()
    if told := [name for name in missing if "_embedding.embedder." in name]:
        odd, expected = (
            sorted(told),
            "the run of that student, whose export lacks what it was told beside its time",
        )
    elif other and all(".lora_" in name for name in other):
        odd = sorted({name.split(".lora_")[0] for name in other})
        holds, expected = f"adapts other layers than roles.{role.name}.targets", "those of that run"
    raise _refused(role.name, source, f"{holds}, e.g. {', '.join(odd[:2])}; expected {expected}")
