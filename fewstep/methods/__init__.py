"""Distillation methods, one file each."""

from . import dmd2  # noqa: F401  (registers itself)
from .base import METHODS, Batch, Method, Phase, Progress, get_method, register

__all__ = ["METHODS", "Batch", "Method", "Phase", "Progress", "get_method", "register"]
