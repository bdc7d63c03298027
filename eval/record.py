"""Keeps what a run of a shipped recipe measured: `python eval/record.py RUN [--hardware TEXT] [--note TEXT ...]`.

Writes ``eval/results/RECIPE.json`` from the run's ``eval/table.json`` and ``run.json``. Rows of the teacher and of the
floor that this run did not make stay as the file has them, if prompts and numbers of images are the same.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from fewstep.errors import FewstepError, RecipeError, tell
from fewstep.files import write
from fewstep.recipe import digest
from fewstep.runs.library import load_recipe

RESULTS = Path(__file__).parent / "results"
RUN = ("teacher", "versions", "seconds", "steps")
MEASURED = ("schema", "prompts", "images", "named")
SPEED = ("nfe", "seconds", "seconds_error", "batch")
METRIC = ("value", "error", "n_fake")
OF_A_RUN = "same-noise distance"  # says nothing beside other students


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--hardware", help="in words (default: what the run says)")
    parser.add_argument(
        "--note", action="append", default=[], help="may be repeated; replaces the file's notes"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the file")
    options = parser.parse_args(arguments)
    try:
        print(record(options.run, options.out, options.hardware, options.note))
    except FewstepError as error:
        return tell(error)
    return 0


def record(run: Path, out: Path, hardware: str | None, notes: list[str]) -> Path:
    """Path of the result file of ``run``.

    Raises:
        RecipeError: the run has no evaluation, or other prompts than the rows it would stand beside.
    """
    for name in ("run.json", "eval/table.json"):
        if not (run / name).is_file():
            raise RecipeError(f"{run}: has no {name}; expected a finished run with an evaluation")
    made, table = (json.loads((run / name).read_text()) for name in ("run.json", "eval/table.json"))
    path = out / f"{made['name']}.json"
    old = json.loads(path.read_text()) if path.is_file() else {}
    rows = [_row(row) for row in table["rows"]]
    kept = [
        row for row in old.get("rows", []) if row["kind"] != "student" and _name(row) not in map(_name, rows)
    ]
    unlike = [key for key in MEASURED if kept and old[key] != table[key]]
    if unlike:
        raise RecipeError(
            f"{path}: rows of {', '.join(unlike)} {old[unlike[0]]}, the run has {table[unlike[0]]}"
        )
    recipe = load_recipe(made["name"])
    before = {Path(role.start_from).name for role in recipe.roles.values() if role.start_from}
    result = {
        **{key: table[key] for key in MEASURED},
        **{key: made[key] for key in RUN},
        "command": f"fewstep train {made['name']}",
        "hardware": hardware or made["hardware"],
        **({"starts_from": sorted(before)} if before else {}),
        "recipe": digest(recipe),
        "notes": notes or old.get("notes", []),
        "rows": [*kept, *rows],
    }
    write(path, json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    return path


def _name(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["name"], row.get("solver"), row.get("steps")


def _row(row: dict[str, Any]) -> dict[str, Any]:
    """What outlives the run: no paths, no versions of an error's definition."""
    kept = {
        key: row[key] for key in ("name", "kind", "solver", "steps", "speed-up") if row.get(key) is not None
    }
    if speed := row.get("speed"):
        kept["speed"] = {key: speed[key] for key in SPEED if key in speed}
    metrics = {name: m for name, m in row["metrics"].items() if not name.startswith(OF_A_RUN)}
    kept["metrics"] = {name: {key: m[key] for key in METRIC if key in m} for name, m in metrics.items()}
    return kept


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
