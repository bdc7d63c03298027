"""Trains the runs of a board, each by ``fewstep train`` in a process of its own, and keeps a record of each.

A record says which recipe and code a run is of, what it cost, and how it ended. Finished runs are not run again,
stopped ones go on from their checkpoints, failed ones stay with their reason.
"""

from __future__ import annotations

import ast
import ctypes
import dataclasses
import functools
import glob
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import FewstepError
from ..files import held, read_text, write_json
from ..methods import METHODS as KNOWN
from ..methods import get_method
from ..report.formats import duration
from .board import Run, words

SIGNALS = (signal.SIGINT, signal.SIGUSR1, signal.SIGTERM)
STOPPED = {128 + n for n in SIGNALS} | {
    -n for n in SIGNALS
}  # see errors.tell; or before anything was there to save
KEPT = ("steps", "seconds", "cpu_seconds", "parameters", "hardware", "memory", "arithmetic", "versions")
METHODS = Path("methods")
PACKAGE = __name__.partition(".")[0]
STUDENTLESS = ("cli", "cost", "evaluation", "leaderboard", "report")  # folders that no training depends on


@functools.cache
def code_hash(method: str) -> str:
    """Hash of the package's code as far as trainings of a method depend on it; comments and docstrings may change.

    Of the files of methods those count that the method's own file imports, directly or through others, and those that
    the rest of the package imports. For a method from elsewhere all of them count, and its own code does not.
    """
    sources = _sources()
    every = {name for name in sources if name.parent == METHODS}
    own = _file_of(get_method(method).__module__)
    needed = _reached(sources, every, own) if own in every else every
    state = hashlib.sha256()
    for name, source in sources.items():
        if name not in every or name in needed:
            state.update(f"{name.as_posix()}\n{source}\n".encode())
    return state.hexdigest()[:12]


@functools.cache
def _sources() -> dict[Path, str]:
    package = Path(__file__).parents[1]
    files = {path.relative_to(package): path for path in sorted(package.rglob("*.py"))}
    return {
        name: _bare(path.read_text(encoding="utf-8"))
        for name, path in files.items()
        if name.parts[0] not in STUDENTLESS
    }


def _file_of(module: str) -> Path | None:
    """``methods/terms.py`` for ``fewstep.methods.terms`` and for all that is in it; None for modules elsewhere."""
    inside = module.removeprefix(f"{PACKAGE}.{METHODS}.")
    return None if inside == module else METHODS / f"{inside.partition('.')[0]}.py"


def _reached(sources: Mapping[Path, str], every: set[Path], own: Path) -> set[Path]:
    """Files of methods that are imported by one, by code that is no method's, or by one of these."""
    found = {METHODS / "__init__.py", own}
    for name in sources.keys() - every:
        found |= every & _imported(name, sources[name])
    left = [*found]
    while left:
        name = left.pop()
        new = (every & _imported(name, sources[name])) - found
        found |= new
        left += new
    return found


@functools.cache
def _imported(name: Path, source: str) -> set[Path | None]:
    """Files of methods that a file of the package may import, in whatever way and wherever it does."""
    folder, modules = (PACKAGE, *name.parent.parts), set[str]()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = folder[: len(folder) + 1 - node.level] if node.level else ()
            begin = ".".join([*above, *([node.module] if node.module else [])])
            modules |= {f"{begin}.{alias.name}" for alias in node.names}
    return {_file_of(module) for module in modules}


def _bare(source: str) -> str:
    """Code without what only people read."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        inner = getattr(node, "body", None)
        if isinstance(inner, list) and inner and isinstance(inner[0], ast.Expr):
            value = inner[0].value
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                inner[0] = ast.Expr(ast.Constant(""))
    return ast.unparse(tree)


@dataclass(frozen=True)
class Place:
    """The folder of a board: ``runs/``, ``pairs/``, ``records/``, ``logs/``, ``eval/``."""

    folder: Path

    def run(self, name: str) -> Path:
        return self.folder / "runs" / name

    def record(self, name: str) -> Path:
        return self.folder / "records" / f"{name}.json"

    def log(self, name: str) -> Path:
        return self.folder / "logs" / f"{name}.txt"

    def pairs(self, run: Run) -> Path:
        return self.folder / "pairs" / run.pairs_digest


def code_of(run: Run) -> str:
    return code_hash(run.source.method_class.name)


def name_of(run: Run, code: str) -> str:
    return f"{run.row.label}-s{run.seed}-{run.digest}-{code}"


def found(place: Place, run: Run) -> dict[str, Any] | None:
    """The record of a run: of today's code, else of the newest other one that finished, else of any other; or None."""
    records = [
        read(path) for path in (place.folder / "records").glob(f"{glob.escape(name_of(run, ''))}*.json")
    ]
    today = name_of(run, code_of(run))

    def key(record: dict[str, Any]) -> tuple[bool, bool, float]:
        newest = place.record(record["name"]).stat().st_mtime
        return record["name"] == today, record["status"] == "done", newest

    return max(records, key=key, default=None)


