"""Continuous-time consistency where everything is known: TrigFlow, tangents, the loss and its gradient."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from toys import NONE, SD, Mlp

from fewstep.diffusion import consistency as scm
from fewstep.diffusion.denoiser import ScheduleView
from fewstep.diffusion.rng import Rng
from fewstep.diffusion.schedules import EDM, Flow, TrigFlow, angle_range, change_schedule, expand
from fewstep.methods.scm import SCM, Consistency
from fewstep.runs.library import load_recipe, recipe_files
from fewstep.teachers.analytic import GaussianMixture

TRIG = TrigFlow()
PATHS = {"vp": SD, "flow": Flow(), "edm": EDM()}
LEVELS = torch.tensor([0.1, 0.5, math.pi / 4, 1.1, 1.3, 1.45], dtype=torch.float64)


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def mixture(schedule=TRIG):
    means = torch.tensor([[-1.0, 0.3], [1.2, -0.2]])
    return GaussianMixture(schedule, means, torch.tensor([[0.25, 0.1], [0.12, 0.3]]))


def gaussian(schedule=TRIG, variance=0.49):
    return GaussianMixture(schedule, torch.tensor([[0.6, -0.4]]), torch.tensor([[variance, variance]]))


def ode(denoiser):
    seen = ScheduleView(denoiser, TRIG)
    return lambda x, t: seen.predict("v", x, t, NONE)


def solved(teacher, x, t):
    """The consistency function of a single Gaussian: its ODE is solved by a shift and a scale."""
    a, s = expand(torch.cos(t), x), expand(torch.sin(t), x)
    mean, std = teacher.means[0], teacher.variances[0].sqrt()
    return mean + std * (x - a * mean) / (a**2 * std**2 + s**2).sqrt()


def velocity_of(f):
    """The F of a given consistency function."""
    return lambda x, t: (expand(torch.cos(t), x) * x - f(x, t)) / expand(torch.sin(t), x)


def smooth_net(seed=0):
    torch.manual_seed(seed)
    net = Mlp(32)
    return lambda x, t: net_call(net, x, t)


def net_call(net, x, t):
    return net.layers(torch.cat([x, torch.stack([t.sin(), t.cos(), (2 * t).sin(), (2 * t).cos()] * 2, 1)], 1))


# ------------------------------------------------------------------------------------------------------- TrigFlow
@pytest.mark.parametrize("path", PATHS)
def test_any_teacher_seen_as_trigflow_is_the_teacher_of_the_same_data(path):
    x, exact = Rng(0).normal(len(LEVELS), 2).double(), mixture()
    expected = TRIG.convert(exact.x0(x, LEVELS, NONE), x, LEVELS, "x0", "v")
    torch.testing.assert_close(ode(mixture(PATHS[path]))(x, LEVELS), expected, rtol=1e-9, atol=1e-9)


class FlowTeacher:
    """A denoiser whose native prediction is the velocity of a flow, as SANA's and SD3's is."""

    prediction, schedule = "flow", Flow()

    def predict(self, x, t, cond, guidance=1.0):
        x0 = mixture(self.schedule).x0(x, t, cond)
        return self.schedule.convert(x0, x, t, "x0", "flow")

    def x0(self, x, t, cond, guidance=1.0):
        return self.schedule.convert(self.predict(x, t, cond), x, t, "flow", "x0")


def test_flow_to_trigflow_is_lossless_and_is_the_papers_formula():
    t = torch.tensor([1e-3, 0.1, 0.5, math.pi / 4, 1.1, 1.3, 1.5, math.atan(400)])
    x, exact = Rng(1).normal(len(t), 2).double(), mixture()
    velocity = ode(FlowTeacher())(x, t)
    direct = TRIG.convert(exact.x0(x, t, NONE), x, t, "x0", "v")
    assert (velocity - direct).abs().max() < 1e-10
    tau = t.sin() / (t.sin() + t.cos())  # SANA-Sprint, prop. 3.1
    n = (tau**2 + (1 - tau) ** 2).sqrt()
    x_f, tau, n = expand(n, x) * x, expand(tau, x), expand(n, x)
    v = FlowTeacher().predict(x_f, tau[:, 0], NONE)
    assert (velocity - ((1 - 2 * tau) * x_f + (1 - 2 * tau + 2 * tau**2) * v) / n).abs().max() < 1e-12


def test_the_conversion_is_finite_and_differentiable_at_both_ends():
    class Linear(FlowTeacher):
        def predict(self, x, t, cond, guidance=1.0):
            return 0.3 * x + expand(t, x)

    x, t = Rng(2).normal(2, 2).double(), torch.tensor([0.0, math.pi / 2])
    value, derivative = torch.func.jvp(ode(Linear()), (x, t), (torch.zeros_like(x), torch.ones(2)))
    assert value.isfinite().all() and derivative.isfinite().all()
    x_t, tau = change_schedule(x, t, TRIG, Flow())
    torch.testing.assert_close(tau, torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(x_t, x)


@pytest.mark.parametrize("path", PATHS)
def test_round_trips_between_paths_keep_x0_in_fp32(path):
    schedule, x0, eps = PATHS[path], *(Rng(i).normal(len(LEVELS), 2).float() for i in (3, 4))
    x_t = TRIG.add_noise(x0, eps, LEVELS)
    there, s = change_schedule(x_t, LEVELS, TRIG, schedule)
    back, t = change_schedule(there, s, schedule, TRIG)
    assert (back - x_t).abs().max() < 1e-6 and (t - LEVELS).abs().max() < 1e-9
    assert (schedule.add_noise(x0, eps, s) - there).abs().max() < 1e-6 * there.abs().max()


def test_the_same_noise_gives_the_same_sample_through_both_odes():
    """Heun's steps on TrigFlow's circle and on the flow's line end in the same points."""
    noise, steps = Rng(5).normal(16, 2).double(), 400

    def heun(velocity, times):
        x = noise
        for a, b in itertools.pairwise(times):
            now, then = torch.full((16,), a.item()), torch.full((16,), b.item())
            first = velocity(x, now)
            second = velocity(x + (b - a) * first, then)
            x = x + (b - a) * (first + second) / 2
        return x

    trig = heun(ode(mixture(Flow())), torch.linspace(math.pi / 2 - 1e-6, 1e-3, steps))
    teacher = FlowTeacher()
    flow = heun(lambda x, t: teacher.predict(x, t, NONE), torch.linspace(1 - 1e-6, 1e-3, steps))
    assert (trig - flow).abs().max() < 5e-3 and trig.std() > 0.5


