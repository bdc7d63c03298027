"""Metrics of two sets of images by name: which inputs each takes, its labels and its uncertainty."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewstep.errors import FewstepError
from fewstep.evaluation import metrics as M
from fewstep.evaluation.features import BATCH, extract
from fewstep.evaluation.images import ImageSource, open_images
from fewstep.evaluation.statistics import Moments, Statistics, check_comparable, check_origin
from fewstep.vision.extractor import SPATIAL, Extractor, Prepared, identity
from fewstep.vision.lpips import find_lpips, lpips_diversity
from fewstep.vision.preprocess import crop_and_resize
from fewstep.vision.scores import Scorer


@dataclass(frozen=True)
class Number:
    """A measured value.

    Attributes:
        name: without the extractor, such as "FD".
        value: the number.
        error: standard error, or None where none is known.
        error_kind: how the error was found.
        extra: whatever else the reader of the value needs.
        by: the model that gave it, where that is not the extractor.
    """

    name: str
    value: float
    error: float | None = None
    error_kind: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    by: str | None = None


@dataclass(frozen=True)
class Sides:
    """Both sets of images and what was asked about them; features are made when first needed."""

    real: ImageSource | Statistics
    fake: ImageSource | Statistics
    extractor: Extractor
    prompted: Tensor | None = None
    groups: Tensor | None = None
    captions: Sequence[str] | None = None
    scorers: Sequence[Scorer] = ()
    share: tuple[int, int] = (0, 1)

    @cached_property
    def images(self) -> dict[str, ImageSource | None]:
        """Of "real" and "fake"; None where there are only statistics."""
        return {"real": images_of(self.real), "fake": images_of(self.fake)}

    @cached_property
    def x(self) -> Tensor:
        """Features of the real images (M, D), cached on disk."""
        return extract(images_of(self.real), self.extractor, cached=True, share=self.share)

    @cached_property
    def y(self) -> Tensor:
        """Features of the fake images (N, D)."""
        return extract(images_of(self.fake), self.extractor, share=self.share)

    @cached_property
    def moments(self) -> Moments:
        """Of the fake features."""
        return Moments.of(self.y)

    @cached_property
    def statistics(self) -> tuple[Statistics, Statistics]:
        """Real and fake, checked to be comparable."""
        origin = identity(self.extractor)
        real = self.real if isinstance(self.real, Statistics) else Statistics.from_features(self.x, origin)
        fake = (
            self.fake if isinstance(self.fake, Statistics) else Statistics.from_moments(self.moments, origin)
        )
        check_comparable(real, fake, names=("real", "fake"))
        return real, fake


def fd(sides: Sides) -> Iterator[Number]:
    """Fréchet distance, with a block jackknife over the fake images."""
    real, fake = sides.statistics
    x = None if isinstance(sides.real, Statistics) else sides.x
    y = None if isinstance(sides.fake, Statistics) else sides.y
    root = None
    if any(features is not None and len(features) <= features.shape[1] for features in (x, y)):
        root = _root(real, x)
        value = M.frechet_distance_of_factors(real.mu, root, fake.mu, _root(fake, y))
    else:
        value = M.frechet_distance(real.mu, real.sigma, fake.mu, fake.sigma)
    if y is None or len(y) < 4:
        yield Number("FD", value)
    else:
        kind = "jackknife over blocks of the fake images, real ones held fixed"
        yield Number("FD", value, fd_error(real, y, sides.moments, root), kind)


def fd_error(
    real: Statistics, features: Tensor, moments: Moments, root: Tensor | None = None, blocks: int = 10
) -> float:
    """Standard error of the Fréchet distance by the delete-one-block jackknife over the fake images.

    Bootstrapping with replacement would be wrong here: repeated images lower the rank of the covariance and
    raise the distance.

    Args:
        real: the reference, held fixed.
        features: of the fake images (N, D).
        moments: of the same features.
        root: a factor of the real covariance (D, any), if there is one already.
        blocks: how many parts are left out in turn.
    """
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(0))
    parts = order.tensor_split(min(blocks, len(order) // 2))
    values = []
    for i, part in enumerate(parts):
        rest = moments - Moments.of(features[part])
        if rest.n > len(rest.mean):
            values.append(M.frechet_distance(real.mu, real.sigma, rest.mean, rest.covariance()))
        else:
            root = _root(real, None) if root is None else root
            others = features[torch.cat([p for j, p in enumerate(parts) if j != i])]
            values.append(
                M.frechet_distance_of_factors(real.mu, root, rest.mean, _centred(others, rest.mean))
            )
    return float((len(parts) - 1) ** 0.5 * np.std(values))


def _root(statistics: Statistics, features: Tensor | None) -> Tensor:
    """A factor of the covariance: the features themselves if they are the smaller one."""
    if features is not None and len(features) <= features.shape[1]:
        return _centred(features, statistics.mu)
    with M.one_thread():
        return M.factor(statistics.sigma)


def _centred(features: Tensor, mean: Tensor) -> Tensor:
    """F (D, N) with `F F^T` the covariance of features (N, D)."""
    return (features.double() - mean).T / (len(features) - 1) ** 0.5


def fd_inf(sides: Sides) -> Iterator[Number]:
    """Fréchet distance without the bias of the number of fake images (that of the real ones stays)."""
    real = sides.statistics[0]
    value, error = M.frechet_infinity(real.mu, real.sigma, sides.y)
    yield Number("FD_inf", value, error, "of the linear fit in 1/n")


def patch_fd(sides: Sides) -> Iterator[Number]:
    """Fréchet distance of middle patches at full resolution, which sees detail that resizing hides."""
    size, both = sides.extractor.size, (sides.images["real"], sides.images["fake"])
    # Without the crop and resize of a protocol, which would take the detail away.
    base = sides.extractor.extractor if isinstance(sides.extractor, Prepared) else sides.extractor
    patch = Prepared(base, crop_and_resize("patch", None, size))
    for number in fd(replace(sides, real=both[0], fake=both[1], extractor=patch)):
        yield replace(number, name="patch-FD")


def sfd(sides: Sides) -> Iterator[Number]:
    """Fréchet distance of an early layer's activations as they lie in the image: sFID, as ADM's evaluator has it."""
    extractor: Any = sides.extractor
    spatial = extractor.spatial
    real, fake = (_spatial_side(side, spatial) for side in (sides.real, sides.fake))
    for number in fd(replace(sides, real=real, fake=fake, extractor=spatial)):
        yield replace(number, name="sFD")


def _spatial_side(side: ImageSource | Statistics, spatial: Extractor) -> ImageSource | Statistics:
    """Images as they are; of statistics their second part, whose origin is that of the first."""
    if not isinstance(side, Statistics):
        return side
    origin = {**side.meta, "dim": len(side.spatial[0])}
    if "extractor" in origin:
        origin["extractor"] += SPATIAL
    return Statistics(*side.spatial, side.n, origin)


def cmmd(sides: Sides) -> Iterator[Number]:
    """Kernel distance of CLIP's features of the middle square."""
    squares = replace(sides, extractor=_bare(sides.extractor).square)
    kind = "delete-one jackknife over both sets"
    yield Number("CMMD", *M.cmmd(squares.x, squares.y), kind, {"n_real": len(squares.x)})


