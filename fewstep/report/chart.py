"""Curves of a run as SVG, for its report."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from html import escape

import numpy as np

from .formats import brief, drawable, pretty
from .health import sign_of

MAX_POINTS = 180  # of a curve as drawn; a long run has thousands


def curves(records: list[dict]) -> str:
    """Small charts grouped by the part of a metric's name before the slash, all on one axis of steps."""
    records = [r for r in records if drawable(r.get("step")) is not None]
    last = max((r["step"] for r in records), default=0)
    keys = dict.fromkeys(k for r in records for k, v in r.items() if v is None or isinstance(v, (int, float)))
    groups: dict[str, list[str]] = {}
    for key in (k for k in keys if k not in ("step", "seconds")):
        groups.setdefault(key.rpartition("/")[0], []).append(key)
    html = ""
    # Phases in the order of the log, then health, then what belongs to no phase (step time, memory).
    for i, group in enumerate(sorted(groups, key=lambda name: (not name, name == "health"))):
        charts = "".join(chart_of(key, records, last) for key in groups[group])
        html += f'<h3>{escape(group or "run")}</h3><div class="charts c{i % 4}">{charts}</div>'
    return html


def chart_of(metric: str, records: list[dict], last: float | None = None) -> str:
    """The chart of one logged number with its healthy range, if it has one; ``last`` is the right end of its axis."""
    x, y = np.array(
        [(r["step"], drawable(r[metric])) for r in records if metric in r], float
    ).T  # None becomes NaN
    sign = sign_of(metric)
    healthy = (sign.low, sign.high) if sign and math.isfinite(sign.low + sign.high) else None
    return _chart(metric.rpartition("/")[2], x, y, max(x) if last is None else last, healthy)


def _chart(
    name: str,
    steps: np.ndarray,
    values: np.ndarray,
    last: float,
    healthy: tuple[float, float] | None = None,
) -> str:
    """One curve as SVG: faint raw points, a smooth line, ticks at the foot where a value was not finite.

    Args:
        name: Title.
        steps: (N,) step numbers, rising.
        values: (N,) values; NaN marks one that was not finite.
        last: Right end of the axis, in steps.
        healthy: A range to shade, which is then on the axis in full.
    """
    ok = np.isfinite(values)
    steps, lost, y = steps[ok], steps[~ok], values[ok]
    log = not healthy and len(y) > 1 and bool(y.min() > 0 and y.max() / y.min() > 100)
    y = np.log10(y) if log else y  # ticks and smoothing live in the axis' own unit
    number = (lambda unit: 10.0**unit) if log else float
    smooth = _smooth(y, max(len(y) // 50, int(len(y) ** 0.5 / 2)))
    seen = [*y, *(healthy or ())]
    low, high = (min(seen), max(seen)) if seen else (0.0, 1.0)
    pad = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    to_x, to_y = _scale(0, max(last, 1), 42, 352), _scale(low - pad, high + pad, 140, 8)

    axes = outside = ""
    if healthy:
        top, foot = to_y(healthy[1]), to_y(healthy[0])
        axes += f'<rect class="healthy" x="42" y="{top:.1f}" width="310" height="{foot - top:.1f}"/>'
        if count := int(((y < healthy[0]) | (y > healthy[1])).sum()):
            outside = f'<i class="bad">{count} of {len(y)} outside</i>'
    for tick in _ticks(low - pad, high + pad, whole=log):
        axes += f'<path class="rule" d="M42 {to_y(tick):.1f}H352"/>'
        axes += f'<text x="36" y="{to_y(tick) + 3:.1f}" text-anchor="end">{brief(number(tick))}</text>'
    for tick in _ticks(0, max(last, 1)):
        x, anchor = (to_x(tick), "middle") if to_x(tick) < 340 else (358, "end")  # a centred one would be cut
        axes += f'<text x="{x:.1f}" y="155" text-anchor="{anchor}">{brief(tick)}</text>'
    raw, line, hover = "", "", []
    # Points too dense to draw become bars from the lowest to the highest, so that spikes survive.
    for part in np.array_split(np.arange(len(y)), MAX_POINTS) if len(y) > MAX_POINTS else range(len(y)):
        i = np.max(part)
        x, at = round(float(to_x(steps[i])), 1), round(float(to_y(smooth[i])), 1)
        raw += f"M{x} {to_y(np.min(y[part])):.1f}V{to_y(np.max(y[part])):.1f}"
        line += f"{x},{at} "
        hover.append([x, at, int(steps[i]), pretty(number(smooth[i]))])
    style = "bars" if len(y) > MAX_POINTS else "dots"
    bad = "".join(f"M{to_x(step):.1f} 140v-7" for step in lost[:: len(lost) // MAX_POINTS + 1])
    tag = "<i>log</i>" * log + outside + f'<i class="bad">{len(lost)} not finite</i>' * (len(lost) > 0)
    latest = pretty(number(smooth[-1])) if len(y) else "–"
    return (
        f"<figure><figcaption><b>{escape(name)}</b>{tag}<output>{latest}</output></figcaption>"
        f'<svg viewBox="0 0 360 160" role="img" aria-label="{escape(name)} over {last:g} steps, at last {latest}"'
        f" data-points='{json.dumps(hover)}'>{axes}"
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
