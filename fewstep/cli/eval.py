"""The command `fewstep eval`. Heavy imports wait until a subcommand runs."""

import argparse
import json
from pathlib import Path
from typing import Any

from fewstep.cli.eval_sampling import add_sampling, process

EMOJI = "builtin:emoji"
IMAGES = "folder or zip of image files, npz of images, statistics file, or builtin:emoji"
SCORERS = (
    "clip:PATH, open_clip:ARCHITECTURE:FILE, pickscore:PATH, hpsv2.1:PATH or imagereward; may be repeated"
)
FLAGS = {
    "kid": "kernel distance, which has no small-sample bias",
    "prdc": "precision, recall, density and coverage",
    "vendi": "effective number of different images",
    "is": "Inception score",
    "fd_inf": "Fréchet distance extrapolated to infinitely many images",
    "patch-fd": "Fréchet distance of full-resolution patches",
}


def add_parser(subparsers: Any) -> None:
    """Adds `eval` with its subcommands; each sets `run`, from the parsed arguments to an exit code."""
    parser = subparsers.add_parser(
        "eval", help="generate and measure images: Fréchet distance, CLIP score, speed"
    )
    commands = parser.add_subparsers(dest="eval_command", required=True, metavar="COMMAND")

    def command(name: str, function: Any, text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text)
        added.set_defaults(run=function)
        return added

    fid = command("fid", _fid, "distance between two sets of images")
    fid.add_argument("real", metavar="REAL", help=IMAGES)
    fid.add_argument("fake", metavar="FAKE", help=IMAGES)
    for name, text in FLAGS.items():
        fid.add_argument(
            f"--{name.replace('_', '-')}", dest=name, action="store_true", help=f"also the {text}"
        )
    fid.add_argument("--num", type=int, metavar="N", help="use the first N fake images")
    fid.add_argument(
        "--declared",
        action="store_true",
        help="take statistics of unknown origin for ones of this extractor and protocol",
    )

    stats = command("stats", _stats, "write the statistics of a set of images")
    stats.add_argument("images", metavar="IMAGES", help=IMAGES)
    stats.add_argument("-o", "--out", type=Path, required=True, metavar="FILE", help="npz file to write")

    retrieval = command("retrieval", _retrieval, "do generated emoji look like what the prompt named?")
    retrieval.add_argument(
        "fake", metavar="FAKE", help="folder or npz of images, in the order of the prompts"
    )
    retrieval.add_argument(
        "--prompts", type=Path, required=True, metavar="FILE", help="text file, one caption of the set a line"
    )

    diversity = command("diversity", _diversity, "how different are the images of one prompt?")
    diversity.add_argument("fake", metavar="FAKE", help="folder or npz of images, those of a prompt in a row")
    diversity.add_argument("--per-prompt", type=int, required=True, metavar="K", help="images per prompt")
    diversity.add_argument(
        "--against",
        metavar="OTHER",
        help="another model's images of the same prompts, compared prompt by prompt",
    )

    scores = command("scores", _scores, "do images match their captions? CLIP score and preference models")
    scores.add_argument("fake", metavar="FAKE", help="folder or npz of images, in the order of the prompts")
    scores.add_argument("--prompts", type=Path, required=True, metavar="FILE", help="one a line, or .jsonl")
    scores.add_argument(
        "--per-prompt", type=int, default=1, metavar="K", help="images of each prompt, in a row"
    )
    scores.add_argument("--scorer", action="append", required=True, metavar="KIND:PATH", help=SCORERS)
    scores.add_argument("--num", type=int, metavar="N", help="use the first N images")

    compare = command("compare", _compare, "result files side by side; unlike ones are refused")
    compare.add_argument("results", nargs="+", type=Path, metavar="FILE.json", help="written with --out")

    command("protocols", _protocols, "list the protocols")
    add_sampling(command)

    for added in (fid, stats, retrieval, diversity):
        added.add_argument(
            "--extractor", metavar="NAME", help="network for the features (default: effnet-lite0)"
        )
        added.add_argument("--weights", metavar="FILE", help="weights of inception-2015")
    for added in (fid, stats, scores):
        added.add_argument("--protocol", metavar="NAME", help="see `fewstep eval protocols`")
    for added in (fid, stats, scores):
        added.add_argument("--device", help="of the network: auto (default), cpu, cuda, cuda:1, ...")
    for added in (fid, stats):
        added.add_argument(
            "--skip-bad",
            type=int,
            default=0,
            metavar="N",
            help="leave out up to N unreadable files",
        )
    for added in (fid, stats, retrieval, diversity, scores):
        added.add_argument(
            "--workers", type=int, metavar="P", help="processes that decode image files (default: by cores)"
        )
    for added in (fid, retrieval, diversity, scores):
        added.add_argument("--out", type=Path, metavar="FILE.json", help="also write the result as JSON")


