"""Commands of data."""

from __future__ import annotations

import argparse

from ..bounds import Count
from .commands import Commands, argument, number, size

DATA = Commands()
COMMANDS = Commands()
COMMANDS.group("data", "sets of images: check", DATA)


@DATA.command(
    "check",
    "decode every image of a set and name those of no use; runs do it as they go",
    argument("images", help="folder of captioned images: files, .tar shards, or tables"),
    argument("--resolution", type=size, default=1, help="of the recipe: pixels, or HEIGHTxWIDTH"),
    argument("--column", metavar="NAME", help="of the captions in tables"),
    argument("--threads", type=number(Count), help="that decode (default: one a core)"),
)
def check(args: argparse.Namespace) -> int:
    from ..data.images import faults, load_images
    from ..report.bar import Bar

    images = load_images(args.images, args.column, max_bad=1.0)
    num, found = len(images.files), 0
    with Bar("decoding", num, "images") as bar:
        for name, reason in faults(images, args.resolution, args.threads):
            bar.update(1)
            if reason:
                found += 1
                print(f"{name}: {reason}")
    print(f"fewstep: {args.images}: {num} images, {found} of no use")
    return 2 if found else 0
