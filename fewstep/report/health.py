"""Vital signs of a run: what is normal, and what to do about what is not.

Pure functions of the records of ``metrics.jsonl``, so that the trainer warns of what the report shows, and a resumed
run goes on counting where it was stopped.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

PATIENCE = 3  # records in a row before a value out of range is no accident


@dataclass(frozen=True)
class Sign:
    """A number with a normal range.

    Attributes:
        name: end of the metric's name. low, high: of its normal range. normal: the same for people.
        below, above: likely cause and remedy.
    """

    name: str
    low: float
    high: float
    normal: str
    below: str
    above: str


LAG = (
    "the critic does not know what the student makes now: raise critic.lr, train it more often (critic_steps of the "
    "methods that have it), or lower student.lr"
)
CAST = (
    "the samples drift towards one colour or brightness: lower student.lr, or give method.guidance_scale less"
)
# The ranges are ours, from runs on the built-in teacher; latents of diffusers' pipelines are scaled to a spread near 1.
# Pixels have a spread near 0.5, and a ``pixel_mean`` with no range: drawings on white are at 0.6.
SIGNS = (
    Sign(
        "critic_lag",
        -0.5,
        0.5,
        "0 where the critic knows the student; within ±0.5 while training",
        LAG,
        LAG,
    ),
    Sign("latent_mean", -0.5, 0.5, "near that of real latents; a drift is a colour cast", CAST, CAST),
    Sign(
        "latent_std",
        0.3,
        1.8,
        "near 1, up to about 1.3 under guidance, of pixels near 0.5; falling is collapse, growing is saturation",
        "the samples collapse: lower student.lr, train a critic more often, or give a discriminator real images (the "
        "methods that have one: gan_weight)",
        "the samples saturate: lower method.guidance_scale or student.lr",
    ),
    Sign(
        "grad_norm",
        1e-8,
        float("inf"),
        "above 0",
        "no gradient arrives: look whether these roles have targets, a lr and a loss that reaches them",
        "",
    ),
    Sign(
        "dropped",
        float("-inf"),
        0.0,
        "0; samples without a finite gradient",
        "",
        "some samples have no finite gradient: look at their images and prompts, lower the lr, or train in float32",
    ),
)


def sign_of(metric: str) -> Sign | None:
    """The sign that a logged number is, by the end of its name: ``health/critic_lag_2`` is a critic_lag."""
    name = metric.rpartition("/")[2].rstrip("0123456789").rstrip("_")
    return next((sign for sign in SIGNS if sign.name == name), None)


class Watch:
    """Reads record after record and says once what has been out of its range :data:`PATIENCE` times in a row."""

    def __init__(self, records: Iterable[Mapping[str, Any]] = ()):
        self.streaks: dict[str, int] = {}
        for record in records:
            self.read(record)

    def read(self, record: Mapping[str, Any]) -> list[str]:
        """One line for each number that has just become a worry; numbers a record does not have are left as they were.

        Args:
            record: name -> value, None where it was not finite.
        """
        found = []
        for metric, value in record.items():
            sign = sign_of(metric)
            if sign is None or value is None:
                continue
            bad = not sign.low <= value <= sign.high
            self.streaks[metric] = self.streaks.get(metric, 0) + 1 if bad else 0
            if self.streaks[metric] == PATIENCE:
                advice = sign.below if value < sign.low else sign.above
                found.append(f"{metric} is {value:.3g} (normal: {sign.normal}); {advice}")
        return found


def warnings(records: Iterable[Mapping[str, Any]]) -> list[str]:
    """Every warning of a run, with its step."""
    watch = Watch()
    return [f"step {r.get('step', '?')}: {line}" for r in records for line in watch.read(r)]
