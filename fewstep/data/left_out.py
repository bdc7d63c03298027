"""Records that cannot be used: left out one by one while a run reads, counted, named and capped."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..errors import FewstepError, RecipeError
from ..files import ReadError, append

FILE = "left_out.jsonl"  # in a run's folder, or in that of a store: a record a line
NAMED = 10  # of them in a message


class BadRecord(FewstepError):
    """One record of a set is of no use; its message is the reason, in a few words."""


class TooSmall(BadRecord):
    """It would have to be enlarged."""


class LeftOut:
    """What was left out of a set so far.

    Args:
        source: of the set, for errors. total: records in it. share: of them that may be left out (``data.max_bad``).

    Attributes:
        reasons: record -> name and reason. path: file that keeps them, once there is a place for it.
        parts: of the set that it is a part of, itself among them, whose records count together.
    """

    def __init__(self, source: str, total: int, share: float):
        self.source, self.total, self.share = source, total, share
        self.reasons: dict[int, tuple[str, str]] = {}
        self.path: Path | None = None
        self.parts: Sequence[LeftOut] = [self]

    @staticmethod
    def count_together(parts: Sequence[LeftOut]) -> None:
        """Of the parts of one set as many may be left out as of the whole one, and not of each."""
        for part in parts:
            part.parts = parts

    def keep(self, path: Path) -> None:
        """From here on they are written to this file, those of before too; those that stand in it count.

        Raises:
            RecipeError: as :meth:`add`.
        """
        self.path, before = path, dict(self.reasons)
        self.reasons = {}
        self._read()
        self._write({record: before[record] for record in sorted(before.keys() - self.reasons.keys())})
        self.reasons |= before
        self.check()

    def add(self, record: int, name: str, reason: str) -> None:
        """Leaves one out, with a word on it.

        Raises:
            RecipeError: more than the share allows, with the first of their names.
        """
        for part in self.parts:
            if part.path:
                part._read()  # what other ranks have left out
        if self.path and record not in self.reasons:
            self._write({record: (name, reason)})
        self.reasons[record] = (name, reason)
        self.check()
        if len(self._all()) <= NAMED:
            print(f"fewstep: note: data.images: {name} is left out: {reason}", file=sys.stderr)

    def check(self, checked: int | None = None) -> None:
        """Refuses a set of which too much is of no use.

        Args:
            checked: records that have been looked at, where that is known.
        """
        found = self._all()
        if len(found) <= int(self.share * self.total):
            return
        named = [f"{name} ({reason})" for name, reason in found[:NAMED]]
        more = f" and {len(found) - NAMED} more" if len(found) > NAMED else ""
        raise RecipeError(
            f"data.images: {self.source}: {len(found)} of {checked or self.total} files cannot be read: "
            f"{', '.join(named)}{more}; remove or replace them (fewstep data check names all), or raise data.max_bad, "
            f"which allows {int(self.share * self.total)} of {self.total}"
        )

    def _all(self) -> list[tuple[str, str]]:
        return [one for part in self.parts for one in part.reasons.values()]

    def _write(self, found: Mapping[int, tuple[str, str]]) -> None:
        """Behind what stands there, in one piece: other ranks write to the same file. A line that a full disk has cut
        gets its end first."""
        if not found:
            return
        assert self.path is not None
        rows = ({"record": n, "name": a, "reason": b} for n, (a, b) in found.items())
        cut = self.path.is_file() and not self.path.read_bytes().endswith(b"\n")
        append(self.path, "\n" * cut + "".join(json.dumps(row) + "\n" for row in rows))

    def _read(self) -> None:
        assert self.path is not None
        try:
            text = self.path.read_text(encoding="utf-8", errors="replace") if self.path.is_file() else ""
        except OSError as error:
            raise ReadError(f"{self.path}: cannot be read ({error}); remove it") from error
        for line in text.split("\n")[:-1]:  # one without its end is being written
            with contextlib.suppress(
                ValueError, KeyError, TypeError
            ):  # of one that was cut the record is found again
                row = json.loads(line)
                self.reasons[row["record"]] = (row["name"], row["reason"])
