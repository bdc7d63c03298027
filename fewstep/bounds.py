"""What an option may be, said beside it: ``steps: Count``; a recipe and the command line refuse by the same words."""

from __future__ import annotations

import json
import math
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import cache
from typing import Annotated, Any, ClassVar, Union, get_args, get_origin, get_type_hints

from .errors import RecipeError


@dataclass(frozen=True)
class Bound:
    """Stands in an annotation, ``Annotated[int, Bound("at least 1", lambda n: n >= 1)]``.

    Attributes:
        text: what was expected. holds: of a value, whose numbers are finite.
    """

    text: str
    holds: Callable[[Any], bool] = lambda _: True


Time = Annotated[int | float, Bound("a time of the teacher's schedule")]
Number = Annotated[float, Bound("a finite number")]
Positive = Annotated[float, Bound("a positive number", lambda x: x > 0)]
Least0 = Annotated[float, Bound("0 or more", lambda x: x >= 0)]
Share = Annotated[float, Bound("0 to 1", lambda x: 0 <= x <= 1)]
Part = Annotated[float, Bound("above 0, up to 1", lambda x: 0 < x <= 1)]
Decay = Annotated[float, Bound("0 or more, and below 1", lambda x: 0 <= x < 1)]
Range = Annotated[tuple[float, float], Bound("0 <= low < high <= 1", lambda r: 0 <= r[0] < r[1] <= 1)]
Count = Annotated[int, Bound("at least 1", lambda n: n >= 1)]
Count0 = Annotated[int, Bound("0 or more", lambda n: n >= 0)]
Seed = Annotated[int, Bound("0 or more, below 2^62", lambda n: 0 <= n < 2**62)]
Steps = Annotated[
    list[int],
    Bound(
        "different numbers from 1 on",
        lambda steps: all(k >= 1 for k in steps) and len({*steps}) == len(steps),
    ),
]


def refusal(hint: Any, value: Any) -> str | None:
    """What an annotation expected of a value that it does not allow; None where it does.

    Args:
        hint: with ``Annotated`` in it, at any depth of lists, tuples and unions.
    """
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Annotated:
        bound = next((note for note in hint.__metadata__ if isinstance(note, Bound)), None)
        if bound and value is not None and not (all(map(_finite, numbers(value))) and bound.holds(value)):
            return bound.text
        return refusal(inner[0], value)
    several = isinstance(value, list | tuple)
    if origin in (Union, types.UnionType):
        arms = [arm for arm in inner if (get_origin(_bare(arm)) in (list, tuple)) == several]
        return next((text for arm in arms if (text := refusal(arm, value))), None)
    if several and origin in (list, tuple):
        hints = inner if origin is tuple and len(inner) == len(value) else inner[:1] * len(value)
        return next((text for one, item in zip(hints, value) if (text := refusal(one, item))), None)
    return None if all(map(_finite, numbers(value))) else "finite numbers"


def numbers(value: Any) -> Iterator[float]:
    """Those in it, at any depth of lists."""
    if isinstance(value, list | tuple):
        for item in value:
            yield from numbers(item)
    elif isinstance(value, int | float):
        yield value


def shown(value: Any) -> str:
    """As in a recipe.yaml."""
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)


def _finite(number: float) -> bool:
    return isinstance(number, int) or math.isfinite(number)


def _bare(hint: Any) -> Any:
    return get_args(hint)[0] if get_origin(hint) is Annotated else hint


@cache
def hints_of(cls: type) -> dict[str, Any]:
    """Name -> annotation of a dataclass's fields, with their bounds."""
    return get_type_hints(cls, include_extras=True)


class Bounded:
    """Base of dataclasses whose fields keep to what their annotations say.

    Attributes:
        PLACE: what stands before a field's name in a message, with other fields in braces.

    Raises:
        RecipeError: naming the first field that does not, its value and what was expected.
    """

    PLACE: ClassVar[str] = ""

    def __post_init__(self) -> None:
        options: Any = self
        hints = hints_of(options.__class__)
        for name in (field.name for field in fields(options)):
            value = getattr(self, name)
            if text := refusal(hints[name], value):
                place = self.PLACE.format_map(vars(self))
                raise RecipeError(f"{place}{name}: {shown(value)}: expected {text}")
