"""fewstep: distill a many-step diffusion image model into a student of 1 to 8 steps.

Heavy imports (diffusers, transformers, peft) happen where they are used, so ``import fewstep`` costs no more
than importing torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_EXPORTS = {
    "Cond": "fewstep.cond",
    "Denoiser": "fewstep.denoiser",
    "EDM": "fewstep.schedules",
    "FewstepError": "fewstep.errors",
    "Flow": "fewstep.schedules",
    "Method": "fewstep.methods",
    "NetDenoiser": "fewstep.denoiser",
    "Phase": "fewstep.methods",
    "Recipe": "fewstep.recipe",
    "RecipeError": "fewstep.errors",
    "Schedule": "fewstep.schedules",
    "Student": "fewstep.student",
    "TrigFlow": "fewstep.schedules",
    "VP": "fewstep.schedules",
    "change_schedule": "fewstep.schedules",
    "load_teacher": "fewstep.teachers",
    "run": "fewstep.run",
}
__all__ = ["__version__", *_EXPORTS]

if TYPE_CHECKING:
    from .cond import Cond
    from .denoiser import Denoiser, NetDenoiser
    from .errors import FewstepError, RecipeError
    from .methods import Method, Phase
    from .recipe import Recipe
    from .run import run
    from .schedules import EDM, VP, Flow, Schedule, TrigFlow, change_schedule
    from .student import Student
    from .teachers import load_teacher


def __getattr__(name: str):
    if name in _EXPORTS:
        value = getattr(import_module(_EXPORTS[name]), name)
        globals()[name] = value  # importing fewstep.run has put the module of that name here
        return value
    raise AttributeError(f"module 'fewstep' has no attribute {name!r}")
