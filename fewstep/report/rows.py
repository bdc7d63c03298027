"""A row of an evaluation, as its ``table.json`` and the files of ``eval/results`` hold it, for people."""

from __future__ import annotations

from typing import Any


def steps_of(count: int) -> str:
    return "1 step" if count == 1 else f"{count} steps"


def row_name(row: dict[str, Any]) -> str:
    """What a row is called: "teacher, 50 steps", "floor, 4 x dpm++", or its name where there are no steps."""
    name, steps, solver = row.get("name") or "", row.get("steps"), row.get("solver", "own")
    if not isinstance(steps, int) or not steps:
        return str(name)
    return f"{name}, {steps_of(steps)}" if solver == "own" else f"{name}, {steps} x {solver}"


def flat(row: dict[str, Any]) -> dict[str, Any]:
    """One value per column: name, kind, nfe, each metric and its standard error as "NAME ±", seconds per image.

    Whatever is not as it should be is left out.
    """
    speed, metrics = _mapping(row.get("speed")), _mapping(row.get("metrics"))
    found = {"name": row_name(row), "kind": row.get("kind"), "nfe": speed.get("nfe")}
    for name, metric in metrics.items():
        metric = _mapping(metric)
        found |= {name: metric.get("value"), f"{name} ±": metric.get("error")}
    found |= {
        "speed-up": row.get("speed-up"),
        "seconds per image": speed.get("seconds"),
        "grid": row.get("grid"),
    }
    return {key: value for key, value in found.items() if value is not None}


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
