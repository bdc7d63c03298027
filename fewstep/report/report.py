"""The report of a run: one page with everything that a run directory holds.

Nothing here imports torch, so a report can be written anywhere a run directory has been copied to.
"""

from __future__ import annotations

import base64
import io
import json
import math
import os
import re
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from ..files import read_text, write
from ..shape import Shape
from .chart import curves
from .formats import brief, drawable, duration, pretty
from .grid import cells
from .health import sign_of, warnings
from .log import direction, read_metrics
from .rows import flat, steps_of

MAX_FRAMES = 24  # sample grids embedded in a report; evenly chosen from all that exist
MAX_PIXELS, MAX_BYTES = 1600, 400_000  # above these an image is embedded as a smaller JPEG
MAX_COMPARED = 24  # images of teacher and student below the slider
MAX_TILE, SMALL = (
    320,
    160,
)  # pixels of an image cut out of a grid; those up to the second are kept without loss
MAX_WARNINGS = 20
UNREADABLE = (OSError, ValueError, KeyError, SyntaxError, Image.DecompressionBombError)


class Picture(NamedTuple):
    """An image as a data URI, with its size in pixels."""

    uri: str
    width: int
    height: int

    @property
    def layout(self) -> str:
        """Wide grids go below each other so that their columns line up, square ones side by side."""
        return "wide" if self.width > 1.7 * self.height else "square"


def write_report(run_dir: str | os.PathLike) -> Path:
    """Writes `report.html` into a run directory: one file without outside references, for `file://` too.

    Everything is optional, and whatever is missing or unreadable is left out: `run.json`, `recipe.yaml`,
    `metrics.jsonl`, `samples/step_*.png`, `samples/teacher.png`, `samples/prompts.json`, `eval/table.json`, `export/`.
    The file is replaced atomically, so it can stay open in a browser during a run.

    Args:
        run_dir: Existing directory of a run.

    Returns:
        Path of the report.
    """
    folder = Path(run_dir)
    run, evaluation = _read_json(folder / "run.json"), _read_json(folder / "eval" / "table.json")
    records = read_metrics(folder / "metrics.jsonl")
    rows = [flat(row) for row in _list(evaluation, "rows") if isinstance(row, dict)]
    rows = [{**row, "kind": _kind(row)} for row in rows]
    title = pretty(run.get("name")) or folder.resolve().name
    snippet = _snippet(read_text(folder / "export" / "README.md"))
    sections = [
        _headline(folder, title, run, rows),
        _tiles(folder, run, rows, records),
        _section("Prompt by prompt", _by_prompt(folder, evaluation, rows)),
        _section("Measured", _table(rows) + _notes(evaluation)),
        _section("Samples over time", _film(folder)),
        _section("Health", _health(folder, records)),
        _section(
            "Curves", curves([{k: v for k, v in r.items() if not k.startswith("health/")} for r in records])
        ),
        _section("Use it", "<p>In the folder <code>export</code>:</p>" * bool(snippet) + _code(snippet)),
        _section("Run", _details(run) + _fold("recipe.yaml", _code(read_text(folder / "recipe.yaml")))),
    ]
    template = Path(__file__).with_name("report_template.html").read_text(encoding="utf-8")
    parts = {"title": escape(title), "body": "\n".join(filter(None, sections))}
    # One pass: braces inside a prompt or a recipe are text, not another placeholder.
    page = re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)
    write(folder / "report.html", page)
    return folder / "report.html"


def _headline(folder: Path, title: str, run: dict, rows: list[dict]) -> str:
    teacher, method, steps = (escape(pretty(run.get(k))) for k in ("teacher", "method", "student_steps"))
    lead = f"<b>{teacher or 'A teacher'}</b>, distilled"
    lead += f" with <b>{method}</b>" if method else ""
    lead += f" into a student of <b>{steps} step{'s' * (steps != '1')}</b>" if steps else ""
    lead = f'<p class="lead">{lead}.</p>' if teacher or method else ""
    text = f'<div><p class="eyebrow">fewstep run</p><h1>{escape(title)}</h1>{lead}</div>'
    if slider := _slider(folder, run, rows):
        return f'<header class="wide">{text}{slider}</header>'
    grids = [_inside(folder / "eval", _best_student(rows).get("grid")), *reversed(_steps(folder).values())]
    picture = next(filter(None, map(_load, grids)), None)
    layout = picture.layout if picture else "wide"
    return f'<header class="{layout}">{text}{_figure(picture, "samples", max_height=520)}</header>'


