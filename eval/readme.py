"""Writes the README's table of results from the files of results: `python eval/readme.py`.

Which rows it shows stands in the README itself, in a comment of the heading. They are those of
`results/leaderboard.json`, if it has numbers for all of them, else of the recipes' own files; never of both, for these
measure differently.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

from fewstep.evaluation.gallery import best
from fewstep.files import write
from fewstep.leaderboard import render

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "eval" / "results"
SECTION = re.compile(r"(^## [^\n]*<!-- best (.*?) -->\n\n).*?(?=^## )", re.MULTILINE | re.DOTALL)
OLD = (
    "FD: of EfficientNet-Lite0's features (no FID), 500 drawings of kinds of emoji, the same prompts and noise in "
    "every row. Floor: the untrained teacher at as\nmany calls, or the fewest of a guided one. Names found: the "
    'nearest of 1,906 emoji is the one asked for. One core that other work shared, one seed; "39 +" is the run that it '
    "starts from. [All results](docs/results/index.md).\n"
)


def leaderboard(folder: Path = RESULTS) -> dict[str, Any] | None:
    """What is kept of one; None before the first."""
    path = folder / "leaderboard.json"
    return json.loads(path.read_text()) if path.is_file() else None


def recipes_files(folder: Path = RESULTS) -> dict[str, Any]:
    """Results of single recipes, by name."""
    return {
        p.stem: json.loads(p.read_text()) for p in sorted(folder.glob("*.json")) if p.stem != "leaderboard"
    }


def body(chosen: list[str], board: dict[str, Any] | None, files: dict[str, Any]) -> str:
    """The table, and what one has to know to read it."""
    there = {row["name"] for row in board["rows"] if row["metrics"]} if board else set()
    if board is None or {name.partition(":")[0] for name in chosen} - there:
        return f"{best(files, chosen)}\n\n{OLD}"
    measured, budget = board["measured"], board["budget"]
    most = max(row["metrics"]["FD"]["n"] for row in board["rows"] if row["name"] in there)
    seeds = f"{most} seeds for the better half (their spread in brackets)" if most > 1 else "one seed"
    extractor = measured["extractor"].partition("@")[0]
    note = (
        f"Under one budget of {budget['cpu_seconds'] / 60:g} minutes of a core, {seeds}. FD: of {extractor}'s features "
        f"(no FID), {measured['per_kind']} drawings of each kind of emoji against as many real ones, the same prompts "
        "and noise in every row.\nFloor: the untrained teacher at as many calls, or the fewest of a guided one. Names "
        "found: the nearest of all emoji is the one asked for. [All rows](docs/results/leaderboard.md), and "
        "[recipes at their own length](docs/results/index.md), which students of tokens need.\n"
    )
    return f"{render.best(board, chosen)}\n\n{note}"


def filled(text: str, board: dict[str, Any] | None, files: dict[str, Any]) -> str:
    """The README with its table of today's results."""
    return SECTION.sub(lambda found: f"{found[1]}{body(found[2].split(), board, files)}\n", text)


def main() -> int:
    path = ROOT / "README.md"
    write(path, filled(path.read_text(), leaderboard(), recipes_files()))
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
