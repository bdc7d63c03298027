"""Runs and their measurements as one ``leaderboard.json``: every row, also those that failed, with every seed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from typing import Any

from ..evaluation.evaluate import versions
from .board import Board, Row, Run
from .train import code_hash, stale

OVER = 1.05  # times the budget
BY = "FD"  # what rows are ordered by, and the better half is chosen by

Records = Mapping[tuple[str, int], dict[str, Any] | None]
Measured = Mapping[str, list[dict[str, Any]]]  # name of a run -> its rows


def summary(
    board: Board,
    records: Records,
    measured: Measured,
    others: Mapping[str, list[dict[str, Any]]],
    command: str,
) -> dict[str, Any]:
    """What ``leaderboard.json`` holds.

    Args:
        records: of the runs, by row and seed. measured: of their exports. others: teacher -> rows of real
            images and of its VAE, its own and the floor's.
        command: that made it.

    Returns:
        JSON-ready. ``rows``: one for each number of steps of each row of the board, best first within a teacher and a
        number of network calls; of a row that has no student yet, one without metrics. A metric's ``value`` is the mean
        over ``n`` seeds, ``error`` the mean of the seeds' own errors (bootstrap or jackknife over drawings, which all
        seeds share the noise of, so that it does not fall with their number), ``spread`` the standard deviation
        over seeds, null of one seed.
    """
    rows = [one for row in board.rows for one in _rows(board, row, records, measured)]
    for row in rows:
        row["floor"] = _floor(row, others[row["teacher"]])
    return {
        "schema": 1,
        "title": board.title,
        "command": command,
        "code": {name: code_hash(name) for name in sorted({row["method"] for row in rows})},
        "versions": versions(),
        "budget": {"cpu_seconds": board.cpu_seconds, "threads": board.threads, "over": OVER},
        "seeds": list(board.seeds),
        "measured": {
            "images": board.images,
            "per_kind": board.per_kind,
            "named": board.named,
            "extractor": board.extractor,
            "seed": board.seed,
        },
        "teachers": {path: [_plain(row) for row in found] for path, found in others.items()},
        "rows": sorted(rows, key=_order),
    }


def _order(row: dict[str, Any]) -> tuple[Any, ...]:
    metric = row["metrics"].get(BY)
    calls = math.inf if row["nfe"] is None else row["nfe"]
    return row["teacher"], calls, metric["value"] if metric else math.inf, row["name"]


def _rows(board: Board, row: Row, records: Records, measured: Measured) -> list[dict[str, Any]]:
    runs = [_run(Run(board, row, seed), records.get((row.label, seed)), measured) for seed in board.seeds]
    runs = [run for run in runs if run["status"] != "not run"] or runs[:1]
    steps = sorted({steps for run in runs for steps in run["metrics"]})
    source = Run(board, row, board.seeds[0])
    recipe = source.recipe
    costs = [run["cost"] for run in runs if run["status"] == "done" and run["cost"] is not None]
    cost = statistics.mean(costs) if costs else None
    about = {
        "name": row.label,
        "recipe": runs[0]["recipe"],
        "method": recipe.method_class.name,
        "teacher": recipe.teacher.path,
        "iterations": row.steps,
        "options": row.options,
        "start_from": row.start_from,
        "cpu_seconds": None if cost is None else round(cost, 1),
        "over_budget": cost is not None and cost > OVER * board.cpu_seconds,
        "status": _status(run["status"] for run in runs),
        "stale": any(run["stale"] for run in runs),
    }
    return [
        {
            **about,
            "steps": k,
            "nfe": next((run["metrics"][k]["nfe"] for run in runs if k in run["metrics"]), None),
            "metrics": _means([run["metrics"][k]["metrics"] for run in runs if k in run["metrics"]]),
            "runs": [_seed_of(run, k) for run in runs],
        }
        for k in steps or [None]
    ]


def _status(found: Iterable[str]) -> str:
    """Of a row: done where all seeds that were begun are; failed where none is, else partly."""
    kinds = {*found}
    return next(iter(kinds)) if len(kinds) == 1 else "partly"


def _run(run: Run, record: dict[str, Any] | None, measured: Measured) -> dict[str, Any]:
    if record is None:
        source = run.row.recipe.rpartition("/")[2]
        return {
            "seed": run.seed,
            "status": "not run",
            "stale": False,
            "metrics": {},
            "cost": None,
            "recipe": source,
        }
    rows = measured.get(record["name"], [])
    faults = [row["error"] for row in rows if "error" in row]
    status = "failed" if faults and record["status"] == "done" else record["status"]
    own = record.get("cpu_seconds")
    return {
        "seed": run.seed,
        "status": status,
        "reason": record.get("reason") or (f"measured: {faults[0]}" if faults else None),
        "stale": stale(record),
        "recipe": record["recipe"],
        "digest": record["digest"],
        "code": record["code"],
        "threads": record["threads"],
        "hardware": record.get("hardware"),
        "arithmetic": record.get("arithmetic"),
        "cpu_seconds": own,
        "seconds": record.get("seconds"),
        "before": record["before"],
        "cost": None if own is None else own + sum(part["cpu_seconds"] for part in record["before"]),
        "metrics": {row["steps"]: row for row in rows if "error" not in row},
    }


def _seed_of(run: dict[str, Any], steps: int | None) -> dict[str, Any]:
    """A run as a row of so many steps has it."""
    found = run["metrics"].get(steps)
    metrics = (
        {name: {k: m[k] for k in ("value", "error")} for name, m in found["metrics"].items()} if found else {}
    )
    kept = {key: value for key, value in run.items() if key not in ("metrics", "recipe")}
    return {**kept, "samples": found["samples"] if found else None, "metrics": metrics}


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    """A row of the teacher's, with its metrics as students have theirs."""
    return {**row, "metrics": _means([row["metrics"]]) if "metrics" in row else {}}