def _slider(folder: Path, run: dict, rows: list[dict]) -> str:
    """Teacher and student of the same prompts and noise on top of each other, and a divide that moves over them."""
    about = _read_json(folder / "samples" / "prompts.json")
    prompts = [pretty(p) for p in _list(about, "prompts")][:MAX_COMPARED]
    newest = next(reversed(_steps(folder).values()), None)
    sides = {"teacher": folder / "samples" / "teacher.png", "student": newest}
    names = {kind: _best(rows, kind).get("name", kind) for kind in sides}
    if not rows and (steps := drawable(run.get("student_steps"))):
        names["student"] = f"student, {steps_of(int(steps))}"
    sheets = ""
    for kind, path in sides.items():
        tiles = _cut(path, about, len(prompts))
        if not tiles:
            return ""
        figures = "".join(
            _figure(tile, prompt, alt=f"{kind}: {prompt}") for tile, prompt in zip(tiles, prompts)
        )
        sheets += f'<div class="sheet {kind}">{figures}</div>'
    label = "Divide: the teacher is left of it, the student right"
    ends = "".join(f'<span class="{kind}">{escape(pretty(name))}</span>' for kind, name in names.items())
    return (
        f'<div class="compare"><div class="ends">{ends}</div><div class="sheets">{sheets}'
        f'<input type="range" min="0" max="100" value="50" aria-label="{label}"></div></div>'
    )


def _tiles(folder: Path, run: dict, rows: list[dict], records: list[dict]) -> str:
    """The numbers to remember: the best student beside the teacher, then what the run cost."""
    student, tiles = _best_student(rows), []
    teacher = _best(rows, "teacher")
    for key in (k for k in _columns(rows) if k == "nfe" or direction(k)):
        value, reference = drawable(student.get(key)), drawable(teacher.get(key))
        if value is None:
            continue
        note = "" if reference is None else f"teacher {pretty(reference)}"
        note += f", {reference / value:.3g}× more" if reference and 0 < 2 * value <= reference else ""
        tiles.append(("evaluations per image" if key == "nfe" else key, pretty(value), note))
    last = records[-1] if records else {}
    steps, seconds = (
        max((n for n in map(drawable, values) if n is not None), default=None)
        for values in ((run.get("steps"), last.get("step")), (run.get("seconds"), last.get("seconds")))
    )
    if seconds is not None:
        tiles.append(("training time", duration(seconds), "" if steps is None else f"{pretty(steps)} steps"))
    memory: Any = run.get("memory")
    if peak := drawable(memory.get("peak_gb")) if isinstance(memory, dict) else None:
        tiles.append(("memory while training", f"{pretty(peak)} GB", pretty(memory.get("kind"))))
    if (waited := drawable(run.get("waited"))) and waited >= 0.01:
        tiles.append(("waited for data", f"{waited:.0%}", "of the training time"))
    files = (folder / "export").glob("*.safetensors")
    if size := sum(path.stat().st_size for path in files):
        tiles.append(("student on disk", f"{size / 1e6:.3g} MB", "safetensors in export/"))
    parameters = run.get("parameters")
    parts = parameters.items() if isinstance(parameters, dict) else ()
    if count := sum(drawable(n) or 0 for name, n in parts if str(name).startswith("student")):
        tiles.append(("trained parameters", brief(count), "in the student"))
    tile = "<div><dt>{}</dt><dd>{}</dd><small>{}</small></div>"
    cells = "".join(tile.format(*map(escape, texts)) for texts in tiles)
    return f'<dl class="tiles">{cells}</dl>' if cells else ""


def _table(rows: list[dict]) -> str:
    """The evaluation, one line per sampler; the best value of each ranked column is marked."""
    columns, best, lines = _columns(rows), {}, ""
    for key in filter(direction, columns):
        # A reference, such as the autoencoder's reconstructions, is a ceiling and wins nothing.
        found = (drawable(row.get(key)) for row in rows if row["kind"] != "reference")
        values = [value for value in found if value is not None]
        best[key] = (max if direction(key) > 0 else min)(values) if len(values) > 1 else None
    for row in rows:
        cells = ""
        for key in columns:
            wins = row["kind"] != "reference" and best.get(key) is not None and row.get(key) == best[key]
            cells += f"<td{' class=best' * wins}>{escape(_value(row, key) or '–')}</td>"
        lines += f'<tr class="{row["kind"]}"><th>{escape(pretty(row.get("name")))}</th>{cells}</tr>'
    arrow = {-1: " ↓", 0: "", 1: " ↑"}
    head = ""
    for key in columns:
        name, _, space = key.partition("(")
        below = f"<br><small>{escape(space.rstrip(')'))}</small>" if space else ""
        head += f"<th>{escape(name)}{arrow[direction(key)]}{below}</th>"
    return f'<div class="scroll"><table><tr><th></th>{head}</tr>{lines}</table></div>' if rows else ""


