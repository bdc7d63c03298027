"""Commands of recipes: what there is, what they encode ahead of their runs."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..errors import FewstepError
from ..files import write
from ..runs.library import load_recipe, recipe_files
from .commands import RECIPE, Commands, argument

COMMANDS = Commands()


@COMMANDS.command(
    "recipes",
    "list the recipes, or copy one to change it",
    argument("action", nargs="?", choices=["list", "copy"], default="list"),
    argument("name", nargs="?", help="of the one to copy"),
    argument("to", nargs="?", default=".", help="folder, made where there is none, or file.py"),
)
def recipes(args: argparse.Namespace) -> int:
    if args.action == "copy":
        print(_copy(args.name or "", Path(args.to)))
        return 0
    for name, path in recipe_files().items():
        first = next((line for line in path.read_text().splitlines() if line.startswith('"""')), "")
        print(f"{name:24} {first.strip(chr(34))}")
    return 0


def _copy(name: str, to: Path) -> Path:
    source = recipe_files().get(name)
    if source is None:
        raise FewstepError(f"recipes copy: {name!r} is none of {', '.join(recipe_files())}")
    target = to if to.suffix == source.suffix and not to.is_dir() else to / source.name
    if there := next((path for path in (target, to) if path.exists() and not path.is_dir()), None):
        raise FewstepError(f"recipes copy: {there} exists already; give another place")
    target.parent.mkdir(parents=True, exist_ok=True)
    write(target, source.read_bytes())
    return target


@COMMANDS.command(
    "methods",
    "list the methods",
    argument(
        "--markdown", action="store_true", help="as a table, with what they need and end in, and their papers"
    ),
)
def methods(args: argparse.Namespace) -> int:
    from ..extensions import plugins
    from ..methods import METHODS

    if args.markdown:
        print(methods_table())
        return 0
    plugins()
    for name, cls in sorted(METHODS.items()):
        print(f"{name:14} {cls.steps:10} {cls.summary}")
    return 0


def methods_table() -> str:
    """What every method's class says of itself, as README has it."""
    from ..methods import METHODS

    lines = ["| method | what it is | steps | papers |", "|---|---|---|---|"]
    for name, cls in sorted(METHODS.items()):
        papers = ", ".join(f"[{number}](https://arxiv.org/abs/{number})" for number in cls.papers)
        cells = (f"[`{name}`](docs/methods/{name}.md)", cls.summary, cls.steps, papers)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


@COMMANDS.command(
    "cache",
    "encode a recipe's prompts and images ahead of its runs; goes on where it stopped",
    RECIPE,
    overrides=True,
)
def cache(args: argparse.Namespace) -> int:
    from ..recipe import override
    from ..runs import session

    for name, store in session.cache(override(load_recipe(args.recipe), args.overrides)).items():
        size = sum(path.stat().st_size for path in store.folder.iterdir())
        print(f"{name:16} {len(store):9} rows {size / 1e6:10.1f} MB  {store.folder}")
    return 0
