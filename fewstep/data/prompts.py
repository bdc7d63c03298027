"""Prompts: a text file with one per line, or the captions of the built-in emoji."""

from __future__ import annotations

from pathlib import Path

from ..errors import RecipeError
from . import emoji

CLASSES = "builtin:imagenet-classes"  # the labels 0 to 999, for teachers that are conditioned on them
UNCONDITIONAL = "builtin:unconditional"  # for teachers that are conditioned on nothing


def load_prompts(source: str, name: str = "data.prompts") -> list[str]:
    """Prompts of a UTF-8 text file, one per line (blank ones are skipped), or of ``builtin:emoji[-names|-groups]``;
    ``builtin:imagenet-classes`` are the labels "0" to "999", ``builtin:unconditional`` 64 empty prompts.

    Prompts are data: no path, no markup, no variable in them means anything.

    Args:
        name: field that errors name.

    Raises:
        RecipeError: the file is missing, no UTF-8 text, or holds no prompt.
    """
    if (built_in := emoji.prompts(source)) is not None:
        return built_in
    if source == CLASSES:
        return [str(label) for label in range(1000)]
    if source == UNCONDITIONAL:
        return [""] * 64
    path = Path(source).expanduser()
    if not path.is_file():
        raise RecipeError(
            f"{name}: {source} is no file; expected a text file with one prompt per line, or builtin:emoji"
        )
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise RecipeError(
            f"{name}: {source} is no UTF-8 text ({error.reason} at byte {error.start})"
        ) from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise RecipeError(f"{name}: {source} holds no prompt; expected one per line")
    return prompts
