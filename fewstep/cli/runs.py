"""Commands of a run: train, resume, replay, sample, export."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

from ..bounds import Count, Seed
from ..errors import FewstepError, TrainingError
from ..files import replacing
from ..runs.library import load_recipe
from .commands import DEVICE, RECIPE, RUN, Commands, argument, number, output

COMMANDS = Commands()
SOFTWARE, MAKER = 0x0131, "fewstep"  # EXIF's tag of the program that made a picture
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")


@COMMANDS.command(
    "train",
    "run a recipe: name, script or recipe.yaml; --a.b VALUE overrides, --smoke tries",
    RECIPE,
    overrides=True,
)
def train(args: argparse.Namespace) -> int:
    from ..runs.session import run

    run(load_recipe(args.recipe), args.overrides)
    return 0


@COMMANDS.command(
    "resume", "continue an interrupted run, exactly; --a.b VALUE changes it", RUN, overrides=True
)
def resume(args: argparse.Namespace) -> int:
    from ..runs import session

    session.resume(args.run_folder, args.overrides)
    return 0


@COMMANDS.command("replay", "repeat the step at which a run gave up, from its snapshot", RUN)
def replay(args: argparse.Namespace) -> int:
    from ..runs import session

    return TrainingError.code if session.replay(args.run_folder) else 0


@COMMANDS.command(
    "sample",
    "images from an exported student, by stock diffusers",
    argument("export", type=Path, metavar="EXPORT", help="export folder, or the run that holds it"),
    argument("--prompt", action="append", help="may be given several times"),
    argument("--teacher", help="the teacher's folder, if it moved"),
    argument("--steps", type=number(Count), help="of the student, where it has several (default: its own)"),
    argument("--num", type=number(Count), default=1, help="images per prompt"),
    argument("--seed", type=number(Seed), default=0, help="of the noise"),
    argument("--scale", type=number(Count), help="integer enlargement (default: to 192 pixels at least)"),
    DEVICE,
    output("--out", suffixes=PICTURES, default=Path("sample.png"), help="the sheet, all images in it"),
)
def sample(args: argparse.Namespace) -> int:
    from PIL import Image

    from ..export import at_steps, load_exported, stock_call
    from ..report.grid import sheet
    from ..teachers.generate import generate

    if not args.prompt:
        raise FewstepError("sample: give at least one --prompt")
    _check_picture(args.out)
    folder = args.export / "export" if (args.export / "export").is_dir() else args.export
    pipe, record = load_exported(folder, args.teacher)
    record = at_steps(record, args.steps)
    pipe.to(args.device)
    images, _ = generate(pipe, args.prompt * args.num, partial(stock_call, pipe, record), seed=args.seed)
    signed = Image.Exif()
    signed[SOFTWARE] = MAKER
    with replacing(args.out) as part:
        sheet(images, args.prompt, args.scale).save(part, exif=signed)
    print(args.out)
    return 0


def _check_picture(path: Path) -> None:
    """Refuses to draw over a picture that another program made."""
    from PIL import Image

    if not path.is_file():
        return
    try:
        with Image.open(path) as image:
            made = image.getexif().get(SOFTWARE)
    except (OSError, Image.DecompressionBombError):
        made = None
    if made != MAKER:
        raise FewstepError(f"--out {path}: fewstep did not make this picture; it is kept: give another name")


def _step(text: str) -> str:
    if text not in ("newest", "best") and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r}: expected newest, best, or the number of a step")
    return text


@COMMANDS.command(
    "export",
    "export a checkpoint of a run again",
    RUN,
    argument("--step", default="newest", type=_step, help="newest (default), best, or a step"),
    argument("--dtype", choices=["float32", "float16", "bfloat16"]),
    argument("--kohya", action="store_true", help="also keys for ComfyUI and A1111"),
)
def export(args: argparse.Namespace) -> int:
    from ..runs.session import reexport

    options = [f"--export.dtype={args.dtype}"] if args.dtype else []
    options += ["--export.kohya=true"] if args.kohya else []
    reexport(args.run_folder, options, args.step)
    return 0
