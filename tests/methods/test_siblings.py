"""DMD2's siblings where everything is known: Diff-Instruct, SwiftBrush, f-distill and DisBack."""

import itertools
import math

import pytest
import torch
from toys import NONE, SD, Mlp, Rows, distance, fit, labels_of, toy, view

from fewstep.data.batches import Batches
from fewstep.diffusion import objectives
from fewstep.diffusion.cond import Cond
from fewstep.diffusion.denoiser import all_of_it
from fewstep.diffusion.rng import Rng
from fewstep.diffusion.schedules import EDM
from fewstep.errors import RecipeError
from fewstep.methods import Batch, Progress
from fewstep.methods.disback import DisBack
from fewstep.methods.dmd2 import DMD2
from fewstep.methods.fdistill import FDistill
from fewstep.methods.score_difference import EDM_LAW, DiffInstruct, SwiftBrush
from fewstep.process import Process
from fewstep.recipe import DataConfig, Recipe, RoleConfig, TeacherConfig, TrainConfig, from_dict, to_dict
from fewstep.runs.build import build
from fewstep.teachers.analytic import GaussianMixture
from fewstep.training.trainer import Trainer

PLAIN = {"guidance_scale": 1.0, "guide_critic": False, "null_probability": 0.0}


@pytest.fixture(scope="module")
def ring():
    return GaussianMixture.ring(SD, radius=2.2, std=0.2)


@pytest.fixture(scope="module")
def fitted(ring):
    """The pretrained network that every role starts from."""
    torch.manual_seed(0)
    return fit(ring, Mlp())


@pytest.fixture(scope="module")
def halves(ring):
    """The ring with two labels: label 0 has the first four modes, label 1 the others."""
    weights = torch.tensor([[0.25] * 4 + [0.0] * 4, [0.0] * 4 + [0.25] * 4])
    return GaussianMixture(SD, ring.means, ring.variances, weights)


@pytest.fixture(scope="module")
def fitted_halves(halves):
    torch.manual_seed(0)
    return fit(halves, Mlp(labels=2))


# ------------------------------------------------------------------------------------------------ exact gradients
class Grid:
    """Randomness that is a product grid, so that means over a batch are integrals over noise and time's noise."""

    def __init__(self, u, side=500):
        quantile = torch.special.ndtri((torch.arange(side, dtype=torch.float64) + 0.5) / side)
        quantile /= quantile.square().mean().sqrt()
        self.first, self.second = (
            g.reshape(-1, 1) for g in torch.meshgrid(quantile, quantile, indexing="ij")
        )
        self.u = u

    def normal(self, *shape):
        return self.first

    def normal_like(self, x):
        return self.second

    def uniform(self, n):
        return torch.full((n,), self.u, dtype=torch.float64)


class Affine:
    """``x0 = shift + scale z``: a student whose samples are Gaussian."""

    schedule, prediction = SD, "x0"

    def __init__(self, shift, scale):
        self.weights = [torch.tensor(w, dtype=torch.float64, requires_grad=True) for w in (shift, scale)]

    def x0(self, x_t, t, cond, *, guidance=1.0):
        return self.weights[0] + self.weights[1] * x_t


def normal(mean, variance):
    return GaussianMixture(SD, torch.tensor([[mean]], dtype=torch.float64), torch.tensor(variance))


REAL, SHIFT, SCALE = (0.7, 0.3), -0.2, 0.9


def gradient(method_class, u, **options):
    """Gradient of the student's loss at one time for (shift, scale), with the exact critic; and that time."""
    student = Affine(SHIFT, SCALE)
    critic, teacher = normal(SHIFT, SCALE**2), normal(*REAL)
    config = method_class.Config(**options)
    method = method_class(config, teacher, (1,), student=student, critic=critic)
    grid = Grid(u)
    batch = Batch(NONE, (len(grid.first), 1), grid, Rng(0))
    loss = method.generator_loss(batch, Progress())["dm"]
    low, high = config.time_range
    return torch.stack(torch.autograd.grad(loss, student.weights)), SD.draw_times(grid.uniform(1), low, high)


def levels(t):
    """Means and variances of student and teacher at level t, differentiable in the student's (shift, scale)."""
    weights = torch.tensor([SHIFT, SCALE], dtype=torch.float64, requires_grad=True)
    a, s = SD.alpha(t), SD.sigma(t)
    fake = a * weights[0], (a * weights[1]) ** 2 + s**2
    real = a * REAL[0], a**2 * REAL[1] + s**2
    return weights, fake, real


def exact_kl_gradient(t):
    weights, (m, v), (mean, variance) = levels(t)
    kl = 0.5 * (torch.log(variance / v) + (v + (m - mean) ** 2) / variance - 1)
    return torch.autograd.grad(kl.sum(), weights)[0]


