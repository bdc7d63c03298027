"""fewstep: distill a many-step diffusion image model into a student of 1 to 8 steps.

Heavy imports (diffusers, transformers, peft) happen where they are used, so ``import fewstep`` costs no more
than importing torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from .version import __version__

_EXPORTS = {
    "Cond": "fewstep.diffusion.cond",
    "Denoiser": "fewstep.diffusion.denoiser",
    "EDM": "fewstep.diffusion.schedules",
    "FewstepError": "fewstep.errors",
    "Flow": "fewstep.diffusion.schedules",
    "Method": "fewstep.methods",
    "NetDenoiser": "fewstep.diffusion.denoiser",
    "Phase": "fewstep.methods",
    "Recipe": "fewstep.recipe",
    "RecipeError": "fewstep.errors",
    "Schedule": "fewstep.diffusion.schedules",
    "Student": "fewstep.diffusion.student",
    "TrigFlow": "fewstep.diffusion.schedules",
    "VP": "fewstep.diffusion.schedules",
    "change_schedule": "fewstep.diffusion.schedules",
    "load_teacher": "fewstep.teachers",
    "run": "fewstep.runs.session",
}
__all__ = ["__version__", *_EXPORTS]

if TYPE_CHECKING:
    from .diffusion.cond import Cond
    from .diffusion.denoiser import Denoiser, NetDenoiser
    from .diffusion.schedules import EDM, VP, Flow, Schedule, TrigFlow, change_schedule
    from .diffusion.student import Student
    from .errors import FewstepError, RecipeError
    from .methods import Method, Phase
    from .recipe import Recipe
    from .runs.session import run
    from .teachers import load_teacher


def __getattr__(name: str):
    if name in _EXPORTS:
        value = getattr(import_module(_EXPORTS[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'fewstep' has no attribute {name!r}")
