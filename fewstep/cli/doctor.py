"""``fewstep doctor``: versions, devices, extras, and pairs of packages known to break each other."""

from __future__ import annotations

import argparse
import platform
import subprocess
import sys
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, requires, version

from .commands import Commands

COMMANDS = Commands()

# Extras: package -> what it is for.
EXTRAS = {
    "torchvision": "published evaluation networks and other tools",
    "xformers": "memory-efficient attention",
    "torchao": "moments of optimisers in 8 bits",
    "clean-fid": "cross-checks of FID",
    "torchmetrics": "cross-checks of FID",
}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def needed() -> dict[str, str]:
    """Package -> what versions of it fewstep supports, from its own metadata."""
    from packaging.requirements import Requirement

    wanted = [Requirement(line) for line in requires("fewstep") or ()]
    return {r.name: str(r.specifier) for r in wanted if r.marker is None or r.marker.evaluate({"extra": ""})}


def problems() -> list[str]:
    """One line per fault, with its remedy."""
    return [*unmet("fewstep"), *(line for package in needed() for line in unmet(package)), *bad_pairs()]


def unmet(package: str) -> list[str]:
    """What an installed package declares to need and does not find, or finds in another version."""
    from packaging.requirements import Requirement

    found = []
    for wanted in map(Requirement, requires(package) or () if _version(package) else ()):
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        have = _version(wanted.name)
        if have is None or not wanted.specifier.contains(have, prereleases=True):
            state = "is missing" if have is None else f"is {have}"
            found.append(
                f"{package} {_version(package)} needs {wanted.name}{wanted.specifier}, which {state}: "
                f"pip install '{wanted.name}{wanted.specifier}'"
            )
    return found


def bad_pairs() -> list[str]:
    """Packages that come in builds for one torch each, and take others down with them beside another one."""
    found = []
    for package in ("torchvision", "xformers"):
        if _version(package) and (reason := _does_not_load(package)):
            found.append(
                f"{package} {_version(package)} does not load beside torch {_version('torch')} ({reason}), and breaks "
                "transformers, diffusers and peft with it: uninstall it, or install the build for this torch"
            )
    return found


def _does_not_load(package: str) -> str | None:
    """Tried in another process: a build for another torch can end this one."""
    done = subprocess.run([sys.executable, "-c", f"import {package}"], capture_output=True, text=True)
    lines = done.stderr.strip().splitlines()
    return (lines[-1] if lines else f"exit code {done.returncode}") if done.returncode else None


def chosen(devices: Iterable[str]) -> list[str]:
    """What ``auto`` in a recipe's teacher becomes on each device, and why."""
    from ..diffusion.kernels import FEW, bf16_units, choose_attention, choose_autocast

    lines = []
    for device in devices:
        kind = device.split(":")[0]
        autocast, why = choose_autocast(kind, bf16_units(device))
        lines.append(f"{f'autocast: auto on {device}':32} {autocast or 'null, so float32'}: {why}")
        few, many = (choose_attention(kind, autocast, n) for n in (FEW, FEW + 1))
        large = f"; {many[0]} for larger samples" if few != many else ""
        lines.append(f"{f'attention: auto on {device}':32} {few[0]}: {few[1]}{large}")
    return lines


def report() -> tuple[str, bool]:
    """(text, healthy)."""
    lines = [f"python {platform.python_version()} on {platform.system()} {platform.machine()}"]
    for package, specifier in needed().items():
        lines.append(f"{package:32} {_version(package) or 'missing'}   (needs {specifier})")
    for package, purpose in EXTRAS.items():
        lines.append(f"{package:32} {_version(package) or f'not installed (optional: {purpose})'}")
    if _version("torch"):
        from ..device import all_of_them

        devices = all_of_them()
        lines += [f"{device!s:32} {what}" for device, what in devices.items()]
        lines += chosen(devices)
    faults = problems()
    lines += ["", *(f"PROBLEM: {fault}" for fault in faults)] if faults else ["", "no problem found"]
    return "\n".join(lines), not faults


@COMMANDS.command("doctor", "versions, devices, extras, known bad pairs")
def doctor(args: argparse.Namespace) -> int:
    text, healthy = report()
    print(text)
    return 0 if healthy else 1
