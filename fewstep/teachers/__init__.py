"""Teachers: adapters of diffusers pipelines, the built-in ones, and closed-form ones for tests and toys."""

from .base import Teacher
from .load import adapters, load_pipeline, load_teacher, pipeline_class_of, register, resolve

__all__ = [
    "Teacher",
    "adapters",
    "load_pipeline",
    "load_teacher",
    "pipeline_class_of",
    "register",
    "resolve",
]
