"""What an image costs: network evaluations counted, seconds at batch 1, peak memory."""

import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..device import name_of, peak, reset_peak, wait


class Rows:
    """How many samples went through a network."""

    count = 0


@contextmanager
def counted(network: nn.Module) -> Iterator[Rows]:
    """Counts the rows of all batches that a network evaluates, so that guidance by a doubled batch counts twice."""
    rows = Rows()

    def hook(_module: nn.Module, args: tuple, kwargs: dict[str, Any], _output: Any) -> None:
        batch = next(x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor) and x.ndim > 1)
        rows.count += len(batch)

    handle = network.register_forward_hook(hook, with_kwargs=True)
    try:
        yield rows
    finally:
        handle.remove()


def measure_speed(draw: Callable[[], Any], network: nn.Module, runs: int = 5) -> dict[str, Any]:
    """Cost of one image.

    Args:
        draw: makes one image at batch 1, from the prompt to pixels.
        network: whose evaluations are counted.
        runs: timed calls, after one that warms up.

    Returns:
        JSON-ready: `nfe`, `seconds` per image (median) and its standard error `seconds_error` (1.25 s / sqrt(n),
        as of a normal sample), `runs`, `peak_memory_mb` (MiB) and `peak_memory_kind`, `device`, `threads`.
    """
    device = next(network.parameters()).device

    def now() -> float:
        wait(device)
        return time.perf_counter()

    draw()
    reset_peak(device)
    seconds = []
    with counted(network) as rows:
        for _ in range(runs):
            begin = now()
            draw()
            seconds.append(now() - begin)
    most = peak(device)
    spread = statistics.stdev(seconds) if runs > 1 else 0.0
    return {
        "nfe": rows.count / runs,
        "seconds": statistics.median(seconds),
        "seconds_error": 1.2533 * spread / runs**0.5,
        "runs": runs,
        "peak_memory_mb": (resident_peak() if most is None else most) / 2**20,
        "peak_memory_kind": "process, high-water mark" if most is None else "device's allocator, batch 1",
        "device": name_of(device),
        "threads": torch.get_num_threads(),
    }


def resident_peak() -> int:
    """High-water mark of this process's resident memory, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