def kid(sides: Sides) -> Iterator[Number]:
    """Kernel distance."""
    kind = "delete-one jackknife over both sets"
    yield Number("KID", *M.kid(sides.x, sides.y), kind, {"n_real": len(sides.x)})


def retrieval(sides: Sides) -> Iterator[Number]:
    """Share of fake images that look most like the real image they were asked to be."""
    real = images_of(sides.real).batches(BATCH)
    same = M.duplicate_groups(image for batch in real for image in batch)
    share = M.retrieval_accuracy(sides.y, sides.prompted, sides.x, same)
    error = (share * (1 - share) / len(sides.y)) ** 0.5
    yield Number("retrieval", share, error, "binomial", {"chance": 1 / len(sides.x)})


def prdc(sides: Sides) -> Iterator[Number]:
    """Precision, recall, density, coverage."""
    for name, (value, error) in M.precision_recall_density_coverage(sides.x, sides.y).items():
        kind = "over images, the neighbourhoods held fixed"
        yield Number(name, value, error, kind, {"n_real": len(sides.x)})


def nearest(sides: Sides) -> Iterator[Number]:
    """Distances to the nearest real image, where the real ones are what a model was trained on."""
    kinds = {"ratio": "bootstrap over images", "copies": "binomial"}
    for name, (value, error) in M.nearest_to_training(sides.x, sides.y).items():
        label = "nearest" if name == "ratio" else name
        yield Number(label, value, error, kinds[name], {"n_real": len(sides.x)})


def vendi(sides: Sides) -> Iterator[Number]:
    """Effective number of different fake images."""
    error = M.vendi_error(sides.y) if len(sides.y) >= 4 else None
    yield Number("Vendi", M.vendi(sides.y), error, "jackknife over blocks of the fake images")


