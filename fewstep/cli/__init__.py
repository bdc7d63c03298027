"""Words of the command line, nothing else."""

from .main import main

__all__ = ["main"]
