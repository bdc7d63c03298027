"""One phase of a command: a bar while it lasts, one line when it is done. Nothing here imports torch."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from typing import Any

from .formats import duration

SHORT = 1.0  # seconds; what took less is not worth a line


@dataclass
class Bar:
    """A context: a bar on a terminal, which makes way for one line, and elsewhere this line alone.

    Attributes:
        title: what is being done, e.g. "encoding". total: how many, None where nobody knows; 0 says nothing.
        unit: what is counted, in the plural. quiet: says nothing, for instance on every rank but the first.
        done: how many are.
    """

    title: str
    total: int | None = None
    unit: str = ""
    quiet: bool = False
    done: int = 0
    _bar: Any = None

    def update(self, count: int = 1) -> None:
        """So many more are done."""
        self.done += count
        if self._bar is not None:
            self._bar.update(count)

    def __enter__(self) -> Bar:
        self.quiet |= self.total == 0
        if not self.quiet and sys.stderr.isatty():
            from tqdm import tqdm

            title, unit = f"fewstep: {self.title}", f" {self.unit}"
            self._bar = tqdm(total=self.total, desc=title, unit=unit, dynamic_ncols=True, leave=False)
        self._begin = time.monotonic()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_error: object) -> None:
        if self._bar is not None:
            self._bar.close()
        seconds = time.monotonic() - self._begin
        if kind is None and not self.quiet and seconds >= SHORT:
            count = f"{self.done:,} {self.unit}, " if self.unit else ""
            print(f"fewstep: {self.title}: {count}{duration(seconds)}", file=sys.stderr, flush=True)
