"""What a run tells while it trains: `metrics.jsonl` and the status line.

Nothing here imports torch.
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..files import WriteError, read_text, write
from .formats import drawable, duration
from .health import sign_of

# Words of a metric's name that tell which way is better. A name with none of them is never ranked.
LOWER_IS_BETTER = {"fd", "fid", "kid", "mmd", "error", "mse", "seconds"}
HIGHER_IS_BETTER = {"retrieval", "accuracy", "clip", "precision", "recall", "density", "coverage", "psnr"}
NOT_RANKED = {"std", "stderr", "error_bar", "low", "high"}


class MetricsLog:
    """Append-only writer of `metrics.jsonl`: one JSON object a line, with `step`, `seconds` and scalars.

    Opening an existing file repairs a last line torn by a crash, so that appending continues on a new line.

    Args:
        path: The file; it and its folder are made when missing.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists() and not self.path.read_bytes().endswith(b"\n"):
            self._write_all(read_metrics(self.path))
        self._open()

    def _open(self) -> None:
        self._file = self.path.open("ab", buffering=0)

    def append(self, record: Mapping[str, Any]) -> None:
        """Writes one line at once. 0-d arrays and tensors become numbers; NaN and infinities become null."""
        line = _json_line(record).encode()
        try:
            while line:
                line = line[self._file.write(line) :]
        except OSError as error:
            reason = f"{error.strerror}; free some space, then resume"
            raise WriteError(f"{self.path}: cannot be written: {reason}") from error

    def truncate_after(self, step: int) -> None:
        """Drops records with `step` above the given one, atomically.

        A resumed run continues from a checkpoint that may be older than the last lines of its log.
        """
        records = read_metrics(self.path)
        kept = [r for r in records if (drawable(r.get("step")) or 0) <= step]
        if len(kept) < len(records):
            self._file.close()
            self._write_all(kept)
            self._open()

    def close(self) -> None:
        """Closes the file; calling it twice is fine."""
        self._file.close()

    def _write_all(self, records: Iterable[Mapping[str, Any]]) -> None:
        write(self.path, "".join(map(_json_line, records)))


def read_metrics(path: str | os.PathLike) -> list[dict[str, Any]]:
    """Reads `metrics.jsonl`; a missing file is empty, and lines that are no JSON object (torn) are skipped.

    Returns:
        The records in file order; values that were not finite are None.
    """
    records = []
    for line in read_text(Path(path)).split("\n"):
        try:
            record = json.loads(line, parse_constant=lambda _: None)
        except ValueError:
            continue
        if isinstance(record, dict):
            records.append(record)
    return records


def _json_line(record: Mapping[str, Any]) -> str:
    values = {k: v.item() if hasattr(v, "item") else v for k, v in record.items()}
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
    return json.dumps(finite, allow_nan=False) + "\n"


class StatusLine:
    """The trainer's progress bar; where stderr is no terminal, one printed line a minute.

    Losses may be tensors: they are read only when the line is drawn, so an accelerator is not made to wait
    at every step. What else is in the log, norms and vital signs, is for the report.

    Args:
        total: Number of steps of the run.
        initial: Steps done before, when a run is resumed.
        quiet: Shows nothing, for instance on every rank but the first.
    """

    def __init__(self, total: int, initial: int = 0, quiet: bool = False):
        self.total, self.initial, self.quiet = total, initial, quiet
        self._bar = None
        if not quiet and sys.stderr.isatty():
            from tqdm import tqdm

            about: dict[str, Any] = {"desc": "fewstep: training", "unit": " steps"}
            self._bar = tqdm(total=total, initial=initial, dynamic_ncols=True, mininterval=0, **about)
        self._interval = 0.2 if self._bar is not None else 60.0  # seconds
        self._start = time.monotonic()
        self._due = self._start + self._interval

    def update(self, step: int, losses: Mapping[str, Any] | None = None) -> None:
        """Shows that `step` steps are done; costs a clock reading except a few times a second."""
        now = time.monotonic()
        if self.quiet or (now < self._due and step < self.total):
            return
        self._due = now + self._interval
        shown = {k: v for k, v in (losses or {}).items() if sign_of(k) is None}
        numbers = {k: float("nan") if v is None else float(v) for k, v in shown.items()}
        text = "  ".join(f"{name} {value:.3g}" for name, value in numbers.items())
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(step - self._bar.n)
        else:
            rate = max(step - self.initial, 1) / max(now - self._start, 1e-9)
            eta = duration((self.total - step) / rate)
            left = f"{eta} left" if step < self.total else duration(now - self._start)
            self.write(f"fewstep: training: {step}/{self.total} steps, {rate:.3g}/s, {left}  {text}")

    def write(self, text: str) -> None:
        """Prints a message above the bar."""
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        elif not self.quiet:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leaves the bar as it stands."""
        if self._bar is not None:
            self._bar.close()


def direction(metric: str) -> int:
    """1 when higher is better, -1 when lower is, 0 when the name does not tell."""
    words = set(re.findall("[a-z]+", metric.lower()))
    if words & NOT_RANKED:
        return 0
    return bool(words & HIGHER_IS_BETTER) - bool(words & LOWER_IS_BETTER)