def test_one_ddim_step_is_a_rotation():
    x, t, h = Rng(6).normal(4, 2).double(), torch.full((4,), 1.2), 0.3
    F = ode(mixture())(x, t)
    x0 = scm.consistency_function(x, F, t)
    torch.testing.assert_close(TRIG.ddim_step(x, x0, t, t - h), math.cos(h) * x - math.sin(h) * F)


def test_the_consistency_function_is_the_identity_at_zero_and_x0_elsewhere():
    x = Rng(7).normal(len(LEVELS), 2).double()
    F = ode(mixture())(x, LEVELS)
    torch.testing.assert_close(scm.consistency_function(x, F, LEVELS), mixture().x0(x, LEVELS, NONE))
    assert scm.consistency_function(x, F, torch.zeros(len(x))).equal(x)


@pytest.mark.parametrize("sigma_data", [0.5, 1.0, 0.2])
def test_scale_of_data_does_not_enter_the_tangent_but_in_its_size(sigma_data):
    """The paper's formulas at scale sigma_d give sigma_d times our g, for the same F and the same t."""
    x, F = Rng(8).normal(len(LEVELS), 2).double(), smooth_net()
    v = ode(mixture())(x, LEVELS)
    c, s = expand(LEVELS.cos(), x), expand(LEVELS.sin(), x)
    big = sigma_data * x  # their x_t
    _, dF = torch.func.jvp(F, (big / sigma_data, LEVELS), (c * s * v, (c * s)[:, 0]))
    theirs = -(c**2) * (sigma_data * F(x, LEVELS) - sigma_data * v) - (c * s * big + sigma_data * dF)
    ours = scm.tangent(x, LEVELS, v, *scm.forward_mode(F, x, LEVELS, v), 1.0)
    torch.testing.assert_close(theirs, sigma_data * ours)
    norm = theirs / (expand(theirs.square().mean(1).sqrt(), x) + 0.1)
    torch.testing.assert_close(norm, scm.normalized(ours, 0.1 / sigma_data))


