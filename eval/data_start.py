"""How long a run takes to its first step with very many prompts and images, and the host memory that they take.

    python eval/data_start.py --prompts 1000000 --images 100000 --out eval/results/data_start/million.json

Prompts are lines of a file, images small pictures in WebDataset shards, both made here. A tiny SDXL is distilled by
DMD2 with its GAN, prompts and images encoded beside training, once on the large set and once on a set of sixteen; what
the first has more at its peak is what the set takes. Nothing that is measured depends on the weights.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fewstep.bounds import Count
from fewstep.cli.commands import number
from fewstep.errors import FewstepError, tell
from fewstep.files import check_writable, write_json
from fewstep.runs.summary import versions
from fewstep.teachers.tiny import write_tiny_pipeline

SHARD, SIDE = 1000, 40  # images of a shard, and their pixels
OPTIONS = """
--data.cache_prompts false --data.cache_images false --train.steps 3 --train.batch_size 4 --train.accumulate 1
--train.device cpu --train.log_every 1 --train.sample_every 0 --train.checkpoint_every 0 --samples.count 4
--samples.teacher_steps 0 --teacher.resolution null --teacher.dtype float32 --teacher.autocast null --evaluation.num 0
--student.rank 4 --critic.kind lora --critic.rank 4 --export.kohya false
"""


def make(folder: Path, prompts: int, images: int) -> None:
    """``prompts.txt`` and ``images/*.tar``; every text and picture is another one."""
    (folder / "images").mkdir(parents=True)
    with (folder / "prompts.txt").open("w") as file:
        for i in range(prompts):
            file.write(
                f"photograph number {i} of {'a red apple' if i % 2 else 'an owl'} in a field of snow\n"
            )
    rng = np.random.default_rng(0)
    for first in range(0, images, SHARD):
        with tarfile.open(folder / "images" / f"{first:09d}.tar", "w") as file:
            for i in range(first, min(first + SHARD, images)):
                pixels = (
                    rng.integers(0, 256, (5, 5, 3), dtype=np.uint8).repeat(SIDE // 5, 0).repeat(SIDE // 5, 1)
                )
                picture = io.BytesIO()
                Image.fromarray(pixels).save(picture, "PNG")
                for suffix, data in (("png", picture.getvalue()), ("txt", f"pattern {i}".encode())):
                    member = tarfile.TarInfo(f"{i:09d}.{suffix}")
                    member.size = len(data)
                    file.addfile(member, io.BytesIO(data))


def train(data: Path, teacher: Path, run: Path) -> dict[str, float]:
    """Seconds from the command to the log's first line, and GB of memory at the peak."""
    places = [
        "--output",
        run,
        "--teacher",
        teacher,
        "--prompts",
        data / "prompts.txt",
        "--images",
        data / "images",
    ]
    words = ["fewstep", "train", "sdxl_dmd2_4step", *map(str, places), *OPTIONS.split()]
    begin, log, first = time.monotonic(), run / "metrics.jsonl", None
    child = os.spawnv(os.P_NOWAIT, sys.executable, [sys.executable, "-m", *words])
    while True:
        done, status, usage = os.wait4(child, os.WNOHANG)
        if first is None and log.is_file() and log.stat().st_size:
            first = time.monotonic() - begin
        if done:
            break
        time.sleep(0.02)
    if status or first is None:
        raise SystemExit(f"the run in {run} failed")
    return {"seconds_to_first_step": round(first, 1), "peak_gb": round(usage.ru_maxrss / 1e6, 3)}


def measure(prompts: int, images: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        os.environ["FEWSTEP_CACHE"] = str(folder / "cache")
        teacher = write_tiny_pipeline("StableDiffusionXLPipeline", folder / "teacher")
        found: dict[str, Any] = {}
        for name, counts in (("small", (16, 16)), ("large", (prompts, images))):
            make(folder / name, *counts)
            for time_of in ("first", "again"):  # the second start finds where the pictures of each shard lie
                found[f"{name}, {time_of} start"] = train(
                    folder / name, teacher, folder / f"{name}_{time_of}"
                )
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompts", type=number(Count), default=1_000_000)
    parser.add_argument("--images", type=number(Count), default=100_000)
    parser.add_argument("--out", type=Path, default=Path("data_start.json"), help="default: %(default)s")
    args = parser.parse_args()
    check_writable(args.out, "--out", (".json",))
    found = measure(args.prompts, args.images)
    more = found["large, first start"]["peak_gb"] - found["small, first start"]["peak_gb"]
    record = {
        "command": f"python eval/data_start.py --prompts {args.prompts} --images {args.images}",
        "hardware": "two cores of an x86-64 server without a GPU",
        "versions": versions(),
        "seconds": round(sum(run["seconds_to_first_step"] for run in found.values())),
        "runs": found,
        "gb_more_than_the_small_set": round(more, 3),
    }
    write_json(args.out, record)
    print(args.out, record)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except FewstepError as error:
        sys.exit(tell(error))