def test_critic_lag_is_zero_for_the_exact_critic_and_by_hand_for_one_of_an_older_student():
    """Score projection: ``delta (fake - x0)`` has the mean of ``delta (fake - exact)``."""
    grid, teacher, exact = Grid(0.5), normal(*REAL), normal(SHIFT, SCALE**2)
    t, x0 = SD.draw_times(grid.uniform(len(grid.first))), SHIFT + SCALE * grid.first
    x_t = SD.add_noise(x0, grid.second, t)
    real, mean = teacher.x0(x_t, t, NONE), exact.x0(x_t, t, NONE)

    def lag(fake):
        batch = Batch(NONE, tuple(x0.shape), grid, Rng(0))
        batch.note_lag(x0, real, fake)
        return batch.log["critic_lag"].item()

    assert abs(lag(mean)) < 1e-9
    older = normal(SHIFT + 0.5, SCALE**2).x0(x_t, t, NONE)
    delta = real - older
    expected = (delta * (older - mean)).mean() / delta.square().mean()
    assert lag(older) == pytest.approx(expected.item(), rel=1e-6) and abs(expected) > 0.1


SCORE_METHODS = [(DiffInstruct, {}, "one"), (SwiftBrush, PLAIN, "vsd")]


@pytest.mark.parametrize("u", [0.02, 0.3, 0.6, 0.95])
@pytest.mark.parametrize(("method", "options", "weight"), SCORE_METHODS)
def test_sign_and_size_with_the_kl_weight_are_those_of_the_exact_gradient(method, options, weight, u):
    found, t = gradient(method, u, **{**options, "weight": "kl"})
    assert torch.allclose(found, exact_kl_gradient(t), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("u", [0.02, 0.3, 0.6, 0.95])
@pytest.mark.parametrize(("method", "options", "weight"), SCORE_METHODS)
def test_default_weights_are_one_on_x0_and_sigma_squared_on_eps(method, options, weight, u):
    found, t = gradient(method, u, **options)
    a, s = SD.alpha(t), SD.sigma(t)
    # mu_f - mu_r = (s^2 / a) (score_f - score_r), eps_r - eps_f = s (score_f - score_r); the exact KL weight on
    # the score difference is a (dx_t / dx0), so on that scale "one" is s^2 / a and "s^2 on eps" is s^3.
    factor = {"one": (s**2 / a) / a, "vsd": s**3 / a}[weight]
    assert torch.allclose(found, factor * exact_kl_gradient(t), rtol=1e-4, atol=1e-7)
    assert method.Config().weight == weight


# -------------------------------------------------------------------------------------- score differences: wiring
class Spy:
    """A closed-form denoiser that remembers what it was asked for."""

    def __init__(self, inner, null=None):
        self.inner, self.schedule, self.calls = inner, inner.schedule, []
        self.null = null or getattr(inner, "null", None)

    def x0(self, x_t, t, cond, *, guidance=1.0):
        self.calls.append({"x_t": x_t, "t": t, "cond": cond, "guidance": guidance})
        return self.inner.x0(x_t, t, cond)


def spied(method_class, halves, net, batch_size=64, accumulate=1, **options):
    trainer = toy(
        method_class,
        method_class.Config(**options),
        Spy(halves),
        net,
        batch_size=batch_size,
        accumulate=accumulate,
        labels=torch.arange(1000) % 2,
    )
    trainer.method.critic = Spy(halves, null=Cond({"label": torch.tensor([-1])}))
    return trainer


def test_swiftbrush_guides_teacher_and_critic_in_the_students_loss_only(halves, fitted_halves):
    trainer = spied(SwiftBrush, halves, fitted_halves)
    batch, method = trainer.data.batch(0, 0), trainer.method
    method.generator_loss(batch, Progress())
    (teacher,), (critic,) = method.teacher.calls, method.critic.calls
    assert teacher["guidance"] == critic["guidance"] == 4.5
    assert torch.equal(teacher["x_t"], critic["x_t"]) and torch.equal(teacher["t"], critic["t"])
    assert torch.equal(teacher["cond"]["label"], batch.cond["label"])
    assert torch.equal(critic["cond"]["label"], batch.cond["label"])
    method.critic_loss(batch, Progress())
    assert method.critic.calls[1]["guidance"] == 1.0


def test_diff_instruct_guides_the_teacher_only(halves, fitted_halves):
    trainer = spied(DiffInstruct, halves, fitted_halves, guidance_scale=3.0)
    trainer.method.generator_loss(trainer.data.batch(0, 0), Progress())
    assert [c["guidance"] for c in trainer.method.teacher.calls] == [3.0]
    assert [c["guidance"] for c in trainer.method.critic.calls] == [1.0]


def test_a_whole_batch_in_ten_meets_the_null_condition_in_the_critics_loss(halves, fitted_halves):
    trainer = spied(SwiftBrush, halves, fitted_halves, batch_size=2, accumulate=2)
    method, dropped, count = trainer.method, [], 600
    method.generate = lambda batch: torch.zeros(batch.shape)
    for i in range(count):
        for micro in range(2):
            batch = trainer.data.batch(i, micro)
            method.critic_loss(batch, Progress(i))
            of_critic = method.critic.calls.pop()["cond"]["label"]
            assert torch.equal(of_critic, batch.cond["label"]) or (of_critic == -1).all()
            dropped.append(bool((of_critic == -1).all()))
    of_iteration = torch.tensor(dropped).view(count, 2)
    assert torch.equal(of_iteration[:, 0], of_iteration[:, 1])  # micro-batches and ranks agree
    expected, spread = 0.1 * count, math.sqrt(count * 0.1 * 0.9)
    assert abs(of_iteration[:, 0].sum() - expected) < 4 * spread


def test_swiftbrush_times_and_the_weight_of_its_critic(halves, fitted_halves):
    trainer = spied(SwiftBrush, halves, fitted_halves, batch_size=20000, null_probability=1.0)
    method, batch = trainer.method, trainer.data.batch(0, 0)
    method.generate = lambda batch: torch.zeros(batch.shape)
    method.generator_loss(batch, Progress())
    t = method.teacher.calls[0]["t"]
    assert (t.min().item(), t.max().item()) == (20, 980)
    loss = method.critic_loss(batch, Progress())["denoising"]
    call = method.critic.calls[-1]
    assert (call["t"].min().item(), call["t"].max().item()) == (0, 999)
    # alpha^2 |eps - eps_hat|^2, from the noise that is in x_t = sigma eps (x0 = 0).
    a, s = (c.float()[:, None] for c in (SD.alpha(call["t"]), SD.sigma(call["t"])))
    predicted = (call["x_t"] - a * halves.x0(call["x_t"], call["t"], call["cond"])) / s
    assert loss.item() == pytest.approx((a**2 * (predicted - call["x_t"] / s) ** 2).mean().item(), rel=1e-3)


def test_diff_instruct_has_edms_law_of_times_and_loss_for_an_edm_teacher():
    teacher = GaussianMixture(EDM(), torch.zeros(1, 2), torch.tensor(0.25))
    student, critic = Spy(teacher), Spy(teacher)
    method = DiffInstruct(DiffInstruct.Config(), teacher, (2,), student=student, critic=critic)
    assert method.student.times == [1] and method.log_normal and method.critic_loss_kind == "edm"
    count = 40000
    batch = Batch(NONE, (count, 2), Rng(0), Rng(1))
    loss = method.critic_loss(batch, Progress())["denoising"]
    sigma = critic.calls[0]["t"]
    assert sigma.log().mean().item() == pytest.approx(-1.2, abs=0.03)
    assert sigma.log().std().item() == pytest.approx(1.2, abs=0.03)
    # EDM's weight is one over the variance c_out^2 of its target, (s^2 + sd^2) / (s sd)^2; with the exact posterior
    # of N(0, sd^2) the squared error is s^2 sd^2 / (s^2 + sd^2) on average: the weighted loss of exact data is 1.
    weight = objectives.denoising_weight("edm", teacher.schedule, sigma)
    assert torch.allclose(weight, (sigma**2 + 0.25) / (0.5 * sigma) ** 2)
    data = teacher.sample(count, Rng(3))
    x_t = teacher.schedule.add_noise(data, Rng(4).normal_like(data), sigma)
    exact = objectives.denoising(teacher.x0(x_t, sigma, NONE), data, weight)
    assert exact.item() == pytest.approx(1, abs=0.03) and loss.isfinite()
    method.generator_loss(batch, Progress())
    assert critic.calls[1]["t"].log().mean().item() == pytest.approx(-1.2, abs=0.03)


def test_diff_instruct_is_uniform_in_time_for_a_vp_teacher(ring, fitted):
    trainer = toy(DiffInstruct, DiffInstruct.Config(), Spy(ring), fitted, batch_size=20000)
    method, batch = trainer.method, trainer.data.batch(0, 0)
    assert method.student.times == [999] and isinstance(method.student.times[0], int)
    method.critic = Spy(ring)
    method.critic_loss(batch, Progress())
    method.generator_loss(batch, Progress())
    for t in (method.critic.calls[0]["t"], method.critic.calls[1]["t"], method.teacher.calls[0]["t"]):
        assert (t.min().item(), t.max().item()) == (0, 999)
        assert t.mean().item() == pytest.approx(499.5, abs=8)


def test_lognormal_times_mean_the_same_ratio_on_every_path():
    normal = Rng(0).normal(1000)
    t = EDM_LAW.draw(SD, Rng(0), 1000)
    assert torch.equal(t, t.round())
    ratio = (SD.sigma(t) / SD.alpha(t)).log()
    inside = (t > 20) & (t < 980)  # below, one step of the table is a large part of the ratio
    assert (ratio - (-1.2 + 1.2 * normal)).abs()[inside].max() < 0.03


def turns_of(trainer, monkeypatch):
    """Lists that fill as it trains: names of its turns, samples that the critic learns, samples that are matched."""
    order = []
    learned, seen = [], []
    denoising, matching = objectives.denoising, objectives.distribution_matching
    monkeypatch.setattr(
        objectives, "denoising", lambda p, x0, w: (learned.append(x0), denoising(p, x0, w))[1]
    )
    monkeypatch.setattr(
        objectives, "distribution_matching", lambda x0, *a: (seen.append(x0.detach()), matching(x0, *a))[1]
    )
    update = trainer.update
    trainer.update = lambda phase, roles: (order.append(phase.name), update(phase, roles))[1]
    return order, learned, seen


def test_diff_instruct_updates_the_critic_first_on_samples_of_its_own(ring, fitted, monkeypatch):
    trainer = toy(DiffInstruct, DiffInstruct.Config(), ring, fitted, batch_size=64)
    order, learned, seen = turns_of(trainer, monkeypatch)
    for _ in range(3):
        trainer.iterate()
    assert order == ["critic", "generator"] * 3
    assert trainer.updates == {"student": 3, "critic": 3}
    assert not any(x0.requires_grad for x0 in learned)
    assert not any(torch.equal(a, b) for a, b in zip(learned, seen))


def test_swiftbrush_updates_the_student_first_and_the_critic_on_the_same_sample(ring, fitted, monkeypatch):
    trainer = toy(SwiftBrush, SwiftBrush.Config(**PLAIN), ring, fitted, batch_size=64)
    order, learned, seen = turns_of(trainer, monkeypatch)
    for _ in range(3):
        trainer.iterate()
    assert order == ["generator", "critic"] * 3
    assert trainer.updates == {"student": 3, "critic": 3}
    assert all(torch.equal(a, b) for a, b in zip(learned, seen))
    assert not any(x0.requires_grad for x0 in learned)
    # With more critic updates per student update the critic goes on with fresh samples.
    trainer = toy(SwiftBrush, SwiftBrush.Config(critic_steps=3, **PLAIN), ring, fitted, batch_size=64)
    for _ in range(6):
        trainer.iterate()
    assert trainer.updates == {"student": 2, "critic": 6}


@pytest.mark.parametrize("method", [DiffInstruct, SwiftBrush])
def test_each_turn_has_gradients_in_its_own_role_only(ring, fitted, method):
    trainer = toy(method, method.Config(**PLAIN), ring, fitted, batch_size=64)
    update, graded = trainer.update, {}

    def spy(phase, roles):
        graded[phase.name] = {
            n for n, r in trainer.roles.items() if any(w.grad is not None for w in r.weights.values())
        }
        return update(phase, roles)

    trainer.update = spy
    trainer.iterate()
    assert graded == {"generator": {"student"}, "critic": {"critic"}}


# -------------------------------------------------------------------------------------------------- distributions
def test_diff_instruct_reaches_the_ring(ring, fitted):
    trainer = toy(DiffInstruct, DiffInstruct.Config(), ring, fitted, steps=350, batch_size=256)
    assert distance(trainer, ring) > 1.0
    trainer.train()
    assert distance(trainer, ring) < 0.05


def test_swiftbrush_reaches_the_ring(ring, fitted):
    trainer = toy(SwiftBrush, SwiftBrush.Config(**PLAIN), ring, fitted, steps=500, batch_size=256)
    trainer.train()
    assert distance(trainer, ring) < 0.04


@pytest.mark.long
def test_swiftbrush_reaches_the_half_ring_of_each_label_with_both_guided(halves, fitted_halves):
    """At any scale the rest point is the data; but guidance multiplies the errors of a learned critic."""
    labels, config = torch.arange(1000) % 2, SwiftBrush.Config(guidance_scale=2.0, critic_steps=2)
    trainer = toy(SwiftBrush, config, halves, fitted_halves, steps=700, labels=labels)
    assert distance(trainer, halves) > 0.4
    trainer.train()
    assert distance(trainer, halves) < 0.05
    cond = labels_of(halves, Rng(1), 2000)
    made = trainer.method.student.sample(Rng(2).normal(2000, 2), cond, None)
    nearest = torch.cdist(made, halves.means).argmin(1)
    assert ((nearest >= 4) == (cond["label"] == 1)).float().mean() > 0.95


# ------------------------------------------------------------------------------------------------------- f-distill
# f of D_f(p || q) = E_q f(p / q), and the constant that the table's h leaves out of r^2 f''(r).
DIVERGENCES = {
    "rkl": (lambda r: -r.log(), 1),
    "kl": (lambda r: r * r.log(), 1),
    "js": (lambda r: r * r.log() - (r + 1) * ((r + 1) / 2).log(), 1),
    "softened_rkl": (lambda r: (r + 1) * ((r + 1) / (2 * r)).log(), 1),
    "neyman": (lambda r: (1 - r) ** 2 / r, 2),
    "hellinger": (lambda r: (r.sqrt() - 1) ** 2, 0.5),
    "jeffreys": (lambda r: (r - 1) * r.log(), 1),
}


def density(x, mean, variance):
    return torch.exp(-0.5 * (x - mean) ** 2 / variance) / (2 * math.pi * variance).sqrt()


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_h_is_the_curvature_of_its_divergence(kind):
    f, constant = DIVERGENCES[kind]
    r = torch.logspace(-1, 1.3, 50, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(f(r).sum(), r, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), r)
    assert torch.allclose(
        objectives.divergence_weight(kind, r.detach()) * constant, r.detach() ** 2 * curvature
    )


def fdistill_gaussian(teacher, critic, student, logits=None, **options):
    """f-distill in one dimension with the exact critic, and two heads whose mean is the exact log ratio."""
    critic.net, critic.image_of, critic.image_first = Mlp(width=8, dim=1), all_of_it, False
    critic.predict = lambda x_t, t, cond: critic.net(x_t.float(), t)
    config = FDistill.Config(num_steps=1, taps=["layers.4"], **options)
    method = FDistill(config, teacher, (1,), student=student, critic=critic)

    def exact(_judge, x_t, t, _cond):
        log_ratio = teacher.log_prob(x_t, t) - critic.log_prob(x_t, t)
        return torch.stack([log_ratio + 3, log_ratio - 3], 1)

    judge = method.host.discriminator
    judge.judged = lambda critic, x_t, t, cond, _scale: (
        (logits or exact)(critic, x_t, t, cond),
        critic.x0(x_t, t, cond),
    )
    return method


@pytest.mark.parametrize("bins", [0, 10])
@pytest.mark.parametrize("kind", DIVERGENCES)
def test_f_distill_has_the_exact_gradient_of_its_divergence(kind, bins):
    student, u = Affine(SHIFT, SCALE), 0.5
    teacher, critic = normal(*REAL), normal(SHIFT, SCALE**2)
    options = {"divergence": kind, "weight": "kl", "ratio_range": (1e-6, 1e6), "time_bins": bins}
    method = fdistill_gaussian(teacher, critic, student, **options)
    grid = Grid(u)
    loss = method.matching(student.x0(grid.first, None, NONE), NONE, Batch(NONE, (1, 1), grid, Rng(0)))
    found = torch.stack(torch.autograd.grad(loss, student.weights))

    f, constant = DIVERGENCES[kind]
    weights, fake, real = levels(SD.draw_times(grid.uniform(1), *method.config.time_range))
    x = torch.linspace(-9, 9, 40001, dtype=torch.float64)
    p, q = density(x, *real), density(x, *fake)
    expected = torch.autograd.grad(torch.trapezoid(q * f(p / q), x), weights, retain_graph=True)[0]
    # The batch mean of h is divided out.
    mean_h = torch.trapezoid(q * objectives.divergence_weight(kind, p / q), x)
    assert torch.allclose(found * mean_h * constant, expected, rtol=1e-2, atol=1e-6)


def weights_of(method, batch, monkeypatch, x0):
    """The weights f-distill gives to samples whose weight under DMD2 would be 1, and the ratio they come from."""
    seen = {}
    with monkeypatch.context() as patch:
        patch.setattr(objectives, "matching_weight", lambda *a: torch.ones(len(x0), dtype=x0.dtype))
        weight = objectives.divergence_weight
        patch.setattr(objectives, "divergence_weight", lambda k, r: (seen.update(ratio=r), weight(k, r))[1])
        patch.setattr(
            objectives, "distribution_matching", lambda x, r, f, weight: seen.update(weight=weight) or x.sum()
        )
        method.matching(x0, NONE, batch)
    return seen["weight"], seen["ratio"]


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_h_has_mean_one_and_its_ratio_is_bounded_then_divided_by_its_bins_mean(kind, monkeypatch):
    raw = torch.linspace(-30, 30, 4000, dtype=torch.float64)[torch.randperm(4000, generator=Rng(0).generator)]
    logits = lambda _judge, x_t, t, cond: raw[:, None].clone().requires_grad_()  # noqa: E731
    teacher, critic, x0 = normal(*REAL), normal(SHIFT, 1.0), Rng(1).normal(4000, 1).double()
    batch = lambda: Batch(NONE, (4000, 1), Rng(2), Rng(3))  # noqa: E731
    student = Affine(SHIFT, SCALE)

    method = fdistill_gaussian(teacher, critic, student, logits, divergence=kind, time_bins=0)
    weight, ratio = weights_of(method, batch(), monkeypatch, x0)
    assert weight.mean().item() == pytest.approx(1) and not weight.requires_grad
    assert (ratio.min().item(), ratio.max().item()) == pytest.approx((0.1, 20))
    assert torch.allclose(ratio, raw.exp().clamp(0.1, 20))

    options = {"logit_limit": 1.0, "ratio_range": (1e-3, 1e3)}
    method = fdistill_gaussian(teacher, critic, student, logits, divergence=kind, time_bins=0, **options)
    _, ratio = weights_of(method, batch(), monkeypatch, x0)
    assert (ratio.min().item(), ratio.max().item()) == pytest.approx((math.exp(-1), math.exp(1)))

    method = fdistill_gaussian(teacher, critic, student, logits, divergence=kind)
    weight, ratio = weights_of(method, batch(), monkeypatch, x0)
    u, clipped = Rng(2).uniform(4000), raw.exp().clamp(0.1, 20)
    for k in range(10):
        bin_ = (u >= k / 10) & (u < (k + 1) / 10)
        assert torch.allclose(ratio[bin_], clipped[bin_] / clipped[bin_].mean())
    assert weight.mean().item() == pytest.approx(1)


def with_gan(method, config, teacher, net, steps=1000, batch_size=64, lr=2e-3):
    torch.manual_seed(0)  # of the head
    trainer = toy(
        method,
        config,
        teacher,
        net,
        steps=steps,
        batch_size=batch_size,
        real=teacher.sample(5000, Rng("real")),
    )
    trainer.roles["discriminator"].config.lr = lr
    return trainer


SHARED = {"num_steps": 1, "taps": ["layers.4"], "critic_steps": 2}


class Guided:
    """The ring, moved by guidance."""

    def __init__(self, ring):
        self.schedule, self.sample, self.ring = ring.schedule, ring.sample, ring

    def x0(self, x_t, t, cond, *, guidance=1.0):
        return self.ring.x0(x_t, t, cond) + (guidance - 1)


def test_reverse_kl_is_dmd2_bit_for_bit(ring, fitted):
    shared = {**SHARED, "guidance_scale": 3.0}
    ours, dmd2, js = (
        with_gan(method, method.Config(**shared, **options), Guided(ring), fitted)
        for method, options in (
            (FDistill, {"divergence": "rkl"}),
            (DMD2, {}),
            (FDistill, {"divergence": "js"}),
        )
    )
    for _ in range(5):
        for trainer in (ours, dmd2, js):
            trainer.iterate()
    assert ours.updates == dmd2.updates == {"student": 3, "critic": 5, "discriminator": 5}
    for name, role in dmd2.roles.items():
        for key, weight in role.weights.items():
            assert torch.equal(weight, ours.roles[name].weights[key])
    student = dmd2.roles["student"].weights
    assert any(not torch.equal(w, student[k]) for k, w in js.roles["student"].weights.items())


def test_h_sends_no_gradient_anywhere(ring, fitted):
    trainer = with_gan(FDistill, FDistill.Config(**SHARED), ring, fitted)
    method, batch = trainer.method, trainer.data.batch(0, 0)
    for role in trainer.roles.values():
        role.requires_grad_(True)
    x0, cond = method.host.generate(batch)
    method.matching(x0, cond, batch).backward()
    for name, role in trainer.roles.items():
        assert any(w.grad is not None for w in role.weights.values()) == (name == "student")
    assert set(batch.log) == {"critic_lag", "latent_mean", "latent_std", "h_std", "density_ratio"}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["js", pytest.param("kl", marks=pytest.mark.long)])
