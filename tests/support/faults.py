"""A layer under everything that is written: the n-th operation fails, or the process dies there."""

import builtins
import errno
import io
import os

import safetensors.torch
from safetensors import SafetensorError

REASON = {errno.ENOSPC: "No space left on device", errno.EIO: "Input/output error"}
REASON[errno.EROFS] = "Read-only file system"  # what a cluster's disk becomes after a fault
LASTING = (errno.ENOSPC, errno.EROFS)


class Disk:
    """While it is entered, operation ``at`` (from 1) fails with ``error``, and all after it where that lasts.

    Operations are opening for writing, writing, making folders, flushing, renaming and linking, and what safetensors
    writes by itself. ``count`` is how many there were.

    Args:
        error: of the system; None kills the process at once, as SIGKILL or a loss of power would.
    """

    def __init__(self, at=0, error=errno.ENOSPC):
        self.at, self.error, self.count = at, error, 0

    def step(self):
        """Counts one operation; True where it must fail."""
        self.count += 1
        due = self.count == self.at or (self.error in LASTING and 0 < self.at < self.count)
        if due and self.error is None:
            os._exit(9)
        return due

    def failing(self, function):
        def call(path, *args, **kwargs):
            there = function is self.mkdir and os.path.isdir(path)  # nothing to write then
            if not there and self.step():
                raise OSError(self.error, REASON[self.error], str(path))
            return function(path, *args, **kwargs)

        return call

    def opening(self, function):
        def call(file, mode="r", *args, **kwargs):
            if not set(mode) & set("wax+") or not isinstance(file, str | os.PathLike):
                return function(file, mode, *args, **kwargs)
            if self.step():
                raise OSError(self.error, REASON[self.error], str(file))
            return File(function(file, mode, *args, **kwargs), self)

        return call

    def saving(self, function):
        def call(tensors, path, *args, **kwargs):
            failing = self.step()
            function(tensors, path, *args, **kwargs)
            if failing:
                os.truncate(path, os.path.getsize(path) // 2)
                raise SafetensorError(f"I/O error: {REASON[self.error]} (os error {self.error})")

        return call

    def __enter__(self):
        self.mkdir = os.mkdir
        targets = [(os, n, self.failing) for n in ("replace", "rename", "mkdir", "fsync", "link")]
        targets += [(builtins, "open", self.opening), (io, "open", self.opening)]
        targets += [(safetensors.torch, "save_file", self.saving)]
        self.before = [(place, name, getattr(place, name)) for place, name, _ in targets]
        for place, name, wrap in targets:
            setattr(place, name, wrap(getattr(place, name)))
        return self

    def __exit__(self, *_):
        for place, name, function in self.before:
            setattr(place, name, function)


class File:
    """A file whose every write is an operation; half of what a failing one was given is written."""

    def __init__(self, file, disk):
        self.__dict__.update(file=file, disk=disk)

    def write(self, data):
        if self.disk.step():
            self.file.write(data[: len(data) // 2])
            raise OSError(self.disk.error, REASON[self.disk.error])
        return self.file.write(data)

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()