def _fid(args: argparse.Namespace) -> int:
    from fewstep.errors import FewstepError
    from fewstep.evaluation import protocols
    from fewstep.evaluation.evaluate import evaluate_images

    if args.real != EMOJI and Path(args.real).resolve() == Path(args.fake).resolve():
        raise FewstepError(f"REAL and FAKE are both {args.real}: expected two different sets of images")

    protocol = protocols.load(args.protocol) if args.protocol else None
    metrics = [
        "fd",
        *(protocol.metrics if protocol else ()),
        *(name for name in FLAGS if getattr(args, name)),
    ]
    result = evaluate_images(
        _open(args.real, args),
        _first(_open(args.fake, args), args.num),
        extractor=args.extractor,
        metrics=tuple(dict.fromkeys(metrics)),
        protocol=protocol,
        weights=args.weights,
        declared=args.declared,
        device=args.device,
    )
    return _finish(result, args.out)


def _stats(args: argparse.Namespace) -> int:
    from fewstep.errors import FewstepError
    from fewstep.evaluation import protocols
    from fewstep.evaluation.features import shared_moments, stream_moments
    from fewstep.evaluation.images import ImageSource
    from fewstep.evaluation.statistics import Statistics
    from fewstep.vision.extractor import identity
    from fewstep.vision.extractors import DEFAULT, get_extractor

    on = args.device
    if args.protocol:
        extractor = protocols.load(args.protocol).get_extractor(args.extractor, on, args.weights)
    else:
        extractor = get_extractor(args.extractor or DEFAULT, on, args.weights)
    source = _open(args.images, args)
    if not isinstance(source, ImageSource):
        raise FewstepError(f"{args.images} holds statistics already, expected images")
    rank, world = process()
    if world > 1:
        import torch.distributed as dist

        dist.init_process_group("gloo")
        moments = shared_moments(source, extractor, rank, world)
        dist.destroy_process_group()
    else:
        moments = stream_moments(source, extractor)
    if rank:
        return 0
    skipped = {"skipped": list(source.skipped)} if source.skipped else {}
    meta = {**identity(extractor), "source": source.name, "images_sha256": source.sha256, **skipped}
    Statistics.from_moments(moments, meta).save(args.out)
    note = f", by {world} processes" if world > 1 else ""
    note += f", {len(source.skipped)} left out: {', '.join(source.skipped)}" if source.skipped else ""
    print(f"{args.out}: {len(source)} images, {extractor.name}{note}")
    return 0


def _retrieval(args: argparse.Namespace) -> int:
    from fewstep.data import emoji
    from fewstep.evaluation.evaluate import evaluate_images
    from fewstep.evaluation.images import open_images

    prompted = prompted_indices(args.prompts, emoji.load()[1])
    result = evaluate_images(
        _open(EMOJI, args),
        open_images(args.fake, workers=_workers(args)),
        extractor=args.extractor,
        prompted=prompted,
        weights=args.weights,
    )
    return _finish(result, args.out)


