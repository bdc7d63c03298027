"""Prompt files: one text a line, or one JSON object with a `prompt` a line, as GenEval has them."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewstep.errors import FewstepError


@dataclass(frozen=True)
class Prompts:
    """Prompts in their order.

    Attributes:
        texts: the prompts.
        records: what a line of a JSON file holds beside and including `prompt`; empty for a text file.
        sha256: hash of the texts.
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
        return hashlib.sha256("\n".join(self.texts).encode()).hexdigest()

    def of_images(self, num: int, per_prompt: int = 1) -> list[str]:
        """The prompt of each of `num` images; the `per_prompt` images of a prompt come in a row."""
        return [self.texts[i // per_prompt] for i in range(num)]


def read_prompts(path: str | Path) -> Prompts:
    """Reads a .jsonl file with a `prompt` in every line, or any other file as one prompt a line.

    Raises:
        FewstepError: unreadable file, no prompts, an empty line before the last prompt, JSON without a prompt.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").rstrip("\r\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise FewstepError(
            f"{path} cannot be read ({error}): expected a UTF-8 file, one prompt a line"
        ) from None
    lines = [line.removesuffix("\r") for line in lines]
    for number, line in enumerate(lines, 1):
        if not line.strip():
            raise FewstepError(f"{path}, line {number} is empty: expected a prompt; remove the line")
    if path.suffix != ".jsonl":
        return Prompts(tuple(lines))
    records = tuple(_record(path, number, line) for number, line in enumerate(lines, 1))
    return Prompts(tuple(record["prompt"] for record in records), records)


def _record(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
        if isinstance(record["prompt"], str) and record["prompt"].strip():
            return record
        problem = f"prompt is {record['prompt']!r}"
    except (ValueError, KeyError, TypeError) as error:
        problem = f"{type(error).__name__}: {error}"
    raise FewstepError(f'{path}, line {number} ({problem}): expected JSON such as {{"prompt": "a cat"}}')
