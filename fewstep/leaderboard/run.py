"""A leaderboard from start to end: trainings, one measurement for all, the page."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from ..errors import FewstepError
from ..evaluation.spec import slug
from ..files import held, write, write_json
from .board import RECORD, Board, Row, Run, hash_of, runs_of, to_dict
from .measure import Ruler
from .render import draw_sheet, to_html, to_markdown
from .summary import Records, better_half, summary
from .train import Place, found, train

NAME = "leaderboard"
SHOWN = 6  # kinds, and as many names, on the sheet


def leaderboard(
    board: Board,
    place: Place,
    command: str,
    rows: list[Row],
    *,
    jobs: int = 1,
    again: bool = False,
    every: bool = False,
) -> dict[str, Any]:
    """Trains the first seed of every row, measures, trains the other seeds of the better half, measures again.

    Args:
        command: for the record. rows: of the board, that are trained; all that there is of others is
            measured and shown with them. jobs: trainings at a time. again: failed runs, and those of other code, anew.
        every: all of the rows are trained with the other seeds, not the better half alone.

    Returns:
        What ``leaderboard.json`` in the board's folder holds.
    """
    with held(place.folder):
        write_json(place.folder / RECORD, to_dict(board))
        if rows:
            rulers_of(board, place)  # not kept: trainings need the memory
        first, rest = board.seeds[:1], board.seeds[1:]
        train(place, runs_of(board, rows, first), jobs, again)
        whole = measure(board, place, command)
        chosen = rows if every else [row for row in better_half(board, whole["rows"]) if row in rows]
        if rest and chosen:
            train(place, runs_of(board, chosen, rest), jobs, again)
            whole = measure(board, place, command)
    return whole


def rulers_of(board: Board, place: Place, name: str = "eval") -> dict[str, Ruler]:
    """One for each teacher, in folders of their own; says what is wrong with teachers and images."""
    return {
        one.path: Ruler(
            board, one, place.folder / name / f"{slug(Path(one.path).name)}-{hash_of(one.path)[:6]}"
        )
        for one in board.teachers
    }


def measure(board: Board, place: Place, command: str) -> dict[str, Any]:
    """Everything that is there, and the page of it."""
    rulers = rulers_of(board, place)
    others = {path: ruler.others() for path, ruler in rulers.items()}
    records: Records = {run.key: found(place, run) for run in runs_of(board, board.rows, board.seeds)}
    measured: dict[str, list[dict[str, Any]]] = {}
    for (label, _), record in records.items():
        if record and record["status"] == "done":
            teacher = Run(board, board.row(label), board.seeds[0]).recipe.teacher.path
            export = place.run(record["name"]) / "export"
            measured[record["name"]] = rulers[teacher].student(record["name"], export)
    whole = summary(board, records, measured, others, command)
    _render(whole, place, rulers)
    return whole


def _render(whole: dict[str, Any], place: Place, rulers: dict[str, Ruler]) -> None:
    one = next(iter(rulers.values()))
    shown = list(one.shown(SHOWN))
    folders = {path: ruler.out for path, ruler in rulers.items()}
    sheet = draw_sheet(whole, folders, shown, [one.prompts[i] for i in shown], place.folder / f"{NAME}.png")
    write_json(place.folder / f"{NAME}.json", whole)
    render(whole, place.folder, sheet)


def render(whole: dict[str, Any], folder: Path, sheet: bool) -> None:
    """``leaderboard.md`` and ``leaderboard.html``, from what ``leaderboard.json`` holds."""
    write(folder / f"{NAME}.md", to_markdown(whole))
    write(folder / f"{NAME}.html", to_html(whole, f"{NAME}.png" if sheet else None))


def keep(place: Place, results: Path) -> None:
    """Copies what is worth keeping to a folder of results: numbers, table, page, sheet and trials."""
    results.mkdir(parents=True, exist_ok=True)
    for suffix in ("json", "md", "html", "png"):
        if (file := place.folder / f"{NAME}.{suffix}").is_file():
            shutil.copyfile(file, results / file.name)
    if (trials := place.folder / "trials.jsonl").is_file():
        shutil.copyfile(trials, results / f"{NAME}_trials.jsonl")


def load(folder: Path) -> dict[str, Any]:
    """What a board's folder, or one of results, has kept.

    Raises:
        FewstepError: nothing.
    """
    try:
        whole: dict[str, Any] = json.loads((folder / f"{NAME}.json").read_text(encoding="utf-8"))
        if whole["schema"] == 1:
            return whole
    except (OSError, ValueError, KeyError) as error:
        raise FewstepError(f"{folder}: no {NAME}.json of `fewstep leaderboard` in it ({error})") from None
    raise FewstepError(f"{folder / NAME}.json: schema {whole['schema']}; expected 1")


def told(whole: dict[str, Any]) -> None:
    """What went wrong, for who reads the terminal."""
    for row in whole["rows"]:
        if row["status"] in ("failed", "partly"):
            print(f"fewstep: {row['name']}: {row['status']}", file=sys.stderr)
