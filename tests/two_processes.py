"""Run by ``torchrun``: trains a recipe for a few iterations; see ``test_distributed.py``."""

import sys

from fewstep import recipe as recipes
from fewstep.run import execute

if __name__ == "__main__":
    execute(recipes.load(sys.argv[1]))