def _notes(evaluation: dict) -> str:
    notes = "".join(f"<li>{escape(pretty(note))}</li>" for note in _list(evaluation, "notes"))
    return f'<ul class="notes">{notes}</ul>' if notes else ""


def _by_prompt(folder: Path, evaluation: dict, rows: list[dict]) -> str:
    """A card for each prompt: what teacher, student and floor make of it and of the same noise."""
    prompts = [pretty(p) for p in _list(evaluation, "prompts")]
    grids = [(row, _inside(folder / "eval", row.get("grid"))) for row in rows]
    # A reference, such as the autoencoder's reconstructions, is of other images.
    asked = [(row, path) for row, path in grids if row["kind"] != "reference"]
    cut = [(row, _cut(path, evaluation, len(prompts))) for row, path in asked]
    cut = [(row, tiles) for row, tiles in cut if tiles]
    if not prompts or not cut:
        figures = "".join(_figure(_load(path), pretty(row.get("name")), row["kind"]) for row, path in grids)
        return f'<div class="grids">{figures}</div>' if figures else ""
    cards = ""
    for i, prompt in enumerate(prompts):
        figures = "".join(
            _figure(tiles[i], name, row["kind"], alt=f"{name}: {prompt}")
            for row, tiles in cut
            if (name := pretty(row.get("name")))
        )
        cards += (
            f'<div class="card"><h3 title="{escape(prompt)}">{escape(prompt)}</h3><div>{figures}</div></div>'
        )
    return f'<div class="cards">{cards}</div>'


def _film(folder: Path) -> str:
    """Sample grids over time: thumbnails, and a viewer that the page's script fills from them."""
    steps = list(_steps(folder).items())
    chosen = {round(i) for i in np.linspace(0, len(steps) - 1, min(len(steps), MAX_FRAMES))}
    frames = [(f"step {steps[i][0]:,}", p) for i in sorted(chosen) if (p := _load(steps[i][1]))]
    teacher = _figure(_load(folder / "samples" / "teacher.png"), "teacher", "teacher")
    if not frames:
        return teacher
    (name, last), end = frames[-1], len(frames) - 1
    strip = "".join(f'<img src="{picture.uri}" alt="{name}" title="{name}">' for name, picture in frames)
    return (
        f'<div class="film"><div class="grids {last.layout}">{teacher}'
        f'{_figure(last._replace(uri=""), "student", "student viewer")}</div><div class="controls">'
        f'<button type="button" aria-label="Play">▶</button><output>{name}</output>'
        f'<input type="range" min="0" max="{end}" value="{end}" aria-label="Training step"></div>'
        f'<div class="strip">{strip}</div></div>'
    )


def _health(folder: Path, records: list[dict]) -> str:
    """Warnings, vital signs with their normal ranges, and the student as teacher and critic see it."""
    keys = {"step", "seconds"}
    charts = curves([{k: v for k, v in r.items() if k in keys or k.startswith("health/")} for r in records])
    found = sorted((folder / "health").glob("step_*.png"))
    pictures = (
        _figure(_load(found[-1]), "student; teacher and critic behind noise", "student") if found else ""
    )
    shown = {sign.name: sign for r in records for key in r if (sign := sign_of(key))}
    notes = "".join(
        f"<li><b>{name}</b>: normal is {escape(sign.normal)}</li>" for name, sign in shown.items()
    )
    worries = "".join(f"<li><b>{escape(line)}</b></li>" for line in warnings(records)[:MAX_WARNINGS])
    return f"<ul>{worries}</ul>" * bool(worries) + f"{pictures}{charts}" + f"<ul>{notes}</ul>" * bool(charts)


# ---- pieces of the page -----------------------------------------------------------------------------------


def _section(title: str, body: str) -> str:
    return f"<section><h2>{title}</h2>{body}</section>" if body else ""


def _fold(title: str, body: str) -> str:
    return f"<details><summary>{title}</summary>{body}</details>" if body else ""


def _code(text: str) -> str:
    return f"<pre>{escape(text.strip())}</pre>" if text.strip() else ""


def _figure(
    picture: Picture | None, caption: str = "", kind: str = "", max_height: int = 10**4, alt: str = ""
) -> str:
    """An image at up to twice its own size and at most `max_height` pixels high."""
    if picture is None:
        return ""
    width = min(2 * picture.width, round(max_height * picture.width / picture.height))
    size = f'width="{picture.width}" height="{picture.height}" style="max-width:min(100%,{width}px)"'
    source = f' src="{picture.uri}"' * bool(picture.uri)
    text = f"<figcaption>{escape(caption)}</figcaption>" * bool(caption)
    return f'<figure class="{kind}">{text}<img {size} alt="{escape(alt or caption)}"{source}></figure>'


