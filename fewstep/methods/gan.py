"""Options of an adversarial term beside another method's loss."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from ..bounds import Least0, Range
from .base import Expected, Options, few

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass
class Gan(Options):
    """A discriminator on features of a network.

    Attributes:
        gan_weight: of the student's adversarial term; 0 is none, and data-free.
        gan_time_range: noise on what the discriminator sees, as fractions of the schedule (published: all of it). A
            small teacher gives nothing away behind much noise.
        discriminator_weight: of its loss beside the critic's.
        taps: blocks whose features it sees.
    """

    gan_weight: Least0 = 5e-3
    gan_time_range: Range = (0.0, 1.0)
    discriminator_weight: Least0 = 1e-2
    taps: list[str] = field(default_factory=lambda: ["mid_block"])

    def expected(self) -> Expected:
        return {"taps": (bool(self.taps) or not self.gan_weight, "names of the network's blocks")}

    def smoke(self) -> Self:
        return replace(super().smoke(), taps=few(self.taps))
