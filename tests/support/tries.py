"""What nobody would do by intention, tried and counted: refused in one message, or good; and nothing is lost."""

import contextlib
import io
import os
import stat
from pathlib import Path

from fewstep import cli
from fewstep.errors import FewstepError


@contextlib.contextmanager
def refused_or_good(tally):
    """Whatever happens inside is a clear refusal or nothing; yields a list that gets the message."""
    tally("inputs tried", 1)
    message = []
    try:
        yield message
    except FewstepError as error:
        message.append(str(error))
        assert str(error).strip()
        tally("refused with a clear error", 1)
    else:
        tally("accepted, being good", 1)


def tried(tally, *words):
    """Runs ``fewstep`` with some words, in this process; anything but an answer or one clear message is a failure.

    Returns:
        Exit code and what it said, of an error first.
    """
    tally("inputs tried", 1)
    said, shown = io.StringIO(), io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(shown):
        try:
            code = cli.main([str(word) for word in words])
        except SystemExit as stop:  # as a recipe's script ends
            code = stop.code
    lines = [line for line in said.getvalue().splitlines() if line.startswith(("fewstep: ", "fewstep eval"))]
    assert code in (0, 2, 3, 4), (words, code)
    if code:
        assert "Traceback" not in said.getvalue() and lines and "usage:" not in said.getvalue(), (
            said.getvalue()
        )
    tally("refused with a clear error" if code else "accepted, being good", 1)
    return code, said.getvalue() + shown.getvalue()


def contents(folder: Path) -> dict[str, object]:
    """Everything below a folder: the bytes of files, where links lead, and the kinds of the rest."""
    found = {}
    for place, folders, names in os.walk(folder):
        for name in (*folders, *names):
            path = Path(place, name)
            kind = stat.S_IFMT(path.lstat().st_mode)
            if stat.S_ISLNK(kind):
                found[str(path)] = os.readlink(path)
            else:
                found[str(path)] = path.read_bytes() if stat.S_ISREG(kind) else kind
    return found


@contextlib.contextmanager
def nothing_lost(tally, folder: Path, *named: Path):
    """What lies in a folder is there afterwards, as it was, but for files that the command may replace by name."""
    before = contents(folder)
    yield
    after = contents(folder)
    lost = [path for path, what in before.items() if after.get(path) != what and Path(path) not in named]
    tally("originals watched", len(before))
    tally("originals lost", len(lost))
    assert not lost, lost[:5]
