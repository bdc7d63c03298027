"""``fewstep doctor``: versions, devices, extras, and pairs of packages known to break each other."""

from __future__ import annotations

import importlib.util
import platform
from importlib.metadata import PackageNotFoundError, version

NEEDED = (
    "torch",
    "diffusers",
    "transformers",
    "peft",
    "accelerate",
    "safetensors",
    "numpy",
    "pillow",
    "pydantic",
)
EXTRAS = ("torchvision", "xformers", "clean-fid", "torchmetrics", "scipy")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def problems() -> list[str]:
    """One line per fault, with its remedy."""
    found = [f"{p} is missing: pip install {p}" for p in NEEDED if _version(p) is None]
    if importlib.util.find_spec("torchvision") is not None:
        try:
            import torchvision  # noqa: F401
        except Exception as error:
            found.append(
                f"torchvision does not load beside this torch ({str(error).splitlines()[0]}), and breaks transformers, "
                "diffusers and peft with it: uninstall it, or install the build that belongs to this torch"
            )
    return found


def report() -> tuple[str, bool]:
    """(text, healthy)."""
    lines = [f"python {platform.python_version()} on {platform.system()} {platform.machine()}"]
    for package in (*NEEDED, *EXTRAS):
        found = _version(package)
        lines.append(
            f"{package:14} {found or ('missing' if package in NEEDED else 'not installed (optional)')}"
        )
    if _version("torch"):
        import torch

        if torch.cuda.is_available():
            cards = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
            lines += [
                f"cuda:{i}         {c.name}, {c.total_memory / 1e9:.0f} GB" for i, c in enumerate(cards)
            ]
        else:
            lines.append(f"no CUDA device; {torch.get_num_threads()} CPU threads")
    faults = problems()
    lines += ["", *(f"PROBLEM: {fault}" for fault in faults)] if faults else ["", "no problem found"]
    return "\n".join(lines), not faults
