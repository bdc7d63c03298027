"""The algebra of schedules in float64, against diffusers' table, closed forms and finite differences."""

import math

import pytest
import torch
from diffusers import DDPMScheduler

from fewstep.diffusion.cond import Cond
from fewstep.diffusion.denoiser import ScheduleView
from fewstep.diffusion.schedules import EDM, KINDS, VP, Flow, TrigFlow, change_schedule
from fewstep.errors import FewstepError
from fewstep.teachers.analytic import GaussianMixture

SD = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
PATHS = {"vp": VP.from_scheduler(SD), "flow": Flow(), "edm": EDM(), "trig": TrigFlow()}
# Levels that lie inside all four ranges.
LOG_SNR = torch.linspace(-5.0, 7.0, 41, dtype=torch.float64)

each_path = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS.keys())


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_vp_meets_the_table_of_diffusers_at_every_integer():
    table, t = SD.alphas_cumprod.double(), torch.arange(1000)
    torch.testing.assert_close(PATHS["vp"].alpha(t) ** 2, table, rtol=1e-13, atol=0)
    torch.testing.assert_close(PATHS["vp"].sigma(t) ** 2, 1 - table, rtol=1e-11, atol=0)


@pytest.mark.parametrize(
    "t, alpha, sigma, gain",
    [
        (999, 0.0683, 0.9977, 14.6),
        (749, 0.2380, 0.9713, 4.08),
        (499, 0.5269, 0.8499, 1.61),
        (399, 0.6528, 0.7576, 1.16),
        (249, 0.8218, 0.5697, 0.69),
    ],
)
def test_constants_of_sdxl(t, alpha, sigma, gain):
    vp, time = PATHS["vp"], torch.tensor([t])
    assert vp.alpha(time).item() == pytest.approx(alpha, abs=5e-5)
    assert vp.sigma(time).item() == pytest.approx(sigma, abs=5e-5)
    assert vp.x0_gain(t, "eps") == pytest.approx(gain, rel=0.01)
    assert vp.x0_gain(t, "v") == pytest.approx(sigma, abs=5e-5)  # a v student has no such gain


@each_path
def test_log_snr_has_an_inverse_and_falls(path):
    t = path.t_from_log_snr(LOG_SNR)
    torch.testing.assert_close(path.log_snr(t), LOG_SNR, rtol=1e-12, atol=1e-12)
    assert (t.diff() < 0).all()
    torch.testing.assert_close(path.t_from_log_snr(path.log_snr(t)), t, rtol=1e-11, atol=1e-12)


@each_path
@pytest.mark.parametrize("target", KINDS)
@pytest.mark.parametrize("source", KINDS)
def test_conversion_round_trip_in_float64(path, source, target):
    t = path.t_from_log_snr(LOG_SNR)
    x0, eps = noise(len(t), 3), noise(len(t), 3, seed=1)
    x_t = path.add_noise(x0, eps, t)
    prediction = noise(len(t), 3, seed=2)
    there = path.convert(prediction, x_t, t, source, target)
    back = path.convert(there, x_t, t, target, source)
    assert (back - prediction).abs().max() < 1e-10


@each_path
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_a_known_sample_converts_to_its_x0_and_eps(path, kind):
    t = path.t_from_log_snr(LOG_SNR)
    x0, eps = noise(len(t), 3), noise(len(t), 3, seed=1)
    x_t = path.add_noise(x0, eps, t)
    a, s, da, ds = (f(t)[:, None] for f in (path.alpha, path.sigma, path.d_alpha, path.d_sigma))
    prediction = {"x0": x0, "eps": eps, "v": a * eps - s * x0, "flow": da * x0 + ds * eps}[kind]
    assert (path.convert(prediction, x_t, t, kind, "x0") - x0).abs().max() < 1e-10
    assert (path.convert(prediction, x_t, t, kind, "eps") - eps).abs().max() < 1e-10


def test_flow_prediction_is_noise_minus_data():
    x0, eps, t = noise(5, 2), noise(5, 2, seed=1), torch.linspace(0.1, 0.9, 5)
    x_t = Flow().add_noise(x0, eps, t)
    torch.testing.assert_close(Flow().convert(x0, x_t, t, "x0", "flow"), eps - x0)


