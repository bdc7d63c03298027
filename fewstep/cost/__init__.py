"""What a recipe takes, before anything is loaded: memory, arithmetic, hours.

The recipe's own code runs, every turn of it, on tensors that have shapes and no storage: the roles, the losses, the
trainer's update. What is alive at each operation is added up, and so are the multiplications. Nothing is modelled
except what the device's libraries keep for themselves.
"""

from .count import plan
from .devices import GPUS
from .fit import check_fits, remedy
from .table import Plan

__all__ = ["GPUS", "Plan", "check_fits", "plan", "remedy"]