def diversity(sides: Sides) -> Iterator[Number]:
    """How different the images of one prompt are: by features, and by LPIPS where its weights are."""
    yield Number("diversity", *M.intra_group_diversity(sides.y, sides.groups), "over prompts")
    distance, fake = find_lpips(), images_of(sides.fake)
    if distance and len(fake.sizes) == 1:
        images = torch.cat(list(fake.batches(1024)))
        value, error = lpips_diversity(images, sides.groups, distance)
        yield Number("LPIPS diversity", value, error, "over prompts", by="alex")


def diversity_difference(sides: Sides) -> Iterator[Number]:
    """How much more diverse the images of one prompt are than the other side's of the same prompts."""
    value, error, interval = M.diversity_difference(sides.y, sides.x, sides.groups)
    extra = {"interval_95": interval, "prompts": len(sides.groups.unique())}
    yield Number("diversity difference", value, error, "paired over prompts; interval by bootstrap", extra)


def inception_score(sides: Sides) -> Iterator[Number]:
    """How sure and how varied the extractor's classifier is."""
    value, error = M.inception_score(_bare(sides.extractor).classify(sides.y))
    yield Number("IS", value, error, "over 10 parts of the images")


def scores(sides: Sides) -> Iterator[Number]:
    """Mean of every scorer over the images and their captions."""
    fake = images_of(sides.fake)
    for scorer in sides.scorers:
        parts, done = [], 0
        for prepared in fake.prepared(BATCH, scorer.prepare):
            parts.append(scorer.score(prepared, sides.captions[done : done + len(prepared)]))
            done += len(prepared)
        values = torch.cat(parts).double()
        if not values.isfinite().all():
            raise FewstepError(f"{scorer.label} of {fake.name} is not finite: look at {scorer.name}")
        extra = {"weights_sha256": scorer.weights_sha256}
        error = float(values.std() / len(values) ** 0.5) if len(values) > 1 else None
        yield Number(scorer.label, float(values.mean()), error, "over images", extra, by=scorer.name)


def _count(least: int, *names: str) -> Callable[[Sides], str | None]:
    """Why there are too few images on these sides."""

    def lacks(sides: Sides) -> str | None:
        counts = {name: len(images) for name, images in sides.images.items() if images is not None}
        few = {name: counts[name] for name in names if counts.get(name, least) < least}
        have = " and ".join(f"{name} has {n}" for name, n in few.items())
        return f"it needs at least {least} images, and {have}" if few else None

    return lacks


def _small(sides: Sides) -> str | None:
    """Why there are no patches."""
    if few := _count(2, "real", "fake")(sides):
        return few
    size, both = sides.extractor.size, sides.images.values()
    small = [s.name for s in both if s is not None and max(map(max, s.sizes)) <= size]
    none = f"but no image of {' and '.join(small)} is larger"
    return f"it takes the middle {size} x {size} pixels, {none}" if small else None


def _flat(sides: Sides) -> str | None:
    """Why there are no spatial features."""
    both = {"real": sides.real, "fake": sides.fake}
    without = [name for name, side in both.items() if isinstance(side, Statistics) and side.spatial is None]
    if without:
        return f"it needs images, or statistics with mu_s and sigma_s, and those of {' and '.join(without)} lack them"
    return _count(2, *(name for name, side in both.items() if isinstance(side, ImageSource)))(sides)


def _has(
    attribute: str, what: str, owner: str, lacks: Callable[[Sides], str | None]
) -> Callable[[Sides], str | None]:
    """Why the extractor cannot give what is asked of it beside features, or what else is lacking."""

    def lacks_it(sides: Sides) -> str | None:
        if hasattr(_bare(sides.extractor), attribute):
            return lacks(sides)
        return f"it needs {what}, which {sides.extractor.name} has not: use {owner}"

    return lacks_it


def _bare(extractor: Extractor) -> Any:
    """Without a protocol's crops."""
    return extractor.extractor if isinstance(extractor, Prepared) else extractor


def _unpaired(sides: Sides) -> str | None:
    counts = [len(images or ()) for images in sides.images.values()]
    if sides.groups is None or counts[0] != counts[1]:
        return f"it needs images of the same prompts on both sides, and these are {counts[0]} and {counts[1]}"
    return _ungrouped(sides)


