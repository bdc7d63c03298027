"""Errors that a user can act on, and what a command ends with.

Every message names the field or file, the value, what was expected and the remedy, and is raised before
expensive work starts. The command line prints the message alone, without a traceback.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import threading
import types
from collections.abc import Iterator


class FewstepError(ValueError):
    """Bad input: a recipe field, a file, a teacher. The message is complete in itself.

    Attributes:
        code: exit code of a command that ends with it.
    """

    code = 2


class RecipeError(FewstepError):
    """A recipe that cannot run; the message starts with the dotted path of the field."""


class TrainingError(FewstepError):
    """The numbers went wrong while they were made: not finite, nothing learnt, not what was trained."""

    code = 3


class LostProcess(FewstepError):
    """Another process of the run has ended, or cannot be reached."""

    code = 5


class Interrupted(FewstepError):
    """Training was asked to stop by a signal, and its state is saved.

    Args:
        how: the command that goes on, None where nothing was saved.
    """

    def __init__(self, number: int, step: int, how: str | None):
        saved = f", saved; continue with: {how}" if how else ""
        super().__init__(f"stopped by {signal.Signals(number).name} at step {step}{saved}")
        self.number, self.step, self.code = number, step, 128 + number


def why(error: BaseException) -> str | None:
    """What the operating system says, where it was the system that refused; safetensors wraps it in words."""
    if isinstance(error, OSError) and error.errno:
        return error.strerror or str(error)
    if type(error).__name__ == "SafetensorError" and "os error" in str(error):
        return str(error)
    return None


def in_line(error: BaseException) -> str:
    """What a library says, in one line of bearable length."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 400 else text[:397] + "..."


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """While it is entered, Ctrl-C ends an import at once, with the exit code of :func:`tell`.

    An exception in the middle of one leaves modules, and libraries in C, half made: they abort the process, or fail in
    words of their own. Anywhere else it is a KeyboardInterrupt as ever; where another handler is set, that one stays.
    """

    def stop(number: int, frame: types.FrameType | None) -> None:
        while frame:
            if frame.f_code.co_filename.startswith("<frozen importlib"):
                os.write(2, b"fewstep: stopped\n")
                os._exit(128 + number)
            frame = frame.f_back
        raise KeyboardInterrupt

    mine = threading.current_thread() is threading.main_thread()
    if not mine or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _unread() -> bool:
    """Whether nobody reads what is printed any more, as where ``head`` has its lines; what is left is thrown away."""
    with contextlib.suppress(AttributeError, OSError):  # a system without poll, an output that is no file
        output = sys.stdout.fileno()
        pipe = select.poll()
        pipe.register(output, 0)  # asks for nothing, and is told of an end all the same
        if pipe.poll(0):
            os.dup2(os.open(os.devnull, os.O_WRONLY), output)  # the interpreter writes the rest as it ends
            return True
    return False


def tell(error: BaseException) -> int:
    """Prints what ended a command, in one message, and returns the exit code.

    0 done; 2 bad input; 3 the numbers went wrong (not finite, nothing learnt, an export that is off); 4 a file cannot
    be read or written; 5 another process was lost; 128 + N signal N (130 SIGINT, 138 SIGUSR1, 143 SIGTERM), at which
    training saves first. Where nobody reads the output any more there is nothing to say, as with any other tool (141).

    Raises:
        BaseException: the error itself, where it is a fault of ours and wants its traceback.
    """
    if isinstance(error, BrokenPipeError) and _unread():
        return 128 + signal.SIGPIPE
    if isinstance(error, FewstepError):
        message, code = str(error), error.code
    elif isinstance(error, KeyboardInterrupt):
        message, code = str(error) or "stopped", 128 + signal.SIGINT
    elif type(error).__name__ == "OutOfMemoryError":  # torch's, of whatever device
        message, code = (
            f"{str(error).splitlines()[0]} `fewstep plan RECIPE` says what fits: a smaller train.batch_size with "
            "as much more train.accumulate, teacher.gradient_checkpointing true, or teacher.dtype bfloat16",
            2,
        )
    elif reason := why(error):
        name = getattr(error, "filename", None) or "a file"
        message, code = f"{name}: {reason}; mend that and run the command again", 4
    else:
        raise error
    print(f"fewstep: {message}", file=sys.stderr)
    return code
