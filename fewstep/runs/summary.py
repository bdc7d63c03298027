"""What a run was made on and with."""

from __future__ import annotations

import platform
from typing import Any

import torch

from ..device import name_of, peak, resident_peak
from ..process import Process
from ..version import __version__


def hardware(process: Process) -> str:
    if process.device.type == "cpu":
        return f"{process.world} process(es) on CPU, {torch.get_num_threads()} threads each"
    return f"{process.world} x {name_of(process.device)}"


def memory(process: Process) -> dict[str, Any]:
    """The most that this process has held so far, and of what."""
    most = peak(process.device)
    kind = "process, high-water mark" if most is None else "device's allocator"
    return {"peak_gb": round((resident_peak() if most is None else most) / 1e9, 2), "kind": kind}


def versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {"fewstep": __version__, "python": platform.python_version()}
    for package in ("torch", "diffusers", "transformers", "peft", "accelerate"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
