"""Small line plots with error bars, as SVG text."""

import math
from dataclasses import dataclass
from html import escape

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#888888")  # Okabe and Ito's
DASHES = {"solid": "none", "dashed": "6 3", "dotted": "2 2"}  # CSS border style: SVG dash array
LEFT, RIGHT, TOP, BOTTOM = 52, 352, 8, 180


@dataclass(frozen=True)
class Series:
    """One line: `points` are (x, value, standard error), sorted by x."""

    name: str
    points: list[tuple[float, float, float]]


def style_of(i: int) -> tuple[str, str]:
    """Colour and border style of the i-th line, different for the first 21."""
    return COLOURS[i % len(COLOURS)], list(DASHES)[i // len(COLOURS) % len(DASHES)]


def legend(names: list[str]) -> str:
    """One for all plots whose lines go by these names."""
    keys = ""
    for i, name in enumerate(names):
        colour, style = style_of(i)
        keys += f'<li><span style="border-top: 3px {style} {colour}"></span>{escape(name)}</li>'
    return f'<ul class="legend">{keys}</ul>'


def plot(title: str, series: list[Series], names: list[str], logarithmic: bool = False) -> str:
    """A figure with one line per series, or nothing without series.

    Args:
        title: of the values. series: the lines.
        names: of all lines that `legend` shows; the place of a name decides how its line looks.
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
        svg += f'<text x="{LEFT - 5}" y="{to_y(y) + 4:.1f}" text-anchor="end">{y:.4g}</text>'
    for line in series:
        colour, style = style_of(names.index(line.name))
        places = [(to_x(to_unit(x)), to_y(y), to_y(y - e), to_y(y + e)) for x, y, e in line.points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y, _, _ in places)
        look = f'fill="none" stroke="{colour}" stroke-width="1.6" stroke-dasharray="{DASHES[style]}"'
        svg += f'<g><title>{escape(line.name)}</title><polyline points="{path}" {look}/>'
        for x, y, low, high in places:
            svg += f'<path d="M{x:.1f} {low:.1f}V{high:.1f}" stroke="{colour}"/>'
            radius = 4 if len(places) == 1 else 2.6  # a student at its only number of steps
            svg += f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" fill="{colour}"/>'
        svg += "</g>"
    return f'<figure><figcaption>{escape(title)}</figcaption><svg viewBox="0 0 360 200">{svg}</svg></figure>'


def _scale(values: list[float], start: float, end: float):
    """The linear map of the range of values to start..end; the middle for a single value."""
    low, high = min(values), max(values)
    if high == low:
        return lambda value: (start + end) / 2
    return lambda value: start + (end - start) * (value - low) / (high - low)
