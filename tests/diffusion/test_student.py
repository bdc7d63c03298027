"""The few-step student: its times, its rollout and where gradient flows."""

import pytest
import torch
from diffusers import DDPMScheduler
from torch import nn

from fewstep.diffusion.cond import Cond
from fewstep.diffusion.denoiser import NetDenoiser
from fewstep.diffusion.rng import Rng
from fewstep.diffusion.schedules import VP, Flow
from fewstep.diffusion.student import Student
from fewstep.diffusion.times import check_times, even_times, uniform_times
from fewstep.errors import RecipeError

SCHEDULE = VP.from_scheduler(DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"))
NONE = Cond({})


class Recorder:
    """``x0 = w x_t``, so the gradient of w through one step alone is known; remembers its calls."""

    schedule = SCHEDULE

    def __init__(self):
        self.w, self.calls = torch.tensor(0.7, requires_grad=True), []

    def x0(self, x_t, t, cond, *, guidance=1.0):
        self.calls.append((x_t, t, torch.is_grad_enabled()))
        return self.w * x_t


@pytest.mark.parametrize(
    "steps, start, expected",
    [
        (4, 999, [999, 749, 499, 249]),
        (1, 399, [399]),
        (2, 999, [999, 499]),
        (8, 799, [799, 699, 599, 499, 399, 299, 199, 99]),
    ],
)
def test_uniform_times(steps, start, expected):
    assert uniform_times(steps, start) == expected


@pytest.mark.parametrize(
    "schedule, steps, start, expected",
    [
        (SCHEDULE, 4, None, [999, 749, 499, 249]),
        (SCHEDULE, 1, 399, [399]),
        (Flow(), 4, None, [1.0, 0.75, 0.5, 0.25]),
        (Flow(shift=3.0), 4, None, [1.0, 0.9, 0.75, 0.5]),  # even before the shift
        (Flow(shift=3.0), 2, 0.75, [0.75, 0.5]),  # 0.75 is 0.5 before it
        (Flow(shift=3.0), 1, 0.3, [0.3]),
    ],
)
def test_even_times_are_even_where_solvers_are(schedule, steps, start, expected):
    assert even_times(schedule, steps, start) == pytest.approx(expected)
    check_times(even_times(schedule, steps, start), schedule)


@pytest.mark.parametrize("steps, start", [(0, None), (2, 1.5), (2, 0.0), (1, 999)])
def test_a_start_outside_a_flow_is_refused(steps, start):
    with pytest.raises(RecipeError, match=r"within \(0, 1\]"):
        even_times(Flow(), steps, start)


@pytest.mark.parametrize("steps, start", [(3, 999), (4, 998), (0, 999), (-1, 999), (1, -1)])
def test_a_grid_that_no_stock_scheduler_meets_is_refused(steps, start):
    with pytest.raises(RecipeError, match="multiple of the number of steps"):
        uniform_times(steps, start)


@pytest.mark.parametrize(
    "times", [[], [249, 499], [499, 499], [1000], [999, 0], [500.5], [999, -1]], ids=repr
)
def test_impossible_times_are_refused(times):
    with pytest.raises(RecipeError, match="student times"):
        check_times(times, SCHEDULE)


def test_a_flow_student_may_have_fractions():
    check_times([1.0, 0.75, 0.3], Flow())
    with pytest.raises(RecipeError, match="student times"):
        check_times([1.5], Flow())


@pytest.mark.parametrize("exit_step", [0, 1, 3])
def test_rollout_has_gradient_in_its_last_step_only(exit_step):
    d, noise, rng = Recorder(), torch.randn(5, 3), Rng(0)
    out = Student(d, [999, 749, 499, 249]).rollout(noise, NONE, rng.normal_like, exit_step)
    inputs, times, grads = zip(*d.calls)
    assert list(grads) == [False] * exit_step + [True]
    assert [t[0].item() for t in times] == [999, 749, 499, 249][: exit_step + 1]
    assert not inputs[-1].requires_grad and inputs[-1].grad_fn is None
    out.sum().backward()
    torch.testing.assert_close(d.w.grad, inputs[-1].sum())  # earlier uses of w would add to this


def test_rollout_that_exits_at_once_starts_from_pure_noise():
    d, noise = Recorder(), torch.randn(5, 3)
    Student(d, [399]).rollout(noise, NONE, Rng(0).normal_like, 0)
    assert d.calls[0][0].equal(noise)


def test_rollout_stays_without_gradient_where_none_is_wanted():
    d = Recorder()
    with torch.no_grad():
        out = Student(d, [999, 499]).rollout(torch.randn(5, 3), NONE, Rng(0).normal_like, 1)
    assert not out.requires_grad


def test_sample_is_the_written_out_loop_with_fresh_noise_at_every_step():
    d, noise, fresh = Recorder(), torch.randn(5, 3), Rng(1)
    sample = Student(d, [999, 749, 499]).sample(noise, NONE, Rng(1).normal_like)
    assert not sample.requires_grad
    x, w = noise, d.w.detach()
    for t in (749, 499):
        abar = SCHEDULE.alpha(torch.tensor([t])).item() ** 2
        x = abar**0.5 * (w * x) + (1 - abar) ** 0.5 * fresh.normal(5, 3)
    torch.testing.assert_close(sample, w * x)


def test_student_gradient_survives_earlier_steps_under_bf16_autocast():
    # A weight that autocast had cast without gradient in the first step must not be used again in the second.
    torch.manual_seed(0)
    net, noise = nn.Linear(3, 3), torch.randn(5, 3)
    call = lambda n, x, t, c: n(x)  # noqa: E731
    gradients = []
    for dtype in (None, torch.bfloat16):
        student = Student(NetDenoiser(net, SCHEDULE, "v", call, autocast=dtype), [999, 499])
        net.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is not None):
            student.rollout(noise, NONE, Rng(0).normal_like, 1).square().mean().backward()
        gradients.append(net.weight.grad.clone())
    exact, rough = gradients
    assert exact.norm() > 0 and (rough - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize("noise", ["fixed", "fresh", "ddim"])
def test_the_noise_of_later_steps_is_the_first_ones_a_fresh_one_or_none(noise):
    recorder, start, drawn = Recorder(), Rng("start").normal(3, 2), Rng("drawn").normal(3, 2)
    student = Student(recorder, [999, 749, 499], noise)
    student.sample(start, NONE, lambda _x: drawn)
    x = start
    for (seen, t, _), following in zip(recorder.calls, [749, 499, None]):
        torch.testing.assert_close(seen, x)
        if following is None:
            break
        s = torch.full((3,), float(following))
        x0 = 0.7 * x
        x = {
            "fixed": lambda x0=x0, s=s: SCHEDULE.add_noise(x0, start, s),
            "fresh": lambda x0=x0, s=s: SCHEDULE.add_noise(x0, drawn, s),
            "ddim": lambda x=x, x0=x0, t=t, s=s: SCHEDULE.ddim_step(x, x0, t, s),
        }[noise]()
