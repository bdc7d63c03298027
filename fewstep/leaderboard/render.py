"""What ``leaderboard.json`` looks like: tables, plots, a page; functions of its content alone but for the sheet."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any

from ..evaluation.page import STYLE
from ..evaluation.plot import Series, legend, plot
from ..evaluation.statistics import table
from ..report.rows import row_name, steps_of

COLUMNS = {
    "FD": "FD",
    "KID": "KID",
    "precision": "precision",
    "recall": "recall",
    "diversity": "diversity",
    "nearest": "nearest",
    "copies": "copies",
    "retrieval": "names found",
}
AXES: dict[str, tuple[str, Callable[[dict[str, Any]], float | None]]] = {
    "calls": ("network calls of a drawing", lambda row: row["nfe"]),
    "cost": ("seconds of a core to train", lambda row: row["cpu_seconds"]),
}
PLOTTED = ("FD", "KID", "recall", "diversity", "retrieval")
READ = (
    "FD, KID, precision, recall and diversity are of drawings of kinds, as many of each kind as of the real ones; "
    "names found: share of drawings by name whose nearest real image is the one asked for. Nearest: median distance to "
    "the training set, as the VAE gives it back, over that between its own images; copies: share of drawings nearer to "
    "it than 95% of its images are to each other, 0.05 for these themselves. ± is the error by jackknife, bootstrap or "
    "of a share, over drawings; behind it, in brackets, the standard deviation over seeds. Floor: the best row without "
    "training at as many network calls, or at the fewest above them. Other images: real ones, of kinds that have twice "
    "as many, beside those of the reference: what one has who draws like these and repeats none. FD of fewer "
    "images is larger for that alone."
)


def label_of(row: dict[str, Any]) -> str:
    """Of a row of students: its name, and its steps where it has others too."""
    return row["name"] if row["steps"] is None else f"{row['name']}, {steps_of(row['steps'])}"


def number(metric: dict[str, Any] | None) -> str:
    """A mean with its error and spread: ``833 ± 10 (12)``."""
    if metric is None or metric["value"] is None:
        return ""

    def said(value: float) -> str:
        digits = 0 if abs(metric["value"]) >= 100 else 3 if abs(metric["value"]) < 10 else 1
        return f"{value:.{digits}f}"

    error = "" if metric["error"] is None else f" ± {said(metric['error'])}"
    return (
        said(metric["value"])
        + error
        + ("" if metric.get("spread") is None else f" ({said(metric['spread'])})")
    )


def to_markdown(board: dict[str, Any], link: Callable[[str], str] = str) -> str:
    """A table for each teacher, best first among students of as many network calls, and the rows that failed below.

    Args:
        board: what ``leaderboard.json`` holds. link: a recipe's name -> what the table shows of it.
    """
    parts = [intro(board)]
    for teacher, others in board["teachers"].items():
        rows = [row for row in board["rows"] if row["teacher"] == teacher]
        body = [_other(row) for row in others if "error" not in row]
        body += [_student(row, link) for row in rows if row["metrics"]]
        parts.append(
            f"## `{teacher}`\n\n{table(('', 'calls', *COLUMNS.values(), 'CPU s', 'seeds', 'floor'), body)}"
        )
        parts += [f"- `{label_of(row)}`: {why}" for row in rows for why in remarks(row)]
        parts += [f"- {row_name(row)}: {row['error']}" for row in others if "error" in row]
    return "\n\n".join(parts).replace("\n\n- ", "\n- ").replace("|\n- ", "|\n\n- ") + "\n"


def intro(board: dict[str, Any]) -> str:
    budget, measured = board["budget"], board["measured"]
    return (
        f"# {board['title']}\n\n"
        f"`{board['command']}`: {budget['cpu_seconds']:g} seconds of a core for each row, iterations fixed before, "
        f"their CPU time measured{_arithmetic(board)}. {measured['per_kind']} drawings of each kind and "
        f"{measured['named']} by name, features of {measured['extractor']}, the same prompts and noise in every row. "
        f"{READ}"
    )


def _arithmetic(board: dict[str, Any]) -> str:
    """What trainings computed in, on which their iterations a second depend."""
    runs = (run["arithmetic"] for row in board["rows"] for run in row["runs"] if run.get("arithmetic"))
    kinds = sorted({run["autocast"] or "float32" for run in runs})
    return f", in {' and '.join(kinds)}" if kinds else ""


def _other(row: dict[str, Any]) -> tuple[str, ...]:
    calls = f"{row['nfe']:g}"
    return (row_name(row), calls, *(number(row["metrics"].get(name)) for name in COLUMNS), "", "", "")


def _student(row: dict[str, Any], link: Callable[[str], str]) -> tuple[str, ...]:
    cost = "" if row["cpu_seconds"] is None else f"{row['cpu_seconds']:.0f}" + "!" * row["over_budget"]
    seeds = str(row["metrics"]["FD"]["n"])
    floor = row["floor"]
    against = f"{floor['FD']['value']:.0f} ({floor['nfe']:g})" if floor else ""
    name = link(row["name"]) + (f", {steps_of(row['steps'])}")
    metrics = (number(row["metrics"].get(name)) for name in COLUMNS)
    return (name, f"{row['nfe']:g}", *metrics, cost, seeds, against)


def remarks(row: dict[str, Any]) -> Iterator[str]:
    """What one has to know of a row beside its numbers."""
    for run in row["runs"]:
        if run["status"] == "failed":
            yield f"seed {run['seed']} failed: {run['reason']}"
        elif run["status"] in ("running", "not run"):
            yield f"seed {run['seed']}: {'stopped, not finished' if run['status'] == 'running' else 'not run'}"
        elif run["stale"]:
            yield f"seed {run['seed']} was trained by other code ({', '.join(run['code'])})"
    if row["over_budget"]:
        yield f"over the budget (marked !): {row['cpu_seconds']:.0f} s"


def series_of(board: dict[str, Any], teacher: str, metric: str, axis: str) -> list[Series]:
    """A line for each student over its numbers of steps, and for the floor and the teacher where calls are the axis."""
    at = AXES[axis][1]
    rows = [row for row in board["rows"] if row["teacher"] == teacher and metric in row["metrics"]]
    if axis == "calls":
        rows += [
            {**r, "cpu_seconds": None}
            for r in board["teachers"][teacher]
            if metric in r.get("metrics", {}) and r["nfe"]
        ]
    found = []
    for name, group in groupby(sorted(rows, key=_line), _line):
        places = [(at(row), row["metrics"][metric]) for row in group]
        points = sorted((float(x), m["value"], _error(m)) for x, m in places if x is not None)
        if points:
            found.append(Series(name, points))
    return found


def _line(row: dict[str, Any]) -> str:
    kind = row.get("kind", "student")
    return f"{kind}, {row['solver']}" if kind == "floor" else str(row["name"])


def _error(metric: dict[str, Any]) -> float:
    """The larger of both: what a bar may hide is not shown smaller than it is."""
    return max(metric["error"] or 0.0, metric.get("spread") or 0.0)


def plots(board: dict[str, Any], teacher: str) -> str:
    """Figures as HTML, by calls and by cost."""
    found = ""
    for axis, (title, _) in AXES.items():
        lines = {metric: series_of(board, teacher, metric, axis) for metric in PLOTTED}
        names = list(dict.fromkeys(line.name for series in lines.values() for line in series))
        drawn = "".join(plot(COLUMNS[m], series, names, logarithmic=True) for m, series in lines.items())
        if drawn:
            found += f'<h3>By {title}</h3>{legend(names)}<div class="plots">{drawn}</div>'
    return found


def to_html(board: dict[str, Any], sheet: str | None = None) -> str:
    """One page that loads nothing but, where there is one, the sheet beside it."""
    title = escape(board["title"])
    body = ""
    for teacher, others in board["teachers"].items():
        rows = [row for row in board["rows"] if row["teacher"] == teacher]
        lines = [_other(row) for row in others if "error" not in row]
        lines += [_student(row, str) for row in rows if row["metrics"]]
        head = "".join(
            f"<th>{escape(name)}</th>" for name in ("", "calls", *COLUMNS.values(), "CPU s", "seeds", "floor")
        )
        cells = ("".join(f"<td>{escape(cell)}</td>" for cell in line) for line in lines)
        told = "".join(
            f"<li>{escape(label_of(row))}: {escape(why)}</li>" for row in rows for why in remarks(row)
        )
        told += "".join(
            f"<li>{escape(row_name(row))}: {escape(row['error'])}</li>" for row in others if "error" in row
        )
        body += f'<h2>{escape(teacher)}</h2><div class="wide"><table><tr>{head}</tr>'
        body += "".join(f"<tr>{line}</tr>" for line in cells) + f"</table></div><ul>{told}</ul>"
        body += plots(board, teacher)
    picture = (
        f'<h2>Drawings</h2><img src="{escape(sheet)}" alt="the same prompts and noise in every row">'
        if sheet
        else ""
    )
    said = escape(intro(board).partition("\n\n")[2])
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; img-src 'self' data:; "
        f"style-src 'unsafe-inline'\"><h1>{title}</h1><p>{said}</p>{body}{picture}</html>\n"
    )


def draw_sheet(
    board: dict[str, Any], folders: dict[str, Path], shown: list[int], texts: list[str], path: Path
) -> bool:
    """The same prompts and noise below each other: each teacher, its floors, then every student's first seed.

    Args:
        folders: teacher -> where its rows' ``samples`` lie. shown: numbers of the drawings. texts: of their prompts.

    Returns:
        Whether there was anything to draw.
    """
    import numpy as np
    from PIL import Image

    from ..files import replacing
    from ..report.grid import image_grid

    rows: list[tuple[str, Path]] = []
    for teacher, others in board["teachers"].items():
        drawn = [row for row in others if "samples" in row]
        best = {row["nfe"]: row for row in sorted(drawn, key=_by_fd, reverse=True) if row["kind"] == "floor"}
        kept = [row for row in drawn if row["kind"] != "floor" or best[row["nfe"]] is row]
        rows += [(f"{row_name(row)}: {_calls(row)}", folders[teacher] / row["samples"]) for row in kept]
        for row in (row for row in board["rows"] if row["teacher"] == teacher):
            first = next((run["samples"] for run in row["runs"] if run["samples"]), None)
            if first:
                rows.append((f"{label_of(row)}: {_calls(row)}", folders[teacher] / first))
    tiles = [[Image.open(folder / f"{i:06d}.png").convert("RGB") for i in shown] for _, folder in rows]
    if not tiles:
        return False
    size = max(tile.size for line in tiles for tile in line)
    same = [
        tile if tile.size == size else tile.resize(size, Image.Resampling.NEAREST)
        for line in tiles
        for tile in line
    ]
    labels = [""] * len(shown) * (len(rows) - 1) + texts
    grid = image_grid(
        np.stack([np.asarray(tile) for tile in same]),
        len(shown),
        labels=labels,
        row_labels=[n for n, _ in rows],
    )
    with replacing(path) as part:
        grid.save(part, format="PNG", optimize=True)
    return True


def _by_fd(row: dict[str, Any]) -> float:
    found: float = row["metrics"]["FD"]["value"]
    return found


def _calls(row: dict[str, Any]) -> str:
    return f"{row['nfe']:g} call{'s' * (row['nfe'] != 1)}"


def best(board: dict[str, Any], chosen: list[str]) -> str:
    """Some rows beside their teacher and the floor, as the README shows them.

    Args:
        chosen: "NAME" or "NAME:STEPS", where one student has several.

    Raises:
        StopIteration: there is no such row with numbers.
    """
    lines = []
    for name, _, steps in (choice.partition(":") for choice in chosen):
        fitting = (row for row in board["rows"] if row["name"] == name and row["metrics"])
        row = next(row for row in fitting if not steps or row["steps"] == int(steps))
        teacher = next(r for r in board["teachers"][row["teacher"]] if r.get("kind") == "teacher")
        floor = row["floor"]
        lines.append(
            (
                f"[`{name}`](recipes/{row['recipe']}.py)" + (f", {steps_of(int(steps))}" if steps else ""),
                f"{number(row['metrics']['FD'])}, {_calls(row)}",
                f"{number(teacher['metrics']['FD'])}, {_calls(teacher)}",
                f"{number(floor['FD'])}, {_calls(floor)}" if floor else "",
                number({**row["metrics"]["retrieval"], "error": None, "spread": None}),
                f"{row['cpu_seconds'] / 60:.0f} min",
            )
        )
    return table(("student", "FD", "its teacher", "floor", "names found", "time of a core"), lines)
