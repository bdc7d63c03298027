"""The built-in image set: 1,906 emoji, each with its Unicode name and a caption that it shares with its kind.

Notices in ``fewstep/assets/emoji/NOTICE``. Members of the file are compressed by LZMA, for the wheel's size.
"""

from functools import cache
from pathlib import Path

import numpy as np

PATH = Path(__file__).parent.parent / "assets" / "emoji" / "emoji-64.npz"
SMALL = "builtin:emoji-32"  # the same drawings at half the side, each under its kind, for labels of `builtin:emoji-edm`


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


def kinds() -> list[str]:
    """The 98 kinds by their numbers, which are the class labels of ``builtin:emoji-edm``."""
    return sorted(set(groups()))


@cache
def small() -> np.ndarray:
    """Images uint8 (1906, 32, 32, 3): means of four pixels, which ``builtin:emoji-edm`` was trained on."""
    images = load()[0]
    n, side = len(images), images.shape[1] // 2
    means: np.ndarray = images.reshape(n, side, 2, side, 2, 3).mean((2, 4)).round().astype(np.uint8)
    return means


def pictures(source: str) -> np.ndarray | None:
    """Images uint8 (1906, S, S, 3) of a built-in name, in the order of its captions; None: not ours."""
    if prompts(source) is None:
        return None
    return small() if source == SMALL else load()[0]


def prompts(source: str) -> list[str] | None:
    """``builtin:emoji`` is both captions of every image, ``-names``, ``-groups``, ``-32`` one of them; None: not ours.

    ``builtin:emoji-mostly-names`` is every name twice for once its group: there are twenty times as many names.
    """
    built_in = {
        "builtin:emoji": [*names(), *groups()],
        "builtin:emoji-mostly-names": [*names() * 2, *groups()],
        "builtin:emoji-names": names(),
        "builtin:emoji-groups": groups(),
        SMALL: groups(),
    }
    return built_in.get(source)
