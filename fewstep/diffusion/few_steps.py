"""A few steps of a deterministic solver at chosen times: its jumps, and the search for the best times."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import FewstepError
from .cond import Cond
from .denoiser import Denoiser
from .schedules import EDM, Flow, Schedule, repeated

END = 1.0, 0.0  # signal and noise of a sample


def jump(before: Any, now: Any, then: Any) -> tuple[Any, Any, Any]:
    """Coefficients of one solver step: ``x_then = a x_now + b x0_now + c x0_before``.

    With ``before`` it is DPM-Solver++(2M) (arXiv 2211.01095, algorithm 2), without it the first-order step, which
    is DDIM's; for a flow that is Euler's, and to :data:`END` it returns x0_now.

    Args:
        before, now, then: (alpha, sigma) of three times, numbers or arrays that broadcast.
    """
    a = then[1] / now[1]
    b = then[0] - now[0] * a
    if before is None:
        return a, b, 0.0 * b
    first, second, third = (np.log(alpha) - np.log(sigma) for alpha, sigma in (before, now, then))
    half = b / 2 * (third - second) / (second - first)
    return a, b + half, -half


def levels(schedule: Schedule, times: Sequence[float], end: tuple[float, float] = END) -> np.ndarray:
    """(alpha, sigma) at the times and at the end, (2, K + 1)."""
    t = torch.tensor(times, dtype=torch.float64)
    return np.stack([np.append(f(t).numpy(), last) for f, last in zip((schedule.alpha, schedule.sigma), end)])


def reference_times(schedule: Schedule, num_steps: int) -> list[float]:
    """The "trailing" grid of diffusers: integers from T-1 for a table, even before the shift for a flow.

    EDM's is even in the seventh root of sigma, as its own, from which it leaves out the clean end.
    """
    even, schedule = [1 - i / num_steps for i in range(num_steps)], schedule.for_steps(num_steps)
    if isinstance(schedule, Flow):
        return schedule.shifted(torch.tensor(even, dtype=torch.float64)).tolist()
    if isinstance(schedule, EDM):
        return [schedule.t_max, *schedule.at(torch.tensor(even[1:], dtype=torch.float64)).tolist()]
    steps = schedule.t_max + 1
    return [float(round(steps * u) - 1) for u in even]


@torch.no_grad()
def sample(
    denoiser: Denoiser,
    noise: Tensor,
    cond: Cond,
    times: Sequence[float],
    *,
    order: int = 2,
    heun: bool = False,
    guidance: float = 1.0,
    end: tuple[float, float] = END,
) -> tuple[Tensor, Tensor, Tensor]:
    """The teacher's ODE with steps at any falling times.

    Args:
        noise: unit noise (B, ...). order: of the jumps, 1 or 2; the first is of order 1, as is one to no noise.
        heun: on EDM's path, whether each step but one to no noise is corrected by a second call where a first-order
            jump ends (EDM, arXiv 2206.00364, algorithm 1), in place of jumps of this order.
        end: signal and noise of the sample.

    Returns:
        states (K, B, ...) at the times, predictions x0 (K, B, ...) there, and the sample (B, ...), which is the
        last of them where it has no noise.
    """
    begun = denoiser.schedule.begin(noise, torch.tensor(times[:1]))
    x, states, predictions, level = begun, [], [], levels(denoiser.schedule, times, end).T
    for k, now in enumerate(times):
        t = repeated(now, x)
        states.append(x)
        predictions.append(denoiser.x0(x, t, cond, guidance=guidance))
        noisy = level[k + 1, 1] > 0
        second = order == 2 and k > 0 and noisy and not heun
        a, b, c = map(float, jump(level[k - 1] if second else None, level[k], level[k + 1]))
        if heun and noisy:  # both slopes are (x - x0) / sigma, for this path's signal is 1
            ahead, s = a * x + b * predictions[-1], float(level[k + 1, 1])
            there = (ahead - denoiser.x0(ahead, repeated(s, x), cond, guidance=guidance)) / s
            x = x + (s - now) / 2 * ((x - predictions[-1]) / now + there)
            continue
        x = a * x + b * predictions[-1] + (c * predictions[-2] if second else 0)
    return torch.stack(states), torch.stack(predictions), x


# ---------------------------------------------------------------------------------------------------------- search
@dataclass
class Paths:
    """All that the search needs of recorded reference paths: the inner products of their states and predictions.

    Attributes:
        times: (M,) falling. gram: (2M + 1, 2M + 1) float64, means over samples and coordinates of the products of
            ``[x_1 .. x_M, sample, x0_1 .. x0_M]``. It does not grow with the number of samples. count: samples.
    """

    times: list[float]
    gram: Tensor
    count: int = 0

    @classmethod
    def none(cls, times: Sequence[float]) -> Paths:
        size = 2 * len(times) + 1
        return cls(list(times), torch.zeros(size, size, dtype=torch.float64))

    def add(self, states: Tensor, predictions: Tensor, end: Tensor) -> None:
        """Takes in what :func:`sample` returned for a batch."""
        rows = torch.cat([states, end[None], predictions]).double().flatten(1)
        new = (rows @ rows.T).cpu() / end[0].numel()
        self.gram = (self.gram * self.count + new) / (self.count + len(end))
        self.count += len(end)

    def costs(self, schedule: Schedule, order: int) -> np.ndarray:
        """Mean squared errors of all jumps, (M, M, M + 1): from node i, with h before it, to node j (M is the end).

        The error of x_j is measured where ``alpha^2 + sigma^2 = 1``, so that every path has the same scale. The
        entries [i, i, j] and [h, i, M] are first-order jumps; what is no jump is infinite.
        """
        m, gram, level = len(self.times), self.gram.numpy(), levels(schedule, self.times)
        before, now, then = level[:, :m, None, None], level[:, None, :m, None], level[:, None, None, :]
        a, b, c = jump(None, now, then)
        if order == 2:
            with np.errstate(all="ignore"):  # of what is no jump
                higher = jump(before, now, then)
            h, i, j = np.ogrid[:m, :m, : m + 1]
            a, b, c = (np.where((h < i) & (i < j) & (j < m), x, y) for x, y in zip(higher, (a, b, c)))
        shape = (m, m, m + 1)
        weights = np.stack([np.broadcast_to(x, shape) for x in (a, b, c, -1.0)], -1)
        h, i, j = np.indices(shape)
        where = np.stack([i, m + 1 + i, m + 1 + h, j], -1)
        costs = np.einsum("...p,...pq,...q", weights, gram[where[..., None], where[..., None, :]], weights)
        return np.where((h <= i) & (i < j), costs.clip(0) / np.square(level).sum(0), np.inf)


def node_weights(schedule: Schedule, times: Sequence[float]) -> list[np.ndarray]:
    """Guesses of how much an error at a node, (M + 1,), matters for the sample: powers of the share of signal there.

    What becomes of an error depends on the data and the guidance: a network corrects some and amplifies others.
    """
    alpha, sigma = levels(schedule, times)
    share = alpha / np.hypot(alpha, sigma)
    share[0] = 1.0  # no jump ends at the first node, which may hold no signal at all
    return [share**power for power in (0, -2, -1, 1, 2)]


def best_nodes(costs: np.ndarray, num_steps: int) -> tuple[list[int], float]:
    """The first node and ``num_steps - 1`` others with the least sum of costs, by dynamic programming.

    Args:
        costs: (M, M, M + 1) as of :meth:`Paths.costs`; the path begins at node 0 and ends at M.

    Returns:
        Indices of the nodes, and the sum.
    """
    m = len(costs)
    if not 1 <= num_steps <= m:
        raise FewstepError(f"--steps {num_steps}: expected 1 to {m}, the steps of the reference")
    ends = costs[np.arange(m), np.arange(m)]  # (i, j), of first order
    if num_steps == 1:
        return [0], float(ends[0, m])
    # best[h, i]: least cost of a path whose last two nodes are h and i
    best = np.full((m, m), np.inf)
    best[0] = ends[0, :m]
    came: list[np.ndarray] = []
    for _ in range(2, num_steps):
        # The first jump has no node before it; every later one has.
        options = best[:, :, None] + costs[:, :, :m]
        came.append(options.argmin(0))
        best = options.min(0)
    total = best + ends[None, :, m]
    h, i = np.unravel_index(int(total.argmin()), total.shape)
    nodes = [int(i), int(h)]
    for chosen in reversed(came):
        nodes.append(int(chosen[nodes[-1], nodes[-2]]))
    return nodes[::-1], float(total[h, i])
