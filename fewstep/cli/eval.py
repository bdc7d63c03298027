"""The command `fewstep eval`. Heavy imports wait until a subcommand runs."""

import argparse
import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fewstep.bounds import Count, Count0
from fewstep.cli.commands import COLUMN, Commands, argument, number, output
from fewstep.cli.eval_sampling import PROTOCOL, SAMPLING, process

EMOJI = "builtin:emoji"
IMAGES = "folder or zip of image files, npz of images, statistics file, builtin:emoji or builtin:emoji-32"
SCORERS = "clip:PATH, open_clip:ARCHITECTURE:FILE, pickscore:PATH, hpsv2.1:PATH or imagereward:FOLDER; may be repeated"
FLAGS = {
    "kid": "kernel distance, which has no small-sample bias",
    "prdc": "precision, recall, density and coverage",
    "nearest": "distance to the nearest real image and share of copies, where REAL is the training set",
    "vendi": "effective number of different images",
    "is": "Inception score",
    "fd_inf": "Fréchet distance extrapolated to infinitely many images",
    "patch-fd": "Fréchet distance of full-resolution patches",
    "sfd": "sFID, of spatial features of Inception",
    "cmmd": "CMMD, with --extractor clip:PATH",
}


COMMANDS, EVAL = Commands(), Commands()
COMMANDS.group("eval", "generate and measure images: Fréchet distance, CLIP score, speed", EVAL, SAMPLING)

FAKE = argument("fake", metavar="FAKE", help="folder or npz of images, in the order of the prompts")
EXTRACTOR = argument("--extractor", metavar="NAME", help="network for the features (default: effnet-lite0)")
WEIGHTS = argument("--weights", metavar="FILE", help="weights of inception-2015")
DEVICE = argument("--device", help="of the network: auto (default), cpu, cuda, cuda:1, ...")
SKIP_BAD = argument(
    "--skip-bad", type=number(Count0), default=0, metavar="N", help="leave out up to N unreadable files"
)
WORKERS = argument(
    "--workers",
    type=number(Count0),
    metavar="P",
    help="processes that decode image files (default: by cores)",
)
OUT = output("--out", suffixes=(".json",), metavar="FILE.json", help="also write the result as JSON")


@EVAL.command(
    "fid",
    "distance between two sets of images",
    argument("real", metavar="REAL", help=IMAGES),
    argument("fake", metavar="FAKE", help=IMAGES),
    *(
        argument(f"--{name.replace('_', '-')}", dest=name, action="store_true", help=f"also the {text}")
        for name, text in FLAGS.items()
    ),
    argument("--num", type=number(Count), metavar="N", help="use the first N fake images"),
    argument(
        "--declared",
        action="store_true",
        help="take statistics of unknown origin for ones of this extractor and protocol",
    ),
    EXTRACTOR,
    WEIGHTS,
    PROTOCOL,
    DEVICE,
    SKIP_BAD,
    WORKERS,
    OUT,
)
def _fid(args: argparse.Namespace) -> int:
    from fewstep.errors import FewstepError
    from fewstep.evaluation import protocols
    from fewstep.evaluation.evaluate import evaluate_images, how_to_get_fid
    from fewstep.evaluation.images import ImageSource
    from fewstep.evaluation.sampling import check_whole, read_manifest

    if args.real != EMOJI and os.path.realpath(args.real) == os.path.realpath(args.fake):
        raise FewstepError(f"REAL and FAKE are both {args.real}: expected two different sets of images")

    protocol = protocols.load(args.protocol) if args.protocol else None
    metrics = [
        "fd",
        *(protocol.metrics_of(args.extractor) if protocol else ()),
        *(name for name in FLAGS if getattr(args, name)),
    ]
    sides = _open(args.real, args), _first(_open(args.fake, args), args.num)
    for side in sides:
        if isinstance(side, ImageSource):
            check_whole(side, read_manifest(side.name))
    with _together() as share:
        result = evaluate_images(
            *sides,
            extractor=args.extractor,
            metrics=tuple(dict.fromkeys(metrics)),
            protocol=protocol,
            weights=args.weights,
            declared=args.declared,
            device=args.device,
            share=share,
        )
    if share[0]:
        return 0
    _finish(result, args)
    if advice := how_to_get_fid(result):
        print(f"\n{advice}")
    return 0


