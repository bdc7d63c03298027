"""Distance between two sets of images: `python eval/evaluate.py REAL FAKE --protocol NAME --out FILE.json`.

The same as `fewstep eval fid`; `--help` lists the options.
"""

import sys

from fewstep.cli import main

if __name__ == "__main__":
    sys.exit(main(["eval", "fid", *sys.argv[1:]]))
