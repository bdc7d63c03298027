"""Mean and covariance of features: accumulated in a stream, saved with their origin, refused when unlike."""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewstep.errors import FewstepError
from fewstep.evaluation.images import KEYS
from fewstep.files import replacing

IDENTITY = (
    "extractor",
    "weights_sha256",
    "resize",
    "dim",
)  # what must be equal for two statistics to be compared


@dataclass(frozen=True)
class Moments:
    """Sums of features that can be added, taken away and merged in any order (Chan et al. 1979), in float64.

    Attributes:
        n: number of images.
        mean: (D,).
        scatter: (D, D), the sum of outer products of deviations from the mean.
    """

    n: int
    mean: Tensor
    scatter: Tensor

    @classmethod
    def of(cls, features: Tensor) -> "Moments":
        """Moments of features (N, D), N >= 1."""
        x = features.double()
        deviation = x - x.mean(0)
        return cls(len(x), x.mean(0), deviation.T @ deviation)

    @classmethod
    def none(cls, dim: int) -> "Moments":
        """Moments of no images."""
        zero = torch.zeros(dim, dtype=torch.float64)
        return cls(0, zero, torch.outer(zero, zero))

    def __add__(self, other: "Moments") -> "Moments":
        """Moments of both sets of images together."""
        if not self.n or not other.n:
            return self if self.n else other
        n, delta = self.n + other.n, other.mean - self.mean
        scatter = self.scatter + other.scatter + torch.outer(delta, delta) * (self.n * other.n / n)
        return Moments(n, self.mean + delta * (other.n / n), scatter)

    def __sub__(self, part: "Moments") -> "Moments":
        """Moments without a part that was added before."""
        n = self.n - part.n
        mean = (self.mean * self.n - part.mean * part.n) / n
        delta = part.mean - mean
        scatter = self.scatter - part.scatter - torch.outer(delta, delta) * (n * part.n / self.n)
        return Moments(n, mean, scatter)

    def covariance(self) -> Tensor:
        """Unbiased covariance (D, D)."""
        return self.scatter / (self.n - 1)


@dataclass(frozen=True)
class Statistics:
    """A Gaussian fitted to the features of a set of images, with its origin.

    Attributes:
        mu: mean (D,), float64.
        sigma: unbiased covariance (D, D), float64.
        n: number of images, or 0 if a foreign file does not tell.
        meta: JSON-ready origin: `extractor`, `weights_sha256`, `resize`, `dim`, and whatever else is worth
            keeping.
        spatial: mean and covariance of the extractor's second kind of features, for sFID, where there are any.
        images: file that holds images beside the moments, as ADM's references do, for what needs images.
    """

    mu: Tensor
    sigma: Tensor
    n: int
    meta: dict[str, Any] = field(default_factory=dict)
    images: Path | None = None
    spatial: tuple[Tensor, Tensor] | None = None

    @classmethod
    def from_moments(cls, moments: Moments, meta: dict[str, Any]) -> "Statistics":
        """Raises FewstepError below two images, which have no covariance."""
        if moments.n < 2:
            raise FewstepError(f"statistics need at least 2 images, got {moments.n}: add images")
        return cls(moments.mean, moments.covariance(), moments.n, {"dim": len(moments.mean), **meta})

    @classmethod
    def from_features(cls, features: Tensor, meta: dict[str, Any] | None = None) -> "Statistics":
        """Statistics of features (N, D), N >= 2."""
        return cls.from_moments(Moments.of(features), meta or {})

    def save(self, path: str | Path) -> None:
        """Writes `mu`, `sigma` and `meta` (JSON) as npz, which every tool for `mu, sigma` files can read."""
        meta = json.dumps({**self.meta, "n": self.n}, sort_keys=True)
        arrays: dict[str, Any] = {"mu": self.mu.cpu().numpy(), "sigma": self.sigma.cpu().numpy()}
        arrays["meta"] = np.array(meta)
        if self.spatial:  # by the names that ADM gave them
            arrays["mu_s"], arrays["sigma_s"] = (part.cpu().numpy() for part in self.spatial)
        with replacing(path) as part, part.open("wb") as file:
            np.savez(file, **arrays)

    @classmethod
    def load(cls, path: str | Path) -> "Statistics":
        """Reads what `save` wrote, or any npz with `mu` and `sigma` (without meta). Nothing is unpickled."""
        try:
            with np.load(path, allow_pickle=False) as file:
                mu, sigma = _gaussian(file, "mu", "sigma")
                spatial = _gaussian(file, "mu_s", "sigma_s") if "mu_s" in file else None
                meta = json.loads(str(file["meta"])) if "meta" in file else {}
                images = Path(path) if set(KEYS) & set(file) else None
            number = int(meta.pop("n", 0))
        except Exception as error:  # zip, zlib, numpy and JSON each raise their own kinds
            raise FewstepError(
                f"{path} is no statistics file ({error}): expected an npz with mu (D,) and sigma (D, D); "
                "`fewstep eval stats IMAGES -o FILE` writes one"
            ) from None
        if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
            raise FewstepError(
                f"{path}: mu has shape {tuple(mu.shape)} and sigma {tuple(sigma.shape)}, "
                "expected (D,) and (D, D)"
            )
        if (dim := meta.get("dim", len(mu))) != len(mu):
            raise FewstepError(
                f"{path}: it says that dim is {dim}, but mu has {len(mu)} entries: write it again"
            )
        if not (mu.isfinite().all() and sigma.isfinite().all()):
            raise FewstepError(f"{path}: mu or sigma has entries that are not finite: write the file again")
        return cls(mu, sigma, number, {"dim": len(mu), **meta}, images, spatial)


