"""Run by ``torchrun``: methods on their toys for a few iterations; see ``test_contract.py``."""

import sys
from pathlib import Path

from safetensors.torch import save_file
from test_contract import STEPS, whole_run

from fewstep.distributed import start
from fewstep.methods import METHODS

if __name__ == "__main__":
    process = start("cpu")
    output = Path(sys.argv[1])
    found = {}
    for name in METHODS:
        found |= whole_run(name, process)
        resumed = whole_run(name, process, output.parent / name, (3, STEPS))
        found |= {f"resumed/{key}": value for key, value in resumed.items()}
    if process.main:
        save_file(found, output)
