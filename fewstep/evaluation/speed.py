"""What an image costs: network evaluations counted, seconds, peak memory."""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..device import name_of, peak, reset_peak, resident_peak, wait


class Rows:
    """How many samples went through a network."""

    count = 0


@contextmanager
def counted(network: nn.Module) -> Iterator[Rows]:
    """Counts the rows of all batches that a network evaluates, so that guidance by a doubled batch counts twice."""
    rows = Rows()

    def hook(_module: nn.Module, args: tuple, kwargs: dict[str, Any], _output: Any) -> None:
        given = (*args, *kwargs.values())  # Z-Image's is a list of samples
        batch = next(x for x in given if isinstance(x, list) or (isinstance(x, torch.Tensor) and x.ndim > 1))
        rows.count += len(batch)

    handle = network.register_forward_hook(hook, with_kwargs=True)
    try:
        yield rows
    finally:
        handle.remove()


class Stopwatch:
    """Counts and times what a network makes while it draws.

    Args:
        network: whose evaluations are counted.
    """

    def __init__(self, network: nn.Module):
        self.network, self.device = network, next(network.parameters()).device
        self.seconds: list[float] = []  # per image, of each call
        self.images, self.evaluations, self.batch = 0, 0, 0
        reset_peak(self.device)

    @contextmanager
    def drawing(self, images: int) -> Iterator[None]:
        """Around a call that makes so many images at once."""
        wait(self.device)
        begin = time.perf_counter()
        with counted(self.network) as rows:
            yield
            wait(self.device)
        self.seconds.append((time.perf_counter() - begin) / images)
        self.images, self.evaluations = self.images + images, self.evaluations + rows.count
        self.batch = max(self.batch, images)

    def read(self) -> dict[str, Any]:
        """Cost of one image.

        Returns:
            JSON-ready: `nfe`, `seconds` per image (median of the calls) and its standard error `seconds_error` (1.25 s
            / sqrt(n), as of a normal sample; None for one call), `runs` (calls), `batch` (images at once),
            `peak_memory_mb` (MiB) and `peak_memory_kind`, `device`, `threads`.
        """
        most, runs = peak(self.device), len(self.seconds)
        return {
            "nfe": self.evaluations / self.images,
            "seconds": statistics.median(self.seconds),
            "seconds_error": 1.2533 * statistics.stdev(self.seconds) / runs**0.5 if runs > 1 else None,
            "runs": runs,
            "batch": self.batch,
            "peak_memory_mb": (resident_peak() if most is None else most) / 2**20,
            "peak_memory_kind": "process, high-water mark" if most is None else "device's allocator",
            "device": name_of(self.device),
            "threads": torch.get_num_threads(),
        }


def measure_speed(draw: Callable[[], Any], network: nn.Module, runs: int = 5) -> dict[str, Any]:
    """Cost of one image, see `Stopwatch.read`, by timed calls after one that warms up.

    Args:
        draw: makes one image at batch 1, from the prompt to pixels.
        network: whose evaluations are counted.
        runs: timed calls.
    """
    draw()
    watch = Stopwatch(network)
    for _ in range(runs):
        with watch.drawing(1):
            draw()
    return watch.read()