def _gaussian(file: Any, *keys: str) -> tuple[Tensor, Tensor]:
    mu, sigma = (torch.from_numpy(file[key].astype(np.float64)) for key in keys)
    return mu, sigma


def check_comparable(a: Statistics, b: Statistics, names: tuple[str, str] = ("first", "second")) -> None:
    """Refuses two statistics whose distance would mean nothing.

    Raises:
        FewstepError: another extractor, other weights, another resize, another dimension, or an origin that
            is not known; the message is a table of what differs.
    """
    _check_alike(a.meta, b.meta, names)


def check_origin(statistics: Statistics, origin: dict[str, Any], name: str) -> None:
    """Refuses statistics that were not made as an extractor of this origin makes them.

    Raises:
        FewstepError: as :func:`check_comparable`.
    """
    _check_alike(statistics.meta, origin, (name, "this extractor"))


def _check_alike(a: dict[str, Any], b: dict[str, Any], names: tuple[str, str]) -> None:
    rows = [(key, str(a.get(key, "unknown")), str(b.get(key, "unknown"))) for key in IDENTITY]
    unlike = [row for row in rows if row[1] != row[2] or "unknown" in row]
    if unlike:
        raise FewstepError(
            "these statistics cannot be compared, because the features were not made in the same way:\n"
            + table(("", *names), unlike)
            + "\nMake both with the same extractor, or give --extractor, --protocol or --declared as they were made."
        )


def table(header: tuple[str, ...], rows: Iterable[tuple[Any, ...]], most: int | None = None) -> str:
    """A Markdown table with aligned columns.

    Args:
        most: letters of a line; columns for which there is no room stand in further tables below, as do the names of
            the rows, the first column.
    """
    rows = [tuple(map(str, row)) for row in rows]
    columns = [(max(map(len, column)), column) for column in zip(header, *rows)]
    tables, room = [columns[:1]], 0.0
    for column in columns[1:]:
        room -= column[0] + 3
        if len(tables[-1]) > 1 and room < 0:
            tables.append(columns[:1])
        if len(tables[-1]) == 1:
            room = math.inf if most is None else most - columns[0][0] - 4 - column[0] - 3
        tables[-1] = [*tables[-1], column]
    return "\n\n".join(map(_aligned, tables))


def _aligned(columns: list[tuple[int, tuple[str, ...]]]) -> str:
    lines = [[cell.ljust(width) for cell in column] for width, column in columns]
    for (width, _), cells in zip(columns, lines):
        cells.insert(1, "-" * width)
    return "\n".join(f"| {' | '.join(line)} |" for line in zip(*lines))
