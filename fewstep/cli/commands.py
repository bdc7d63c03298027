"""How a command declares itself: name, help and arguments stand on top of the function that it calls."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, get_args

from ..bounds import Steps, refusal
from ..errors import FewstepError
from ..files import check_writable
from ..shape import Shape

Run = Callable[[argparse.Namespace], int]  # parsed arguments -> exit code


@dataclass(frozen=True)
class Argument:
    """What ``add_argument`` of a parser is given."""

    names: tuple[str, ...]
    options: dict[str, Any]


@dataclass(frozen=True)
class Output(Argument):
    """An argument that names what is written; checked before the command runs, see :func:`check_outputs`.

    Attributes:
        suffixes, record: see :func:`~fewstep.files.check_writable`.
    """

    suffixes: tuple[str, ...] = ()
    record: str | None = None


class Parser(argparse.ArgumentParser):
    """One line for what is wrong with a command, as everywhere."""

    def error(self, message: str) -> NoReturn:
        raise FewstepError(f"{message.removeprefix('argument ')}; see {self.prog} --help")


def argument(*names: str, **options: Any) -> Argument:
    return Argument(names, options)


def output(
    *names: str, suffixes: tuple[str, ...] = (), record: str | None = None, **options: Any
) -> Argument:
    return Output(names, {"type": Path, **options}, suffixes, record)


class Commands:
    """Commands in the order in which they were declared."""

    def __init__(self) -> None:
        self.declared: list[Callable[[Any], None]] = []  # each adds itself to the commands of a parser

    def command(
        self, name: str, text: str, *arguments: Argument, overrides: bool = False
    ) -> Callable[[Run], Run]:
        """Declares the decorated function a command.

        Args:
            text: of the help. overrides: it also takes options of a recipe, ``--a.b VALUE``, and finds them in
                ``args.overrides``.
        """

        def declare(run: Run) -> Run:
            def add(subparsers: Any) -> None:
                parser = subparsers.add_parser(name, help=text, description=text)
                parser.set_defaults(run=run, takes_overrides=overrides)
                outputs = {}
                for one in arguments:
                    dest = parser.add_argument(*one.names, **one.options).dest
                    if isinstance(one, Output):
                        outputs[dest] = one
                parser.set_defaults(outputs=outputs)

            self.declared.append(add)
            return run

        return declare

    def group(self, name: str, text: str, *parts: Commands) -> None:
        """Declares a command that has commands of its own."""

        def add(subparsers: Any) -> None:
            add_all(subparsers.add_parser(name, help=text), f"{name}_command", parts)

        self.declared.append(add)


def check_outputs(args: argparse.Namespace) -> None:
    """Refuses outputs that would replace what is not theirs, an input above all, or that cannot be written."""
    for dest, one in args.outputs.items():
        if (path := getattr(args, dest)) is not None:
            others = (value for name, value in vars(args).items() if name not in args.outputs)
            inputs = [place for value in others for place in _places(value)]
            check_writable(path, one.names[-1], one.suffixes, one.record, inputs)


def _places(value: Any) -> list[str | Path]:
    """Files that an argument may name: it, its items, and what follows a colon or = in it, as in ``clip:PATH``."""
    if isinstance(value, list | tuple):
        return [place for item in value for place in _places(item)]
    if isinstance(value, str):
        return [value, *(value[i + 1 :] for i, letter in enumerate(value) if letter in ":=")]
    return [value] if isinstance(value, Path) else []


def add_all(parser: argparse.ArgumentParser, dest: str, parts: Iterable[Commands]) -> None:
    """Gives a parser the commands of all parts; parsed arguments say under ``dest`` which it was."""
    subparsers = parser.add_subparsers(dest=dest, required=True, metavar="COMMAND")
    for part in parts:
        for add in part.declared:
            add(subparsers)


# Arguments of several commands.
DEVICE = argument("--device", help="auto (default), cpu, cuda, cuda:1, ...")
COLUMN = argument(
    "--column", metavar="NAME", help="of a table of prompts (default: its text, caption or prompt)"
)
RECIPE = argument("recipe", help="a name, a script or a recipe.yaml")
RUN = argument("run_folder", type=Path, metavar="RUN", help="folder of a run")

# What a pipeline's weights are besides its path, in the words of a recipe's `teacher`.
WEIGHTS = (
    argument("--variant", metavar="NAME", help="of a folder's weights, e.g. fp16"),
    argument("--config", metavar="FOLDER", help="pipeline whose parts a file of a network lacks"),
    argument(
        "--base-lora",
        action="append",
        default=[],
        metavar="FILE[=WEIGHT]",
        help="merged into it before anything else; may be repeated",
    ),
)


def weights_of(args: argparse.Namespace) -> dict[str, Any]:
    """The options ``WEIGHTS``, as :meth:`fewstep.teachers.origin.Origin.of` takes them."""
    loras = []
    for word in args.base_lora:
        there = Path(word).exists()  # a folder rank=8
        path, _, weight = ("", "", "") if there else word.rpartition("=")
        try:
            loras.append({"path": path, "weight": float(weight)} if path else {"path": word})
        except ValueError:  # the = is one of its name's
            loras.append({"path": word})
    return {"variant": args.variant, "config": args.config, "loras": tuple(loras)}


def number(hint: Any) -> Callable[[str], Any]:
    """Reads a number that keeps to an annotation, such as :data:`~fewstep.bounds.Count`."""
    kind = get_args(hint)[0]

    def read(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if expected := refusal(hint, value):
            whole = ", a whole number" if kind is int else ""
            raise argparse.ArgumentTypeError(f"{text}: expected {expected}{whole}")
        return value

    return read


def size(text: str) -> int | list[int]:
    """Of an image: the side of a square, or height and width."""
    sides = text.split("x")
    if len(sides) > 2 or not all(side.isdecimal() and int(side) for side in sides):
        raise argparse.ArgumentTypeError(f"{text}: expected at least 1, a whole number, or HEIGHTxWIDTH")
    return Shape.of([int(side) for side in sides] * (3 - len(sides))).said


def sizes(text: str) -> int | list[int] | dict[str, Any]:
    """One size as :func:`size`; of several, separated by commas, ``sizes`` and ``shares``, which are equal where none
    is given behind a colon."""
    words = [word.partition(":") for word in text.split(",")]
    if len(words) == 1:
        return size(text)
    found = [size(name) for name, _, _ in words]
    if any(colon for _, colon, _ in words):
        try:
            return {"sizes": found, "shares": [float(share) for _, _, share in words]}
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"{text}: expected a share behind each size, or behind none, such as 1024:2,832x1216:1"
            ) from None
    return {"sizes": found}


def integers(text: str) -> list[int]:
    """Numbers from 1 on, separated by commas."""
    values = [int(word) if word.strip().isdecimal() else math.nan for word in text.split(",")]
    if expected := refusal(Steps, values):
        raise argparse.ArgumentTypeError(f"{text}: expected {expected}, such as 1,2,4")
    return [int(value) for value in values]