def test_latents_of_unit_scale_keep_it_at_every_level():
    x0, eps = (Rng(i).normal(100_000, 1).double() for i in (9, 10))
    for t in LEVELS:
        assert TRIG.add_noise(x0, eps, t.expand(100_000)).std() == pytest.approx(1, abs=0.01)


# ------------------------------------------------------------------------------------------------------- tangents
def test_tangent_is_cos_t_times_the_total_derivative_of_f():
    x, F, v = Rng(11).normal(len(LEVELS), 2).double(), smooth_net(), ode(mixture())
    along = v(x, LEVELS)

    def f(x, t):
        return scm.consistency_function(x, F(x, t), t)

    _, total = torch.func.jvp(f, (x, LEVELS), (along, torch.ones_like(LEVELS)))
    g = scm.tangent(x, LEVELS, along, *scm.forward_mode(F, x, LEVELS, along), 1.0)
    torch.testing.assert_close(g, expand(LEVELS.cos(), x) * total, rtol=1e-12, atol=1e-12)
    assert g.abs().max() > 0.1


def test_tangent_of_the_true_consistency_function_is_zero():
    teacher, x = gaussian(), Rng(12).normal(len(LEVELS), 2).double()
    v = ode(teacher)(x, LEVELS)
    F = velocity_of(lambda x, t: solved(teacher, x, t))
    g = scm.tangent(x, LEVELS, v, *scm.forward_mode(F, x, LEVELS, v), 1.0)
    assert g.abs().max() < 1e-12
    other = scm.tangent(x, LEVELS, v, *scm.forward_mode(ode(teacher), x, LEVELS, v), 1.0)
    assert other.abs().max() > 0.1  # the teacher's own posterior mean is not consistent


def test_without_warmup_yet_the_step_regresses_the_velocity_on_the_teachers():
    x, t, F = Rng(13).normal(len(LEVELS), 2).double(), LEVELS, smooth_net()
    v = ode(mixture())(x, t)
    g = scm.tangent(x, t, v, F(x, t), torch.full_like(x, 1e6), 0.0)
    torch.testing.assert_close(g, -expand(t.cos() ** 2, x) * (F(x, t) - v))


def test_tangent_is_bounded_at_the_noisiest_level():
    x, F = Rng(14).normal(3, 2).double(), smooth_net()
    t = torch.full((3,), math.pi / 2)
    v = F(x, t) + 1
    g = scm.tangent(x, t, v, *scm.forward_mode(F, x, t, v), 1.0)
    assert g.abs().max() < 1e-12  # cos(pi/2): the boundary is learned from below


@pytest.mark.parametrize("step, error", [(1e-2, 1e-3), (1e-3, 1e-5)])
def test_difference_on_the_circle_agrees_with_forward_mode(step, error):
    x, F, v = Rng(15).normal(len(LEVELS), 2).double(), smooth_net(), ode(mixture())
    along = v(x, LEVELS)
    value, exact = scm.forward_mode(F, x, LEVELS, along)
    mean, estimate = scm.central_difference(F, x, LEVELS, along, step)
    assert (estimate - exact).abs().max() < error * exact.abs().max()
    assert (mean - value).abs().max() < error


