"""What six recipes take on cards of 16 to 80 GB, and the options with which they fit: counted on one core.

    python eval/cards.py                     # all of them, about half an hour
    python eval/cards.py sdxl_dmd2_4step     # those that have changed

A file per recipe and a table of all of them go to eval/results/cards/. Nothing is downloaded and nothing is measured.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from fewstep import recipe as recipes
from fewstep.errors import FewstepError, tell
from fewstep.files import SHARED, check_own, check_writable, write, write_json
from fewstep.runs.library import load_recipe

RESULTS = Path(__file__).parent / "results" / "cards"
TITLE = "# What fits which card"
CARDS = ("rtx4080-16gb", "rtx4090-24gb", "l40s-48gb", "h100-80gb")
RECIPES = (
    *("sdxl_dmd2_4step", "flux_dmd2_4step", "qwen_image_dmd2_4step"),
    *("z_image_dmd2_4step", "sana_sprint", "sd35_dmd2_4step"),
)


def counted(name: str) -> dict[str, Any]:
    """Of a recipe on one card of each kind, by `fewstep plan`, with the seconds that it took of one core."""
    from fewstep.cost import proposals

    recipe = load_recipe(name)
    shard = ["--train.shard=1"] if recipe.train.shard > 1 else []
    begin = time.process_time()
    found = proposals(recipes.override(recipe, shard), CARDS, quiet=False)
    seconds = time.process_time() - begin
    cards: dict[str, Any] = {}
    for gpu, (words, plan) in found.items():
        size = recipes.override(recipe, words).train.batch_size
        cards[gpu] = {
            "options": [*shard, *words],
            "batch_size": size,
            "held_gb": round(plan.held / 1e9, 2),
            "iteration_gb": round(max(plan.iteration(size), plan.preview) / 1e9, 2),
            "total_gb": round(plan.total(size) / 1e9, 2),
        }
    return {
        "how": "counted by fewstep plan, not measured",
        "command": f"python eval/cards.py {name}",
        "recipe": recipes.digest(recipe),
        "seconds": round(seconds, 1),
        "cards": cards,
    }


def table(folder: Path) -> str:
    """All files of a folder as Markdown."""
    from fewstep.cost import GPUS

    lines = [
        TITLE,
        "",
        "Counted by `fewstep plan RECIPE --gpu CARD`, not measured; made by `python eval/cards.py`. GB are of a whole",
        "run on one card, and in the head what the card has; then the first options that fit, to add to the",
        "recipe. Each cell's options run in `--smoke` (`tests/cost/test_cards.py`).",
        "",
        "| recipe | " + " | ".join(f"{gpu}, {GPUS[gpu].memory / 1e9:.1f} GB" for gpu in CARDS) + " |",
        "| --- |" + " --- |" * len(CARDS),
    ]
    for name in (name for name in RECIPES if (folder / f"{name}.json").is_file()):
        cards = json.loads((folder / f"{name}.json").read_text())["cards"]
        cells = []
        for gpu in CARDS:
            one = cards.get(gpu)
            options = "<br>".join(f"`{word}`" for word in one["options"]) if one else ""
            cells.append(f"{one['total_gb']:.1f}<br>{options or 'as it is'}" if one else "nothing fits")
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipes", nargs="*", metavar="RECIPE")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    check_writable(args.out, "--out", record=SHARED)
    check_own(args.out / "README.md", TITLE, "--out")
    for name in args.recipes or RECIPES:
        write_json(args.out / f"{name}.json", result := counted(name))
        write(args.out / "README.md", table(args.out))
        print(f"{name}: {', '.join(result['cards']) or 'nothing fits'}, {result['seconds']} s", flush=True)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except FewstepError as error:
        sys.exit(tell(error))
