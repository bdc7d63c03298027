"""Pairs of a teacher's noise and the sample it makes of it: what regression losses learn from.

    pairs.json            teacher, the hash of its network, its law, guidance, solver, steps, seed, count
    prompts.txt           prompt of each pair, one per line
    000000000.safetensors noise and x0 of the first rows, or their tokens, and so on

Making them can be interrupted at any time and goes on where it stopped; several processes take turns with the files.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..diffusion.cond import Cond
from ..diffusion.rng import Rng
from ..errors import FewstepError, RecipeError
from ..files import Need, check_room, sweep, write, write_json, write_tensors
from ..process import Process
from ..report.bar import Bar
from ..teachers.base import Teacher
from ..teachers.fingerprint import of_file, of_network
from ..teachers.origin import lora_file
from .cache import encode_prompts, identity, is_whole, need_of_prompts
from .places import PLACE
from .store import Store, rows_to_make, shard_path

SHARD = 256  # rows of one file
OWN = ("num", "solver", "steps", "seed")  # of what is recorded, what a run need not share


class Pairs:
    """Pairs on disk; prompts[i] is the prompt of pair i."""

    def __init__(self, folder: Path):
        self.about = json.loads((folder / "pairs.json").read_text())
        # As they were written: other ends of lines than ours may stand in a prompt.
        text = (folder / "prompts.txt").read_bytes().decode()
        self.prompts = text.removesuffix("\n").split("\n")
        remedy = "put it back, or run fewstep pairs again, then go on with fewstep resume"
        self.store = Store(folder, self.about["num"], SHARD, remedy)

    def __len__(self) -> int:
        return len(self.store)

    def rows(self, index: Tensor) -> dict[str, Tensor]:
        """(k,) numbers of pairs -> ``noise`` and ``x0`` or ``tokens`` (int64), k rows each."""
        rows = self.store.rows(index)
        if "tokens" in rows:
            rows["tokens"] = rows["tokens"].long()
            rows["noise"] = noise_of(self.about["seed"], index.tolist(), self.about["latent_shape"])
        return rows


def noise_of(seed: int, rows: Iterable[int], shape: Sequence[int]) -> Tensor:
    """The noise of pairs, a function of the seed and their numbers: (k, *shape)."""
    return torch.stack([Rng(seed, "pair", i).normal(*shape) for i in rows])


def load_pairs(source: str | None, recipe_name: str = "RECIPE") -> Pairs:
    """Raises RecipeError, naming the command that makes them, where they are missing or unfinished."""
    remedy = f"make them with: fewstep pairs {recipe_name} --out {source or 'PAIRS'}"
    if source is None:
        raise RecipeError(
            f"data.pairs: missing; this configuration learns from pairs of the teacher; {remedy}"
        )
    folder = Path(source).expanduser()
    if not (folder / "pairs.json").is_file():
        raise RecipeError(f"data.pairs: {source} holds no pairs (no pairs.json in it); {remedy}")
    try:
        about = json.loads((folder / "pairs.json").read_text())
        missing = [s for s in range(0, about["num"], SHARD) if not shard_path(folder, s).is_file()]
        if missing:
            raise RecipeError(
                f"data.pairs: {source} is unfinished, {len(missing)} of {-(-about['num'] // SHARD)} files are missing; "
                "run the command that makes them again"
            )
        return Pairs(folder)
    except RecipeError:
        raise
    except Exception as error:  # damaged JSON or safetensors: each raises its own kind
        raise RecipeError(f"data.pairs: {source} is damaged: {error}; {remedy}") from error


def made_by(teacher: Teacher, guidance: float) -> dict[str, Any]:
    """What pairs have to agree on with the run that learns from them."""
    return {
        "teacher": identity(teacher)[0],
        "guidance_scale": guidance,
        "latent_shape": list(teacher.latent_shape),
        "network": of_network(teacher.net),
        **_merged(teacher),
        **teacher.law,
    }


def _merged(teacher: Teacher) -> dict[str, Any]:
    """LoRAs in the teacher, which may be of its text encoders alone."""
    loras = [f"{of_file(lora_file(one.path))} x {one.weight:g}" for one in teacher.origin.loras]
    return {"loras": loras} if loras else {}


def check_pairs(pairs: Pairs, teacher: Teacher, guidance: float, quiet: bool = False) -> None:
    """Refuses pairs of another teacher, network, law of sampling, guidance or size: the student would learn two
    different things. Of pairs from before one of these was recorded it is said that they do not tell."""
    expected, unknown = made_by(teacher, guidance), []
    for name, value in expected.items():
        if name not in pairs.about:
            unknown.append(name)
        elif pairs.about[name] != value:
            raise RecipeError(
                f"data.pairs: made with {name} {pairs.about[name]!r}, but this run has {value!r}; make them again with "
                "fewstep pairs, or give this run the teacher and the guidance that they were made with"
            )
    extra = [name for name in pairs.about if name not in expected and name not in OWN]
    if extra:
        raise RecipeError(
            f"data.pairs: made with {extra[0]} {pairs.about[extra[0]]!r}, and this run's teacher has none; make them "
            "again with fewstep pairs"
        )
    if unknown and not quiet:
        print(
            f"fewstep: note: data.pairs: {pairs.store.folder} was made before {', '.join(unknown)} was recorded, so "
            "that only you know whether it is of this teacher as it is now",
            file=sys.stderr,
        )


def make_pairs(
    folder: Path,
    teacher: Teacher,
    prompts: list[str],
    *,
    num: int,
    solver: str | None = None,
    steps: int | None = None,
    guidance: float = 1.0,
    seed: int = 0,
    batch_size: int = 32,
    process: Process | None = None,
) -> Path:
    """Writes ``num`` pairs; pair i is the same whatever the batch size, the number of processes or interruptions.

    Args:
        solver, steps: deterministic, one of those the teacher takes; default its own. guidance: as the student's run
            has it.

    Raises:
        FewstepError: the folder holds pairs made otherwise.
    """
    if teacher.edits:
        raise FewstepError(
            f"pairs: {teacher.source} edits images, and pairs keep no references; choose a method that needs no pairs"
        )
    process = process or Process()
    solver, steps = solver or teacher.solver[0], steps or teacher.solver[1]
    name, make = teacher.pair_maker(solver, steps, guidance)
    about = {"num": num, **made_by(teacher, guidance), "solver": solver, "steps": steps, "seed": seed}
    order = Rng(seed, "pairs").permutation(len(prompts)).tolist()
    chosen = [prompts[order[i % len(order)]].replace("\n", " ") for i in range(num)]
    _check_room(folder, teacher, chosen)
    if process.main:
        sweep(folder)
        _claim(folder, about, chosen)
    process.barrier()
    conditions = encode_prompts(teacher, chosen, quiet=not process.main)
    teacher.drop_encoders()
    starts = list(range(0, num, SHARD))[process.rank :: process.world]
    missing = [start for start in starts if not is_whole(shard_path(folder, start))]
    with Bar("making", len(missing) * SHARD, "pairs", quiet=not process.main) as bar:
        for start in missing:
            rows = range(start, min(start + SHARD, num))
            noise = noise_of(seed, rows, teacher.latent_shape)
            made = []
            for part in torch.arange(rows.start, rows.stop).split(batch_size):
                x, cond = noise[part - start].to(teacher.device), Cond(conditions.rows(part))
                made.append(make(x, cond.to(teacher.device)).cpu())
                bar.update(len(part))
            # The noise of tokens is many times as large as they are, and a function of the seed.
            kept = {} if name == "tokens" else {"noise": noise}
            write_tensors(shard_path(folder, start), {**kept, name: torch.cat(made)})
    process.barrier()
    return folder


def _check_room(folder: Path, teacher: Teacher, prompts: list[str]) -> None:
    size = len(rows_to_make(folder, len(prompts), SHARD)) * teacher.pair_bytes
    conditions = need_of_prompts(teacher, prompts, "their prompts")
    remedy = f"lower --num, give another --out, or set {PLACE} to another disk"
    check_room([Need("pairs", "--out", folder, size), conditions], remedy)


def _claim(folder: Path, about: dict[str, Any], prompts: list[str]) -> None:
    text = "".join(prompt + "\n" for prompt in prompts)
    path = folder / "pairs.json"
    if path.is_file():
        found = json.loads(path.read_text())
        if found != about or (folder / "prompts.txt").read_bytes() != text.encode():
            odd = [k for k in (*about, *found) if found.get(k) != about.get(k)] or ["prompts"]
            raise FewstepError(
                f"{folder}: holds pairs of another kind: {odd[0]} is {found.get(odd[0])!r}, not {about.get(odd[0])!r}; "
                "give another --out"
            )
        return
    if folder.exists() and any(folder.iterdir()):
        raise FewstepError(f"{folder}: is not empty and holds no pairs; give another --out")
    write(folder / "prompts.txt", text)
    write_json(path, about)
