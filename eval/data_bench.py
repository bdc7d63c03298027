"""How many rows a second a thread has of each source of data, beside the library that reads it, and what a step costs.

    python eval/data_bench.py --images 400 --out eval/results/data_bench/cpu.json

Pictures are JPEGs of 512 pixels made here, in files, in WebDataset shards, in Parquet and as ``datasets`` saves them.
*Rows*: records in random order, decoded and cropped to 256 pixels by fewstep, and by the library alone with the same
crop: Pillow on a file, ``tarfile`` at a member's place, ``datasets`` with its own decoding; rows of a store of latents,
and slices of its safetensors. Both take turns, and the ratio is the median over rounds. *Steps*: ``fewstep bench`` of a
recipe of small networks beside a bare loop of the same calls, the encoders' among them: prompts and images in a cache,
and encoded beside training from each source, its pictures the emoji, as large as the recipe wants them.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from fewstep.bounds import Count
from fewstep.cli.commands import number
from fewstep.data import emoji
from fewstep.data.images import load_images
from fewstep.data.store import SHARD, Store, shard_path
from fewstep.errors import FewstepError, tell
from fewstep.files import check_writable, write_json, write_tensors
from fewstep.runs.summary import versions

SIDE, SIZE, ROUNDS = 512, 256, 5
KINDS = ("files", "shards", "parquet", "saved")
RECIPE = "emoji_dmd2_4step"  # prompts, images and captions
STEP = ["--train.batch_size=16", "--train.accumulate=1"]
Row = tuple[bytes, str]


def emojis() -> Iterator[Row]:
    """The recipe's own pictures and captions."""
    for pixels, text in zip(emoji.load()[0], emoji.prompts("builtin:emoji") or ()):
        out = io.BytesIO()
        Image.fromarray(pixels).save(out, "PNG")
        yield out.getvalue(), text


def pictures(count: int) -> Iterator[Row]:
    """JPEGs of smooth noise and their captions."""
    rng = np.random.default_rng(0)
    for i in range(count):
        small = Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8))
        out = io.BytesIO()
        small.resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(out, "JPEG", quality=92)
        yield out.getvalue(), f"pattern number {i}"


def write_files(folder: Path, rows: list[Row]) -> None:
    folder.mkdir(parents=True)
    for i, (data, text) in enumerate(rows):
        (folder / f"{i:06d}.jpg").write_bytes(data)
        (folder / f"{i:06d}.txt").write_text(text)


def write_shards(folder: Path, rows: list[Row]) -> None:
    folder.mkdir(parents=True)
    for first in range(0, len(rows), 100):
        with tarfile.open(folder / f"{first:06d}.tar", "w") as tar:
            for i, (data, text) in enumerate(rows[first : first + 100], first):
                for suffix, part in (("jpg", data), ("txt", text.encode())):
                    member = tarfile.TarInfo(f"{i:06d}.{suffix}")
                    member.size = len(part)
                    tar.addfile(member, io.BytesIO(part))


def write_tables(folder: Path, rows: list[Row], parquet: bool) -> None:
    import datasets

    columns = {"image": [{"bytes": data, "path": None} for data, _ in rows], "text": [t for _, t in rows]}
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    table = datasets.Dataset.from_dict(columns, features=features)
    datasets.disable_progress_bars()
    if not parquet:
        table.save_to_disk(str(folder))
        return
    folder.mkdir(parents=True)
    table.to_parquet(str(folder / "rows.parquet"))


def make(folder: Path, rows: list[Row]) -> dict[str, Path]:
    places = {kind: folder / kind for kind in KINDS}
    write_files(places["files"], rows)
    write_shards(places["shards"], rows)
    write_tables(places["parquet"], rows, True)
    write_tables(places["saved"], rows, False)
    return places


def crop(image: Image.Image) -> np.ndarray:
    return np.asarray(ImageOps.fit(image.convert("RGB"), (SIZE, SIZE), Image.Resampling.LANCZOS))


def library(kind: str, place: Path) -> Callable[[int], np.ndarray]:
    """Reads one record as a short program with the library alone would."""
    if kind == "files":
        files = sorted(place.glob("*.jpg"))
        return lambda i: crop(Image.open(files[i]))
    if kind == "shards":
        tars = [tarfile.open(path) for path in sorted(place.glob("*.tar"))]  # noqa: SIM115
        members = [(tar, m) for tar in tars for m in tar.getmembers() if m.name.endswith("jpg")]
        return lambda i: crop(Image.open(members[i][0].extractfile(members[i][1])))
    import datasets

    if kind == "saved":
        table = datasets.load_from_disk(str(place))
    else:
        table = datasets.Dataset.from_parquet(
            str(place / "rows.parquet"), cache_dir=str(place.parent / "arrow")
        )
    return lambda i: crop(table[i]["image"])


