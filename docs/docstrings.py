"""For the API pages: what shares a line in a docstring stands one below the other."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from griffe import Extension

sys.path.insert(0, str(Path(__file__).parent))
from hooks import entries

SECTION = re.compile(r"^(Args|Attributes):\n((?: {4}.*(?:\n|$))+)", re.MULTILINE)


class OneByOne(Extension):
    """Rewrites sections of arguments and attributes before they are parsed."""

    def on_function(self, *, func: Any, **_more: Any) -> None:
        _rewrite(func, (parameter.name for parameter in func.parameters))

    def on_class_members(self, *, cls: Any, **_more: Any) -> None:
        init = cls.members.get("__init__")
        _rewrite(cls, [*cls.members, *(parameter.name for parameter in getattr(init, "parameters", ()))])


def _rewrite(documented: Any, names: Iterable[str]) -> None:
    if documented.docstring:
        names = list(names)
        documented.docstring.value = SECTION.sub(
            lambda found: (
                f"{found[1]}:\n"
                + "".join(f"    {name}: {text}\n" for name, text in entries(found[2], names).items())
            ),
            documented.docstring.value,
        )