def test_f_distill_reaches_the_ring(ring, fitted, kind):
    config = FDistill.Config(**{**SHARED, "critic_steps": 1}, divergence=kind)
    trainer = with_gan(FDistill, config, ring, fitted, steps=300, batch_size=256)
    trainer.train()
    assert distance(trainer, ring) < 0.05


# --------------------------------------------------------------------------------------------------------- DisBack
def disback(ring, net, steps=1000, batch_size=64, **options):
    config = DisBack.Config(**{"nodes": 3, "record_steps": 4, "backtrack_steps": 3, **options})
    return toy(DisBack, config, ring, net, steps=steps, batch_size=batch_size)


def snapshot(role):
    return {name: weight.detach().clone() for name, weight in role.weights.items()}


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_nodes_are_recorded_in_order_then_met_in_reverse_up_to_the_teacher(ring, fitted):
    trainer = disback(ring, fitted)
    method, learned, targets = trainer.method, [], []
    node_1, node_2, node_3 = method.nodes
    denoisers = {node_1: "node_1", node_2: "node_2", node_3: "node_3", ring: "teacher"}
    for denoiser, name in denoisers.items():
        denoiser_x0 = type(denoiser).x0

        def x0(x_t, t, cond, *, guidance=1.0, me=denoiser, name=name, call=denoiser_x0):
            if not torch.is_grad_enabled():
                targets.append(name)
            return call(me, x_t, t, cond, guidance=guidance)

        denoiser.x0 = x0
    try:
        for _ in range(12 + 12):
            before = {name: snapshot(role) for name, role in trainer.roles.items()}
            trainer.iterate()
            learned.append({n for n, r in trainer.roles.items() if not equal(before[n], snapshot(r))})
    finally:
        del ring.x0
    assert learned[:12] == [{"node_1"}] * 4 + [{"node_2"}] * 4 + [{"node_3"}] * 4
    assert learned[12:] == [{"student", "critic"}] * 12
    # Three iterations each; the last node is where the critic starts, not a target.
    assert targets == ["node_2"] * 3 + ["node_1"] * 3 + ["teacher"] * 6
    assert method.target.path[-1] is ring


