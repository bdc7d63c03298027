"""The command line. Heavy imports wait until a command runs, so ``fewstep --help`` is quick; all others wait until
Ctrl-C ends them well."""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from ..errors import interruptible, tell


def parser() -> argparse.ArgumentParser:
    """Of all commands; each module declares its own beside what they do."""
    from ..version import __version__
    from . import cost, data, doctor, eval, leaderboard, recipes, runs, teachers
    from .commands import Parser, add_all

    modules = (runs, teachers, data, eval, leaderboard, recipes, cost, doctor)
    main = Parser(
        prog="fewstep",
        description="Distill diffusion image models into 1 to 8 steps.",
        epilog="Exit codes: 0 done; 2 bad input; 3 the numbers went wrong; 4 a file cannot be read or written; "
        "5 another process was lost; 130, 138, 143 stopped by SIGINT, SIGUSR1, SIGTERM, at which training saves first. "
        "Slurm: "
        "#SBATCH --signal=USR1@120 and srun fewstep ..., or B:USR1@120 and exec fewstep ...; under torchrun also "
        "--signals-to-handle SIGTERM,SIGINT,SIGUSR1.",
    )
    main.add_argument("--version", action="version", version=__version__)
    add_all(main, "command", (module.COMMANDS for module in modules))
    return main


def main(arguments: list[str] | None = None) -> int:
    """Exit codes: 0 done; what else there is, :func:`fewstep.errors.tell` says."""
    try:
        with interruptible():
            try:
                return _run(sys.argv[1:] if arguments is None else arguments)
            finally:
                sys.stdout.flush()  # here, where it can still be said that this failed
    except BaseException as error:
        return tell(error)


def _run(words: Sequence[str]) -> int:
    from ..files import all_at_home
    from .commands import check_outputs

    whole = parser()
    args, rest = whole.parse_known_args(words)
    if rest and not args.takes_overrides:
        whole.error(f"unrecognized arguments: {' '.join(rest)}")
    args.overrides = rest
    for name, value in vars(args).items():  # a shell leaves the ~ of --out=~/x to us
        setattr(args, name, all_at_home(value))
    args.typed = _typed(words)
    if "device" in args:
        from ..device import choose

        args.device = str(choose(args.device, "--device"))
    check_outputs(args)
    return args.run(args)


def _typed(words: Sequence[str]) -> str:
    """The command as it can be given again, without the name of anyone's home folder.

    A shell takes ``~/x``, and leaves the ~ of ``--out=~/x`` and ``clip:~/x`` to :func:`at_home`.
    """
    home = re.compile(rf"(^|[=:]){re.escape(str(Path.home()))}(?=/|$)")
    short = (home.sub(r"\1~", word) for word in words)
    quoted = (f"~/{shlex.quote(word[2:])}" if word.startswith("~/") else shlex.quote(word) for word in short)
    return " ".join(["fewstep", *quoted])


if __name__ == "__main__":
    sys.exit(main())
