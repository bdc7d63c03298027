"""Walks from noise to a sample in few steps: families of nodes that are known without looking at a teacher.

"Hyperparameters are all you need" (arXiv 2510.02390) uses EDM's formula twice: for a grid of noise levels, of which one
near the end is where a walk stops, and for nodes down to there that are even in a root of the time. Used once more it
gives nodes that are even in a root of the noise level, as EDM's are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch

from .few_steps import END, levels, reference_times
from .schedules import EDM, VP, Flow, Schedule

RHOS = 5.0, 7.0, 12.0  # of the noise levels, the paper's range
RHO_OF_TIMES = 1.2
# The level where a walk stops: the grid's length and the index in it, of walks of up to 6 steps and of longer ones.
STOPS = (8, 6), (12, 9)


class Walk(NamedTuple):
    """Jumps of a solver over falling times.

    Attributes:
        family: what its nodes are called. times: where the network is called. order: of the jumps, 1 or 2.
        stop: time at which the sample is taken, with the noise that is left there; None for none.
        free_u: whether the network runs with Free-U.
        heun: whether the jumps are steps of Heun's method, two calls each but in the last (on EDM's path).
    """

    family: str
    times: tuple[float, ...]
    order: int
    stop: float | None = None
    free_u: bool = False
    heun: bool = False

    def end(self, schedule: Schedule) -> tuple[float, float]:
        """Signal and noise of the sample, as the stock scheduler of this order leaves it: Euler's signal is whole."""
        if self.stop is None:
            return END
        alpha, sigma = levels(schedule, [self.stop])[:, 0].tolist()
        return (1.0, sigma / alpha) if self.order == 1 else (alpha, sigma)


def spread(first: float, last: float, num: int, rho: float) -> list[float]:
    """Falling numbers whose rho-th roots are even (EDM, arXiv 2206.00364, eq. 5)."""
    even = np.linspace(first ** (1 / rho), last ** (1 / rho), num)
    return (even**rho).clip(last, first).tolist()  # both ends are met exactly


def noise_at(schedule: Schedule, times: Sequence[float]) -> list[float]:
    """Noise over signal, which diffusers calls sigma; at zero SNR 4096, as its schedulers have it."""
    alpha, sigma = levels(schedule, times)[:, :-1]
    return (sigma / np.maximum(alpha, 2**-12)).tolist()


def times_of(schedule: Schedule, sigmas: Sequence[float]) -> list[float]:
    """Times, with fractions, at which noise over signal is this."""
    log_snr = -2 * torch.tensor(sigmas, dtype=torch.float64).log()
    return schedule.t_from_log_snr(log_snr).clamp(schedule.t_min, schedule.t_max).tolist()


def stop_time(schedule: Schedule, num_steps: int, rho: float) -> float:
    """Where the paper's walk of so many steps stops; 18.3 for 5 steps of Stable Diffusion at rho 5."""
    length, index = STOPS[num_steps > 6]
    least, most = noise_at(schedule, [schedule.t_min, schedule.t_max])
    return times_of(schedule, [spread(most, least, length, rho)[index]])[0]


def walk(
    schedule: Schedule, family: str, times: Sequence[float], order: int, stop: float | None = None
) -> Walk | None:
    """Through these times, or through integers next to them: stock schedulers of a table take no others at order 2.

    None where two of them are one.
    """
    times = [float(round(t)) for t in times] if order == 2 and isinstance(schedule, VP) else times
    if any(now <= then for now, then in pairwise([*times, -1.0 if stop is None else stop])):
        return None
    return Walk(family, tuple(times), order, stop)


def known_walks(schedule: Schedule, num_steps: int, order: int) -> Iterator[Walk | None]:
    """All of so many steps that do not depend on the teacher's network.

    "even" is the trailing grid. "karras" and "power" end at a clean sample, "stopped" as the paper does. A flow, whose
    stock schedulers end at no other level than zero, has powers of the time before its shift. EDM has "karras", its own
    formula down to the least level, and "power", which leaves that one out as "even" does.
    """
    yield walk(schedule, "even", reference_times(schedule, num_steps), order)
    schedule = schedule.for_steps(num_steps)
    if isinstance(schedule, Flow):
        even = torch.tensor(spread(1.0, 0.0, num_steps + 1, RHO_OF_TIMES)[:-1], dtype=torch.float64)
        yield walk(schedule, "power", schedule.shifted(even).tolist(), order)
        return
    if isinstance(schedule, EDM):
        for rho in RHOS:
            ends = schedule.t_max, schedule.t_min
            yield walk(schedule, "karras", spread(*ends, num_steps, rho), order)
            yield walk(schedule, "power", spread(*ends, num_steps + 1, rho)[:-1], order)
        return
    for rho in RHOS:
        stop = stop_time(schedule, num_steps, rho)
        most, least = noise_at(schedule, [schedule.t_max, stop])
        power = spread(schedule.t_max, stop, num_steps + 1, RHO_OF_TIMES)[:-1]
        karras = [schedule.t_max, *times_of(schedule, spread(most, least, num_steps + 1, rho)[1:-1])]
        yield walk(schedule, "karras", karras, order)
        yield walk(schedule, "power", power, order)
        yield walk(schedule, "stopped", power, order, stop)
