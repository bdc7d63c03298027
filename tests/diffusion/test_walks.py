"""Families of nodes against the numbers of "Hyperparameters are all you need" and against closed forms."""

import math
from itertools import pairwise

import pytest
import torch
from toys import NONE, SD

from fewstep.diffusion.few_steps import reference_times, sample
from fewstep.diffusion.rng import Rng
from fewstep.diffusion.schedules import VP, Flow
from fewstep.diffusion.walks import Walk, known_walks, noise_at, spread, stop_time, times_of
from fewstep.diffusion.walks import walk as walk_of
from fewstep.teachers.analytic import GaussianMixture


def family(name, schedule, steps, order=1):
    return [one for one in known_walks(schedule, steps, order) if one and one.family == name]


@pytest.mark.parametrize(
    "steps, index, times, stop",
    [
        (5, 0, [999, 772.5, 556.7, 354.2, 170.0], 18.3),
        (6, 0, [999, 809.6, 627.3, 453.5, 290.4, 141.7], 18.3),
        (8, 1, [999, 857.3, 719.4, 585.9, 457.2, 334.3, 218.7, 112.7], 22.7),
    ],
)
def test_the_papers_walks_of_stable_diffusion(steps, index, times, stop):
    """Its code's own numbers for 5 and 6 steps (rho 5) and 8 (rho 7) of Stable Diffusion 1.5, to a tenth."""
    stopped = family("stopped", SD, steps)[index]
    assert list(stopped.times) == pytest.approx(times, abs=0.05) and stopped.stop == pytest.approx(
        stop, abs=0.05
    )
    assert family("power", SD, steps)[index] == Walk("power", stopped.times, 1)
    second = family("stopped", SD, steps, order=2)[index]  # whose stock scheduler takes integers alone
    assert second.times == tuple(round(t) for t in stopped.times) and second.stop == stopped.stop


def test_karras_nodes_are_even_in_the_root_of_the_noise_level():
    for steps in (1, 3, 5, 8):
        for rho, one in zip((5, 7, 12), family("karras", SD, steps), strict=True):
            sigmas = noise_at(SD, [*one.times, stop_time(SD, steps, rho)])
            roots = [sigma ** (1 / rho) for sigma in sigmas]
            gaps = [a - b for a, b in pairwise(roots)]
            assert len(one.times) == steps and one.times[0] == 999 and one.stop is None
            assert gaps == pytest.approx([gaps[0]] * steps, rel=1e-6)
    assert sigmas[0] == pytest.approx(14.6, abs=0.02) and stop_time(SD, 8, 12) < stop_time(SD, 8, 5)


def test_spread_and_times_of_levels():
    assert spread(9.0, 1.0, 3, 2.0) == [9.0, 4.0, 1.0] and spread(4.0, 0.0, 3, 1.0) == [4.0, 2.0, 0.0]
    assert times_of(SD, noise_at(SD, [999.0, 400.25, 18.5, 0.0])) == pytest.approx([999, 400.25, 18.5, 0])
    assert noise_at(Flow(), [0.5, 0.25]) == pytest.approx([1.0, 1 / 3])
    silent = VP([0.9, 0.5, 0.0])
    assert noise_at(silent, [2.0])[0] == pytest.approx(4096) and math.isfinite(stop_time(silent, 4, 5.0))


def test_a_flow_has_powers_of_the_time_before_its_shift_and_stops_nowhere():
    walks = {one.family: one for one in known_walks(Flow(3.0), 4, 1)}
    assert set(walks) == {"even", "power"} and all(one.stop is None for one in walks.values())
    u = [(k / 4) ** 1.2 for k in (4, 3, 2, 1)]
    assert walks["power"].times == pytest.approx([3 * v / (1 + 2 * v) for v in u])
    assert list(walks["even"].times) == reference_times(Flow(3.0), 4)


def test_a_walk_whose_rounded_times_meet_is_none():
    assert (
        walk_of(SD, "x", [999.0, 3.4, 2.6], 2) is None and walk_of(SD, "x", [999.0, 3.4, 2.6], 1) is not None
    )
    assert walk_of(SD, "x", [999.0, 18.4], 2, 18.3) is None  # the stop lies above the rounded node
    assert all(one is None or len(one.times) == 30 for one in known_walks(SD, 30, 2))


@pytest.mark.parametrize("order", [1, 2])
def test_a_stopped_walk_leaves_the_noise_of_its_stop(order):
    """Of data at one point the path is a line: its state at the stop is the point and the noise there."""
    teacher = GaussianMixture(SD, torch.full((1, 2), 3.0), torch.tensor(1e-12))
    noise, one = Rng(0).normal(5, 2), family("stopped", SD, 8, order)[0]
    signal, level = one.end(SD)
    made = sample(teacher, noise, NONE, one.times, order=order, end=(signal, level))[2]
    alpha, sigma = (f(torch.tensor([one.stop], dtype=torch.float64)).item() for f in (SD.alpha, SD.sigma))
    assert level / signal == pytest.approx(sigma / alpha) and signal == (1.0 if order == 1 else alpha)
    start = torch.tensor([999.0], dtype=torch.float64)
    eps = (noise - SD.alpha(start) * 3.0) / SD.sigma(start)
    torch.testing.assert_close(made, (signal * 3.0 + level * eps).float(), rtol=1e-4, atol=1e-4)


def test_only_a_jump_to_no_noise_is_of_first_order_at_the_end():
    """Of two jumps over a Gaussian's curved path the last may be of second order, if it stops above zero."""
    teacher = GaussianMixture(SD, torch.zeros(1, 1), torch.tensor(0.3**2))
    noise, nodes, fine = torch.ones(1, 1), [999.0, 600.0], [float(t) for t in range(999, 300, -1)]
    for stop in (300.0, None):
        first, second = (Walk("", nodes, order, stop).end(SD) for order in (1, 2))
        path = fine if stop else [float(t) for t in range(999, -1, -1)]
        end = sample(teacher, noise, NONE, path, order=2, end=second)[2]
        one = sample(teacher, noise, NONE, nodes, order=1, end=second)[2]
        two = sample(teacher, noise, NONE, nodes, order=2, end=second)[2]
        if stop is None:
            assert first == second == (1.0, 0.0) and one.equal(two)
        else:
            assert (two - end).abs() < 0.9 * (one - end).abs()
