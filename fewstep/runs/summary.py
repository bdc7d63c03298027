"""What a run was made on and with."""

from __future__ import annotations

import platform

import torch

from ..device import name_of
from ..process import Process
from ..version import __version__


def hardware(process: Process) -> str:
    if process.device.type == "cpu":
        return f"{process.world} process(es) on CPU, {torch.get_num_threads()} threads each"
    return f"{process.world} x {name_of(process.device)}"


def versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {"fewstep": __version__, "python": platform.python_version()}
    for package in ("torch", "diffusers", "transformers", "peft", "accelerate"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
