"""A plan: what was counted, and what follows from it for a card."""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

from ..recipe import Recipe
from .devices import FRAGMENTS, GPUS, LIBRARIES, UTILISATION, Device

# Left out where it takes nothing, as of tokens.
GRID = "decoding a grid             {} GB, between iterations; samples.vae decodes with less"


@dataclass
class Part:
    """One row of a plan, in bytes on one device."""

    name: str
    parameters: int = 0
    trained: int = 0
    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    average: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.optimizer + self.average


@dataclass
class Turn:
    """One kind of iteration: the phases that run in it, how often, and what they take at a batch size."""

    phases: tuple[str, ...]
    count: int
    told: bool = False  # whether a second size would tell nothing new
    peak: dict[int, int] = field(default_factory=dict)  # batch size -> bytes beyond the parts
    # batch size -> of all micro-batches on one device, by the kind of arithmetic
    flops: dict[int, dict[str, float]] = field(default_factory=dict)

    def flops_at(self, batch_size: int) -> dict[str, float]:
        """Of one such iteration; both ends of a rollout's length count half."""
        total: dict[str, float] = defaultdict(float)
        for counted, flops in self.flops.items():
            for kind, number in flops.items():
                total[kind] += number * batch_size / counted / len(self.flops)
        return total


@dataclass
class Plan:
    """What a recipe takes on one device; see :func:`plan`."""

    recipe: Recipe
    processes: int
    parts: list[Part]
    leaving: int
    preview: int
    turns: list[Turn]
    cache: dict[str, dict[str, int | None]] = field(
        default_factory=dict
    )  # see :func:`~fewstep.runs.disk.on_disk`

    @property
    def held(self) -> int:
        """Bytes that stay through the run."""
        return sum(part.total for part in self.parts)

    def iteration(self, batch_size: int) -> float:
        """Peak of an iteration beyond what is held, gradients included: linear through two counted micro-batches."""
        peaks = []
        for turn in (t for t in self.turns if len(t.peak) == 2):  # the others take no more than one of these
            (b1, p1), (b2, p2) = sorted(turn.peak.items())
            peaks.append(p1 + (p2 - p1) / (b2 - b1) * (batch_size - b1))
        return max(peaks)

    def total(self, batch_size: int | None = None) -> float:
        """Bytes at the peak, be it an iteration's or a grid of previews'."""
        peak = max(self.iteration(batch_size or self.recipe.train.batch_size), self.preview)
        return self.held + (1 + FRAGMENTS) * peak + LIBRARIES

    def largest_batch(self, memory: float) -> int:
        """Largest micro-batch that fits; 0 if none does."""
        if self.total(1) > memory:
            return 0
        high = 2
        while self.total(high) <= memory and high < 2**20:
            high *= 2
        return bisect_left(range(high), True, 1, key=lambda size: self.total(size) > memory) - 1

    def flops(self) -> dict[str, float]:
        """Of the whole run on one device, by the kind of arithmetic."""
        total: dict[str, float] = defaultdict(float)
        for turn in self.turns:
            for kind, number in turn.flops_at(self.recipe.train.batch_size).items():
                total[kind] += turn.count * number
        return total

    def hours(self, device: Device) -> float:
        return device.seconds(self.flops()) / UTILISATION / 3600

    def to_dict(self, gpu: str) -> dict[str, Any]:
        size, iterations = self.recipe.train.batch_size, sum(t.count for t in self.turns)
        return {
            "how": "counted by fewstep plan, not measured",
            "gpu": gpu,
            "processes": self.processes,
            "batch_size": size,
            "held_gb": round(self.held / 1e9, 6),
            "iteration_gb": round(self.iteration(size) / 1e9, 6),
            "preview_gb": round(self.preview / 1e9, 6),
            "total_gb": round(self.total() / 1e9, 6),
            "gb_per_sample": round((self.iteration(2) - self.iteration(1)) / 1e9, 6),
            "largest_batch": self.largest_batch(GPUS[gpu].memory),
            "tflop_per_iteration": round(sum(self.flops().values()) / 1e12 / iterations, 2),
            "tflop_by_kind": {k: round(v / 1e12 / iterations, 2) for k, v in self.flops().items()},
            "hours": round(self.hours(GPUS[gpu]), 1),
            "cache": self.cache,
            "parts": {p.name: {**vars(p), "total": p.total} for p in self.parts},
        }

    def text(self, gpu: str) -> str:
        """A table, and under it what follows from it."""
        gb = lambda size: f"{size / 1e9:.2f}"  # noqa: E731
        head = ["", "parameters", "trained", "weights", "gradients", "optimiser", "average", "held GB"]
        rows = [
            [p.name, f"{p.parameters / 1e6:.1f} M", f"{p.trained / 1e6:.1f} M"]
            + [gb(v) for v in (p.weights, p.gradients, p.optimizer, p.average, p.total)]
            for p in self.parts
        ]
        widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
        lines = [" | ".join(cell.rjust(w) for cell, w in zip(row, widths)) for row in [head, *rows]]
        t, size = self.recipe.train, self.recipe.train.batch_size
        per_image = (self.iteration(2) - self.iteration(1)) / 1e9
        total, device = sum(turn.count for turn in self.turns), GPUS[gpu]
        best = self.largest_batch(device.memory)
        lines += [
            "",
            f"held                        {gb(self.held)} GB",
            f"an iteration, at most       {gb(self.iteration(size))} GB, gradients included, at micro-batches of "
            f"{size}; {per_image:.2f} GB per sample",
            *([GRID.format(gb(self.preview))] if self.preview else []),
            f"libraries and fragments     {gb(self.total() - self.held - max(self.iteration(size), self.preview))} GB "
            "(assumed)",
            f"total                       {gb(self.total())} GB of {gb(device.memory)} on {gpu}"
            + (f", {self.processes} of them" if self.processes > 1 else ""),
            f"largest micro-batch         {best or 'none fits'}",
        ]
        if self.leaving:
            lines.append(f"text encoders               {gb(self.leaving)} GB, gone once prompts are encoded")
        for name, store in self.cache.items():
            known = "" if store["bytes"] is None else f", {gb(store['bytes'])} GB for {store['rows']}"
            lines.append(f"{name + ' on disk':28}{store['bytes_each'] / 1e3:.1f} kB each{known}, at most")
        for turn in self.turns:
            each = sum(turn.flops_at(size).values()) / 1e12
            lines.append(
                f"{' + '.join(turn.phases):27} {turn.count} of {total} iterations, {each:.1f} TFLOP each"
            )
        samples = t.batch_size * t.accumulate * self.processes
        flops, whole = self.flops(), sum(self.flops().values())
        kinds = ", ".join(f"{flops[k] / whole:.0%} {k}" for k in sorted(flops, key=lambda k: -flops[k]))
        lines.append(
            f"the run                     {whole / 1e18:.1f} EFLOP per device ({kinds}), "
            f"{self.hours(device):.1f} h at an assumed {UTILISATION:.0%} of the data sheet's rates; {samples} samples "
            "per iteration"
        )
        return "\n".join(lines)