def test_weights_travel_from_node_to_node_and_into_the_critic(ring, fitted):
    trainer = disback(ring, fitted)
    update, before = trainer.update, {}

    def spy(phase, roles):
        if phase.name not in before:  # the first update of each phase; its gradient is there, its step is not
            before[phase.name] = {name: snapshot(role) for name, role in trainer.roles.items()}
        return update(phase, roles)

    trainer.update = spy
    teacher = snapshot(trainer.roles["node_1"])
    for _ in range(13):
        trainer.iterate()
    assert list(before) == ["record_1", "record_2", "record_3", "generator", "critic"]
    assert equal(before["record_1"]["node_1"], teacher)
    for k in (2, 3):
        start = before[f"record_{k}"]
        assert equal(start[f"node_{k}"], start[f"node_{k - 1}"]) and not equal(start[f"node_{k}"], teacher)
    start = before["generator"]
    assert equal(start["critic"], start["node_3"]) and not equal(start["node_3"], start["node_2"])
    assert equal(start["student"], teacher)
    assert equal(before["critic"]["critic"], start["critic"])  # the student's turn leaves it alone
    assert not equal(snapshot(trainer.roles["critic"]), start["critic"])
    assert equal(snapshot(trainer.roles["node_3"]), start["node_3"])
    # Once is enough: at the student's next turn the critic is what it has become.
    critic = snapshot(trainer.roles["critic"])
    before.clear()
    trainer.iterate()
    assert equal(before["generator"]["critic"], critic)


