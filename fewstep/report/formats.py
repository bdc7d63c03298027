"""Numbers as people read them."""

from __future__ import annotations

from typing import Any


def drawable(value: Any) -> float | None:
    """The value if it is a number that can be drawn, else None; the bound keeps axis arithmetic finite."""
    return value if isinstance(value, (int, float)) and abs(value) < 1e100 else None


def pretty(value: Any) -> str:
    """A value from a JSON file for people: 0.0123, 1,234,567, 3.10e-5; nothing for None and NaN."""
    if isinstance(value, list):
        return ", ".join(map(pretty, value))
    if isinstance(value, (bool, str)) or not isinstance(value, (int, float)):
        return "" if value is None else str(value)
    if drawable(value) is None:
        return ""
    if value == int(value) or abs(value) >= 1000:
        return f"{value:,.0f}" if abs(value) < 1e12 else f"{value:.3g}"
    return f"{value:.2e}".replace("e-0", "e-") if abs(value) < 1e-3 else f"{value:#.3g}".rstrip(".")


def brief(value: float) -> str:
    """A number in few characters, for axes: 2e-4, 0.05, 12, 1.5k, 3M."""
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if unit <= abs(value) < 1000 * unit:
            return f"{value / unit:.3g}{name}"
    return f"{value:.4g}".replace("e-0", "e-").replace("e+0", "e")


def duration(seconds: float) -> str:
    """12 s, 11 min 32 s or 3 h 05 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600:,} h {whole % 3600 // 60:02} min"
