"""Prompts: a text file with one per line, a column of a table, or the captions of the built-in emoji."""

from __future__ import annotations

from pathlib import Path

from ..errors import FewstepError, RecipeError
from ..teachers.references import Edit
from . import emoji, texts
from .shards import read_shards, shards_of
from .tables import open_tables

CLASSES = "builtin:imagenet-classes"  # the labels 0 to 999, for teachers that are conditioned on them
UNCONDITIONAL = "builtin:unconditional"  # for teachers that are conditioned on nothing


def shown_prompts(given: str | list[str] | None, column: str | None = None) -> list[str] | None:
    """Those of ``samples.prompts``, a file or the texts themselves; None where it says nothing.

    Raises:
        RecipeError: as :func:`load_prompts`.
    """
    return (
        load_prompts(given, "samples.prompts", texts.column_for(given, column))
        if isinstance(given, str)
        else given
    )


def load_prompts(source: str, name: str = "data.prompts", column: str | None = None) -> list[str]:
    """Prompts of a file (see :mod:`.texts`; blank lines are skipped), or of ``builtin:emoji`` (``-names``, ``-groups``,
    ``-mostly-names``); ``builtin:imagenet-classes`` are the labels "0" to "999", ``builtin:unconditional`` 64 empty.

    A folder of tables (:mod:`.tables`), or of WebDataset shards, gives all its texts.

    A table with a column ``reference`` gives an :class:`~fewstep.teachers.references.Edit` a row.

    Prompts are data: no path, no markup, no variable in them means anything.

    Args:
        name: field that errors name. column: of a table; lines have none.

    Raises:
        RecipeError: the file is missing, neither text nor a table, or holds no prompt.
    """
    if (built_in := emoji.prompts(source)) is not None:
        return built_in
    if source == CLASSES:
        return [str(label) for label in range(1000)]
    if source == UNCONDITIONAL:
        return [""] * 64
    place = Path(source).expanduser()
    if not place.exists():
        raise RecipeError(
            f"{name}: {source} is no file; expected a text file with one prompt per line, a table, a folder of "
            "tables or shards, or builtin:emoji"
        )
    try:
        if place.is_dir() or place.suffix in (".arrow", ".tar"):
            return (
                read_shards(shards, column)[1]
                if (shards := shards_of(place))
                else open_tables(place).texts(column)
            )
        found = texts.read(source, column, blank="skip")
    except FewstepError as error:
        raise RecipeError(f"{name}: {error}") from error
    return [text if isinstance(text, Edit) else text.strip() for text in found.texts]