def test_student_turns_count_from_the_start_of_backtracking(ring, fitted):
    trainer = disback(ring, fitted, nodes=1, record_steps=5, critic_steps=3)
    turns = []
    update = trainer.update
    trainer.update = lambda phase, roles: (turns.append(phase.name), update(phase, roles))[1]
    for _ in range(9):
        trainer.iterate()
    assert turns == ["record_1"] * 5 + ["generator", "critic", "critic", "critic", "generator", "critic"]


def test_the_last_node_knows_the_initial_student_better_than_the_teacher(ring, fitted):
    trainer = disback(ring, fitted, nodes=4, record_steps=60, batch_size=512)
    method = trainer.method
    for _ in range(240):
        trainer.iterate()
    rng = Rng("samples")
    with torch.no_grad():
        x0 = view(fitted).x0(rng.normal(4000, 2), torch.full((4000,), 999.0), NONE)
        assert torch.equal(x0, method.student.x0(Rng("samples").normal(4000, 2), 0, NONE))  # still untrained
        t = SD.draw_times(rng.uniform(4000))
        x_t = SD.add_noise(x0, rng.normal_like(x0), t)
        weight = SD.error_weight("v", t)
        errors = [
            objectives.denoising(denoiser.x0(x_t, t, NONE), x0, weight).item()
            for denoiser in (view(fitted), *method.nodes)
        ]
    assert errors[-1] < 0.3 * errors[0]
    assert all(later < 1.1 * earlier for earlier, later in itertools.pairwise(errors))


