"""What a recipe takes, before anything is loaded: memory, arithmetic, hours.

The recipe's own code runs, every turn of it, on tensors that have shapes and no storage: the roles, the losses, the
trainer's update. What is alive at each operation is added up, and so are the multiplications. Nothing is modelled
except what the device's libraries keep for themselves.
"""

from importlib import import_module
from typing import TYPE_CHECKING

_EXPORTS = {
    "GPUS": "devices",
    "Plan": "table",
    "check_fits": "fit",
    "plan": "count",
    "proposals": "fit",
    "remedy": "fit",
}
__all__ = ["GPUS", "Plan", "check_fits", "plan", "proposals", "remedy"]

if TYPE_CHECKING:
    from .count import plan
    from .devices import GPUS
    from .fit import check_fits, proposals, remedy
    from .table import Plan


def __getattr__(name: str):  # a card that nobody has is refused before torch is imported
    if name in _EXPORTS:
        return getattr(import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