def test_normalised_tangents_are_shorter_than_one_whatever_their_size():
    x = Rng(16).normal(5, 3, 4, 4).double() * torch.tensor([1e-6, 1e-2, 1.0, 1e3, 1e8]).view(-1, 1, 1, 1)
    size = scm.normalized(x).square().flatten(1).mean(1).sqrt()
    assert (size < 1).all() and (size.diff() > 0).all()
    assert size[2] == pytest.approx(1 / 1.1, abs=0.05)
    half = scm.normalized(x[:1].float()).square().mean().sqrt()
    assert half == pytest.approx(1e-5, rel=0.2)  # c is inside the denominator


def test_no_recipe_leaves_the_weight_of_noise_levels_behind():
    rates = {n: r.roles["weighting"].lr for n in recipe_files() if "weighting" in (r := load_recipe(n)).roles}
    assert len(rates) >= 5 and min(rates.values()) >= 1e-3, rates


def test_the_papers_norm_is_the_root_of_the_sum():
    x = Rng(16).normal(5, 3, 4, 4).double()
    length = x.flatten(1).norm(dim=1)
    found = scm.normalized(x, 0.1, "sum").flatten(1).norm(dim=1)
    torch.testing.assert_close(found, length / (length + 0.1))


@pytest.mark.parametrize("norm, entries", [("sum", 1), ("mean", 48)])
def test_the_square_is_a_sum_or_a_mean_as_the_norm_is(norm, entries):
    """So that the weight has nowhere to climb to: zero is what it begins with."""
    g = scm.normalized(1e3 * Rng(20).normal(3, 3, 4, 4).double(), 0.1, norm)
    found = scm.consistency(torch.zeros_like(g), g, torch.zeros(3).double(), norm=norm)["consistency"]
    assert found.item() == pytest.approx(g.square().sum().item() / 3 / entries)
    assert found.item() == pytest.approx(1, rel=1e-2)


@pytest.mark.parametrize("norm, length", [("sum", 2.0), ("mean", 2 / math.sqrt(48))])
def test_at_the_fixed_point_of_the_weight_the_gradient_of_a_sample_has_this_length(norm, length):
    """What another term's gradient stands beside: 2, or 2 / sqrt(D); 1/tan, as in SANA-Sprint, cancels."""
    g = scm.normalized(1e3 * Rng(20).normal(3, 3, 4, 4).double(), 0.1, norm)
    F, prior = torch.zeros_like(g, requires_grad=True), torch.tensor([0.1, 1.0, 30.0])
    w = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    for _ in range(60):  # gradient descent on the weight alone: exp(w) becomes 1 / (prior error)
        (slope,) = torch.autograd.grad(sum(scm.consistency(F, g, w, prior, norm).values()), w)
        w = (w - 0.5 * (3 * slope).clamp(-1, 1)).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(3 * scm.consistency(F, g, w, prior, norm)["consistency"], F)
    torch.testing.assert_close(
        gradient.flatten(1).norm(dim=1), torch.full((3,), length).double(), rtol=1e-3, atol=0
    )


@pytest.mark.parametrize(
    "name", ["sana_sprint", "sd3_sana_sprint", "emoji_flow_sana_sprint", "emoji_scm_1step"]
)
def test_the_weight_of_noise_levels_learns_its_law_at_the_recipes_rate(name):
    """-log(error) within 0.3 after 4,000 updates wherever nine of ten times are; at 2e-6 it would be off by 2.8."""
    recipe = load_recipe(name)
    role, c = recipe.roles["weighting"], recipe.method
    weighting = scm.LogWeight()
    optimizer = torch.optim.AdamW(
        weighting.parameters(), role.lr, role.betas, role.eps, weight_decay=role.weight_decay
    )

    def wanted(t):  # the inverse of the prior of SANA-Sprint's code times a constant error
        return torch.log(c.sigma_data * torch.tan(t)).float()

    torch.manual_seed(0)
    for _ in range(4000):
        t = scm.angles(torch.randn(16), c.time_mean, c.time_std, c.sigma_data)
        w = weighting(t)
        optimizer.zero_grad()
        ((w - wanted(t)).exp() - w).mean().backward()
        torch.nn.utils.clip_grad_norm_(weighting.parameters(), recipe.train.clip_norm)
        optimizer.step()
    t = scm.angles(torch.linspace(-1.645, 1.645, 41), c.time_mean, c.time_std, c.sigma_data)
    assert (weighting(t) - wanted(t)).abs().max() < 0.3