def _diversity(args: argparse.Namespace) -> int:
    from fewstep.errors import FewstepError
    from fewstep.evaluation.evaluate import evaluate_images
    from fewstep.evaluation.images import open_images

    fake = open_images(args.fake, workers=_workers(args))
    if args.per_prompt < 2 or len(fake) % args.per_prompt or len(fake) < 2 * args.per_prompt:
        raise FewstepError(
            f"--per-prompt is {args.per_prompt} for {len(fake)} images, expected at least 2 that "
            "divides their number into at least 2 prompts"
        )
    other = open_images(args.against, workers=_workers(args)) if args.against else fake
    if len(other) != len(fake):
        raise FewstepError(
            f"--against {args.against}: {len(other)} images for {len(fake)}: expected as many, of the same prompts"
        )
    groups = [i // args.per_prompt for i in range(len(fake))]
    result = evaluate_images(
        other,
        fake,
        extractor=args.extractor,
        groups=groups,
        metrics=("diversity", "vendi", *["diversity-difference"] * bool(args.against)),
        weights=args.weights,
    )
    return _finish({**result, "warnings": []}, args.out)


def _scores(args: argparse.Namespace) -> int:
    from fewstep.evaluation.evaluate import evaluate_images
    from fewstep.evaluation.images import open_images
    from fewstep.evaluation.prompts import read_prompts
    from fewstep.evaluation.sampling import check_made_from, check_num

    prompts = read_prompts(args.prompts)
    fake = _first(open_images(args.fake, workers=_workers(args)), args.num)
    check_made_from(args.fake, prompts, args.per_prompt)
    check_num(len(fake), prompts, args.per_prompt)
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
    return _finish({**result, "warnings": []}, args.out)


def _compare(args: argparse.Namespace) -> int:
    from fewstep.evaluation.compare import compare, load_result

    names = [path.stem for path in args.results]
    names = names if len(set(names)) == len(names) else [str(path) for path in args.results]
    print(compare({name: load_result(path) for name, path in zip(names, args.results)}))
    return 0


def _protocols(args: argparse.Namespace) -> int:
    from fewstep.evaluation import protocols
    from fewstep.evaluation.statistics import table

    loaded = [protocols.load(name) for name in protocols.names()]
    rows = [
        (p.name, p.extractor, protocols.short(p.samples) if p.samples else "any", p.about) for p in loaded
    ]
    print(table(("protocol", "extractor", "images", "about"), rows))
    return 0


def prompted_indices(path: Path, captions: list[str]) -> list[int]:
    """Index into `captions` of each line of a text file; FewstepError names a line that is no caption."""
    import difflib

    from fewstep.errors import FewstepError

    try:
        lines = path.read_text(encoding="utf-8").rstrip().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise FewstepError(
            f"{path} cannot be read ({error}): expected a text file with one caption a line"
        ) from None
    index = {caption: i for i, caption in reversed(list(enumerate(captions)))}
    for number, line in enumerate(lines, 1):
        if line.strip() not in index:
            near = difflib.get_close_matches(line.strip(), index, 1)
            hint = f"; the nearest is {near[0]!r}" if near else ""
            raise FewstepError(f"{path}, line {number}: {line!r} is no caption of the reference set{hint}")
    return [index[line.strip()] for line in lines]


def _workers(args: argparse.Namespace) -> int | None:
    from fewstep.errors import FewstepError

    if args.workers is not None and args.workers < 0:
        raise FewstepError(f"--workers is {args.workers}, expected 0 (decode in this process) or more")
    return args.workers


def _open(side: str, args: argparse.Namespace) -> Any:
    from fewstep.evaluation.evaluate import open_side
    from fewstep.evaluation.images import ArrayImages

    if side == EMOJI:
        from fewstep.data import emoji

        return ArrayImages(emoji.load()[0], EMOJI)
    return open_side(side, getattr(args, "skip_bad", 0), _workers(args))


def _first(source: Any, num: int | None) -> Any:
    from fewstep.errors import FewstepError
    from fewstep.evaluation.images import FirstImages, ImageSource

    if num is None:
        return source
    if not isinstance(source, ImageSource):
        raise FewstepError("--num needs images, but FAKE is a statistics file")
    return FirstImages(source, num)


def _finish(result: dict[str, Any], out: Path | None) -> int:
    from fewstep.evaluation.evaluate import to_markdown
    from fewstep.files import write

    print(to_markdown(result))
    if out:
        text = json.dumps(result, indent=2, allow_nan=False) + "\n"
        write(out, text)
    return 0