@each_path
def test_derivatives_equal_finite_differences(path):
    # Between the entries of the VP table, where its interpolation has a kink.
    t = path.t_from_log_snr(LOG_SNR)
    t = t.floor() + 0.5 if isinstance(path, VP) else t
    h = 1e-5 * t.clamp(max=1.0)
    for value, derivative in ((path.alpha, path.d_alpha), (path.sigma, path.d_sigma)):
        numeric = (value(t + h) - value(t - h)) / (2 * h)
        torch.testing.assert_close(derivative(t), numeric, rtol=1e-6, atol=1e-9)


@each_path
@pytest.mark.parametrize("target", PATHS.values(), ids=PATHS.keys())
def test_change_of_schedule_there_and_back(path, target):
    t, x = path.t_from_log_snr(LOG_SNR), noise(len(LOG_SNR), 3)
    y, s = change_schedule(x, t, path, target)
    torch.testing.assert_close(target.log_snr(s), path.log_snr(t), rtol=1e-10, atol=1e-10)
    back, r = change_schedule(y, s, target, path)
    assert (back - x).abs().max() < 1e-10
    torch.testing.assert_close(r, t, rtol=1e-10, atol=1e-10)


@each_path
@pytest.mark.parametrize("target", PATHS.values(), ids=PATHS.keys())
def test_a_viewed_teacher_is_the_same_teacher_on_the_other_path(path, target):
    means = torch.tensor([[1.0, -2.0], [0.5, 0.0]], dtype=torch.float64)
    variances = torch.tensor([[0.3, 2.0], [0.1, 0.4]], dtype=torch.float64)
    teacher, direct = (GaussianMixture(p, means, variances) for p in (path, target))
    t = target.t_from_log_snr(LOG_SNR)
    x_t = target.add_noise(noise(len(t), 2), noise(len(t), 2, seed=1), t)
    viewed = ScheduleView(teacher, target).x0(x_t, t, Cond({}))
    torch.testing.assert_close(viewed, direct.x0(x_t, t, Cond({})), rtol=1e-9, atol=1e-10)


def test_a_flow_viewed_at_pure_noise_stays_finite():
    x, t = noise(2, 3), torch.ones(2, dtype=torch.float64)
    y, s = change_schedule(x, t, Flow(), TrigFlow())
    torch.testing.assert_close(y, x)
    torch.testing.assert_close(s, torch.full((2,), math.pi / 2, dtype=torch.float64))


@each_path
def test_transitions_compose(path):
    s, t, r = (path.t_from_log_snr(torch.tensor([level])) for level in (3.0, 0.5, -4.0))
    (a1, b1), (a2, b2), (a, b) = path.transition(s, t), path.transition(t, r), path.transition(s, r)
    torch.testing.assert_close(a1 * a2, a)
    torch.testing.assert_close((a2 * b1) ** 2 + b2**2, b**2)
    x, eps = noise(1, 3), noise(1, 3, seed=1)
    torch.testing.assert_close(path.renoise(x, eps, s, r), a * x + b * eps)


@pytest.mark.parametrize("path", [Flow(), TrigFlow(), EDM()], ids=["flow", "trig", "edm"])
def test_renoising_clean_data_is_adding_noise(path):
    x0, eps = noise(4, 3), noise(4, 3, seed=1)
    t = path.t_from_log_snr(torch.linspace(-4, 4, 4, dtype=torch.float64))
    clean = torch.zeros(4, dtype=torch.float64)
    torch.testing.assert_close(path.renoise(x0, eps, clean, t), path.add_noise(x0, eps, t))


@each_path
def test_a_ddim_step_with_the_true_x0_keeps_eps(path):
    x0, eps = noise(1, 3), noise(1, 3, seed=1)
    t, s = (path.t_from_log_snr(torch.tensor([level])) for level in (-4.0, 2.0))
    stepped = path.ddim_step(path.add_noise(x0, eps, t), x0, t, s)
    torch.testing.assert_close(stepped, path.add_noise(x0, eps, s), rtol=1e-11, atol=1e-11)


