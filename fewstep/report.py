"""What a person watches and reads: the status line, `metrics.jsonl`, sample grids and the run report.

Nothing here imports torch, so a report can be written anywhere a run directory has been copied to.
"""

from __future__ import annotations

import base64
import io
import json
import math
import os
import re
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .files import WriteError, write
from .health import sign_of, warnings

MAX_FRAMES = 24  # sample grids embedded in a report; evenly chosen from all that exist
MAX_PIXELS, MAX_BYTES = 1600, 400_000  # above these an image is embedded as a smaller JPEG
MAX_WARNINGS = 20
MAX_POINTS = 180  # of a curve as drawn; a long run has thousands

# Words of a metric's name that tell which way is better. A name with none of them is never ranked.
LOWER_IS_BETTER = {"fd", "fid", "kid", "mmd", "error", "mse", "seconds"}
HIGHER_IS_BETTER = {"retrieval", "accuracy", "clip", "precision", "recall", "density", "coverage", "psnr"}
NOT_RANKED = {"std", "stderr", "error_bar", "low", "high"}


# ---- grids ------------------------------------------------------------------------------------------------


def image_grid(
    images: np.ndarray,
    columns: int,
    *,
    labels: Sequence[str] | None = None,
    scale: int = 1,
    row_labels: Sequence[str] | None = None,
) -> Image.Image:
    """Arranges images row by row on white, with a gap of 1/32 of a cell (at least 2 px) between and around.

    Args:
        images: uint8 array (N, H, W, 3), 0..255.
        columns: Images per row; the last row may be shorter.
        labels: One caption below each image, at most two lines, shortened to the cell's width.
        scale: Integer factor of enlargement, nearest neighbour, so that pixels stay pixels.
        row_labels: One text left of each row.

    Returns:
        An RGB image. Without texts it is `columns * (W * scale + gap) + gap` pixels wide.

    Raises:
        ValueError: The array is not uint8 (N, H, W, 3) with N > 0, or a number of labels does not fit.
    """
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or not len(images):
        raise ValueError(f"images: expected uint8 (N, H, W, 3) with N > 0, got {images.dtype} {images.shape}")
    if columns < 1 or scale < 1:
        raise ValueError(f"columns and scale must be at least 1, got {columns} and {scale}")
    rows = -(-len(images) // columns)
    for name, texts, count in (("labels", labels, len(images)), ("row_labels", row_labels, rows)):
        if texts is not None and len(texts) != count:
            raise ValueError(f"{name}: expected {count} texts, got {len(texts)}")

    height, width = images.shape[1] * scale, images.shape[2] * scale
    gap = max(2, min(height, width) // 32)
    font = ImageFont.load_default(size=max(10, width // 11))
    line = sum(font.getmetrics())
    captions = [_wrap(text, font, width) for text in labels or ()]
    caption_height = line * max((len(c) for c in captions), default=0)
    sides = [" ".join(text.split()) for text in row_labels or ()]
    left = math.ceil(max((font.getlength(s) + 3 * gap for s in sides), default=0))
    step_x, step_y = width + gap, height + caption_height + gap

    grid = Image.new("RGB", (left + columns * step_x + gap, rows * step_y + gap), "white")
    draw = ImageDraw.Draw(grid)
    for i, image in enumerate(images):
        x, y = left + gap + i % columns * step_x, gap + i // columns * step_y
        grid.paste(Image.fromarray(image).resize((width, height), Image.Resampling.NEAREST), (x, y))
        for n, text in enumerate(captions[i] if captions else ()):
            draw.text((x + width / 2, y + height + n * line), text, "#555", font, anchor="ma")
    for n, text in enumerate(sides):
        draw.text((left - gap, gap + n * step_y + height / 2), text, "#222", font, anchor="rm")
    return grid


def _wrap(text: str, font: Any, width: int) -> list[str]:
    """At most two lines of about `width` pixels; what does not fit ends in an ellipsis."""
    per_character = 1.06 * font.getlength(text) / max(len(text), 1)
    return textwrap.wrap(text, max(4, int(width / max(per_character, 1))), max_lines=2, placeholder="…")


# ---- metrics.jsonl ----------------------------------------------------------------------------------------


class MetricsLog:
    """Append-only writer of `metrics.jsonl`: one JSON object a line, with `step`, `seconds` and scalars.

    Opening an existing file repairs a last line torn by a crash, so that appending continues on a new line.

    Args:
        path: The file; it and its folder are made when missing.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists() and not self.path.read_bytes().endswith(b"\n"):
            self._write_all(read_metrics(self.path))
        self._open()

    def _open(self) -> None:
        self._file = self.path.open("ab", buffering=0)

    def append(self, record: Mapping[str, Any]) -> None:
        """Writes one line at once. 0-d arrays and tensors become numbers; NaN and infinities become null."""
        line = _json_line(record).encode()
        try:
            while line:
                line = line[self._file.write(line) :]
        except OSError as error:
            reason = f"{error.strerror}; free some space, then resume"
            raise WriteError(f"{self.path}: cannot be written: {reason}") from error

    def truncate_after(self, step: int) -> None:
        """Drops records with `step` above the given one, atomically.

        A resumed run continues from a checkpoint that may be older than the last lines of its log.
        """
        records = read_metrics(self.path)
        kept = [r for r in records if (_finite(r.get("step")) or 0) <= step]
        if len(kept) < len(records):
            self._file.close()
            self._write_all(kept)
            self._open()

    def close(self) -> None:
        """Closes the file; calling it twice is fine."""
        self._file.close()

    def _write_all(self, records: Iterable[Mapping[str, Any]]) -> None:
        write(self.path, "".join(map(_json_line, records)))


def read_metrics(path: str | os.PathLike) -> list[dict[str, Any]]:
    """Reads `metrics.jsonl`; a missing file is empty, and lines that are no JSON object (torn) are skipped.

    Returns:
        The records in file order; values that were not finite are None.
    """
    records = []
    for line in _read_text(Path(path)).split("\n"):
        try:
            record = json.loads(line, parse_constant=lambda _: None)
        except ValueError:
            continue
        if isinstance(record, dict):
            records.append(record)
    return records


def _json_line(record: Mapping[str, Any]) -> str:
    values = {k: v.item() if hasattr(v, "item") else v for k, v in record.items()}
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
    return json.dumps(finite, allow_nan=False) + "\n"


# ---- status line ------------------------------------------------------------------------------------------


class StatusLine:
    """The trainer's progress bar; where stderr is no terminal, one printed line every ten seconds.

    Losses may be tensors: they are read only when the line is drawn, so an accelerator is not made to wait
    at every step.

    Args:
        total: Number of steps of the run.
        initial: Steps done before, when a run is resumed.
        quiet: Shows nothing, for instance on every rank but the first.
    """

    def __init__(self, total: int, initial: int = 0, quiet: bool = False):
        self.total, self.initial, self.quiet = total, initial, quiet
        self._bar = None
        if not quiet and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, initial=initial, unit="step", dynamic_ncols=True, mininterval=0)
        self._interval = 0.2 if self._bar is not None else 10.0  # seconds
        self._start = time.monotonic()
        self._due = self._start + self._interval

    def update(self, step: int, losses: Mapping[str, Any] | None = None) -> None:
        """Shows that `step` steps are done; costs a clock reading except a few times a second."""
        now = time.monotonic()
        if self.quiet or (now < self._due and step < self.total):
            return
        self._due = now + self._interval
        numbers = {k: float("nan") if v is None else float(v) for k, v in (losses or {}).items()}
        text = "  ".join(f"{name} {value:.3g}" for name, value in numbers.items())
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(step - self._bar.n)
        else:
            rate = max(step - self.initial, 1) / max(now - self._start, 1e-9)
            eta = _duration((self.total - step) / rate)
            self.write(f"step {step}/{self.total}  {rate:.3g} it/s  ETA {eta}  {text}")

    def write(self, text: str) -> None:
        """Prints a message above the bar."""
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        elif not self.quiet:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leaves the bar as it stands."""
        if self._bar is not None:
            self._bar.close()


# ---- the report -------------------------------------------------------------------------------------------


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
    `metrics.jsonl`, `samples/step_*.png`, `samples/teacher.png`, `samples/final.png`, `eval.json`,
    `export/README.md`. The file is replaced atomically, so it can stay open in a browser during a run.

    Args:
        run_dir: Existing directory of a run.

    Returns:
        Path of the report.
    """
    folder = Path(run_dir)
    run, evaluation = _read_json(folder / "run.json"), _read_json(folder / "eval.json")
    records = read_metrics(folder / "metrics.jsonl")
    rows = [{**row, "kind": _kind(row)} for row in _list(evaluation, "rows") if isinstance(row, dict)]
    title = _text(run.get("name")) or folder.resolve().name
    snippet = _snippet(_read_text(folder / "export" / "README.md"))
    sections = [
        _headline(folder, title, run, rows),
        _tiles(run, rows, records),
        _section("Evaluation", _table(rows) + _comparison(folder, evaluation, rows)),
        _section("Samples over time", _film(folder)),
        _section("Health", _health(folder, records)),
        _section(
            "Curves", _curves([{k: v for k, v in r.items() if not k.startswith("health/")} for r in records])
        ),
        _section("Use it", _code(snippet)),
        _section("Run", _details(run) + _fold("recipe.yaml", _code(_read_text(folder / "recipe.yaml")))),
    ]
    template = Path(__file__).with_name("report_template.html").read_text(encoding="utf-8")
    parts = {"title": escape(title), "body": "\n".join(filter(None, sections))}
    # One pass: braces inside a prompt or a recipe are text, not another placeholder.
    page = re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)
    write(folder / "report.html", page)
    return folder / "report.html"


def _headline(folder: Path, title: str, run: dict, rows: list[dict]) -> str:
    teacher, method, steps = (escape(_text(run.get(k))) for k in ("teacher", "method", "student_steps"))
    lead = f"<b>{teacher or 'A teacher'}</b>, distilled"
    lead += f" with <b>{method}</b>" if method else ""
    lead += f" into a student of <b>{steps} step{'s' * (steps != '1')}</b>" if steps else ""
    lead = f'<p class="lead">{lead}.</p>' if teacher or method else ""
    grids = [folder / "samples" / "final.png", _inside(folder, _best_student(rows).get("grid"))]
    picture = next(filter(None, map(_load, [*grids, *reversed(_steps(folder).values())])), None)
    layout = picture.layout if picture else "wide"
    text = f'<div><p class="eyebrow">fewstep run</p><h1>{escape(title)}</h1>{lead}</div>'
    return f'<header class="{layout}">{text}{_figure(picture, max_height=520)}</header>'


def _tiles(run: dict, rows: list[dict], records: list[dict]) -> str:
    """The numbers to remember: the best student beside the teacher, then what the run cost."""
    student, tiles = _best_student(rows), []
    teachers = [row for row in rows if row["kind"] == "teacher"]
    teacher = max(teachers, key=lambda row: _finite(row.get("nfe")) or 0, default={})
    for key in (k for k in _columns(rows) if k == "nfe" or direction(k)):
        value, reference = _finite(student.get(key)), _finite(teacher.get(key))
        if value is None:
            continue
        note = "" if reference is None else f"teacher {_text(reference)}"
        note += f", {reference / value:.3g}× more" if reference and 0 < 2 * value <= reference else ""
        tiles.append(("evaluations per image" if key == "nfe" else key, _text(value), note))
    last = records[-1] if records else {}
    steps = _finite(run.get("steps", last.get("step")))
    seconds = _finite(run.get("seconds", last.get("seconds")))
    if seconds is not None:
        tiles.append(("training time", _duration(seconds), "" if steps is None else f"{_text(steps)} steps"))
    parameters = run.get("parameters")
    parts = parameters.items() if isinstance(parameters, dict) else ()
    if count := sum(_finite(n) or 0 for name, n in parts if str(name).startswith("student")):
        tiles.append(("trained parameters", _short(count), "in the student"))
    tile = "<div><dt>{}</dt><dd>{}</dd><small>{}</small></div>"
    cells = "".join(tile.format(*map(escape, texts)) for texts in tiles)
    return f'<dl class="tiles">{cells}</dl>' if cells else ""


def _table(rows: list[dict]) -> str:
    """The evaluation, one line per sampler; the best value of each ranked column is marked."""
    columns, best, lines = _columns(rows), {}, ""
    for key in filter(direction, columns):
        # A reference, such as the autoencoder's reconstructions, is a ceiling and wins nothing.
        values = [_finite(row.get(key)) for row in rows if row["kind"] != "reference"]
        values = [value for value in values if value is not None]
        best[key] = (max if direction(key) > 0 else min)(values) if len(values) > 1 else None
    for row in rows:
        cells = ""
        for key in columns:
            wins = row["kind"] != "reference" and best.get(key) is not None and row.get(key) == best[key]
            cells += f"<td{' class=best' * wins}>{escape(_value(row, key) or '–')}</td>"
        lines += f'<tr class="{row["kind"]}"><th>{escape(_text(row.get("name")))}</th>{cells}</tr>'
    arrow = {-1: " ↓", 0: "", 1: " ↑"}
    head = ""
    for key in columns:
        name, _, space = key.partition("(")
        below = f"<br><small>{escape(space.rstrip(')'))}</small>" if space else ""
        head += f"<th>{escape(name)}{arrow[direction(key)]}{below}</th>"
    return f'<div class="scroll"><table><tr><th></th>{head}</tr>{lines}</table></div>' if rows else ""


def _comparison(folder: Path, evaluation: dict, rows: list[dict]) -> str:
    """Notes, and the rows' grids: teacher, student and floor at a glance, prompts in the same columns."""
    notes = "".join(f"<li>{escape(_text(note))}</li>" for note in _list(evaluation, "notes"))
    notes = f'<ul class="notes">{notes}</ul>' if notes else ""
    grids = [(row, picture) for row in rows if (picture := _load(_inside(folder, row.get("grid"))))]
    if not grids:
        return notes
    figures = "".join(_figure(picture, _text(row.get("name")), row["kind"]) for row, picture in grids)
    layout = grids[0][1].layout
    prompts = "".join(f"<span>{escape(_text(p))}</span>" for p in _list(evaluation, "prompts"))
    prompts = f'<div class="prompts">{prompts}</div>' if prompts and layout == "wide" else ""
    return f'{notes}<div class="grids {layout}">{figures}{prompts}</div>'


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
    curves = _curves([{k: v for k, v in r.items() if k in keys or k.startswith("health/")} for r in records])
    found = sorted((folder / "health").glob("step_*.png"))
    pictures = (
        _figure(_load(found[-1]), "student; teacher and critic behind noise", "student") if found else ""
    )
    shown = {sign.name: sign for r in records for key in r if (sign := sign_of(key))}
    notes = "".join(
        f"<li><b>{name}</b>: normal is {escape(sign.normal)}</li>" for name, sign in shown.items()
    )
    worries = "".join(f"<li><b>{escape(line)}</b></li>" for line in warnings(records)[:MAX_WARNINGS])
    return f"<ul>{worries}</ul>" * bool(worries) + f"{pictures}{curves}" + f"<ul>{notes}</ul>" * bool(curves)


def _curves(records: list[dict]) -> str:
    """Small charts grouped by the part of a metric's name before the slash, all on one axis of steps."""
    records = [r for r in records if _finite(r.get("step")) is not None]
    last = max((r["step"] for r in records), default=0)
    keys = dict.fromkeys(k for r in records for k, v in r.items() if v is None or isinstance(v, (int, float)))
    groups: dict[str, list[str]] = {}
    for key in (k for k in keys if k not in ("step", "seconds")):
        groups.setdefault(key.rpartition("/")[0], []).append(key)
    html = ""
    # Phases in the order of the log, then health, then what belongs to no phase (step time, memory).
    for i, group in enumerate(sorted(groups, key=lambda name: (not name, name == "health"))):
        charts = ""
        for key in groups[group]:
            pairs = [(r["step"], _finite(r[key])) for r in records if key in r]
            charts += _chart(key.rpartition("/")[2], *np.array(pairs, float).T, last)  # None becomes NaN
        html += f'<h3>{escape(group or "run")}</h3><div class="charts c{i % 4}">{charts}</div>'
    return html


def _chart(name: str, steps: np.ndarray, values: np.ndarray, last: float) -> str:
    """One curve as SVG: faint raw points, a smooth line, ticks at the foot where a value was not finite.

    Args:
        name: Title.
        steps: (N,) step numbers, rising.
        values: (N,) values; NaN marks one that was not finite.
        last: Right end of the axis, in steps.
    """
    ok = np.isfinite(values)
    steps, lost, y = steps[ok], steps[~ok], values[ok]
    log = len(y) > 1 and bool(y.min() > 0 and y.max() / y.min() > 100)
    y = np.log10(y) if log else y  # ticks and smoothing live in the axis' own unit
    number = (lambda unit: 10.0**unit) if log else float
    smooth = _smooth(y, max(len(y) // 50, int(len(y) ** 0.5 / 2)))
    low, high = (y.min(), y.max()) if len(y) else (0.0, 1.0)
    pad = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    to_x, to_y = _scale(0, max(last, 1), 42, 352), _scale(low - pad, high + pad, 140, 8)

    axes = ""
    for tick in _ticks(low - pad, high + pad, whole=log):
        axes += f'<path class="rule" d="M42 {to_y(tick):.1f}H352"/>'
        axes += f'<text x="36" y="{to_y(tick) + 3:.1f}" text-anchor="end">{_short(number(tick))}</text>'
    for tick in _ticks(0, max(last, 1)):
        axes += f'<text x="{to_x(tick):.1f}" y="155" text-anchor="middle">{_short(tick)}</text>'
    raw, line, hover = "", "", []
    # Points too dense to draw become bars from the lowest to the highest, so that spikes survive.
    for part in np.array_split(np.arange(len(y)), MAX_POINTS) if len(y) > MAX_POINTS else range(len(y)):
        i = np.max(part)
        x, at = round(float(to_x(steps[i])), 1), round(float(to_y(smooth[i])), 1)
        raw += f"M{x} {to_y(np.min(y[part])):.1f}V{to_y(np.max(y[part])):.1f}"
        line += f"{x},{at} "
        hover.append([x, at, int(steps[i]), _text(number(smooth[i]))])
    style = "bars" if len(y) > MAX_POINTS else "dots"
    bad = "".join(f"M{to_x(step):.1f} 140v-7" for step in lost[:: len(lost) // MAX_POINTS + 1])
    tag = "<i>log</i>" * log + f'<i class="bad">{len(lost)} not finite</i>' * (len(lost) > 0)
    latest = _text(number(smooth[-1])) if len(y) else "–"
    return (
        f"<figure><figcaption><b>{escape(name)}</b>{tag}<output>{latest}</output></figcaption>"
        f"<svg viewBox='0 0 360 160' data-points='{json.dumps(hover)}'>{axes}"
        f'<path class="{style}" d="{raw}"/><polyline points="{line}"/><path class="bad" d="{bad}"/>'
        f'<path class="guide" d="M0 8V140"/><circle r="3.2"/></svg></figure>'
    )


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    """The linear map that takes low to start and high to end."""
    return lambda value: start + (end - start) * (value - low) / (high - low)


def _smooth(values: np.ndarray, half: int) -> np.ndarray:
    """Centred running mean over `2 * half + 1` values, twice; windows are cut at the ends."""
    n = len(values)
    low, high = np.maximum(np.arange(n) - half, 0), np.minimum(np.arange(n) + half + 1, n)
    for _ in range(2):
        total = np.concatenate([[0.0], np.cumsum(values)])
        values = (total[high] - total[low]) / (high - low)
    return values


def _ticks(low: float, high: float, whole: bool = False) -> list[float]:
    """About three to six round positions in [low, high]; whole numbers for an axis in decades."""
    step = 10.0 ** math.floor(math.log10((high - low) / 3))
    step *= max(m for m in (1, 2, 5) if m == 1 or m * step <= (high - low) / 3)
    step = max(1, round(step)) if whole else step
    return [float(f"{i * step:.9g}") for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


# ---- pieces of the page -----------------------------------------------------------------------------------


def _section(title: str, body: str) -> str:
    return f"<section><h2>{title}</h2>{body}</section>" if body else ""


def _fold(title: str, body: str) -> str:
    return f"<details><summary>{title}</summary>{body}</details>" if body else ""


def _code(text: str) -> str:
    return f"<pre>{escape(text.strip())}</pre>" if text.strip() else ""


def _figure(picture: Picture | None, caption: str = "", kind: str = "", max_height: int = 10**4) -> str:
    """An image at up to twice its own size and at most `max_height` pixels high."""
    if picture is None:
        return ""
    width = min(2 * picture.width, round(max_height * picture.width / picture.height))
    size = f'width="{picture.width}" height="{picture.height}" style="max-width:min(100%,{width}px)"'
    source = f' src="{picture.uri}"' * bool(picture.uri)
    text = f"<figcaption>{escape(caption)}</figcaption>" * bool(caption)
    return f'<figure class="{kind}">{text}<img {size} alt="{escape(caption)}"{source}></figure>'


def _details(run: dict) -> str:
    """Everything in `run.json`; what is nested becomes one line."""
    lines = ""
    for key, value in run.items():
        if isinstance(value, dict):
            value = " · ".join(f"{k} {_text(v)}" for k, v in value.items())
        lines += f"<dt>{escape(key.replace('_', ' '))}</dt><dd>{escape(_text(value))}</dd>"
    return f'<dl class="details">{lines}</dl>' if lines else ""


def _snippet(markdown: str) -> str:
    """The first Python block of a model card."""
    block = re.search(r"```(?:python|py)\s*\n(.*?)```", markdown, re.DOTALL)
    return block[1] if block else ""


def _kind(row: dict) -> str:
    """What a row of the evaluation is about: its `kind`, or else the first word of its name."""
    text = _text(row.get("kind") or row.get("name")).lower()
    return next((kind for kind in ("teacher", "student", "floor") if text.startswith(kind)), "reference")


def _columns(rows: list[dict]) -> list[str]:
    """Columns of the table; a standard error stands beside its value, not in a column of its own."""
    keys = dict.fromkeys(k for row in rows for k in row)
    return [k for k in keys if k not in ("name", "kind", "grid") and not k.endswith("±")]


def _value(row: dict, key: str) -> str:
    error = _finite(row.get(f"{key} ±"))
    return _text(row.get(key)) + (f" ± {error:.2g}" if error else "")


def direction(metric: str) -> int:
    """1 when higher is better, -1 when lower is, 0 when the name does not tell."""
    words = set(re.findall("[a-z]+", metric.lower()))
    if words & NOT_RANKED:
        return 0
    return bool(words & HIGHER_IS_BETTER) - bool(words & LOWER_IS_BETTER)


def _best_student(rows: list[dict]) -> dict:
    """The student that is best by the first ranked column; {} without students."""
    key = next(filter(direction, _columns(rows)), "")
    worst = -math.inf
    score = lambda row: worst if (v := _finite(row.get(key))) is None else v * direction(key)  # noqa: E731
    return max((row for row in rows if row["kind"] == "student"), key=score, default={})


# ---- values and files -------------------------------------------------------------------------------------


def _finite(value: Any) -> float | None:
    """The value if it is a number that can be drawn, else None; the bound keeps axis arithmetic finite."""
    return value if isinstance(value, (int, float)) and abs(value) < 1e100 else None


def _text(value: Any) -> str:
    """A value from a JSON file for people: 0.0123, 1,234,567, 3.10e-5; nothing for None and NaN."""
    if isinstance(value, list):
        return ", ".join(map(_text, value))
    if isinstance(value, (bool, str)) or not isinstance(value, (int, float)):
        return "" if value is None else str(value)
    if _finite(value) is None:
        return ""
    if value == int(value) or abs(value) >= 1000:
        return f"{value:,.0f}" if abs(value) < 1e12 else f"{value:.3g}"
    return f"{value:.2e}".replace("e-0", "e-") if abs(value) < 1e-3 else f"{value:#.3g}".rstrip(".")


def _short(value: float) -> str:
    """A number in few characters, for axes: 2e-4, 0.05, 12, 1.5k, 3M."""
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if unit <= abs(value) < 1000 * unit:
            return f"{value / unit:.3g}{name}"
    return f"{value:.4g}".replace("e-0", "e-").replace("e+0", "e")


def _duration(seconds: float) -> str:
    """12 s, 11 min 32 s or 3 h 05 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600:,} h {whole % 3600 // 60:02} min"


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
            kind = Image.MIME[image.format]
            if max(image.size) > MAX_PIXELS or len(data) > MAX_BYTES:
                image.thumbnail((MAX_PIXELS, MAX_PIXELS))
                buffer = io.BytesIO()
                image.convert("RGB").save(buffer, "JPEG", quality=90)
                data, kind = buffer.getvalue(), "image/jpeg"
            return Picture(f"data:{kind};base64,{base64.b64encode(data).decode()}", *image.size)
    except (OSError, ValueError, KeyError, SyntaxError, Image.DecompressionBombError):
        return None


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(_read_text(path))
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}
