"""Commands of what a recipe costs: measured, and counted before anything is loaded."""

from __future__ import annotations

import argparse
import json
import sys

from ..bounds import Count
from ..errors import FewstepError
from ..files import write_json
from ..runs.library import load_recipe
from .commands import RECIPE, Commands, argument, number, output

COMMANDS = Commands()


@COMMANDS.command(
    "bench",
    "what a step takes: seconds, memory, arithmetic, and where they go",
    RECIPE,
    argument("--iterations", type=number(Count), default=30, help="that are timed"),
    argument("--baseline", choices=["bare"], help="time a loop of the same network calls beside it"),
    argument(
        "--random-weights", action="store_true", help="random weights of the teacher's shape, noise for data"
    ),
    output("--out", suffixes=(".json",), help="also write the result there, as JSON"),
    overrides=True,
)
def bench(args: argparse.Namespace) -> int:
    from ..cost import bench as benches

    recipe, rest = load_recipe(args.recipe), args.overrides
    measured = benches.bench(recipe, rest, args.iterations, args.baseline, args.random_weights)
    if args.out:
        write_json(args.out, {"recipe": args.recipe, "arguments": rest, **measured})
    print(json.dumps(measured, indent=1))
    return 0


@COMMANDS.command(
    "plan",
    "memory, arithmetic and hours of a recipe, counted before anything is loaded",
    RECIPE,
    argument("--gpu", default="h100-80gb", help="card, e.g. h100-80gb, or what names one: 4090"),
    argument("--processes", type=number(Count), default=1, help="cards, each with a process of its own"),
    argument("--json", action="store_true", help="instead of a table"),
    overrides=True,
)
def plan(args: argparse.Namespace) -> int:
    from ..cost.devices import GPUS, named

    gpu = named(args.gpu)
    if gpu is None:
        raise FewstepError(f"--gpu {args.gpu}: expected one of {', '.join(GPUS)}")
    from .. import cost
    from ..recipe import override
    from ..runs.disk import doubt

    made = cost.plan(override(load_recipe(args.recipe), args.overrides), args.processes, quiet=False)
    print(json.dumps(made.to_dict(gpu), indent=1) if args.json else made.text(gpu))
    if note := doubt(made.cache):
        print(f"fewstep: note: {note}", file=sys.stderr)
    cost.check_fits(made, gpu, quiet=False)
    return 0
