"""Run by ``torchrun``: methods on their toys for a few iterations; see ``test_contract.py``."""

import sys

from safetensors.torch import save_file
from test_contract import SPREAD, whole_run

from fewstep.distributed import start

if __name__ == "__main__":
    process = start("cpu")
    found = {key: value for name in SPREAD for key, value in whole_run(name, process).items()}
    if process.main:
        save_file(found, sys.argv[1])
