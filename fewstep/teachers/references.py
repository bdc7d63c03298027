"""Prompts that edit images: an instruction that goes wherever prompts go, with the images it speaks of."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import FewstepError
from ..files import ReadError, sketch
from ..pictures import read_picture, size_of

if TYPE_CHECKING:
    from PIL import Image


class Edit(str):
    """An instruction with its reference images. Of the same words, but about other images, it is another prompt.

    Attributes:
        references: their files in the order in which the instruction counts them. sketches: hashes of their content
            when they were found, see :func:`fewstep.files.sketch`. sizes: (width, height) of each. place: where it
            stands, for errors.
    """

    references: tuple[Path, ...]
    sketches: tuple[str, ...]
    sizes: tuple[tuple[int, int], ...]
    place: str

    def __new__(cls, text: str, references: Iterable[Path], place: str = "a prompt") -> Edit:
        self = super().__new__(cls, text)
        self.references, self.place = tuple(references), place
        self.sketches = tuple(map(sketch, self.references))
        self.sizes = tuple(map(size_of, self.references))
        return self

    def __getnewargs__(self) -> tuple[Any, ...]:
        return str(self), self.references, self.place

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Edit) and identity_of(self) == identity_of(other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash(identity_of(self))

    def images(self) -> list[Image.Image]:
        """RGB, as they were when the command began.

        Raises:
            ReadError: one is gone or has changed since.
        """
        for path, before in zip(self.references, self.sketches):
            if not path.is_file() or sketch(path) != before:
                raise ReadError(
                    f"{self.place}: {path} is gone or has changed since; put it back, and begin again"
                )
        return [read_picture(path) for path in self.references]


def identity_of(prompt: str) -> str:
    """What tells a prompt from any other: its words, and the content of its references behind them."""
    return "\0".join([str(prompt), *getattr(prompt, "sketches", ())])


def refuse_references(name: str, prompts: Iterable[str], what: str = "prompts") -> None:
    """Refuses images for a pipeline of this class, which reads none and would not miss them.

    Raises:
        FewstepError: with the place of the first such prompt.
    """
    if edit := next((prompt for prompt in prompts if isinstance(prompt, Edit)), None):
        raise FewstepError(
            f"{what}: {edit.place}: a {name} reads no reference image; leave that column out, or choose an editing "
            "teacher"
        )


def check_references(teacher: Any, prompts: Sequence[str], what: str = "prompts") -> None:
    """Refuses prompts without what a teacher, or its class, reads, or with what it does not read.

    Batches have one shape, so all rows have as many references as the first one, and each of them its proportions.

    Raises:
        FewstepError: with the place of the first such prompt.
    """
    name = teacher.pipeline_class
    if not teacher.edits:
        return refuse_references(name, prompts, what)
    first: Edit | None = None
    for number, prompt in enumerate(prompts, 1):
        if not isinstance(prompt, Edit):
            raise FewstepError(
                f"{what}: number {number}, {prompt[:40]!r}, has no reference image, and a {name} edits images; give a "
                'table with the columns "prompt" and "reference"'
            )
        first = first or prompt
        if teacher.reference_shapes(prompt) != teacher.reference_shapes(first):
            raise FewstepError(
                f"{what}: {prompt.place}: references of {_sizes(prompt)} pixels, and {first.place}: {_sizes(first)}; "
                "expected as many in every row, in one order of proportions: crop them, or train on one kind at a time"
            )


def _sizes(prompt: Edit) -> str:
    return ", ".join(f"{width} x {height}" for width, height in prompt.sizes)