@pytest.mark.parametrize("stop", [3, 5, 6, 8, 9])
def test_resuming_across_stages_is_exact(ring, fitted, tmp_path, stop):
    """Stages of this run begin at iterations 3 (node 2), 6 (critic and student), 9 (the teacher)."""
    options = {"nodes": 2, "record_steps": 3, "backtrack_steps": 3}
    straight = disback(ring, fitted, **options)
    for _ in range(12):
        straight.iterate()
    broken = disback(ring, fitted, **options)
    broken.folder = tmp_path
    for _ in range(stop):
        broken.iterate()
    broken.save()
    resumed = disback(ring, fitted, **options)
    resumed.folder = tmp_path
    assert resumed.restore() and resumed.progress.iteration == stop
    for _ in range(12 - stop):
        resumed.iterate()
    assert straight.updates == resumed.updates
    for name, role in straight.roles.items():
        assert equal(snapshot(role), snapshot(resumed.roles[name]))
        assert role.average is None or equal(role.average, resumed.roles[name].average)


@pytest.mark.parametrize("guide_nodes", [False, True])
def test_guidance_is_for_the_original_teacher_unless_asked_for(halves, fitted_halves, guide_nodes):
    options = {"nodes": 2, "record_steps": 1, "backtrack_steps": 2, "guide_nodes": guide_nodes}
    config = DisBack.Config(guidance_scale=5.0, **options)
    trainer = toy(DisBack, config, halves, fitted_halves, batch_size=8, labels=torch.arange(100) % 2)
    path = trainer.method.target.path = [Spy(d) for d in trainer.method.target.path]
    trainer.method.critic.x0 = lambda *a, guidance=1.0, call=trainer.method.critic.x0: call(
        *a, guidance=guidance
    )
    for _ in range(6):
        trainer.iterate()
    assert [[c["guidance"] for c in spy.calls] for spy in path] == [
        [5.0 if guide_nodes else 1.0] * 2,
        [5.0] * 2,
    ]