@EVAL.command(
    "stats",
    "write the statistics of a set of images",
    argument("images", metavar="IMAGES", help=IMAGES),
    output("-o", "--out", suffixes=(".npz",), required=True, metavar="FILE.npz", help="file to write"),
    EXTRACTOR,
    WEIGHTS,
    PROTOCOL,
    DEVICE,
    SKIP_BAD,
    WORKERS,
)
def _stats(args: argparse.Namespace) -> int:
    from fewstep.errors import FewstepError
    from fewstep.evaluation import protocols
    from fewstep.evaluation.evaluate import left
    from fewstep.evaluation.features import shared_moments
    from fewstep.evaluation.images import ImageSource
    from fewstep.evaluation.statistics import Statistics
    from fewstep.vision.extractor import identity
    from fewstep.vision.extractors import DEFAULT, get_extractor

    on = args.device
    protocol = protocols.load(args.protocol) if args.protocol else None
    if protocol:
        extractor = protocol.get_extractor(args.extractor, on, args.weights)
    else:
        extractor = get_extractor(args.extractor or DEFAULT, on, args.weights)
    source = _open(args.images, args)
    if not isinstance(source, ImageSource):
        raise FewstepError(f"{args.images} holds statistics already, expected images")
    if len(source) < 2:
        raise FewstepError(f"{args.images} has one image: statistics need at least 2")
    if protocol:
        source = source.read_as(protocol.reads_as)
    also = getattr(extractor, "spatial", None) if protocol and "sfd" in protocol.metrics else None
    with _together() as (rank, world):
        moments = shared_moments(source, extractor, rank, world)
        spatial = shared_moments(source, also, rank, world) if also else None
    if rank:
        return 0
    skipped = {name: list(value) for name in ("skipped", "passed_over") if (value := getattr(source, name))}
    meta = {**identity(extractor), **source.origin, **skipped}
    statistics = Statistics.from_moments(moments, meta)
    if spatial:
        statistics = dataclasses.replace(statistics, spatial=(spatial.mean, spatial.covariance()))
    statistics.save(args.out)
    note = f", by {world} processes" if world > 1 else ""
    print(f"{args.out}: {len(source)} images, {extractor.name}{note}", *left(source), sep="\n- ")
    return 0


@EVAL.command(
    "retrieval",
    "do generated emoji look like what the prompt named?",
    FAKE,
    argument(
        "--prompts",
        type=Path,
        required=True,
        metavar="FILE",
        help="captions of the set, one a line, or a table",
    ),
    COLUMN,
    EXTRACTOR,
    WEIGHTS,
    DEVICE,
    WORKERS,
    OUT,
)
def _retrieval(args: argparse.Namespace) -> int:
    from fewstep.data import emoji
    from fewstep.evaluation.evaluate import evaluate_images
    from fewstep.evaluation.images import open_images
    from fewstep.evaluation.prompts import read_prompts
    from fewstep.evaluation.sampling import check_made_from, check_pairs

    prompted = prompted_indices(args.prompts, emoji.load()[1], args.column)
    fake = open_images(args.fake, workers=args.workers)
    check_pairs(fake, len(prompted), what="captions")
    check_made_from(fake, 1, read_prompts(args.prompts, args.column).sha256)
    result = evaluate_images(
        _open(EMOJI, args),
        fake,
        extractor=args.extractor,
        prompted=prompted,
        weights=args.weights,
        device=args.device,
    )
    return _finish(result, args)


