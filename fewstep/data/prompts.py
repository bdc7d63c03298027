"""Prompts: a text file with one per line, or the captions of the built-in emoji."""

from __future__ import annotations

from pathlib import Path

from ..errors import RecipeError
from . import emoji


def load_prompts(source: str) -> list[str]:
    """Prompts of ``builtin:emoji`` or of a UTF-8 text file, one per line; blank lines are skipped.

    Prompts are data: no path, no markup, no variable in them means anything.

    Raises:
        RecipeError: the file is missing, no UTF-8 text, or holds no prompt.
    """
    if source == "builtin:emoji":
        return emoji.load()[1]
    path = Path(source).expanduser()
    if not path.is_file():
        raise RecipeError(
            f"data.prompts: {source} is no file; expected a text file with one prompt per line, or builtin:emoji"
        )
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise RecipeError(
            f"data.prompts: {source} is no UTF-8 text ({error.reason} at byte {error.start})"
        ) from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise RecipeError(f"data.prompts: {source} holds no prompt; expected one per line")
    return prompts
