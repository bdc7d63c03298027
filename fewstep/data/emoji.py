"""The built-in image set: 1,906 emoji, each with its Unicode name and a caption that it shares with its kind.

Notices in ``fewstep/assets/emoji/NOTICE``. Members of the file are compressed by LZMA, for the wheel's size.
"""

from functools import cache
from pathlib import Path

import numpy as np

PATH = Path(__file__).parent.parent / "assets" / "emoji" / "emoji-64.npz"


def _read(name: str) -> np.ndarray:
    with np.load(PATH, allow_pickle=False) as data:
        found: np.ndarray = data[name]
    return found


@cache
def load() -> tuple[np.ndarray, list[str]]:
    """Images uint8 (1906, 64, 64, 3) on white and their captions, e.g. ``"red apple"``."""
    return _read("images"), names()


@cache
def names() -> list[str]:
    """The captions alone."""
    return [str(caption) for caption in _read("captions")]


@cache
def groups() -> list[str]:
    """A caption for each image that it shares with its kind, e.g. ``"any food fruit"``: 98 of them, 1 to 259 images.

    A name is drawn nearly one way; these leave a student something to integrate over.
    """
    return ["any " + str(kind).replace("-", " ").replace("&", "and") for kind in _read("subcategory")]


def prompts(source: str) -> list[str] | None:
    """``builtin:emoji`` is both captions of every image, ``-names`` and ``-groups`` one of them; None: not ours.

    ``builtin:emoji-mostly-names`` is every name twice for once its group: there are twenty times as many names.
    """
    built_in = {
        "builtin:emoji": [*names(), *groups()],
        "builtin:emoji-mostly-names": [*names() * 2, *groups()],
        "builtin:emoji-names": names(),
        "builtin:emoji-groups": groups(),
    }
    return built_in.get(source)
