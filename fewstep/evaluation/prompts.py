"""Prompts of images that are measured, each in its place: lines, or rows of a table such as GenEval's."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewstep.data import texts
from fewstep.data.prompts import load_prompts
from fewstep.errors import FewstepError
from fewstep.teachers.references import identity_of


@dataclass(frozen=True)
class Prompts:
    """Prompts in their order.

    Attributes:
        texts: the prompts.
        records: what the rows of a table hold beside and including the prompt; empty for a text file.
        sha256: hash of the texts, and of the references of those that edit images.
    """

    texts: tuple[str, ...]
    records: tuple[dict[str, Any], ...] = ()

    def named(self, num: int) -> list[int]:
        """Of `num` prompts, what the last ones have as `real`: the image that each names, for retrieval.

        Raises:
            FewstepError: other prompts between these, or what is no index.
        """
        found = [record.get("real") for record in self.records[:num]]
        first = next((i for i, index in enumerate(found) if index is not None), len(found))
        named: list[int] = []
        for i, index in enumerate(found[first:], first):
            if type(index) is not int or index < 0:
                raise FewstepError(
                    f'prompt {i + 1}: "real" is {index!r}, expected the index of a real image in this prompt and in '
                    "all that follow"
                )
            named.append(index)
        return named

    @property
    def sha256(self) -> str:
        return hashlib.sha256("\n".join(map(identity_of, self.texts)).encode()).hexdigest()

    def of_images(self, num: int, per_prompt: int = 1) -> list[str]:
        """The prompt of each of `num` images; the `per_prompt` images of a prompt come in a row."""
        return [self.texts[i // per_prompt] for i in range(num)]


def read_prompts(path: str | Path, column: str | None = None) -> Prompts:
    """One prompt a line, the column of a table, see :mod:`fewstep.data.texts`, or those that are built in.

    Raises:
        FewstepError: neither text nor a table, no prompts, an empty line before the last prompt, a row without one.
    """
    if str(path).startswith("builtin:"):
        return Prompts(tuple(load_prompts(str(path), "--prompts")))
    found = texts.read(path, column)
    return Prompts(found.texts, found.records)