def _details(run: dict) -> str:
    """Everything in `run.json`; what is nested becomes one line."""
    lines = ""
    for key, value in run.items():
        if isinstance(value, dict):
            value = " · ".join(f"{k} {pretty(v)}" for k, v in value.items())
        lines += f"<dt>{escape(key.replace('_', ' '))}</dt><dd>{escape(pretty(value))}</dd>"
    return f'<dl class="details">{lines}</dl>' if lines else ""


def _snippet(markdown: str) -> str:
    """The first Python block of a model card."""
    block = re.search(r"```(?:python|py)\s*\n(.*?)```", markdown, re.DOTALL)
    return block[1] if block else ""


def _kind(row: dict) -> str:
    """What a row of the evaluation is about: its `kind`, or else the first word of its name."""
    text = pretty(row.get("kind") or row.get("name")).lower()
    return next((kind for kind in ("teacher", "student", "floor") if text.startswith(kind)), "reference")


def _columns(rows: list[dict]) -> list[str]:
    """Columns of the table; a standard error stands beside its value, not in a column of its own."""
    keys = dict.fromkeys(k for row in rows for k in row)
    return [k for k in keys if k not in ("name", "kind", "grid") and not k.endswith("±")]


def _value(row: dict, key: str) -> str:
    error = drawable(row.get(f"{key} ±"))
    return pretty(row.get(key)) + (f" ± {error:.2g}" if error else "")


def _best(rows: list[dict], kind: str) -> dict:
    """The best student; of other kinds the row that takes most network calls; {} without one."""
    if kind == "student":
        return _best_student(rows)
    found = [row for row in rows if row["kind"] == kind]
    return max(found, key=lambda row: drawable(row.get("nfe")) or 0, default={})


def _best_student(rows: list[dict]) -> dict:
    """The student that is best by the first ranked column; {} without students."""
    key = next(filter(direction, _columns(rows)), "")
    worst = -math.inf
    score = lambda row: worst if (v := drawable(row.get(key))) is None else v * direction(key)  # noqa: E731
    return max((row for row in rows if row["kind"] == "student"), key=score, default={})


# ---- values and files -------------------------------------------------------------------------------------


def _list(mapping: dict, key: str) -> list:
    value = mapping.get(key)
    return value if isinstance(value, list) else []


def _steps(folder: Path) -> dict[int, Path]:
    """The sample grids of a run by step, in order."""
    paths = (folder / "samples").glob("step_*.png")
    return dict(sorted((int(path.stem[5:]), path) for path in paths if path.stem[5:].isdecimal()))


def _inside(folder: Path, name: Any) -> Path | None:
    """A file named in a run's JSON, unless it lies outside the run directory."""
    path = (folder / name).resolve() if isinstance(name, str) else None
    return path if path and path.is_relative_to(folder.resolve()) else None


def _load(path: Path | None) -> Picture | None:
    """An image file for embedding, or None when it is missing or damaged (still being written, say)."""
    try:
        data = path.read_bytes() if path else b""
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            if max(image.size) > MAX_PIXELS or len(data) > MAX_BYTES:
                return _embedded(image, MAX_PIXELS)
            return Picture(_uri(data, Image.MIME[image.format]), *image.size)
    except UNREADABLE:
        return None


def _cut(path: Path | None, about: dict, count: int) -> list[Picture]:
    """The first images of a grid, each by itself; none of what is no whole grid with so many.

    Args:
        about: its ``columns``, and where its images are no squares their ``cell``, (height, width).
    """
    columns, cell = about.get("columns"), _list(about, "cell")
    shape = Shape(*cell) if [type(side) for side in cell] == [int, int] and min(cell) > 0 else None
    try:
        with Image.open(path or "") as image:
            boxes = cells(image.size, columns if isinstance(columns, int) else 0, shape)[:count]
            whole = len(boxes) == count
            return [_embedded(image.crop(box), MAX_TILE) for box in boxes] if whole else []
    except UNREADABLE:
        return []


def _embedded(image: Image.Image, most: int) -> Picture:
    """An image of at most so many pixels a side: small ones without loss, large ones as JPEG."""
    kind = "PNG" if max(image.size) <= min(most, SMALL) else "JPEG"
    image = image.convert("RGB")
    image.thumbnail((most, most))
    buffer = io.BytesIO()
    image.save(buffer, kind, quality=90)
    return Picture(_uri(buffer.getvalue(), Image.MIME[kind]), *image.size)


def _uri(data: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(read_text(path))
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}
