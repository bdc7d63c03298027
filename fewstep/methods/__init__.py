"""Distillation methods, one file each."""

from . import (  # noqa: F401  (each registers itself)
    boot,
    dd1,
    dd2,
    disback,
    dmd,
    dmd2,
    fdistill,
    hyper_sd,
    ladd,
    multi_student,
    phased_dmd,
    sana_sprint,
    scm,
    score_difference,
    sid,
    sim,
)
from .base import METHODS, Batch, Method, Phase, Progress, get_method, register

__all__ = ["METHODS", "Batch", "Method", "Phase", "Progress", "get_method", "register"]