def read(path: Path) -> dict[str, Any]:
    """A record.

    Raises:
        FewstepError: it is damaged.
    """
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if {"name", "status", "code"} <= record.keys():
            return record
    except (OSError, ValueError, AttributeError):
        pass
    raise FewstepError(f"{path}: no record of a run; remove it, and its run is made again")


def stale(record: dict[str, Any]) -> bool:
    """Whether other code than today's has trained it, or a part of it.

    What it starts from, and who made its pairs, may be of another method, and have that one's code.
    """
    return not {*record["code"]} <= {code_hash(method) for method in KNOWN}


class Stopped(Exception):
    """A child has been asked to stop, and has saved."""


class Children:
    """Processes that end with this one.

    Args:
        threads: that each may use.
    """

    def __init__(self, threads: int):
        self.threads, self.live, self.lock = threads, set[subprocess.Popen[bytes]](), threading.Lock()
        self.stopping = False

    def call(self, command: list[str], log: Path) -> tuple[int, float]:
        """Exit code and CPU seconds of ``fewstep COMMAND``; what it says goes to the log.

        Raises:
            Stopped: it was, or all are.
        """
        log.parent.mkdir(parents=True, exist_ok=True)
        count = str(self.threads)
        environment = {**os.environ, **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), count)}
        with log.open("ab") as stream, self.lock:
            if self.stopping:
                raise Stopped
            child = subprocess.Popen(
                [sys.executable, "-m", "fewstep", *command],
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,  # Ctrl-C is for this process, which passes it on once
                preexec_fn=_end_with_parent,
            )
            self.live.add(child)
        _, status, used = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        with self.lock:
            self.live.discard(child)
        if child.returncode in STOPPED or self.stopping:
            raise Stopped
        return child.returncode, used.ru_utime + used.ru_stime

    def stop(self) -> None:
        with self.lock:
            self.stopping = True
            for child in self.live:
                child.terminate()


LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def _end_with_parent() -> None:
    """Where the system can (Linux), a child whose parent is killed saves and ends; elsewhere it goes on to its end."""
    if LIBC:
        LIBC.prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def train(place: Place, runs: Iterable[Run], jobs: int = 1, again: bool = False) -> None:
    """Trains what is not trained yet, those that others start from first.

    Args:
        jobs: processes at a time. again: failed runs, and those of other code, too.

    Raises:
        KeyboardInterrupt: all that ran have saved, and go on next time.
    """
    left = {run.key: run for run in _with_those_before(runs)}.values()
    if not left:
        return
    pace = Pace(sum(not _over(found(place, run), again) for run in left))
    children = Children(next(iter(left)).board.threads)
    with ThreadPoolExecutor(jobs) as pool:
        done: dict[tuple[str, int], Future[None]] = {}
        pairs: dict[str, Future[None]] = {}  # who makes them
        for run in left:
            earlier = [done[run.before.key]] if run.before else []
            earlier += [pairs[run.pairs_digest]] if run.row.pairs and run.pairs_digest in pairs else []
            done[run.key] = pool.submit(_one, place, children, run, earlier, again, pace)
            if run.row.pairs:
                pairs.setdefault(run.pairs_digest, done[run.key])
        try:
            for future in done.values():
                future.result()
        except BaseException as error:
            children.stop()
            for future in done.values():
                future.cancel()
            if isinstance(error, Stopped):
                raise KeyboardInterrupt("stopped; the same command goes on") from None
            raise


def _with_those_before(runs: Iterable[Run]) -> Iterator[Run]:
    for run in runs:
        if run.before:
            yield from _with_those_before([run.before])
        yield run


class Pace:
    """How many runs are left, and for how long at the pace so far."""

    def __init__(self, count: int):
        self.count, self.ended, self.begin, self.lock = count, 0, time.monotonic(), threading.Lock()

    def one_ended(self) -> str:
        with self.lock:
            self.ended += 1
            left = self.count - self.ended
            seconds = (time.monotonic() - self.begin) / self.ended * left
        return f"{left} of {self.count} runs left, about {duration(seconds)}" if left else "the last run"


