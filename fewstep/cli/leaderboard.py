"""The command of a leaderboard: many recipes under one budget."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..bounds import Count, Count0, Part, Positive
from ..errors import FewstepError
from ..files import SHARED
from .commands import Commands, argument, number, output

COMMANDS = Commands()


@COMMANDS.command(
    "leaderboard",
    "many recipes under one budget: train, measure alike, show; goes on where it was stopped",
    argument("board", metavar="BOARD.yaml", help="rows, teachers, budget: see eval/boards"),
    output(
        "--to",
        record="board.json",
        required=True,
        metavar="DIR",
        help="gets leaderboard.json and all it is of",
    ),
    argument(
        "--minutes",
        type=number(Positive),
        metavar="M",
        help="of two cores for a row, in place of the board's",
    ),
    argument("--seeds", type=number(Count), metavar="N", help="the first N of the board's"),
    argument(
        "--every-seed", action="store_true", help="train all seeds of every row, not of the better half alone"
    ),
    argument("--only", nargs="+", default=[], metavar="ROW", help="train these, and what they start from"),
    argument("--jobs", type=number(Count), default=1, metavar="N", help="trainings at a time (default: 1)"),
    argument("--again", action="store_true", help="train failed runs, and those of other code, again"),
    argument("--render-only", action="store_true", help="train nothing: measure and show what there is"),
    argument(
        "--search",
        type=number(Count0),
        default=0,
        metavar="N",
        help="instead: N trials a row, and the board of the best, settled.yaml",
    ),
    argument(
        "--share", type=number(Part), default=0.2, metavar="S", help="of a row's iterations in a trial (0.2)"
    ),
    output("--results", record=SHARED, metavar="DIR", help="also keep numbers, table, page and sheet there"),
)
def leaderboard(args: argparse.Namespace) -> int:
    from ..leaderboard import run, search
    from ..leaderboard.board import chosen, load_board, resized
    from ..leaderboard.train import Place

    if args.search and (args.render_only or args.again or args.results or args.every_seed):
        raise FewstepError(
            "--search: runs trials alone; leave out --render-only, --again, --every-seed and --results"
        )
    if args.render_only and (args.again or args.every_seed or args.only):
        raise FewstepError("--render-only: trains nothing; leave out --again, --every-seed and --only")
    board = resized(load_board(args.board), args.minutes and 120 * args.minutes, args.seeds)
    rows = chosen(board, args.only)
    place = Place(args.to)
    if args.search:
        search.search(board, place, args.search, args.share, rows, args.jobs)
        print(place.folder / search.SETTLED)
        return 0
    if args.render_only:
        rows = []
    decide = {"--minutes": args.minutes, "--seeds": args.seeds}
    words = [f"{name} {value:g}" for name, value in decide.items() if value]
    words += ["--every-seed"] * args.every_seed
    command = " ".join(["fewstep leaderboard", Path(args.board).name, *words])
    how = {"jobs": args.jobs, "again": args.again, "every": args.every_seed}
    whole = run.leaderboard(board, place, command, rows, **how)
    run.told(whole)
    if args.results:
        run.keep(place, args.results)
    print(place.folder / f"{run.NAME}.html")
    return 0