def _means(seeds: list[dict[str, Any]]) -> dict[str, Any]:
    """Of each metric over the seeds, see :func:`summary`."""
    found = {}
    for name in dict.fromkeys(name for metrics in seeds for name in metrics):
        there = [metrics[name] for metrics in seeds if name in metrics]
        values, errors = [m["value"] for m in there], [m["error"] for m in there if m["error"] is not None]
        found[name] = {
            "value": statistics.mean(values),
            "error": statistics.mean(errors) if errors else None,
            "spread": statistics.stdev(values) if len(values) > 1 else None,
            "n": len(values),
            "n_fake": there[0].get("n_fake"),
        }
    return found


def _floor(row: dict[str, Any], others: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The best row without training at as many network calls, or at the fewest above them."""
    floors = [
        r for r in others if r["kind"] == "floor" and "metrics" in r and r["nfe"] >= (row["nfe"] or math.inf)
    ]
    nearest = [r for r in floors if r["nfe"] == min(f["nfe"] for f in floors)]
    best = min(nearest, key=lambda r: r["metrics"][BY]["value"], default=None)
    return best and {key: best[key] for key in ("solver", "steps", "nfe")} | {
        BY: {key: best["metrics"][BY][key] for key in ("value", "error")}
    }


def better_half(board: Board, rows: list[dict[str, Any]]) -> list[Row]:
    """Rows that deserve more seeds: by FD of the first seed the better half, rounded up, of those with as many network
    calls on the same teacher; of rows that several seeds have made only the first one counts, so that the choice stays.
    """
    groups: dict[tuple[str, float], list[tuple[float, str]]] = {}
    for row in rows:
        first = next((run for run in row["runs"] if run["seed"] == board.seeds[0]), None)
        if first and BY in first["metrics"]:
            key = row["teacher"], row["nfe"]
            groups.setdefault(key, []).append((first["metrics"][BY]["value"], row["name"]))
    chosen = {name for found in groups.values() for _, name in sorted(found)[: math.ceil(len(found) / 2)]}
    return [row for row in board.rows if row.label in chosen]