def _ungrouped(sides: Sides) -> str | None:
    several = (torch.unique(sides.groups, return_counts=True)[1] > 1).sum().item()
    return (
        None
        if several > 1
        else f"it needs at least 2 prompts with several images each, and there are {several}"
    )


@dataclass(frozen=True)
class Measure:
    """A metric and what it takes.

    Attributes:
        numbers: the function. images: sides that must be images rather than statistics.
        lacks: why it cannot be had of some sides, known before a network runs; None where it can.
        moments: it compares means and covariances.
        asked: what of `Sides` is its question; without it the measure is not asked for.
    """

    numbers: Callable[[Sides], Iterator[Number]]
    images: tuple[str, ...] = ()
    lacks: Callable[[Sides], str | None] = lambda _sides: None
    moments: bool = False
    asked: str | None = None

    @property
    def compares(self) -> bool:
        """It is about both sides."""
        return self.moments or "real" in self.images


MEASURES: dict[str, Measure] = {
    "fd": Measure(fd, lacks=_count(2, "real", "fake"), moments=True),
    "fd_inf": Measure(fd_inf, ("fake",), _count(8, "fake"), moments=True),
    "patch-fd": Measure(patch_fd, ("real", "fake"), _small),
    "kid": Measure(kid, ("real", "fake"), _count(3, "real", "fake")),
    "retrieval": Measure(retrieval, ("real", "fake"), asked="prompted"),
    "prdc": Measure(prdc, ("real", "fake"), _count(6, "real", "fake")),
    "nearest": Measure(nearest, ("real", "fake"), _count(3, "real")),
    "vendi": Measure(vendi, ("fake",)),
    "diversity": Measure(diversity, ("fake",), _ungrouped, asked="groups"),
    "diversity-difference": Measure(diversity_difference, ("real", "fake"), _unpaired),
    "is": Measure(
        inception_score, ("fake",), _has("classify", "a classifier", "inception-2015", _count(20, "fake"))
    ),
    "sfd": Measure(sfd, lacks=_has("spatial", "spatial features", "inception-2015", _flat), moments=True),
    "cmmd": Measure(
        cmmd,
        ("real", "fake"),
        _has("square", "the features of a CLIP", "clip:PATH", _count(2, "real", "fake")),
    ),
    "scores": Measure(scores, ("fake",)),
}


def measure(names: tuple[str, ...], sides: Sides) -> tuple[list[Number], dict[str, str]]:
    """All numbers, and why some measures cannot be had; see :func:`possible`."""
    wanted, left_out = possible(names, sides)
    return [number for name in wanted for number in MEASURES[name].numbers(sides)], left_out


def possible(names: tuple[str, ...], sides: Sides) -> tuple[list[str], dict[str, str]]:
    """The measures that can be had, and why the others cannot, before the network sees an image.

    Raises:
        FewstepError: none can be had, or statistics that were made in another way.
    """
    left_out: dict[str, str] = {}
    names = tuple(
        n for n in names if (asked := MEASURES[n].asked) is None or getattr(sides, asked) is not None
    )
    for name in names:
        if reason := _reason(name, sides):
            left_out[name] = reason
    wanted = [name for name in names if name not in left_out]
    if left_out and not wanted:
        raise FewstepError("; ".join(f"{name}: {reason}" for name, reason in left_out.items()))
    if any(MEASURES[name].moments for name in wanted):
        for side, statistics in (("real", sides.real), ("fake", sides.fake)):
            if isinstance(statistics, Statistics):
                check_origin(statistics, identity(sides.extractor), side)
    return wanted, left_out


def _reason(name: str, sides: Sides) -> str | None:
    """Why a measure cannot be had."""
    one = MEASURES[name]
    if any(sides.images[side] is None for side in one.images):
        return "it needs images where statistics were given"
    return one.lacks(sides)


def images_of(side: ImageSource | Statistics) -> ImageSource | None:
    """The images of a side, also those that a statistics file holds beside its moments; None without any."""
    if isinstance(side, Statistics):
        return _opened(side.images) if side.images else None
    return side


@cache
def _opened(path: Path) -> ImageSource:
    """Checked once: a reference of 10,000 images has gigabytes."""
    return open_images(path, at_least=2)


def describe(side: Any) -> dict[str, Any]:
    """Name, count and hash of one side; JSON-ready."""
    if isinstance(side, Statistics):
        return {
            "name": side.meta.get("source", "statistics"),
            "n": side.n,
            "sha256": side.meta.get("images_sha256"),
        }
    return {"name": side.name, "n": len(side), "sha256": side.sha256}
