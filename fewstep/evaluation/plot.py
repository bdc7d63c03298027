"""Small line plots with error bars, as SVG text."""

import math
from dataclasses import dataclass
from html import escape

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#888888")  # Okabe and Ito's
LEFT, RIGHT, TOP, BOTTOM = 52, 352, 8, 180


@dataclass(frozen=True)
class Series:
    """One line: `points` are (x, value, standard error), sorted by x."""

    name: str
    points: list[tuple[float, float, float]]


def plot(title: str, series: list[Series], logarithmic: bool = False) -> str:
    """A figure with one line per series, or nothing without series.

    Args:
        title: of the values. series: the lines.
        logarithmic: axis of x, if all x are above 0.
    """
    if not series:
        return ""
    xs = [x for line in series for x, _, _ in line.points]
    ends = [y + sign * error for line in series for _, y, error in line.points for sign in (-1, 1)]
    to_unit = math.log10 if logarithmic and min(xs) > 0 else float
    to_x = _scale([to_unit(x) for x in xs], LEFT + 10, RIGHT - 10)
    to_y = _scale(ends, BOTTOM - 8, TOP + 8)
    svg = f'<path d="M{LEFT} {TOP}V{BOTTOM}H{RIGHT}" fill="none" stroke="#8888"/>'
    for x in sorted(set(xs)) if len(set(xs)) <= 6 else (min(xs), max(xs)):
        svg += f'<text x="{to_x(to_unit(x)):.1f}" y="{BOTTOM + 14}" text-anchor="middle">{x:.3g}</text>'
    for y in (min(ends), (min(ends) + max(ends)) / 2, max(ends)):
        svg += f'<text x="{LEFT - 5}" y="{to_y(y) + 4:.1f}" text-anchor="end">{y:.3g}</text>'
    for i, line in enumerate(series):
        colour = COLOURS[i % len(COLOURS)]
        places = [(to_x(to_unit(x)), to_y(y), to_y(y - e), to_y(y + e)) for x, y, e in line.points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y, _, _ in places)
        svg += f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.6"/>'
        for x, y, low, high in places:
            svg += f'<path d="M{x:.1f} {low:.1f}V{high:.1f}" stroke="{colour}"/>'
            svg += f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.6" fill="{colour}"/>'
        y = BOTTOM + 34 + 15 * i
        svg += f'<circle cx="{LEFT}" cy="{y - 4}" r="4" fill="{colour}"/>'
        svg += f'<text x="{LEFT + 10}" y="{y}">{escape(line.name)}</text>'
    height = BOTTOM + 40 + 15 * len(series)
    return f'<figure><figcaption>{escape(title)}</figcaption><svg viewBox="0 0 360 {height}">{svg}</svg></figure>'


def _scale(values: list[float], start: float, end: float):
    """The linear map of the range of values to start..end; the middle for a single value."""
    low, high = min(values), max(values)
    if high == low:
        return lambda value: (start + end) / 2
    return lambda value: start + (end - start) * (value - low) / (high - low)