@each_path
def test_score_is_the_gradient_of_the_log_density(path):
    means = torch.tensor([[1.0, -2.0], [0.5, 0.0]], dtype=torch.float64)
    teacher = GaussianMixture(path, means, torch.tensor([[0.3, 2.0], [0.1, 0.4]]), torch.tensor([0.2, 0.8]))
    t = path.t_from_log_snr(LOG_SNR)
    x_t = path.add_noise(noise(len(t), 2), noise(len(t), 2, seed=1), t).requires_grad_()
    (exact,) = torch.autograd.grad(teacher.log_prob(x_t, t).sum(), x_t)
    score = path.score(teacher.x0(x_t, t, Cond({})), x_t, t)
    torch.testing.assert_close(score, exact, rtol=1e-8, atol=1e-9)


@each_path
@pytest.mark.parametrize("kind", KINDS)
def test_error_weight_is_the_ratio_of_squared_errors(path, kind):
    t = path.t_from_log_snr(LOG_SNR)
    x_t, x0, off = (noise(len(t), 3, seed=i) for i in range(3))
    a, b = (path.convert(x, x_t, t, "x0", kind) for x in (x0, x0 + off))
    ratio = (a - b).pow(2).sum(1) / off.pow(2).sum(1)
    torch.testing.assert_close(path.error_weight(kind, t), ratio, rtol=1e-8, atol=1e-12)
    if kind == "eps":
        torch.testing.assert_close(path.error_weight(kind, t), path.log_snr(t).exp())


@pytest.mark.parametrize("low, high, first, last", [(0.02, 0.98, 20, 980), (0.0, 1.0, 0, 999)])
def test_discrete_times_include_both_ends_and_are_uniform(low, high, first, last):
    count = last - first + 1
    u = (torch.arange(3 * count, dtype=torch.float64) + 0.5) / (3 * count)
    values, counts = PATHS["vp"].draw_times(u, low, high).unique(return_counts=True)
    assert values.tolist() == list(range(first, last + 1))
    assert (counts == 3).all()
    ends = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert PATHS["vp"].draw_times(ends, low, high).tolist() == [first, last]


def test_continuous_times_span_their_range():
    u = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    assert Flow().draw_times(u, 0.02, 0.98).tolist() == pytest.approx([0.02, 0.5, 0.98])
    assert Flow(shift=3.0).draw_times(u).tolist() == pytest.approx([0.0, 0.75, 1.0])
    assert EDM().draw_times(u).tolist() == pytest.approx([0.002, 2.5152, 80.0], rel=1e-3)  # the Karras grid
    assert TrigFlow().draw_times(u).tolist() == pytest.approx([0.0, math.pi / 4, math.pi / 2])


def test_zero_terminal_snr_stays_finite_for_v():
    vp = VP.from_scheduler(DDPMScheduler(rescale_betas_zero_snr=True))
    t, x_t, v = torch.tensor([999]), noise(1, 3), noise(1, 3, seed=1)
    assert vp.alpha(t).item() < 1e-8
    torch.testing.assert_close(vp.convert(v, x_t, t, "v", "x0"), -v)


@pytest.mark.parametrize("table", [[0.5], [0.5, 0.7], [1.1, 0.5], [[0.9, 0.5]]])
def test_a_table_that_is_none_is_refused(table):
    with pytest.raises(FewstepError, match="alphas_cumprod"):
        VP(table)


def test_a_table_may_begin_clean_and_minus_one_is_the_clean_sample():
    vp = VP([1.0, 0.5])  # as the table of an exported TCDScheduler does
    assert vp.sigma(torch.tensor([0])).item() < 1e-8
    clean = vp.at(torch.tensor([0.0]))
    assert clean.item() == -1 and vp.alpha(clean).item() == 1 and vp.sigma(clean).item() == 0


@pytest.mark.parametrize("schedule", [Flow(), Flow(shift=3.0), EDM(), TrigFlow()])
def test_even_fractions_run_from_the_clean_sample_to_the_noisiest_level(schedule):
    times = schedule.at(torch.linspace(0, 1, 9))
    assert times[0].item() == schedule.clean and times[-1].item() == pytest.approx(schedule.t_max)
    assert (times.diff() > 0).all() and schedule.sigma(times[:1]).item() == 0


def test_unknown_kind_and_shift_are_refused():
    with pytest.raises(ValueError, match="'noise'"):
        Flow().convert(noise(1, 1), noise(1, 1), torch.tensor([0.5]), "noise", "x0")
    with pytest.raises(FewstepError, match="shift"):
        Flow(shift=0)
