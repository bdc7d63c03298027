"""The page of `fewstep eval run`: one HTML file with the table, plots as SVG and grids as PNG, all inside."""

import base64
import itertools
from html import escape
from pathlib import Path
from typing import Any

from fewstep.evaluation.compare import cell
from fewstep.evaluation.mixture import counted
from fewstep.evaluation.plot import Series, legend, plot
from fewstep.files import write
from fewstep.report.rows import row_name

STYLE = """
:root { color-scheme: light dark }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums }
td, th { padding: .25rem .6rem; border-bottom: 1px solid #8884; text-align: right; white-space: nowrap }
td:first-child, th:first-child { text-align: left }
.wide { overflow-x: auto } .plots { display: flex; flex-wrap: wrap; gap: 1rem }
figure { margin: 0 0 1rem } figcaption { font-size: 13px } img { max-width: 100%; image-rendering: pixelated }
.legend { columns: 18rem; list-style: none; padding: 0; font-size: 13px }
.legend span { display: inline-block; width: 1.8rem; margin-right: .5rem; vertical-align: middle }
svg { width: 23rem; font: 11px system-ui, sans-serif } svg text { fill: currentColor }
"""


def write_page(whole: dict[str, Any], out: Path) -> None:
    """Writes `index.html` from what `run_spec` returns; every text is escaped, and nothing is loaded from outside."""
    rows = whole["rows"]
    labels = list(dict.fromkeys(label for row in rows for label in row["metrics"]))
    title = escape(whole["title"])
    facts = " ".join(whole["notes"])
    if whole["real"]:
        facts += f" Real images: {whole['real']['name']}, {whole['real']['n']}."
    if whole["protocol"]:
        facts += f" Protocol: {whole['protocol']}."
    warnings = "".join(f"<li>{escape(warning)}</li>" for warning in whole["warnings"])
    prompts = escape(" | ".join(whole["prompts"]))
    html = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">"
        f'<h1>{title}</h1><p>{escape(facts)}</p><div class="wide">{_table(rows, labels)}</div><ul>{warnings}</ul>'
        f"{_plots(rows, labels)}<h2>Images</h2><p>{prompts}</p>{_grids(rows, out)}</html>\n"
    )
    write(out / "index.html", html)


def _table(rows: list[dict[str, Any]], labels: list[str]) -> str:
    shapes = ["images"] * any(row.get("shapes") for row in rows)
    head = ("model", *shapes, "solver", "guidance", "steps", "NFE", "s / image", "peak MiB", *labels)
    html = "<tr>" + "".join(f"<th>{escape(name)}</th>" for name in head) + "</tr>"
    for row in rows:
        speed = row.get("speed")
        cells = [row["name"], *[counted(row.get("shapes", {}))] * len(shapes)]
        cells += [row.get("solver", ""), _number(row.get("guidance")), row.get("steps", "")]
        if speed:
            seconds = cell({"value": speed["seconds"], "error": speed["seconds_error"]})
            cells += [_number(speed["nfe"]), seconds, f"{speed['peak_memory_mb']:.0f}"]
        else:
            cells += ["", "", ""]
        cells += [cell(row["metrics"].get(label)) for label in labels]
        html += "<tr>" + "".join(f"<td>{escape(str(value))}</td>" for value in cells) + "</tr>"
    return f"<table>{html}</table>"


def _plots(rows: list[dict[str, Any]], labels: list[str]) -> str:
    """Each metric against network evaluations and seconds, and against guidance where that was varied."""
    rows = [row for row in rows if row.get("speed")]
    html = ""
    for title, x, keys in (
        ("Quality against network evaluations", lambda r: r["speed"]["nfe"], ("name", "solver", "guidance")),
        (
            "Quality against seconds per image",
            lambda r: r["speed"]["seconds"],
            ("name", "solver", "guidance"),
        ),
        ("Guidance sweep", lambda r: r["guidance"], ("name", "solver", "steps")),
    ):
        sweep = title.startswith("Guidance")
        lines = {label: _series(rows, label, x, keys, 2 if sweep else 1) for label in labels}
        names = list(dict.fromkeys(line.name for series in lines.values() for line in series))
        drawn = "".join(plot(label, series, names, logarithmic=not sweep) for label, series in lines.items())
        if drawn:
            html += f'<h2>{title}</h2>{legend(names)}<div class="plots">{drawn}</div>'
    return html


def _series(
    rows: list[dict[str, Any]], label: str, x: Any, keys: tuple[str, ...], least: int
) -> list[Series]:
    """Points of the rows that agree in `keys`, if there are at least so many different x."""
    found = []
    rows = sorted((r for r in rows if label in r["metrics"]), key=lambda r: [str(r[k]) for k in keys])
    for key, group in itertools.groupby(rows, lambda r: [r[k] for k in keys]):
        points = sorted(
            (float(x(r)), r["metrics"][label]["value"], r["metrics"][label]["error"] or 0.0) for r in group
        )
        if len({point[0] for point in points}) >= least:
            found.append(
                Series(
                    ", ".join(f"{k} {_number(v)}" if k != "name" else v for k, v in zip(keys, key)), points
                )
            )
    return found


def _grids(rows: list[dict[str, Any]], out: Path) -> str:
    """Some images of each row, the same prompts and noise below each other."""
    html = ""
    for row in rows:
        if "grid" not in row:
            continue
        caption = row_name(row)
        if row.get("guidance") is not None:
            caption += f", guidance {_number(row['guidance'])}"
        data = base64.b64encode((out / row["grid"]).read_bytes()).decode()
        html += f"<figure><figcaption>{escape(caption)}</figcaption>"
        html += f'<img alt="{escape(caption)}" src="data:image/png;base64,{data}"></figure>'
    return html


def _number(value: Any) -> str:
    return f"{value:g}" if isinstance(value, int | float) else "" if value is None else str(value)