def test_disback_reaches_the_ring(ring, fitted):
    options = {"nodes": 3, "record_steps": 40, "backtrack_steps": 60}
    trainer = disback(ring, fitted, steps=500, batch_size=512, **options)
    trainer.train()
    assert distance(trainer, ring) < 0.03


# ------------------------------------------------------------------------------------------------------- tiny SDXL
def recipe_of(config, **roles):
    return Recipe(
        output="",
        teacher=TeacherConfig(path=""),
        method=config,
        data=DataConfig(prompts=""),
        train=TrainConfig(steps=100, batch_size=2),
        roles=roles,
    )


def spine(sdxl, config, **roles):
    """A method on the tiny SDXL as a recipe builds it."""
    recipe = recipe_of(config, **roles)
    built, method = build(recipe, sdxl, Process())
    prompts = sdxl.encode(["red apple", "blue bird", "a dog", "a cat"])
    latents = torch.randn(4, *sdxl.latent_shape, generator=torch.Generator().manual_seed(0))
    stores = {"latents": Rows(4, latents=latents), "captions": Rows(4, **prompts.tensors)}
    data = Batches(Rows(4, **prompts.tensors), sdxl.latent_shape, batch_size=2, **stores)
    return Trainer(method, built, data, recipe.train, quiet=True)


LORA = RoleConfig(rank=2, lr=1e-2)


