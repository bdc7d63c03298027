"""Distillation methods, one file each; every file of this folder that registers one is found."""

from importlib import import_module
from pkgutil import iter_modules

from .base import METHODS, Batch, Method, Options, Phase, Progress, get_method, register

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

__all__ = ["METHODS", "Batch", "Method", "Options", "Phase", "Progress", "get_method", "register"]