def _one(
    place: Place, children: Children, run: Run, earlier: list[Future[None]], again: bool, pace: Pace
) -> None:
    for future in earlier:  # submitted before, so that it runs already
        future.result()
    record = found(place, run)
    if _over(record, again):
        return
    if record is None or (record["status"] != "running" and record["name"] != name_of(run, code_of(run))):
        record = {"name": name_of(run, code_of(run)), "code": []}
    record = _begun(run, record)
    with held(place.run(record["name"])):
        pass  # another board's child may still be at work there, and says so
    write_json(place.record(record["name"]), record)
    print(f"fewstep: {run.row.label}, seed {run.seed}: {run.row.steps} iterations", file=sys.stderr)
    reason = _prepared(place, children, run, record) or _trained(place, children, run, record)
    ended = {"status": "failed", "reason": reason} if reason else _ended(place.run(record["name"]))
    write_json(place.record(record["name"]), {**record, **ended})
    told = f"failed: {reason}" if reason else f"{ended['cpu_seconds']:.0f} s of a core"
    print(f"fewstep: {run.row.label}, seed {run.seed}: {told}; {pace.one_ended()}", file=sys.stderr)


def _over(record: dict[str, Any] | None, again: bool) -> bool:
    """Whether a run is not trained any more; with ``again`` failed ones are, and those of other code."""
    if record is None or record["status"] == "running":
        return False
    return not (again and (record["status"] == "failed" or stale(record)))


def _begun(run: Run, record: dict[str, Any]) -> dict[str, Any]:
    code = [*record["code"], *[code_of(run)] * (code_of(run) not in record["code"])]
    return {
        "name": record["name"],
        "row": run.row.label,
        "recipe": run.row.recipe if "/" not in run.row.recipe else Path(run.row.recipe).name,
        "method": run.source.method_class.name,
        "seed": run.seed,
        "options": run.options(),
        "digest": run.digest,
        "code": code,
        "threads": run.board.threads,
        "status": "running",
        "before": [],
    }


def _prepared(place: Place, children: Children, run: Run, record: dict[str, Any]) -> str | None:
    """Makes pairs and finds the student to start from; what they cost goes to the record. Why they are not there."""
    if run.row.pairs:
        made = _pairs(place, children, run)
        if not made["whole"]:
            return f"pairs: {made['reason']}"
        record["before"].append({"what": f"{made['num']} pairs", "cpu_seconds": made["cpu_seconds"]})
        record["code"] = sorted({*record["code"], *made["code"]})
    if run.before:
        earlier = found(place, run.before)
        if earlier is None or earlier["status"] != "done":
            return f"{run.before.row.label}, which it starts from, has failed"
        cost = sum(part["cpu_seconds"] for part in earlier["before"]) + earlier["cpu_seconds"]
        record["before"].append({"what": run.before.row.label, "cpu_seconds": round(cost, 1)})
        record["code"] = sorted({*record["code"], *earlier["code"]})
    return None


def _pairs(place: Place, children: Children, run: Run) -> dict[str, Any]:
    """The record of a run's pairs, which are made where they are not whole; it has the cost of attempts that failed."""
    asked, name = run.row.pairs, f"pairs-{run.pairs_digest}"
    assert asked is not None
    made: dict[str, Any] = json.loads(read_text(place.record(name)) or "{}")
    if made.get("whole"):
        return made
    given = {key: value for key, value in dataclasses.asdict(asked).items() if value is not None}
    command = ["pairs", run.row.recipe, f"--out={place.pairs(run)}", *words(given), *words(run.options())]
    code, cpu = children.call(command, place.log(name))
    made = {
        "whole": code == 0,
        "reason": _last(place.log(name), code) if code else None,
        "num": asked.num,
        "cpu_seconds": round(cpu + made.get("cpu_seconds", 0.0), 1),
        "code": sorted({*made.get("code", []), code_of(run)}),
    }
    write_json(place.record(name), made)
    return made


def _trained(place: Place, children: Children, run: Run, record: dict[str, Any]) -> str | None:
    """Why it could not be."""
    folder = place.run(record["name"])
    if (folder / "recipe.yaml").is_file():
        command = ["resume", str(folder)]
    else:
        command = ["train", run.row.recipe, f"--output={folder}", *words(run.options())]
        if run.pairs:
            command.append(f"--data.pairs={place.pairs(run.pairs)}")
        if run.before and (earlier := found(place, run.before)):
            command.append(f"--roles.student.start_from={place.run(earlier['name']) / 'export'}")
    code, _ = children.call(command, place.log(record["name"]))
    if code:
        return _last(place.log(record["name"]), code)
    shutil.rmtree(
        folder / "checkpoints", ignore_errors=True
    )  # the export is what is measured, and started from
    return None


def _ended(folder: Path) -> dict[str, Any]:
    made = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    return {"status": "done", **{key: made[key] for key in KEPT}}


def _last(log: Path, code: int) -> str:
    """What a child that failed said last, without the places of this machine's files."""
    lines = [line.strip() for line in read_text(log).splitlines() if line.strip()]
    said = lines[-1].removeprefix("fewstep: ") if lines else ""
    how = f"signal {-code}" if code < 0 else f"exit code {code}"
    return f"{said.replace(str(Path.cwd()) + os.sep, '')[:300]} ({how})"