def test_swiftbrushs_critic_is_the_teacher_where_its_adapter_is_off(sdxl):
    thin = RoleConfig(rank=2, alpha=3.375, targets=["to_q", "to_v"], lr=1e-3)
    trainer = spine(sdxl, SwiftBrush.Config(start=399), student=LORA, critic=thin)
    teacher = {name: value.clone() for name, value in sdxl.net.state_dict().items()}
    critic, batch = trainer.method.critic, trainer.data.batch(0, 0)
    assert all(("to_q" in n or "to_v" in n) and "lora" in n for n in trainer.roles["critic"].weights)
    x_t, t = batch.rng.normal(*batch.shape), torch.tensor([300.0, 700.0])

    def predictions():
        with torch.no_grad():
            return [d.predict(x_t, t, batch.cond, guidance=4.5) for d in (critic, sdxl.denoiser)]

    assert torch.equal(*predictions())
    for _ in range(3):
        trainer.iterate()
    assert trainer.updates == {"student": 3, "critic": 3}
    assert not torch.equal(*predictions())
    layers = [m for m in critic.net.modules() if hasattr(m, "lora_A")]
    for layer in layers:
        layer.enable_adapters(False)
    assert layers and torch.equal(*predictions())
    assert all(torch.equal(value, teacher[name]) for name, value in sdxl.net.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in sdxl.net.parameters())


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_disbacks_teacher_never_moves_and_its_adapters_share_the_base(sdxl, kind):
    role = RoleConfig(kind=kind, rank=2, lr=1e-3)
    config = DisBack.Config(
        nodes=2, record_steps=2, backtrack_steps=1, start=399, guidance_scale=2.0, gan_weight=1e-3
    )
    trainer = spine(sdxl, config, student=role, critic=role, node=role)
    teacher = {name: value.clone() for name, value in sdxl.net.state_dict().items()}
    for _ in range(4):
        trainer.iterate()
    node_1, node_2 = trainer.method.nodes
    hold = {name: value.clone() for name, value in node_2.net.state_dict().items()}
    trainer.iterate()
    assert trainer.method.target.index == 0 and trainer.method.target.path[0] is node_1
    assert all(torch.equal(value, hold[name]) for name, value in node_2.net.state_dict().items())
    trainer.iterate()
    assert trainer.method.target.path[trainer.method.target.index] is sdxl.denoiser
    assert trainer.updates == {"student": 2, "critic": 2, "node_1": 2, "node_2": 2, "discriminator": 2}
    assert all(torch.equal(value, teacher[name]) for name, value in sdxl.net.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in sdxl.net.parameters())
    shared = {id(p) for p in sdxl.net.parameters()} & {id(p) for p in node_1.net.parameters()}
    assert bool(shared) == (kind == "lora")


@pytest.mark.parametrize(
    "odd",
    [
        RoleConfig(rank=4),
        RoleConfig(rank=2, alpha=1),
        RoleConfig(rank=2, targets=["to_q"]),
        RoleConfig("full"),
    ],
)
def test_nodes_and_critic_of_unequal_weights_are_refused(sdxl, odd):
    config = DisBack.Config(nodes=2, start=399)
    with pytest.raises(RecipeError, match=r"^roles\.critic: .*same kind, rank, alpha and targets"):
        spine(sdxl, config, student=LORA, critic=odd, node=LORA)


# --------------------------------------------------------------------------------------------------------- options
@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (FDistill, {"gan_weight": 0}, r"method\.gan_weight: 0.*density ratio.*dmd2"),
        (FDistill, {"discriminator_weight": 0}, r"method\.discriminator_weight: 0"),
        (FDistill, {"ratio_range": (1, 1)}, r"method\.ratio_range: \(1.*expected 0 < low < high"),
        (FDistill, {"logit_limit": 0}, r"method\.logit_limit: 0.*expected a positive"),
        (FDistill, {"time_bins": -1}, r"method\.time_bins: -1: expected 0"),
        (FDistill, {"divergence": "tv"}, r"method\.divergence: 'tv'.*'js'"),
        (FDistill, {"critic_steps": 0}, r"method\.critic_steps: 0: expected at least 1"),
        (DisBack, {"nodes": 0}, r"method\.nodes: 0: expected at least 1"),
        (DisBack, {"record_steps": 0}, r"method\.record_steps: 0: expected at least 1"),
        (DisBack, {"backtrack_steps": 0}, r"method\.backtrack_steps: 0: expected at least 1"),
        (DisBack, {"time_range": (0.5, 0.2)}, r"method\.time_range: .*expected 0 <= low"),
        (SwiftBrush, {"null_probability": 2}, r"method\.null_probability: 2\.0: expected 0 to 1"),
        (SwiftBrush, {"null_probability": 0}, r"method\.null_probability: 0.*guide_critic false"),
        (SwiftBrush, {"time_range": (0.5, 0.2)}, r"method\.time_range: .*expected 0 <= low"),
        (DiffInstruct, {"critic_steps": 0}, r"method\.critic_steps: 0: expected at least 1"),
    ],
)
def test_impossible_options_are_refused_by_name(method, options, message):
    plain = to_dict(recipe_of(method.Config()))
    assert from_dict(plain).method == method.Config()
    with pytest.raises(RecipeError, match=message):
        from_dict({**plain, "method": {**plain["method"], **options}})


def test_null_prompts_need_a_teacher_that_has_them(ring, fitted):
    with pytest.raises(RecipeError, match=r"method\.null_probability: 0\.1: .*no null condition"):
        toy(SwiftBrush, SwiftBrush.Config(guidance_scale=1.0), ring, fitted)
