"""What a run depends on beside its recipe, as hashes of its content: a run that goes on goes on with the same.

Of a teacher 64 numbers of every tensor are hashed, and its scheduler's configuration; prompts and captions as a whole;
of image files, shards, tables, pairs and a reward's files the size and up to 16 blocks of 4 kB. Of more than 1,024
files of images as many, evenly spread, are read so, and of the others the name and the size count. Where they lie does
not matter, and neither does when they were written: what is moved or copied is the same.
"""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from ..data.images import CaptionedImages
from ..data.pairs import load_pairs
from ..data.prompts import load_prompts
from ..data.texts import column_for
from ..errors import RecipeError
from ..files import sketch, write_json
from ..recipe import Recipe, to_dict
from ..teachers.base import Teacher
from ..teachers.fingerprint import hash_of, of_file, of_tensors
from ..teachers.origin import lora_file
from ..teachers.references import identity_of

FILE = "inputs.json"  # in a run directory
PLACES = "places"  # in it: whole paths and ids of the hub
SKETCHED = 1024  # files of images that are read, at most
LOOSE = (
    "_diffusers_version",
    "_name_or_path",
    "_use_default_values",
)  # of a configuration, which say nothing


def inputs_of(
    recipe: Recipe, teacher: Teacher, prompts: list[str], images: CaptionedImages | None
) -> dict[str, str]:
    """Field of the recipe -> hash of what it names."""
    needs, measured = recipe.method_class.needs(recipe.method), recipe.evaluation.prompts
    found = {}
    if loras := teacher.origin.loras:  # before the teacher, whose weights they change
        found["teacher.loras"] = hash_of(f"{of_file(lora_file(one.path))} {one.weight}" for one in loras)
    found |= {"teacher.path": of_teacher(teacher), "data.prompts": hash_of(map(identity_of, prompts))}
    if images is not None:
        found["data.images"] = _of_images(images)
    if "pairs" in needs and recipe.data.pairs:
        folder = Path(recipe.data.pairs)
        files = (sketch(path) for path in sorted(folder.glob("*.safetensors")))
        found["data.pairs"] = hash_of([*load_pairs(recipe.data.pairs).prompts, *files])
    if measured and recipe.evaluation.num:
        column = column_for(measured, recipe.data.column)
        found["evaluation.prompts"] = hash_of(
            map(identity_of, load_prompts(measured, "evaluation.prompts", column))
        )
    if reward := getattr(recipe.method, "reward", None):
        found["method.reward"] = hash_of(_of_paths(reward.split(":")[1:]))
    return found


def of_teacher(teacher: Teacher) -> str:
    """Of its weights as they are in memory, whatever files they came from and whatever their names there."""
    hashes: list[str] = []
    for part in teacher.pipe.components.values():
        if isinstance(part, nn.Module):
            hashes += of_tensors(part)
    scheduler = getattr(teacher.pipe, "scheduler", None)
    config = {} if scheduler is None else {k: v for k, v in scheduler.config.items() if k not in LOOSE}
    return hash_of([*sorted(hashes), json.dumps(config, sort_keys=True, default=str)])


def _of_images(images: CaptionedImages) -> str:
    if isinstance(images.files, np.ndarray):
        return hash_of(
            [*map(identity_of, images.captions), hashlib.sha256(images.files.tobytes()).hexdigest()]
        )
    places = images.on_disk()
    looked = -(-len(places) // SKETCHED)
    return hash_of(
        [
            *map(identity_of, images.captions),
            *(
                f"{path.name} {path.stat().st_size if i % looked else sketch(path)}"
                for i, path in enumerate(places)
            ),
        ]
    )


def _of_paths(names: Iterable[str]) -> Iterable[str]:
    for name in names:
        path = Path(name)
        files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        yield from (sketch(file) for file in files if file.is_file())


# --------------------------------------------------------------------------------------------------------------- a run
def keep(folder: Path, inputs: Mapping[str, str], teacher: Teacher) -> None:
    """Beside the hashes it is said where the teacher lay, which nothing is compared with."""
    write_json(folder / FILE, {**inputs, PLACES: teacher.origin.record()})


def check_inputs(folder: Path, inputs: Mapping[str, str], recipe: Recipe, meant: Collection[str]) -> None:
    """Refuses to go on with other inputs than a run began with; one from before inputs were kept is taken as it is.

    Args:
        meant: dotted names of the options that were given with the command: who names an input means its change.

    Raises:
        RecipeError: with the field, and the option that goes on all the same.
    """
    try:
        before: Any = json.loads((folder / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    for field, found in inputs.items():
        if found == before.get(field, found) or any(_touches(name, field) for name in meant):
            continue
        part, _, name = field.partition(".")
        value = to_dict(recipe)[part][name]
        value = value if isinstance(value, str) else json.dumps(value)
        raise RecipeError(
            f"{field}: {value}: holds something else than when this run began; put that back, or say that you mean "
            f"it: fewstep resume {folder} --{field} {shlex.quote(value)}"
        )


def _touches(option: str, field: str) -> bool:
    """Whether an option decides what a field holds: itself, or another one of the teacher's or of the data's column."""
    if field.startswith("teacher."):
        return option.startswith("teacher.")
    return option == field or (option == "data.column" and field.startswith(("data.", "evaluation.")))
