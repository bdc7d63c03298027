"""Signals that ask a run to stop."""

from __future__ import annotations

import contextlib
import signal
import time

# Slurm's warning before the time is up is what --signal asks for, by custom USR1; torchrun hands it on if told to.
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]

# One request can come more than once: a terminal and a launcher both hand Ctrl-C on, Linux tells of a parent's death
# once for each thread of it.
AT_ONCE = 1.0  # seconds


class StopSignal(contextlib.AbstractContextManager["StopSignal"]):
    """While it is entered, the first of :data:`SIGNALS` is only noted; one that comes later ends the program at once.

    Attributes:
        number: of the signal that came; None for none yet.
    """

    def __init__(self) -> None:
        self.number: int | None = None

    def _note(self, number: int, _frame: object) -> None:
        now = time.monotonic()
        if self.number is None:
            self.number, self._since = number, now
        elif now - self._since > AT_ONCE:
            raise KeyboardInterrupt

    def __enter__(self) -> StopSignal:
        try:
            self._before = {s: signal.signal(s, self._note) for s in SIGNALS}
        except ValueError:  # not the main thread, e.g. a notebook's worker
            self._before = {}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