@EVAL.command(
    "diversity",
    "how different are the images of one prompt?",
    argument("fake", metavar="FAKE", help="folder or npz of images, those of a prompt in a row"),
    argument("--per-prompt", type=number(Count), required=True, metavar="K", help="images per prompt"),
    argument(
        "--against",
        metavar="OTHER",
        help="another model's images of the same prompts, compared prompt by prompt",
    ),
    EXTRACTOR,
    WEIGHTS,
    DEVICE,
    WORKERS,
    OUT,
)
def _diversity(args: argparse.Namespace) -> int:
    from fewstep.errors import FewstepError
    from fewstep.evaluation.evaluate import evaluate_images
    from fewstep.evaluation.images import open_images
    from fewstep.evaluation.sampling import check_made_from

    fake = open_images(args.fake, workers=args.workers)
    if args.per_prompt < 2 or len(fake) % args.per_prompt or len(fake) < 2 * args.per_prompt:
        raise FewstepError(
            f"--per-prompt is {args.per_prompt} for {len(fake)} images, expected at least 2 that "
            "divides their number into at least 2 prompts"
        )
    other = open_images(args.against, workers=args.workers) if args.against else fake
    if len(other) != len(fake):
        raise FewstepError(
            f"--against {args.against}: {len(other)} images for {len(fake)}: expected as many, of the same prompts"
        )
    check_made_from(other, args.per_prompt, check_made_from(fake, args.per_prompt))
    groups = [i // args.per_prompt for i in range(len(fake))]
    result = evaluate_images(
        other,
        fake,
        extractor=args.extractor,
        groups=groups,
        metrics=("diversity", "vendi", *["diversity-difference"] * bool(args.against)),
        weights=args.weights,
        device=args.device,
    )
    return _finish(result, args)


@EVAL.command(
    "scores",
    "do images match their captions? CLIP score and preference models",
    FAKE,
    argument("--prompts", type=Path, required=True, metavar="FILE", help="one a line, or a table"),
    COLUMN,
    argument(
        "--per-prompt", type=number(Count), default=1, metavar="K", help="images of each prompt, in a row"
    ),
    argument("--scorer", action="append", required=True, metavar="KIND:PATH", help=SCORERS),
    argument("--num", type=number(Count), metavar="N", help="use the first N images"),
    PROTOCOL,
    DEVICE,
    WORKERS,
    OUT,
)
def _scores(args: argparse.Namespace) -> int:
    from fewstep.evaluation.evaluate import evaluate_images
    from fewstep.evaluation.images import open_images
    from fewstep.evaluation.prompts import read_prompts
    from fewstep.evaluation.sampling import check_made_from, check_num, check_pairs

    prompts = read_prompts(args.prompts, args.column)
    if args.num is not None:
        check_num(args.num, prompts, args.per_prompt)
    fake = _first(open_images(args.fake, workers=args.workers), args.num)
    check_made_from(fake, args.per_prompt, prompts.sha256)
    check_pairs(fake, len(prompts.texts), args.per_prompt)
    result = evaluate_images(
        fake,
        fake,
        metrics=(),
        protocol=args.protocol,
        extractor="effnet-lite0",  # which scores do not need
        captions=prompts.of_images(len(fake), args.per_prompt),
        scorers=args.scorer,
        device=args.device,
    )
    return _finish(result, args)


@EVAL.command(
    "compare",
    "result files side by side; unlike ones are refused",
    argument("results", nargs="+", type=Path, metavar="FILE.json", help="written with --out"),
)
def _compare(args: argparse.Namespace) -> int:
    from fewstep.evaluation.compare import compare, load_result

    names = [path.stem for path in args.results]
    names = names if len(set(names)) == len(names) else [str(path) for path in args.results]
    print(compare({name: load_result(path) for name, path in zip(names, args.results)}))
    return 0


@EVAL.command("protocols", "list the protocols")
def _protocols(args: argparse.Namespace) -> int:
    from fewstep.evaluation import protocols
    from fewstep.evaluation.statistics import table

    loaded = [protocols.load(name) for name in protocols.names()]
    rows = [
        (p.name, p.extractor, protocols.short(p.samples) if p.samples else "any", p.about) for p in loaded
    ]
    print(table(("protocol", "extractor", "images", "about"), rows))
    return 0


def prompted_indices(path: Path, captions: list[str], column: str | None = None) -> list[int]:
    """Index into `captions` of each text of a file; FewstepError names one that is no caption."""
    import difflib

    from fewstep.data import texts
    from fewstep.errors import FewstepError

    found = texts.read(path, column)
    index = {caption: i for i, caption in reversed(list(enumerate(captions)))}
    for place, text in zip(found.places, found.texts):
        if text.strip() not in index:
            near = difflib.get_close_matches(text.strip(), index, 1)
            hint = f"; the nearest is {near[0]!r}" if near else ""
            raise FewstepError(f"{path}, {place}: {text!r} is no caption of the reference set{hint}")
    return [index[text.strip()] for text in found.texts]


@contextlib.contextmanager
def _together() -> Iterator[tuple[int, int]]:
    """Rank and number of the processes that a launcher started, joined in a group."""
    rank, world = process()
    if world == 1:
        yield rank, world
        return
    import torch.distributed as dist

    dist.init_process_group("gloo")
    yield rank, world
    dist.destroy_process_group()


def _open(side: str, args: argparse.Namespace) -> Any:
    from fewstep.data import emoji
    from fewstep.evaluation.evaluate import open_side
    from fewstep.evaluation.images import ArrayImages

    if (pictures := emoji.pictures(side)) is not None:
        return ArrayImages(pictures, side)
    return open_side(side, getattr(args, "skip_bad", None), args.workers)


def _first(source: Any, num: int | None) -> Any:
    from fewstep.errors import FewstepError
    from fewstep.evaluation.images import FirstImages, ImageSource

    if num is None:
        return source
    if not isinstance(source, ImageSource):
        raise FewstepError("--num needs images, but FAKE is a statistics file")
    return FirstImages(source, num)


def _finish(result: dict[str, Any], args: argparse.Namespace) -> int:
    from fewstep.evaluation.evaluate import to_markdown
    from fewstep.evaluation.features import FeatureError
    from fewstep.files import write

    print(to_markdown(result))
    if args.out:
        try:
            text = json.dumps({**result, "command": args.typed}, indent=2, allow_nan=False) + "\n"
        except ValueError:
            raise FeatureError(
                f"{args.out} is not written: a number is not finite; look at the images"
            ) from None
        write(args.out, text)
    return 0
