"""Distillation methods, one file each."""

from . import disback, dmd, dmd2, fdistill, phased_dmd, score_difference, sid, sim  # noqa: F401  (each registers itself)
from .base import METHODS, Batch, Method, Phase, Progress, get_method, register

__all__ = ["METHODS", "Batch", "Method", "Phase", "Progress", "get_method", "register"]
