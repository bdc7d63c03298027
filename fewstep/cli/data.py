"""Commands of data."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Mapping

from ..bounds import Count
from ..errors import FewstepError
from ..shape import Shape
from .commands import Commands, argument, number, sizes

DATA = Commands()
COMMANDS = Commands()
COMMANDS.group("data", "sets of images: check", DATA)


@DATA.command(
    "check",
    "decode every image of a set and name those of no use; runs do it as they go",
    argument("images", help="folder of captioned images: files, .tar shards, or tables"),
    argument(
        "--resolution",
        type=sizes,
        help="of the recipe: pixels, or HEIGHTxWIDTH; several with commas are its data.shapes (default: 1)",
    ),
    argument("--recipe", metavar="RECIPE", help="whose resolution or shapes, column and upscale are meant"),
    argument("--column", metavar="NAME", help="of the captions in tables"),
    argument("--threads", type=number(Count), help="that decode (default: one a core)"),
)
def check(args: argparse.Namespace) -> int:
    from ..data.buckets import homes_of
    from ..data.cache import sizes_of
    from ..data.images import faults, load_images
    from ..report.bar import Bar

    shapes, upscale, column = _meant(args)
    images = load_images(args.images, args.column or column, upscale=upscale, max_bad=1.0)
    num, found = len(images.files), Counter[tuple[int, str]]()
    homes = homes_of(sizes_of(images), shapes) if len(shapes) > 1 else [0] * num
    with Bar("decoding", num, "images") as bar:
        for home, fault in zip(homes, faults(images, [shapes[k].said for k in homes], args.threads)):
            bar.update(1)
            if fault:
                found[home, fault.rule] += 1
                print(f"{fault.name}: {fault.reason}")
    empty = 0
    for k, shape in enumerate(shapes if len(shapes) > 1 else []):
        there, bad = homes.count(k), {rule: count for (home, rule), count in found.items() if home == k}
        empty += there == sum(bad.values())
        print(f"{shape}: {there} images, {_of_no_use(bad)}")
    rules = Counter[str]()
    for (_, rule), count in found.items():
        rules[rule] += count
    print(f"fewstep: {args.images}: {num} images, {_of_no_use(rules)}")
    if empty:
        print("fewstep: a run refuses shapes without images: leave them out of data.shapes, or add some")
    return 2 if found or empty else 0


def _meant(args: argparse.Namespace) -> tuple[list[Shape], bool, str | None]:
    """Shapes, whether small images are enlarged, and the column of captions, of the recipe where one is named."""
    from ..evaluation.mixture import Mixture

    asked = args.resolution
    if args.recipe is None:
        if isinstance(asked, dict):
            return list(Mixture.of(**asked).shapes), False, None
        return [Shape.of(asked or 1)], False, None
    from ..runs.library import load_recipe
    from ..runs.shapes import shapes_of

    recipe = load_recipe(args.recipe)
    if asked is not None:
        raise FewstepError(f"--resolution beside --recipe {args.recipe}, which says it itself: leave one out")
    shapes = shapes_of(recipe) or [Shape.of(one) for one in [recipe.teacher.resolution] if one]
    if not shapes:
        raise FewstepError(
            f"--recipe {args.recipe}: has the resolution of its teacher, which is not loaded here; give --resolution"
        )
    return shapes, recipe.data.upscale, recipe.data.column


def _of_no_use(rules: Mapping[str, int]) -> str:
    """How many, by the rules that left them out."""
    total = sum(rules.values())
    told = ", ".join(f"{count} {rule}" for rule, count in sorted(rules.items()))
    return f"{total} of no use" + (f": {told}" if total else "")
