"""Statistics of real images: `python eval/make_reference.py IMAGES --protocol NAME -o FILE.npz`.

The same as `fewstep eval stats`; `--help` lists the options.
"""

import sys

from fewstep.cli import main

if __name__ == "__main__":
    sys.exit(main(["eval", "stats", *sys.argv[1:]]))
