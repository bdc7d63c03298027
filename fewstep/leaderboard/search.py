"""The search before a leaderboard: as many trials for every row, all of them kept, and a board with the best of each.

A trial is a short run, a share of the row's iterations, on a seed of its own; it is measured as the board is, with
other noise, other prompts by name and other real images. Trial 0 is the recipe as it is. The others multiply each
field that the board names, and the recipe has, by a factor that is uniform in its logarithm (Bergstra and Bengio 2012).
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from typing import Any

import yaml

from .. import recipe as recipes
from ..diffusion.rng import Rng
from ..errors import FewstepError
from ..files import held, write, write_json
from .board import RECORD, Board, Row, Run, to_dict
from .run import rulers_of
from .summary import BY
from .train import Place, found, train

SEED = 1000  # of trials: their trainings', and of what they are measured by
TRIALS, SETTLED = "trials.jsonl", "settled.yaml"
FILLED = 0.97  # of the budget, for rates vary


def trial_of(board: Board, row: Row, number: int, share: float) -> Row:
    """A row as a trial has it."""
    plain = recipes.to_dict(Run(board, row, board.seeds[0]).recipe)
    options = dict(row.options)
    for name, (low, high) in board.search.items():
        value = _value(plain, name)
        if number and value is not None:
            u = Rng(SEED, row.label, number, name).uniform(1).item()
            new = value * math.exp(math.log(low) + u * math.log(high / low))
            options[name] = round(new) if isinstance(value, int) else float(f"{new:.3g}")
    steps = max(1, round(row.steps * share))
    return dataclasses.replace(row, name=f"{row.label}.t{number}", steps=steps, options=options)


def _value(plain: Any, name: str) -> float | None:
    """Of a dotted field; None where the recipe has none, or no number."""
    for part in name.split("."):
        plain = plain.get(part) if isinstance(plain, dict) else None
    return plain if isinstance(plain, int | float) and not isinstance(plain, bool) else None


def search(board: Board, place: Place, trials: int, share: float, rows: list[Row], jobs: int = 1) -> Board:
    """Runs what is missing of the trials; writes ``trials.jsonl`` and ``settled.yaml``, a board of the best ones.

    Args:
        trials: of each row. share: of its iterations. rows: of the board, that are tried; what there is of others
            counts.

    Raises:
        FewstepError: the board names no fields to search, or none that a row's recipe has.
    """
    tries = {
        row.label: [trial_of(board, row, number, share) for number in range(trials)] for row in board.rows
    }
    for label, tried in tries.items():
        if trials > 1 and tried[0].options == tried[1].options:
            raise FewstepError(
                f"search: {list(board.search)}: the recipe of {label} has none of these numbers"
            )
    # What a trial starts from is the first trial of that row: the search is for each row alone.
    flat = [
        dataclasses.replace(row, start_from=f"{row.start_from}.t0" if row.start_from else None)
        for tried in tries.values()
        for row in tried
    ]
    whole = dataclasses.replace(board, rows=flat, seeds=[SEED], seed=SEED)
    with held(place.folder):
        write_json(place.folder / RECORD, to_dict(board))
        rulers = rulers_of(whole, place, "trials")
        lines: list[dict[str, Any]] = []
        for label, tried in tries.items():
            runs = [Run(whole, whole.row(row.label), SEED) for row in tried]
            if board.row(label) in rows:
                train(place, runs, jobs)
            made = [(number, run, found(place, run)) for number, run in enumerate(runs)]
            lines += [_line(place, run, label, number, one, rulers) for number, run, one in made if one]
            write(place.folder / TRIALS, "".join(json.dumps(line) + "\n" for line in lines))
        settled = settle(board, lines)
        write(place.folder / SETTLED, yaml.safe_dump(to_dict(settled), sort_keys=False, width=110))
    return settled


def _line(
    place: Place, run: Run, label: str, number: int, record: dict[str, Any], rulers: dict[str, Any]
) -> dict[str, Any]:
    """A trial as it is kept; of one that failed, why."""
    about = {"row": label, "trial": number, "steps": run.row.steps, "options": run.row.options}
    kept = {
        key: record.get(key)
        for key in ("status", "reason", "digest", "code", "threads", "cpu_seconds", "before")
    }
    scores = {}
    if record["status"] == "done":
        made = rulers[run.recipe.teacher.path].student(record["name"], place.run(record["name"]) / "export")
        if faults := [row["error"] for row in made if "error" in row]:
            kept |= {"status": "failed", "reason": f"measured: {faults[0]}"}
        else:
            scores = {str(row["steps"]): row["metrics"][BY]["value"] for row in made}
    return {**about, **kept, BY: scores}


def settle(board: Board, lines: list[dict[str, Any]]) -> Board:
    """Each row with the options of its best trial, and as many iterations as fill the budget at the measured rate.

    Of a student of several numbers of steps the best one has the lowest product of distances. What a row's pairs cost
    is taken off its budget, and what it starts from.
    """
    rows: list[Row] = []
    cost: dict[str, float] = {}
    for row in board.rows:
        tried = [line for line in lines if line["row"] == row.label]
        good = [line for line in tried if line[BY]]
        if not good:
            rows.append(row)  # it fails on the board too, and is seen there
            cost[row.label] = 0.0
            continue
        best = min(good, key=lambda line: (_score(line), line["trial"]))
        rate = statistics.median(line["cpu_seconds"] / line["steps"] for line in good)
        pairs = sum(part["cpu_seconds"] for part in best["before"] if part["what"].endswith("pairs"))
        fixed = pairs + cost.get(row.start_from or "", 0.0)
        steps = math.floor((FILLED * row.share * board.cpu_seconds - fixed) / rate)
        if steps < 1:
            raise FewstepError(
                f"rows.{row.label}: {fixed:.0f} of {row.share * board.cpu_seconds:.0f} s are spent before it begins; "
                "expected a rest: fewer pairs, or a smaller share of what it starts from"
            )
        cost[row.label] = fixed + steps * rate
        rows.append(dataclasses.replace(row, options=best["options"], steps=steps))
    return dataclasses.replace(board, rows=rows)


def _score(line: dict[str, Any]) -> float:
    return sum(math.log(max(value, 1e-12)) for value in line[BY].values())
