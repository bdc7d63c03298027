"""Where fewstep keeps what can be made again."""

from __future__ import annotations

import os
from pathlib import Path

PLACE = "FEWSTEP_CACHE"  # the variable that says where


def cache_root() -> Path:
    """``$FEWSTEP_CACHE``, or ``fewstep`` in the user's cache folder."""
    base = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return Path(os.environ.get(PLACE, base / "fewstep"))