def rates(ours: Callable[[int], Any], theirs: Callable[[int], Any], rows: list[int]) -> dict[str, float]:
    """Calls a second of both, in turn over the same rows."""
    took: tuple[list[float], list[float]] = ([], [])
    for turn in range(ROUNDS + 1):
        for seconds, read in zip(took, (ours, theirs)):
            begin = time.perf_counter()
            for row in rows:
                read(row)
            if turn:  # the first has opened the files
                seconds.append(time.perf_counter() - begin)
    return {
        "rows_per_second": round(len(rows) / statistics.median(took[0]), 1),
        "library_rows_per_second": round(len(rows) / statistics.median(took[1]), 1),
        "of_library": round(statistics.median(b / a for a, b in zip(*took)), 3),
    }


def of_store(folder: Path) -> dict[str, float]:
    """Batches of 16 random rows of latents of SDXL, of a store and of its files' slices."""
    from safetensors import safe_open

    count, batch = 2 * SHARD, 16
    for start in range(0, count, SHARD):
        write_tensors(shard_path(folder, start), {"latents": torch.zeros(SHARD, 4, 128, 128)})
    store = Store(folder, count)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    batches = order[: batch * 16].view(-1, batch)
    opened = [safe_open(shard_path(folder, start), "pt") for start in range(0, count, SHARD)]

    def theirs(i: int) -> torch.Tensor:
        places = [divmod(row, SHARD) for row in batches[i].tolist()]
        return torch.cat([opened[shard].get_slice("latents")[at : at + 1] for shard, at in places])

    found = rates(lambda i: store.rows(batches[i]), theirs, list(range(len(batches))))
    return {name: rate if name == "of_library" else round(rate * batch, 1) for name, rate in found.items()}


def reading(folder: Path, count: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    found, rows = {}, torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()
    for kind, place in make(folder / "large", list(pictures(count))).items():
        images = load_images(str(place))
        read = library(kind, place)
        ours = images.sound(rows[0], SIZE)[1]
        if not np.array_equal(ours, read(rows[0])):
            raise FewstepError(f"{kind}: fewstep and the library read two different pictures")
        found[kind] = rates(lambda i, images=images: images.sound(i, SIZE), read, rows)
    found["store of latents"] = of_store(folder / "store")
    return found


def stepping(folder: Path, iterations: int) -> dict[str, Any]:
    """A step beside a bare loop: seconds, ratio, share outside networks."""
    sources = {"cached": ["--data.cache_prompts", "true", "--data.cache_images", "true"]}
    live, places = (
        ["--data.cache_prompts=false", "--data.cache_images=false"],
        make(folder / "small", list(emojis())),
    )
    sources["prompts live"] = ["--data.cache_prompts", "false", "--data.cache_images", "true"]
    sources |= {f"live, {kind}": [*live, "--data.images", str(place)] for kind, place in places.items()}
    found = {}
    for name, words in sources.items():
        out = folder / "step.json"
        told = ["bench", RECIPE, *STEP, *words, "--iterations", str(iterations), "--baseline", "bare"]
        done = subprocess.run(
            [sys.executable, "-m", "fewstep", *told, "--out", str(out)], capture_output=True, text=True
        )
        if done.returncode:
            raise FewstepError(f"{name}: {done.stderr[-500:]}")
        one = json.loads(out.read_text())
        found[name] = {key: one[key] for key in ("seconds_per_iteration", "over_bare", "outside")}
        print(name, found[name], flush=True)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=number(Count), default=400)
    parser.add_argument("--iterations", type=number(Count), default=40, help="of each bench (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("data_bench.json"), help="default: %(default)s")
    args = parser.parse_args()
    check_writable(args.out, "--out", (".json",))
    with tempfile.TemporaryDirectory() as place:
        rows = reading(Path(place), args.images)
        print(json.dumps(rows, indent=1), flush=True)
        steps = stepping(Path(place), args.iterations)
    record = {
        "command": f"python eval/data_bench.py --images {args.images} --iterations {args.iterations}",
        "versions": versions(),
        "picture": f"JPEG of {SIDE} pixels, cropped to {SIZE}; one thread",
        "reading": rows,
        "recipe": " ".join([RECIPE, *STEP]),
        "steps": steps,
    }
    write_json(args.out, record)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except FewstepError as error:
        sys.exit(tell(error))
