"""What every recipe takes, counted on one core: memory beside the hardware that it names, hours, caches on disk.

    python eval/plans.py                                  # all of them, about 20 minutes
    python eval/plans.py sdxl_dmd2_4step sd3_sana_sprint  # those that have changed

A file per recipe and a table of all of them go to eval/results/plans/. Nothing is downloaded and nothing is measured.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from fewstep import recipe as recipes
from fewstep.errors import FewstepError, tell
from fewstep.files import SHARED, check_own, check_writable, write, write_json
from fewstep.runs.library import load_recipe, recipe_files

RESULTS = Path(__file__).parent / "results" / "plans"
TITLE = "# What recipes take"
CARDS = {"H100, 80 GB": "h100-80gb", "RTX 4090, 24 GB": "rtx4090-24gb"}
NAMED = re.compile(rf"Hardware: (?:(one|eight) ({'|'.join(CARDS)})|two CPU cores, (\d+) GB of memory)")


class Hardware(NamedTuple):
    """What the docstring of a recipe names."""

    words: str
    gpu: str | None  # as `fewstep plan` calls it; None is a CPU
    gigabytes: float


def hardware(path: Path) -> Hardware:
    """Of a recipe's script.

    Raises:
        ValueError: its docstring names none.
    """
    text = " ".join((ast.get_docstring(ast.parse(path.read_text())) or "").split())
    found = NAMED.search(text)
    if found is None:
        raise ValueError(f"{path}: its docstring names no hardware; expected {NAMED.pattern}")
    from fewstep.cost import GPUS

    if found[3]:
        return Hardware("two cores", None, float(found[3]))
    count, gpu = {"one": 1, "eight": 8}[found[1]], CARDS[found[2]]
    return Hardware(f"{count} {found[2].partition(',')[0]}", gpu, GPUS[gpu].memory / 1e9)


def planned(name: str) -> dict[str, Any]:
    """The plan of a recipe as it stands, beside its hardware, with the seconds that it took of one core."""
    from fewstep.cost import plan

    recipe, room = load_recipe(name), hardware(recipe_files()[name])
    processes = recipe.train.shard
    begin = time.process_time()
    made = plan(recipe, processes, quiet=False)
    seconds = time.process_time() - begin
    words = f" --processes {processes}" if processes > 1 else ""
    return {
        "command": f"fewstep plan {name}{words} --json",
        "recipe": recipes.digest(recipe),
        "hardware": room.words,
        "hardware_gb": round(room.gigabytes, 1),
        "seconds": round(seconds, 1),
        **made.to_dict(room.gpu or CARDS["H100, 80 GB"]),
    }


def table(folder: Path) -> str:
    """All files of a folder as Markdown."""
    lines = [
        TITLE,
        "",
        "Counted by `fewstep plan RECIPE`, not measured; made by `python eval/plans.py`. GB are of one device: what it",
        "holds through the run, what an iteration takes beyond at the recipe's micro-batch, and all of it with what",
        "libraries and fragments are assumed to take. Hours are those of the recipe's steps on the card it names, at",
        "40% of the data sheet's rate of each kind of arithmetic. The last column is what the plan itself took.",
        "",
        "| recipe | hardware | held GB | iteration GB | total GB | micro-batch | largest | hours | cached, kB a row | "
        "seconds of one core |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for path in sorted(folder.glob("*.json")):
        r = json.loads(path.read_text())
        cache = ", ".join(f"{name} {store['bytes_each'] / 1e3:.1f}" for name, store in r["cache"].items())
        gpu = not r["hardware"].endswith("cores")
        largest, hours = (str(r["largest_batch"]), f"{r['hours']:.1f}") if gpu else ("", "")
        lines.append(
            f"| {path.stem} | {r['hardware']} | {r['held_gb']:.2f} | {r['iteration_gb']:.2f} | {r['total_gb']:.2f} | "
            f"{r['batch_size']} | {largest} | {hours} | {cache} | {r['seconds']:.0f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipes", nargs="*", metavar="RECIPE")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    check_writable(args.out, "--out", record=SHARED)
    check_own(args.out / "README.md", TITLE, "--out")
    for name in args.recipes or recipe_files():
        result = planned(name)
        write_json(args.out / f"{name}.json", result)
        write(args.out / "README.md", table(args.out))
        fits = "fits" if result["total_gb"] <= result["hardware_gb"] else "DOES NOT FIT"
        print(
            f"{name}: {result['total_gb']:.1f} GB, {fits} {result['hardware']}, {result['seconds']} s",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except FewstepError as error:
        sys.exit(tell(error))