def test_the_loss_has_the_gradient_of_the_continuous_time_objective():
    """``grad |F - sg(F) - g|^2 = 2 / sin(t) grad <f, cos(t) df/dt>``."""
    torch.manual_seed(0)
    net, x, t = Mlp(16), Rng(17).normal(1, 2).double(), torch.tensor([1.1])
    v = ode(mixture())(x, t)

    def F(x, t):
        return net_call(net, x, t)

    with torch.no_grad():
        g = scm.tangent(x, t, v, *scm.forward_mode(F, x, t, v), 1.0)
    weight = net.layers[2].weight
    loss = scm.consistency(F(x, t), g, torch.zeros(1))["consistency"]
    (ours,) = torch.autograd.grad(loss, weight)
    f = scm.consistency_function(x, F(x, t), t)
    (theirs,) = torch.autograd.grad((f * g).mean(), weight)
    torch.testing.assert_close(ours, 2 / math.sin(1.1) * theirs, rtol=1e-12, atol=1e-14)
    assert ours.abs().max() > 1e-6


def test_a_step_down_the_loss_moves_the_velocity_along_the_tangent():
    """F changes by +g, so f at t by -sin(t) cos(t) df/dt: it follows f a little nearer to the data."""
    F, g = torch.zeros(4, 2, requires_grad=True), Rng(19).normal(4, 2).double()
    (gradient,) = torch.autograd.grad(scm.consistency(F, g, torch.zeros(4))["consistency"], F)
    torch.testing.assert_close(-gradient * F.numel() / 2, g)


def test_adaptive_weight_learns_the_inverse_of_the_error():
    g, log_weight = torch.full((2, 3), 0.5), torch.zeros(2, requires_grad=True)
    F = torch.zeros(2, 3)
    for _ in range(200):
        terms = scm.consistency(F, g, log_weight)
        (gradient,) = torch.autograd.grad(sum(terms.values()), log_weight)
        log_weight = (log_weight - 0.5 * gradient).detach().requires_grad_()
    torch.testing.assert_close(log_weight.exp(), torch.full((2,), 4.0), rtol=1e-5, atol=0)
    assert terms["consistency"].item() == pytest.approx(1.0) and terms["weight"].item() == pytest.approx(
        -math.log(4)
    )


def test_prior_multiplies_the_error_and_not_the_regulariser():
    g, w = torch.ones(2, 3), torch.tensor([0.1, 0.2])
    plain, with_prior = (scm.consistency(torch.zeros(2, 3), g, w, p) for p in (1.0, torch.tensor([2.0, 3.0])))
    assert plain["consistency"].item() == pytest.approx((math.exp(0.1) + math.exp(0.2)) / 2)
    assert with_prior["consistency"].item() == pytest.approx((2 * math.exp(0.1) + 3 * math.exp(0.2)) / 2)
    assert plain["weight"] == with_prior["weight"]


def test_samples_whose_tangent_is_not_finite_are_dropped():
    F = torch.randn(3, 2, requires_grad=True)
    g, w = torch.ones(3, 2), torch.tensor([0.0, 5.0, 0.0], requires_grad=True)
    g[1, 0] = math.nan
    terms = scm.consistency(F, g, w)
    of_F, of_w = torch.autograd.grad(sum(terms.values()), (F, w))
    assert of_F[1].eq(0).all() and of_w[1] == 0 and of_F.isfinite().all()
    alone = scm.consistency(F[[0, 2]], g[[0, 2]], w[[0, 2]])
    assert all(alone[name] == terms[name] for name in terms)


