"""Result files side by side, if they can be compared at all."""

import json
from pathlib import Path
from typing import Any

from fewstep.errors import FewstepError
from fewstep.evaluation.statistics import table


def load_result(path: str | Path) -> dict[str, Any]:
    """Reads what `fewstep eval ... --out` wrote."""
    if not Path(path).is_file():
        raise FewstepError(
            f"{path} {'is a folder' if Path(path).is_dir() else 'does not exist'}: expected a result, "
            "as `fewstep eval ... --out FILE.json` writes it"
        )
    try:
        result = json.loads(Path(path).read_text(encoding="utf-8"))
        problem = _fault(result)
        if problem is None:
            return result
    except (OSError, ValueError, KeyError, TypeError) as error:
        problem = str(error) or type(error).__name__
    raise FewstepError(f"{path} is no result of `fewstep eval` ({problem}): write one with --out FILE.json")


def _fault(result: dict[str, Any]) -> str | None:
    """What in it is not as `evaluate_images` writes it."""
    if result["schema"] != 1:
        return f"schema {result['schema']}"
    sides = [result[side] for side in ("real", "fake")]
    if not all(isinstance(x, dict) for x in (*sides, result["extractor"], result["metrics"])):
        return "real, fake, extractor and metrics are not all mappings"
    if odd := [side for side in sides if not {"name", "n", "sha256"} <= {*side}]:
        return f"a side is {odd[0]}"
    for label, entry in result["metrics"].items():
        value, error = entry["value"], entry["error"]
        if not _is_number(value) or not (error is None or _is_number(error)):
            return f"{label} is {value!r} ± {error!r}"
    warnings = result["warnings"]
    if not (isinstance(warnings, list) and all(isinstance(warning, str) for warning in warnings)):
        return f"warnings is {warnings!r}"
    return None


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def compare(results: dict[str, dict[str, Any]]) -> str:
    """A Markdown table, one column per result, one row per metric.

    Args:
        results: name of the column to result, two or more; made with one protocol, one extractor and one
            reference.

    Raises:
        FewstepError: unlike results, with a table of what differs.
    """
    if len(results) < 2:
        raise FewstepError(f"a comparison needs at least 2 results, got {len(results)}")
    check_alike(results)
    # A label of a small sample holds its count, but equal counts were just checked: the labels agree.
    labels = list(dict.fromkeys(label for result in results.values() for label in result["metrics"]))
    rows = [(label, *(cell(result["metrics"].get(label)) for result in results.values())) for label in labels]
    return table(("metric", *results), rows)


def check_alike(results: dict[str, dict[str, Any]]) -> None:
    """Refuses results of another protocol, extractor, reference or count, with a table of what differs."""
    facts = {name: _conditions(result) for name, result in results.items()}
    first = next(iter(facts.values()))
    unlike = [
        (key, *(str(fact[key]) for fact in facts.values()))
        for key in first
        if any(fact[key] != first[key] for fact in facts.values())
    ]
    if unlike:
        raise FewstepError(
            "these results cannot be compared, because they were not made in the same way:\n"
            + table(("", *facts), unlike)
        )


def _conditions(result: dict[str, Any]) -> dict[str, Any]:
    protocol = result.get("protocol")
    return {
        "protocol": json.dumps(protocol, sort_keys=True) if protocol else "none",
        **result["extractor"],
        "real images": result["real"]["sha256"] or result["real"]["name"],
        "n real": result["real"]["n"],
        "n fake": result["fake"]["n"],
    }


def cell(entry: dict[str, Any] | None) -> str:
    """A value with its standard error, or nothing."""
    if entry is None:
        return ""
    return f"{entry['value']:.4g}" + ("" if entry["error"] is None else f" ± {entry['error']:.2g}")
