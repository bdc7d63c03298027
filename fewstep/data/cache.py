"""Prompts and images encoded once: sharded safetensors that any later run with the same inputs finds again.

A store is a folder named by the hash of everything that decides its content. A shard is there whole
or not at all, so an interrupted encoding goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..diffusion.cond import Cond
from ..diffusion.rng import Rng
from ..files import Need, sweep, write_json, write_tensors
from ..process import Process
from ..report.bar import Bar
from ..shape import Shape
from ..teachers.base import Teacher
from ..teachers.lengths import token_counts, too_long, unsaid
from ..teachers.origin import lora_file
from ..teachers.references import check_references, identity_of
from . import store
from .images import CaptionedImages, size_at
from .left_out import FILE
from .places import PLACE, cache_root
from .shards import Members
from .store import Store, joined, rows_to_make, shard_path, without_padding

BATCH = 32  # prompts that are encoded at a time
TOLD_BY = 20_000  # prompts by whose lengths the space of more is told
LAYOUT = "without padding"  # of stored prompts; those of another are not read


def encode_prompts(
    teacher: Teacher,
    prompts: Sequence[str],
    batch_size: int = BATCH,
    quiet: bool = False,
    process: Process | None = None,
) -> Store:
    """Conditions of all prompts, as a store with one row per prompt; each process encodes its share of the files."""
    check_references(teacher, prompts)

    def encode(start: int, stop: int) -> Iterator[dict[str, Tensor]]:
        for i in range(start, stop, batch_size):
            with unsaid():
                yield without_padding(stored(teacher.encode(prompts[i : min(i + batch_size, stop)]), teacher))

    folder = prompts_folder(teacher, prompts)
    if not quiet and rows_to_make(folder, len(prompts)) and (cut := too_long(teacher.pipe, prompts)):
        print(f"fewstep: note: {cut}", file=sys.stderr)
    return _store(folder, len(prompts), encode, quiet, process or Process())


def stored(cond: Cond, teacher: Teacher) -> dict[str, Tensor]:
    """Conditions as they are kept: floating-point parts in the dtype of the frozen network."""
    dtype = teacher.net.dtype
    return {n: v.to("cpu", dtype if v.is_floating_point() else v.dtype) for n, v in cond.tensors.items()}


def prompts_folder(teacher: Teacher, prompts: Sequence[str]) -> Path:
    """Where the store of these prompts is, or will be."""
    return _folder(
        "prompts", ["prompts", LAYOUT, identity(teacher), teacher.resolution, list(map(identity_of, prompts))]
    )


def encode_images(
    teacher: Teacher,
    images: CaptionedImages,
    batch_size: int = 16,
    quiet: bool = False,
    process: Process | None = None,
) -> Store:
    """Scaled latents of all images at the teacher's resolution; one fixed draw of the VAE's posterior each.

    Each process encodes its share of the files, and knows in the end what others have left out.

    What a row holds is the image that its ``row`` says: another one where its own is of no use.
    """
    folder = images_folder(teacher, images)
    images.left_out.keep(folder / FILE)

    def encode(start: int, stop: int) -> Iterator[dict[str, Tensor]]:
        for i in range(start, stop, batch_size):
            found = [images.sound(j, teacher.resolution) for j in range(i, min(i + batch_size, stop))]
            pixels = [torch.tensor(image) for _, image in found]
            generator = torch.Generator().manual_seed(i)  # of the CPU: the same draw on every device
            yield {
                "latents": teacher.latents(torch.stack(pixels), generator).to("cpu", torch.float32),
                "row": torch.tensor([row for row, _ in found]),
            }

    found = _store(folder, len(images), encode, quiet, process or Process())
    images.left_out.keep(folder / FILE)
    return found


def images_folder(teacher: Teacher, images: CaptionedImages) -> Path:
    """Where the store of these images is, or will be."""
    key: list[Any] = [
        "images, rows",
        identity(teacher),
        teacher.resolution,
        _fingerprint(images),
        len(images),
        images.upscale,
    ]
    if images.of is not None:
        key.append(hashlib.sha256(images.of.numpy().tobytes()).hexdigest())
    if teacher.autoencoder == "vae":  # what was kept under another rule of scaling is not taken for this one
        key.append([torch.as_tensor(value).flatten().tolist() for value in teacher.latent_scale()])
    return _folder("latents", key)


def sizes_of(images: CaptionedImages) -> list[Shape | None]:
    """How large each image is, by the headers of their files, which are read once and kept; None where there is none.
    Of shards the index knows it."""
    if "sizes" not in images.known:
        images.known["sizes"] = _sizes_of(images)
    found: list[Shape | None] = images.known["sizes"]
    return found


def _sizes_of(images: CaptionedImages) -> list[Shape | None]:
    every = range(len(images.files))
    if isinstance(images.files, np.ndarray):
        return [Shape(*images.files.shape[1:3])] * len(every)
    if isinstance(images.files, Members):
        return [shape and Shape(*shape) for shape in images.files.shapes]
    path = _folder("sizes", [_fingerprint(images), len(every)]) / "sizes.json"
    try:
        return [one and Shape(*one) for one in json.loads(path.read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError):
        pass
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = list(pool.map(lambda i: size_at(images, i), every))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, found)
    return found


def _folder(kind: str, key: list[Any]) -> Path:
    return cache_root() / f"{kind}-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:20]}"


def need_of_prompts(teacher: Teacher, prompts: Sequence[str], what: str) -> Need:
    """Bytes that :func:`encode_prompts` will write for these, at most; of very many by a part of them."""
    folder = prompts_folder(teacher, prompts)
    missing = [prompts[row] for row in rows_to_make(folder, len(prompts))]
    some = some_of(missing)
    size = _prompt_bytes(teacher, some) * len(missing) // len(some) if some else 0
    return Need(what, PLACE, folder, size)


def some_of(prompts: Sequence[str]) -> Sequence[str]:
    """All of them, or of very many a part that tells of the rest."""
    if len(prompts) <= TOLD_BY:
        return prompts
    return [prompts[i] for i in Rng(0, "some").permutation(len(prompts))[:TOLD_BY].tolist()]


def _prompt_bytes(teacher: Teacher, prompts: Sequence[str]) -> int:
    """What these take on disk at most: what the shortest does, and a token's room for each that another has more."""
    counts = token_counts(teacher.pipe, prompts)
    shortest = min(range(len(prompts)), key=counts.__getitem__) if counts else 0
    with unsaid():
        row = stored(teacher.encode([prompts[shortest]]), teacher)
    found = joined([without_padding(row)])
    short = [name for name in found if name.endswith(store.KEPT)]
    most = _bytes(row) + sum(found[name].nbytes for name in short)
    each = sum(row[name.removesuffix(store.KEPT)][0, 0].nbytes for name in short)
    if counts is None:
        return len(prompts) * most
    return sum(min(most, _bytes(found) + (count - counts[shortest]) * each) for count in counts)