def test_log_weight_starts_at_zero_and_is_a_function_of_t():
    head = scm.LogWeight()
    assert head(LEVELS).eq(0).all()
    torch.nn.init.normal_(head.linear.weight)
    assert head(LEVELS).shape == LEVELS.shape and head(LEVELS).std() > 0.1


# --------------------------------------------------------------------------------------------------- noise levels
def test_histogram_of_noise_levels_is_log_normal():
    t = scm.angles(Rng(20).normal(200_000).double(), -0.8, 1.6, 0.5)
    tau = torch.log(0.5 * torch.tan(t))
    assert tau.mean() == pytest.approx(-0.8, abs=0.02) and tau.std() == pytest.approx(1.6, abs=0.02)
    assert (t < math.pi / 2).all() and (t > 0).all()
    assert tau.sub(-0.8).div(1.6).pow(4).mean() == pytest.approx(
        3, abs=0.1
    )  # normal, not only of this spread


def test_with_unit_data_it_is_the_logit_normal_law_of_a_flow():
    n = Rng(21).normal(1000).double()
    t = scm.angles(n, 1.0, 1.0, 1.0)
    torch.testing.assert_close(t.sin() / (t.sin() + t.cos()), torch.sigmoid(1 + n))


@pytest.mark.parametrize("path", PATHS)
def test_drawn_times_stay_within_what_the_teacher_covers(path):
    schedule = PATHS[path]
    term = Consistency(SCM.Config(), gaussian(schedule), gaussian(schedule))
    t = term.draw(torch.tensor([-50.0, -3, 0, 3, 50.0]))
    low, high = angle_range(schedule)
    assert (t > low).all() and (t < high).all() and (1 / t.tan()).isfinite().all()
    s = schedule.time_at(t.cos(), t.sin())
    assert (s > schedule.t_min).all() and (s < schedule.t_max).all()


def test_the_law_of_the_noise_level_knows_the_scale_of_data():
    config = SCM.Config(sigma_data=0.25, time_mean=0.4, time_std=0.8)
    term, normal = Consistency(config, gaussian(Flow()), gaussian(Flow())), torch.linspace(-1, 1, 7)
    wanted = torch.atan(torch.exp(0.4 + 0.8 * normal.double()) / 0.25)
    torch.testing.assert_close(term.draw(normal), wanted, check_dtype=False)


def test_options_of_the_loss_go_where_they_belong(monkeypatch):
    """The tangent's constant in units of our data, its norm in both places, and the prior of SANA-Sprint's code."""
    config = SCM.Config(
        tangent="difference", tangent_norm="sum", tangent_constant=0.2, sigma_data=0.25, prior="1/tan"
    )
    term, seen = Consistency(config, gaussian(), gaussian(variance=0.3)), {}

    def watch(owner, name):
        real = getattr(owner, name)

        def watched(*args):
            seen[name] = (args, real(*args))
            return seen[name][1]

        monkeypatch.setattr(owner, name, watched)

    watch(term, "draw"), watch(scm, "normalized"), watch(scm, "consistency")
    x0, batch = (
        Rng(5).normal(6, 2).double(),
        SimpleNamespace(rng=Rng(6), log={}, note_latents=lambda _x0: None),
    )
    term.losses(x0, NONE, NONE, 1.0, 3, batch)
    t = seen["draw"][1]
    assert seen["normalized"][0][1:] == (pytest.approx(0.8), "sum")
    velocity, g, weight, prior, norm = seen["consistency"][0]
    assert norm == "sum" and g is seen["normalized"][1] and torch.equal(weight, term.weighting(t))
    torch.testing.assert_close(prior, 4 / t.tan())
    assert batch.log["tangent"] > 0 and velocity.shape == x0.shape
