"""Tables of several evaluations for people: what the README shows of ``eval/results``."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from ..report.rows import flat, row_name, steps_of
from .statistics import table

EXTRACTOR = re.compile(r"(?<=\w)\(([^()]+)\)")  # of a label: FD(effnet-lite0@96)
RANK = {"reference": 0, "teacher": 1, "floor": 2, "student": 3}


def results_table(rows: list[dict[str, Any]]) -> str:
    """Rows of a ``table.json`` as Markdown: numbers with their standard errors, best viewed beside the grids."""
    return _table([flat(row) for row in rows])


def for_terminal(rows: list[dict[str, Any]], most: int) -> str:
    """The same in lines of so many letters; an extractor that all numbers share stands above them once."""
    flats = [flat(row) for row in rows]
    shared = {name for row in flats for name in EXTRACTOR.findall(" ".join(row))}
    if len(shared) != 1:
        return _table(flats, most)
    short = [{EXTRACTOR.sub("", label): value for label, value in row.items()} for row in flats]
    return f"Measured in the features of {shared.pop()}:\n\n{_table(short, most)}"


def _table(rows: list[dict[str, Any]], most: int | None = None) -> str:
    apart = ("name", "kind", "nfe", "grid")
    labels = list(dict.fromkeys(k for row in rows for k in row if k not in apart and not k.endswith("±")))

    def cell(row: dict[str, Any], label: str) -> str:
        if label not in row:
            return ""
        error = row.get(f"{label} ±")
        digits = ".3g" if label == "seconds per image" else ".0f" if row[label] >= 100 else ".3f"
        return f"{row[label]:{digits}}" + (f" ± {error:.2g}" if error else "")

    body = [(r["name"], f"{r.get('nfe', 0):g}", *(cell(r, label) for label in labels)) for r in rows]
    return table(("", "network calls", *labels), body, most)


def gallery(results: Mapping[str, dict[str, Any]], others: Mapping[str, dict[str, Any]] | None = None) -> str:
    """A Markdown table per teacher: references once, floors once, then every student by its result file.

    Args:
        results: name of the file -> content; those of one teacher with the same prompts, images and extractor.
        others: results that are not shown, of runs which those may start from.
    """
    teachers: dict[str, dict[str, dict[str, Any]]] = {}
    for name, result in results.items():
        teachers.setdefault(result["teacher"], {})[name] = result
    parts = [
        f"Teacher `{name}`:\n\n{_gallery_of(group, {**(others or {}), **results})}"
        for name, group in sorted(teachers.items(), reverse=True)
    ]
    return "\n\n".join(parts)


def _gallery_of(results: Mapping[str, dict[str, Any]], everything: Mapping[str, dict[str, Any]]) -> str:
    rows: dict[str, dict[str, Any]] = {}
    for result in results.values():
        rows |= {row_name(row): flat(row) for row in result["rows"] if row["kind"] != "student"}
    for name, result in results.items():
        students = [row for row in result["rows"] if row["kind"] == "student"]
        for row in students:
            label = f"`{name}`" if len(students) == 1 else f"`{name}`, {steps_of(row['steps'])}"
            rows[label] = {
                **flat(row),
                "name": label,
                "distilled in s": float(sum(_seconds(name, everything))),
            }
    ordered = sorted(rows.values(), key=lambda r: (RANK[r["kind"]], r.get("nfe", 0), r["name"]))
    apart = ("seconds per image", "speed-up", "same-noise distance")  # of one run only
    return _table([{k: v for k, v in row.items() if not k.startswith(apart)} for row in ordered])


def _seconds(name: str, results: Mapping[str, dict[str, Any]]) -> list[float]:
    """Of a student's training, after those of the runs that it starts from."""
    before = [s for other in results[name].get("starts_from", ()) for s in _seconds(other, results)]
    return [*before, results[name]["seconds"]]


def best(results: Mapping[str, dict[str, Any]], chosen: Iterable[str]) -> str:
    """A Markdown table of some students, each beside its teacher and the floor at as many network calls.

    Where a guided teacher cannot make so few, the floor is at the fewest it can.

    Args:
        results: name of the file -> content. chosen: "NAME" or "NAME:STEPS", where one student has several.

    Raises:
        KeyError, StopIteration: there is no such result, or no such number of steps in it.
    """
    lines: list[tuple[str, ...]] = []
    for name, _, steps in (choice.partition(":") for choice in chosen):
        result = results[name]
        others = [r for x in results.values() if x["teacher"] == result["teacher"] for r in x["rows"]]
        students = (r for r in result["rows"] if r["kind"] == "student")
        row = next(r for r in students if not steps or r["steps"] == int(steps))
        distance, least = next(iter(row["metrics"])), row["speed"]["nfe"]
        teacher = next(r for r in others if r["kind"] == "teacher")
        floors = [r for r in others if r["kind"] == "floor" and r["speed"]["nfe"] >= least]
        nearest = [r for r in floors if r["speed"]["nfe"] == min(f["speed"]["nfe"] for f in floors)]
        floor = min(nearest, key=lambda r: r["metrics"][distance]["value"], default=None)

        def told(row: dict[str, Any] | None, distance: str = distance) -> str:
            if row is None:
                return ""
            found = row["metrics"][distance]
            return f"{found['value']:.0f} ± {found['error']:.0f} ({row['speed']['nfe']:g})"

        named = {metric.partition("(")[0]: m["value"] for metric, m in row["metrics"].items()}
        minutes = " + ".join(f"{seconds / 60:.0f}" for seconds in _seconds(name, results)) + " min"
        label = f"[`{name}`](recipes/{name}.py)" + (f", {steps_of(int(steps))}" if steps else "")
        lines.append((label, told(row), told(teacher), told(floor), f"{named['retrieval']:.2f}", minutes))
    header = ("student", "FD (network calls)", "its teacher", "floor", "names found", "distilled in")
    return table(header, lines)