def condition_bytes(teacher: Teacher, prompts: Sequence[str]) -> int:
    """What one encoded prompt takes on disk at most, with all of its padding."""
    with unsaid():
        return _bytes(stored(teacher.encode(prompts[:1]), teacher))


def _bytes(row: Mapping[str, Tensor]) -> int:
    return sum(value.nbytes for value in row.values())


def latent_bytes(teacher: Teacher) -> int:
    """What one encoded image takes on disk, in fp32, with the number of its row."""
    return 4 * torch.Size(teacher.latent_shape).numel() + 8


def identity(teacher: Teacher) -> list[str]:
    """What tells one teacher from another: its source, the size and time of every file, and what is merged into it."""
    from ..teachers import resolve

    origin = teacher.origin.placed()
    stats = _stats(Path(resolve(teacher.source)))
    if origin.variant:
        stats.append(f"variant:{origin.variant}")
    if origin.config:
        stats += [f"config:{origin.config}", *_stats(Path(origin.config))]
    loras = [f"lora:{_stat(lora_file(one.path))}:{one.weight}" for one in origin.loras]
    return [teacher.source, *stats, *loras]


def _stats(place: Path) -> list[str]:
    """Of a file, or of every file in a folder; of the hub nothing."""
    if place.is_file():
        return [f"{place.name}:{_stat(place)}"]
    return [f"{p.relative_to(place)}:{_stat(p)}" for p in sorted(place.rglob("*")) if p.is_file()]


def _stat(path: Path) -> str:
    return f"{path.stat().st_size}:{path.stat().st_mtime_ns}"


def _fingerprint(images: CaptionedImages) -> list[str]:
    if isinstance(images.files, Sequence):
        return [f"{p}:{_stat(p)}" for p in images.on_disk()]
    return [hashlib.sha256(images.files.tobytes()).hexdigest()]


def _store(
    folder: Path,
    length: int,
    encode: Callable[[int, int], Iterator[dict[str, Tensor]]],
    quiet: bool,
    process: Process,
) -> Store:
    kind = folder.name.partition("-")[0]
    folder.mkdir(parents=True, exist_ok=True)
    sweep(folder)
    every = range(0, length, store.SHARD)
    # What others have encoded is on this disk, unless nodes have disks of their own.
    for starts in (every[process.rank :: process.world], every):
        missing = [start for start in starts if not is_whole(shard_path(folder, start))]
        rows = [range(start, min(start + store.SHARD, length)) for start in missing]
        with Bar("encoding", sum(map(len, rows)), kind, quiet=quiet) as bar:
            for part in rows:
                write_tensors(shard_path(folder, part.start), joined(list(encode(part.start, part.stop))))
                bar.update(len(part))
        process.barrier()
    return Store(folder, length)


def is_whole(path: Path) -> bool:
    """Whether a shard is there and as long as its header says; a damaged one is named and made again."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt"):
            return True
    except FileNotFoundError:
        return False
    except (OSError, SafetensorError) as error:
        print(f"fewstep: cached file {path} is damaged ({error}); encoding it again", file=sys.stderr)
        return False
