"""SiD where everything is known: laws whose score is a formula, exact expectations, and small networks."""

import itertools
import math
from functools import cache

import numpy as np
import pytest
import torch
import toys
from diffusers import DDPMScheduler
from toys import NONE, SD, Mlp, Rows, distance, energy_distance, fit, labelled_mixture, view

from fewstep.data.batches import Batches
from fewstep.diffusion import objectives
from fewstep.diffusion.cond import Cond
from fewstep.diffusion.denoiser import NetDenoiser, ScheduleView
from fewstep.diffusion.rng import Rng
from fewstep.diffusion.schedules import EDM, VP, Flow
from fewstep.diffusion.times import TimeLaw, student_times
from fewstep.errors import RecipeError
from fewstep.export import student_scheduler
from fewstep.methods import Progress, terms
from fewstep.methods.live_scores import exit_step, through_networks
from fewstep.methods.sid import SiD
from fewstep.process import Process
from fewstep.recipe import DataConfig, Recipe, RoleConfig, TeacherConfig, TrainConfig, from_dict, to_dict
from fewstep.runs.build import build
from fewstep.teachers.analytic import GaussianMixture
from fewstep.training.roles import Role
from fewstep.training.trainer import Trainer

DOUBLE = {"dtype": torch.float64}
PATHS = {"vp": SD, "flow": Flow(), "edm": EDM()}


# ------------------------------------------------------------------------------------------------ exact expectations
class Line:
    """A student of two modes on a line, ``m_k + s_k z``, with its exact critic and quadrature in z and noise."""

    def __init__(self, schedule, ratio=0.7, nodes=60, fine=False):
        level = torch.tensor([-2 * math.log(ratio)], **DOUBLE)
        self.schedule, self.t = schedule, schedule.t_from_log_snr(level)
        self.ratio = (schedule.sigma(self.t) / schedule.alpha(self.t)).item()
        means, variances = torch.tensor([[-1.0], [1.2]], **DOUBLE), torch.tensor([[0.25], [0.12]], **DOUBLE)
        self.teacher = GaussianMixture(schedule, means, variances, torch.tensor([0.4, 0.6]))
        self.theta = torch.tensor([-0.4, 0.9, 0.8, 0.5], **DOUBLE)  # means, spreads
        x, w = (torch.tensor(v) for v in np.polynomial.hermite_e.hermegauss(nodes))
        e, v = x, w
        if fine:  # for integrands with a sharp bend in the noise
            e = torch.linspace(-8.5, 8.5, 1001, **DOUBLE)
            v = torch.exp(-0.5 * e**2) * (e[1] - e[0])
        z, self.eps = (g.flatten()[:, None].repeat(2, 1) for g in torch.meshgrid(x, e, indexing="ij"))
        self.z, self.mode = z, torch.arange(2).repeat_interleave(len(z) // 2)
        self.probability = 0.5 * torch.outer(w, v).flatten().repeat(2) / (2 * math.pi)
        # Functions of fewstep average over samples; this weight makes the average an expectation.
        self.weight = self.probability * len(z)
        self.times = self.t.expand(len(z))

    def law(self, theta):
        return GaussianMixture(self.schedule, theta[:2, None], theta[2:, None] ** 2)

    def __call__(self, theta, critic, detach=()):
        """x0, x_t and the means of teacher and critic."""
        x0 = theta[:2][self.mode, None] + theta[2:][self.mode, None] * self.z
        x_t = self.schedule.add_noise(x0, self.eps, self.times)
        real = self.teacher.x0(x_t.detach() if "real" in detach else x_t, self.times, NONE)
        fake = self.law(critic).x0(x_t.detach() if "fake" in detach else x_t, self.times, NONE)
        return x0, x_t, real, fake

    def expectation(self, values):
        return (self.probability * values.flatten(1).sum(1)).sum()

    def divergence(self, theta):
        """The Fisher divergence in units of x0; the critic follows the student."""
        _, _, real, fake = self(theta, theta)
        return self.expectation((real - fake) ** 2)

    def loss(self, theta, alpha, detach=()):
        x0, _, real, fake = self(theta, self.theta, detach)
        return objectives.score_identity(x0, real, fake, self.weight, alpha)


def gradient(function, theta):
    theta = theta.clone().requires_grad_()
    return torch.autograd.grad(function(theta), theta)[0]


def differences(function, theta, step=1e-5):
    shifts = step * torch.eye(len(theta), **DOUBLE)
    return torch.stack([(function(theta + h) - function(theta - h)) / (2 * step) for h in shifts])


@pytest.fixture(scope="module", params=list(PATHS))
def line(request):
    return Line(PATHS[request.param])


def test_alpha_one_half_is_half_the_gradient_of_the_fisher_divergence(line):
    exact = differences(line.divergence, line.theta)
    torch.testing.assert_close(gradient(line.divergence, line.theta), exact, rtol=1e-6, atol=1e-9)
    found = 2 * gradient(lambda theta: line.loss(theta, 0.5), line.theta)
    torch.testing.assert_close(found, exact, rtol=1e-6, atol=1e-8)
    for alpha in (0.0, 1.0, 1.2):  # a direction of its own, close to it
        other = gradient(lambda theta, a=alpha: line.loss(theta, a), line.theta)
        assert 0.8 < torch.cosine_similarity(other, exact, 0) < 0.9999


def test_alpha_one_is_half_the_gradient_with_the_law_of_the_noisy_samples_frozen(line):
    _, x_t, real, _ = line(line.theta, line.theta)

    def frozen(theta):
        return line.expectation((real - line.law(theta).x0(x_t, line.times, NONE)) ** 2)

    found = gradient(lambda theta: line.loss(theta, 1.0), line.theta)
    torch.testing.assert_close(2 * found, differences(frozen, line.theta), rtol=1e-6, atol=1e-8)


def test_the_gradient_is_the_same_on_every_path():
    lines = {name: Line(path) for name, path in PATHS.items()}
    found = [gradient(lambda theta, v=v: v.loss(theta, 1.2), v.theta) for v in lines.values()]
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found[0], found[2], rtol=1e-9, atol=1e-12)


def test_both_estimates_have_the_value_of_the_divergence_and_their_difference_is_zero(line):
    exact = line.divergence(line.theta)
    torch.testing.assert_close(line.loss(line.theta, 0.0), exact)  # L2
    assert abs(line.loss(line.theta, 1.0)) < 1e-7  # L2 - L1, score projection
    x0, _, real, fake = line(line.theta, line.theta + 0.1)  # a critic that lags
    assert abs(objectives.score_identity(x0, real, fake, line.weight, 1.0)) > 1e-3


def test_the_naive_estimate_has_the_value_but_not_the_gradient(line):
    def naive(theta):
        _, _, real, fake = line(theta, line.theta)
        return line.expectation((real - fake) ** 2)

    exact = gradient(line.divergence, line.theta)
    torch.testing.assert_close(naive(line.theta), line.divergence(line.theta))
    assert torch.cosine_similarity(gradient(naive, line.theta), exact, 0) < 0.9


def test_networks_without_gradient_give_the_same_value_and_the_direction_of_the_kl(line):
    def kl(theta):
        _, x_t, _, _ = line(theta, theta)
        ratio = line.law(theta).log_prob(x_t, line.times) - line.teacher.log_prob(x_t, line.times)
        return line.expectation(ratio[:, None])

    live = gradient(lambda theta: line.loss(theta, 1.0), line.theta)
    for detach in (("real",), ("fake",), ("real", "fake")):
        torch.testing.assert_close(line.loss(line.theta, 1.0, detach), line.loss(line.theta, 1.0))
        found = gradient(lambda theta, d=detach: line.loss(theta, 1.0, d), line.theta)
        assert (found - live).norm() > 0.05 * live.norm()
    torch.testing.assert_close(found, line.ratio**2 * gradient(kl, line.theta), rtol=1e-6, atol=1e-9)


def test_the_flow_form():
    """``(f - g)(g - x0) = -sigma^2 (v_f - v_g)(eps - x0 - v_g)`` (SiD-DiT)."""
    line = Line(PATHS["flow"])
    x0, x_t, real, fake = line(line.theta, line.theta)
    s = line.t.item()
    v_real, v_fake = (x_t - real) / s, (x_t - fake) / s
    product = -(s**2) * (v_real - v_fake) * (line.eps - x0 - v_fake)
    exact = objectives.score_identity(x0, real, fake, torch.ones(len(x0), **DOUBLE))
    torch.testing.assert_close(product.mean(), exact)


# ------------------------------------------------------------------------------------------------------- the weights
def random_batch(rows=6, dim=5, seed=0):
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, dim, generator=g, **DOUBLE) for _ in range(3))


def test_weights_by_hand_and_equal_on_every_path():
    x0, real, _ = random_batch()
    ratio = torch.tensor([0.1, 0.5, 1, 2, 5, 10], **DOUBLE)
    s = ratio / (1 + ratio)
    expected = {
        "one": torch.ones(6, **DOUBLE),
        "1-sigma": 1 - s,
        "(1-sigma)^2": (1 - s) ** 2,
        "1/sigma": 1 / s,
        "1/sigma^2": 1 / s**2,
        "alpha/sigma": 1 / ratio,
        "(alpha/sigma)^2": 1 / ratio**2,
        "l1": 1 / (x0 - real).abs().mean(1),
    }
    assert set(expected) == set(objectives.IDENTITY_WEIGHTS)
    for path, (name, value) in itertools.product(PATHS.values(), expected.items()):
        t = path.t_from_log_snr(-2 * ratio.log())
        torch.testing.assert_close(objectives.identity_weight(name, x0, real, path, t), value)


def test_the_normaliser_is_per_sample_detached_and_bounded():
    x0, real, _ = (v.requires_grad_() for v in random_batch())
    weight = objectives.identity_weight("l1", x0, real, SD, torch.zeros(6))
    assert not weight.requires_grad
    assert objectives.identity_weight("l1", x0, x0, SD, torch.zeros(6)).max() == pytest.approx(1e5)
    scaled = objectives.identity_weight("l1", 3 * x0, 3 * real, SD, torch.zeros(6))
    torch.testing.assert_close(scaled, weight / 3)
    wide = objectives.identity_weight("l1", x0.repeat(1, 4), real.repeat(1, 4), SD, torch.zeros(6))
    torch.testing.assert_close(wide, weight)  # a mean over pixels, no sum
    with pytest.raises(ValueError, match="expected one of"):
        objectives.identity_weight("l2", x0, real, SD, torch.zeros(6))


def test_the_loss_by_hand():
    x0, real, fake = random_batch()
    other, weight = real + 0.3, torch.arange(1.0, 7, **DOUBLE)
    for alpha in (-0.25, 0.0, 1.0, 1.2):
        by_hand = weight[:, None] * (real - fake) * ((real - x0) - alpha * (real - other))
        found = objectives.score_identity(x0, real, fake, weight, alpha, other)
        torch.testing.assert_close(found, by_hand.mean())
    collapsed = weight[:, None] * (real - fake) * (fake - x0)
    torch.testing.assert_close(objectives.score_identity(x0, real, fake, weight), collapsed.mean())


def test_a_sample_that_is_not_finite_is_left_out_and_the_others_are_not():
    x0, real, fake = (v.requires_grad_() for v in random_batch())
    with torch.no_grad():
        real[2, 1], fake[4, 0] = torch.nan, torch.inf
    weight = objectives.identity_weight("l1", x0, real, SD, torch.zeros(6))
    loss = objectives.score_identity(x0, real, fake, weight, 1.2)
    found = torch.autograd.grad(loss, (x0, real, fake))
    keep = torch.tensor([0, 1, 3, 5])
    alone = objectives.score_identity(x0[keep], real[keep], fake[keep], weight[keep], 1.2) * 4 / 6
    torch.testing.assert_close(loss, alone)
    for value, exact in zip(found, torch.autograd.grad(alone, (x0, real, fake))):
        torch.testing.assert_close(value, exact)
        assert not value[[2, 4]].any()


# ------------------------------------------------------------------------------------------------------------ the toy
@pytest.fixture(scope="module")
def ring():
    return GaussianMixture.ring(SD, radius=2.2, std=0.2)


@pytest.fixture(scope="module")
def fitted(ring):
    """The pretrained network that student and critic start from."""
    torch.manual_seed(0)
    return fit(ring, Mlp())


def toy(teacher, net, steps=1000, batch_size=64, **options):
    extra = {k: options.pop(k) for k in ("prediction", "labels", "accumulate") if k in options}
    return toys.toy(SiD, SiD.Config(**options), teacher, net, steps, batch_size, **extra)


def student_gradient(trainer, batch=None, progress=None):
    """Gradient of the student's loss as the trainer takes it, flat; and what else got one."""
    for role in trainer.roles.values():
        role.requires_grad_(role.name == "student")
    batch = batch or trainer.data.batch(0, 0)
    loss = sum(trainer.method.generator_loss(batch, progress or Progress()).values())
    weights = list(trainer.roles["student"].weights.values())
    return loss.detach(), torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights)])


def perturb(trainer, seed=1, size=0.05):
    """A critic that has learned something of its own."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in trainer.roles["critic"].weights.values():
            weight += size * torch.randn(weight.shape, generator=g)


class Spy:
    """A teacher that remembers what it was asked, and answers with anything."""

    def __init__(self, inner, change=lambda x_t, mean: mean):
        self.inner, self.schedule, self.change, self.calls = inner, inner.schedule, change, []
        self.null, self.prediction = getattr(inner, "null", None), getattr(inner, "prediction", "x0")

    def x0(self, x_t, t, cond, *, guidance=1.0):
        self.calls.append({"x": x_t, "t": t, "cond": cond, "g": guidance, "grad": torch.is_grad_enabled()})
        return self.change(x_t, self.inner.x0(x_t, t, cond, guidance=guidance))


def test_the_slope_of_teacher_and_of_critic_matter(ring, fitted):
    """The pitfall of the family: under no_grad the loss is the same and the method another one."""
    plain = toy(ring, fitted)
    perturb(plain)
    loss, exact = student_gradient(plain)
    flat = lambda x_t, mean: mean.detach()  # noqa: E731
    for whom in ("teacher", "critic"):
        trainer = toy(ring, fitted)
        perturb(trainer)
        setattr(trainer.method, whom, Spy(getattr(trainer.method, whom), flat))
        value, found = student_gradient(trainer)
        torch.testing.assert_close(value, loss)
        assert (found - exact).norm() > 0.05 * exact.norm()


@pytest.mark.parametrize("weight", objectives.IDENTITY_WEIGHTS)
def test_a_critic_that_meets_the_teacher_is_a_fixed_point(ring, fitted, weight):
    for alpha in (-0.25, 0.5, 1.2):
        trainer = toy(ring, fitted, weight=weight, alpha=alpha)
        trainer.method.critic = ring
        assert not student_gradient(trainer)[1].any()


def test_no_turn_leaves_a_gradient_in_the_other_role(ring, fitted):
    trainer, seen = toy(ring, fitted), []
    update = trainer.update

    def spy(phase, roles):
        graded = [n for n, r in trainer.roles.items() if any(w.grad is not None for w in r.weights.values())]
        seen.append((phase.name, graded))
        return update(phase, roles)

    trainer.update = spy
    trainer.iterate()
    assert seen == [("critic", ["critic"]), ("generator", ["student"])]  # the critic comes first
    assert trainer.updates == {"student": 1, "critic": 1}


def test_the_critic_may_learn_more_often(ring, fitted):
    trainer = toy(ring, fitted, critic_steps=3)
    for _ in range(4):
        trainer.iterate()
    assert trainer.updates == {"student": 2, "critic": 4}


def test_the_student_turn_has_noise_and_times_of_its_own(ring, fitted):
    trainer = toy(ring, fitted)
    method, batch = trainer.method, trainer.data.batch(0, 0)
    method.critic = Spy(method.critic)
    method.critic_loss(batch, Progress())
    method.generator_loss(batch, Progress())
    of_critic, of_student = method.critic.calls
    assert not torch.equal(of_critic["t"], of_student["t"])
    assert (of_critic["x"] - of_student["x"]).abs().min(1).values.median() > 0.01
    assert not of_critic["x"].requires_grad and of_student["x"].requires_grad


@pytest.mark.parametrize("prediction", ["x0", "eps", "v", "flow"])
def test_the_gradient_does_not_depend_on_what_networks_predict(ring, fitted, prediction):
    critic = GaussianMixture(SD, torch.tensor([[1.0, 0.5], [-1.5, -0.5]]), torch.tensor(0.3))

    def as_network(mixture):
        def call(_net, x_t, t, cond):
            return SD.convert(mixture.x0(x_t, t, cond), x_t, t, "x0", prediction)

        return NetDenoiser(torch.nn.Identity(), SD, prediction, call)

    trainer = toy(ring, fitted)
    trainer.method.critic = critic
    exact = student_gradient(trainer)[1]
    trainer.method.teacher, trainer.method.critic = as_network(ring), as_network(critic)
    torch.testing.assert_close(student_gradient(trainer)[1], exact, rtol=1e-3, atol=1e-4 * exact.abs().max())


# --------------------------------------------------------------------------------------------------- lean and finite
def nets(seed=0):
    torch.manual_seed(seed)
    layers = lambda: torch.nn.Sequential(  # noqa: E731
        torch.nn.Linear(8, 64, **DOUBLE), torch.nn.SiLU(), torch.nn.Linear(64, 8, **DOUBLE)
    )
    return layers(), [layers().requires_grad_(False) for _ in range(3)]


@pytest.mark.parametrize("lean", [False, True])
def test_the_lean_gradient_is_the_joint_one(lean):
    student, networks = nets()
    z, eps, weight = torch.randn(32, 8, **DOUBLE), torch.randn(32, 8, **DOUBLE), torch.rand(32, **DOUBLE)

    def loss(x0, real, fake, other):
        return objectives.score_identity(x0, real, fake, weight, 1.2, other)

    found = through_networks(lambda: student(z), lambda x0: 0.8 * x0 + 0.6 * eps, networks, loss, lean)
    x0 = student(z)
    exact = loss(x0, *(net(0.8 * x0 + 0.6 * eps) for net in networks))
    torch.testing.assert_close(found, exact)
    for a, b in zip(*(torch.autograd.grad(v, list(student.parameters())) for v in (found, exact))):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("options", [{}, {"alpha": 1.2, "num_steps": 4}, {"weight": "1-sigma"}])
def test_the_lean_turn_is_the_joint_one(ring, fitted, options):
    results = []
    for lean in (False, True):
        trainer = toy(ring, fitted, lean=lean, **options)
        perturb(trainer)
        batch = trainer.data.batch(0, 0)
        results.append((*student_gradient(trainer, batch), batch.log))
    (loss, exact, log), (lean_loss, found, lean_log) = results
    torch.testing.assert_close(lean_loss, loss)
    torch.testing.assert_close(found, exact, rtol=1e-3, atol=1e-5 * exact.abs().max())
    assert log == lean_log and set(log) == {"critic_lag", "latent_mean", "latent_std"}


def test_lean_holds_the_activations_of_one_network_at_a_time():
    class Held:  # counts what autograd keeps
        now = peak = 0

        def __init__(self, tensor):
            self.tensor = tensor
            Held.now += tensor.numel()
            Held.peak = max(Held.peak, Held.now)

        def __del__(self):
            Held.now -= self.tensor.numel()

    student, networks = nets()
    z = torch.randn(256, 8, **DOUBLE)
    peaks = []
    for lean in (False, True):
        Held.now = Held.peak = 0
        with torch.autograd.graph.saved_tensors_hooks(Held, lambda held: held.tensor):
            loss = through_networks(
                lambda: student(z),
                lambda x0: x0 + 1,
                networks,
                lambda x0, *others: x0.sum() + sum(v.sum() for v in others),
                lean,
            )
            loss.backward()
        del loss
        peaks.append(Held.peak)
    assert peaks[1] < 0.5 * peaks[0]


@pytest.mark.parametrize("lean", [False, True])
def test_a_sample_with_nan_is_dropped_alone(ring, fitted, lean):
    trainer = toy(ring, fitted, lean=lean)
    perturb(trainer)
    loss, exact = student_gradient(trainer)
    bad = torch.zeros(64, 1)
    bad[[3, 10]] = torch.nan
    # The slope is NaN as well, so that a zero that meets it is NaN again.
    trainer.method.teacher = Spy(ring, lambda x_t, mean: mean + bad * x_t)
    value, found = student_gradient(trainer)
    assert found.isfinite().all() and value.isfinite()
    assert 0 < (found - exact).norm() < 0.5 * exact.norm()
    # The rest of the batch weighs as before: dropping the rows by weight gives the same gradient.
    trainer.method.teacher = ring
    weight = objectives.identity_weight
    with pytest.MonkeyPatch.context() as patch:
        masked = lambda *a, **k: weight(*a, **k) * (bad[:, 0] == 0)  # noqa: E731
        patch.setattr(objectives, "identity_weight", masked)
        torch.testing.assert_close(found, student_gradient(trainer)[1], rtol=1e-3, atol=1e-6)
    trainer.method.teacher = Spy(ring, lambda x_t, mean: mean * torch.nan)
    value, found = student_gradient(trainer)  # a batch of nothing else still takes part
    assert value == 0 and not found.any()


def test_the_critic_leaves_out_what_is_not_finite(ring, fitted):
    trainer = toy(ring, fitted)
    student = trainer.method.student
    bad = torch.zeros(64, 1)
    bad[5] = torch.inf
    student.denoisers = [Spy(student.denoiser, lambda x_t, mean: mean + bad)]
    (loss,) = trainer.method.critic_loss(trainer.data.batch(0, 0), Progress()).values()
    loss.backward()
    assert loss.isfinite() and loss > 0
    assert all(w.grad.isfinite().all() for w in trainer.roles["critic"].weights.values())


# -------------------------------------------------------------------------------------------------- steps and times
def test_the_exit_step_is_shared_by_critic_student_and_micro_batches_and_uniform(ring, fitted):
    trainer = toy(ring, fitted, batch_size=2, num_steps=4, accumulate=2)
    method, exits = trainer.method, []
    method.student.inputs = lambda noise, cond, draw, step: exits.append(step) or noise
    for iteration, micro in itertools.product(range(30), range(2)):
        batch = trainer.data.batch(iteration, micro)
        method.critic_loss(batch, Progress())
        method.generator_loss(batch, Progress())
    steps = torch.tensor(exits).view(30, 4)
    assert (steps == steps[:, :1]).all() and len(steps.unique()) == 4
    drawn = torch.tensor([exit_step(trainer.data.batch(i, 0), method.student) for i in range(800)])
    counts = drawn.bincount(minlength=4)
    assert len(counts) == 4 and ((counts - 200) ** 2 / 200).sum() < 16.3  # chi-square, p = 0.001


@pytest.mark.parametrize("noise", ["fresh", "fixed", "ddim"])
@pytest.mark.parametrize("lean", [False, True])
def test_earlier_steps_are_out_of_the_graph(ring, fitted, noise, lean):
    trainer = toy(ring, fitted, num_steps=4, noise=noise, lean=lean)
    student, batch = trainer.method.student, trainer.data.batch(0, 0)
    batch.shared.integer = lambda below: 2
    spy = Spy(student.denoiser)
    student.denoisers = [spy] * 4
    student_gradient(trainer, batch)
    assert [c["t"][0].item() for c in spy.calls][:3] == student.times[:3]
    assert not any(c["x"].requires_grad for c in spy.calls)
    last = [False, True] if lean else [True]
    assert [c["grad"] for c in spy.calls] == [False, False, *last]


def test_start_of_stable_diffusion_is_625_and_the_exported_scheduler_meets_it():
    assert student_times(SD, 1) == [625]
    assert student_times(SD, 4) == [623, 467, 311, 155]
    linear = DDPMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear")
    assert student_times(VP.from_scheduler(linear), 1) == [440]  # PixArt
    assert student_times(EDM(), 1) == pytest.approx([2.5])
    assert student_times(Flow(), 4) == [1.0, 0.75, 0.5, 0.25]
    assert student_times(SD, 4, times=[625, 468, 312, 156]) == [625, 468, 312, 156]
    teacher = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    for times in ([625], [623, 467, 311, 155]):
        scheduler, call = student_scheduler(teacher, times)
        scheduler.set_timesteps(call["num_inference_steps"])
        assert scheduler.timesteps.tolist() == times


def test_few_steps_stay_inside_a_short_table():
    short = VP(torch.linspace(0.99, 0.5, 10))  # ends long before sigma / alpha = 2.5
    assert student_times(short, 1) == [9]
    assert student_times(short, 4) == [7, 5, 3, 1]


def test_time_laws_of_the_schedules():
    law, rng = TimeLaw(), Rng(0)
    for critic in (False, True):
        t = law.on(SD, critic).draw(SD, rng, 20000)
        assert (t.min(), t.max()) == (20, 980) and torch.equal(t, t.floor())
    edm = EDM()
    log_sigma = law.on(edm, critic=True).draw(edm, rng, 20000).log()
    assert log_sigma.mean() == pytest.approx(-1.2, abs=0.05) and log_sigma.std() == pytest.approx(
        1.2, abs=0.05
    )
    t = law.on(edm, critic=False).draw(edm, rng, 20000)
    assert t.max() == pytest.approx(24.41, abs=0.05) and t.min() < 0.0021
    assert t.quantile(0.4993 / 0.8) == pytest.approx(2.5, rel=0.1)  # rho = 7: u = 0.4993 is 2.5
    flow = Flow()
    for critic in (False, True):
        logit = law.on(flow, critic).draw(flow, rng, 20000).logit()
        assert logit.mean() == pytest.approx(math.log(2), abs=0.05)
        assert logit.std() == pytest.approx(1.6, abs=0.05)
    t = TimeLaw("log_normal", std=1.0).draw(SD, rng, 1000)
    assert torch.equal(t, t.round()) and -0.2 < -0.5 * SD.log_snr(t).mean() < 0.2


def test_critic_and_student_have_laws_of_their_own(ring, fitted):
    low, high = TimeLaw("uniform", 0.1, 0.2), TimeLaw("uniform", 0.6, 0.7)
    trainer = toy(ring, fitted, batch_size=2000, generator_times=low, critic_times=high)
    method, batch = trainer.method, trainer.data.batch(0, 0)
    method.critic = Spy(method.critic)
    method.critic_loss(batch, Progress())
    method.generator_loss(batch, Progress())
    of_critic, of_student = (c["t"] for c in method.critic.calls)
    assert (of_critic.min(), of_critic.max()) == (600, 700)
    assert (of_student.min(), of_student.max()) == (100, 200)


def test_the_weight_of_the_critic():
    class Critic:
        schedule, prediction = SD, "eps"

        def x0(x_t, t, cond, guidance):
            return 3 * torch.ones_like(x_t)

    def weight(kind, t):  # of a squared error of 4
        return terms.regression(Critic, kind, torch.ones(1, 2), torch.zeros(1, 2), t, NONE).item() / 4

    Critic.schedule = EDM()
    for sigma in (0.5, 2.0):
        expected = (sigma**2 + 0.25) / (0.5 * sigma) ** 2
        assert weight("edm", torch.tensor([sigma], **DOUBLE)) == pytest.approx(expected)
    Critic.schedule = SD
    for t in (100, 900):
        time = torch.tensor([t])
        assert weight("native", time) == pytest.approx(((SD.alpha(time) / SD.sigma(time)) ** 2).item())
        assert weight("x0", time) == pytest.approx(1)


# ------------------------------------------------------------------------------------------------------------ guidance
@pytest.fixture(scope="module")
def labelled():
    return labelled_mixture()


LABELS = torch.arange(1000) % 4


@pytest.mark.parametrize(
    ("options", "kappas"),
    [
        ({}, (1, 1, 1, 1)),
        ({"guidance_scale": 2.0}, (2, 2, 2, 2)),
        ({"guidance": "teacher_only", "guidance_scale": 4.5}, (1, 1, 1, 4.5)),
        ({"guidance": "zero_cfg"}, (0, 0, 0, 1)),
        ({"guidance": "anti_cfg", "guidance_scale": 0.5}, (1, -0.5, -0.5, 1)),
        ({"guidance_scale": 2.0, "kappa3": 1.0, "kappa4": 5.0}, (2, 2, 1, 5)),
    ],
)
def test_the_four_scales_go_where_they_belong(labelled, options, kappas):
    trainer = toy(labelled, Mlp(width=16, dim=16, labels=4), labels=LABELS, **options)
    method, batch = trainer.method, trainer.data.batch(0, 0)
    assert method.kappas == kappas
    teacher, critic = method.teacher, method.critic = Spy(method.teacher), Spy(method.critic)
    method.critic_loss(batch, Progress())
    assert [c["g"] for c in critic.calls] == [kappas[0]] and not teacher.calls
    critic.calls.clear()
    method.generator_loss(batch, Progress())
    wanted = [kappas[1]] if kappas[1] == kappas[2] else [kappas[1], kappas[2]]
    assert [c["g"] for c in critic.calls] == wanted and [c["g"] for c in teacher.calls] == [kappas[3]]
    assert all(torch.equal(c["cond"]["label"], batch.cond["label"]) for c in critic.calls + teacher.calls)


def test_two_views_of_the_critic_stand_in_their_own_places(labelled, monkeypatch):
    trainer = toy(labelled, Mlp(width=16, dim=16, labels=4), labels=LABELS, kappa2=2.0, kappa3=3.0)
    method, seen = trainer.method, []
    monkeypatch.setattr(objectives, "score_identity", lambda *a: seen.append(a) or a[0].sum())
    method.critic.x0 = lambda x_t, t, cond, *, guidance=1.0: torch.full_like(x_t, guidance)
    method.generator_loss(trainer.data.batch(0, 0), Progress())
    assert seen[0][2].unique() == 2 and seen[0][5].unique() == 3 and seen[0][4] == 1.0


def test_guidance_is_u_plus_kappa_times_c_minus_u_and_0_and_1_are_single_forwards():
    class Linear(torch.nn.Module):
        rows = None

        def forward(self, x, label):
            Linear.rows = (len(x), set(label.tolist()))
            return 2 * x + label[:, None].float()

    call = lambda net, x, t, cond: net(x, cond["label"])  # noqa: E731
    d = NetDenoiser(Linear(), EDM(), "x0", call, Cond({"label": torch.tensor([-1])}))
    x, t, cond = torch.ones(3, 2), torch.ones(3), Cond({"label": torch.full((3,), 5)})
    expected = {0.0: (3, {-1}), 1.0: (3, {5}), 2.0: (6, {-1, 5}), -0.5: (6, {-1, 5})}
    for kappa, rows in expected.items():
        u, c = 2 * x - 1, 2 * x + 5
        found = d.x0(x, t, cond, guidance=kappa)
        torch.testing.assert_close(found, u + kappa * (c - u))
        torch.testing.assert_close(found, c + (kappa - 1) * (c - u))  # the other convention has s = kappa - 1
        assert Linear.rows == rows


@pytest.mark.parametrize(
    ("options", "drops"),
    [
        ({"guidance_scale": 2.0}, True),
        ({"kappa2": 1.5}, True),
        ({"kappa1": 1.5}, True),
        ({"guidance": "teacher_only", "guidance_scale": 4.0}, False),
        ({"guidance_scale": 2.0, "caption_dropout": 0.0}, False),
        ({}, False),
    ],
)
def test_captions_are_dropped_in_the_critic_turn_only(labelled, options, drops):
    net = Mlp(width=16, dim=16, labels=4)
    trainer = toy(labelled, net, labels=LABELS, batch_size=4000, **options)
    method, batch = trainer.method, trainer.data.batch(0, 0)
    method.critic = Spy(method.critic)
    method.critic_loss(batch, Progress())
    labels = method.critic.calls[0]["cond"]["label"]
    dropped = labels == -1
    assert dropped.float().mean() == pytest.approx(0.1 if drops else 0.0, abs=0.02)
    assert torch.equal(labels[~dropped], batch.cond["label"][~dropped])
    method.critic.calls.clear()
    method.generator_loss(batch, Progress())
    assert all((c["cond"]["label"] >= 0).all() for c in method.critic.calls)


def test_the_guided_combination_of_the_critic_is_what_learns(labelled):
    trainer = toy(labelled, Mlp(width=16, dim=16, labels=4), labels=LABELS, guidance_scale=2.0)
    method, batch = trainer.method, trainer.data.batch(0, 0)
    inner, method.critic = method.critic, Spy(method.critic)
    loss = method.critic_loss(batch, Progress())["denoising"]
    call = method.critic.calls[0]
    null = inner.null.expand(64)
    u, c = (inner.predict(call["x"], call["t"], v) for v in (null, call["cond"]))
    # The same draws again give x0 and eps.
    rng = trainer.data.batch(0, 0).rng
    with torch.no_grad():
        x0 = method.student.x0(rng.normal(64, 16), 0, batch.cond)
    rng.uniform(64)
    eps = rng.normal(64, 16)
    target = SD.convert(eps, call["x"], call["t"], "eps", "v")
    torch.testing.assert_close(SD.add_noise(x0, eps, call["t"]), call["x"])
    torch.testing.assert_close(loss, (u + 2 * (c - u) - target).square().mean(), rtol=1e-3, atol=1e-4)


# ---------------------------------------------------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_steps": 0}, "method.num_steps: 0: expected at least 1"),
        ({"critic_steps": 0}, "method.critic_steps: 0"),
        ({"alpha": math.nan}, "method.alpha: nan"),
        ({"alpha": 3.0}, "method.alpha: 3.0: expected -1 <= alpha <= 2"),
        ({"kappa3": math.inf}, "method.kappa3: inf: expected a finite number"),
        ({"last_share": 1.0}, "method.last_share: 1.0"),
        ({"caption_dropout": 1.0}, "method.caption_dropout: 1.0"),
        ({"gan_weight": -1.0}, "method.gan_weight: -1.0"),
        ({"discriminator_weight": 0.0}, "method.discriminator_weight: 0.0"),
        ({"gan_schedule": (5, 1)}, r"method.gan_schedule: \(5, 1\)"),
        ({"guidance": "zero_cfg", "guidance_scale": 2.0}, "method.guidance_scale: 2.0: expected 1"),
        ({"weight": "l2"}, "method.weight: 'l2': input should be"),
        (
            {"generator_times": {"kind": "uniform", "low": 0.9, "high": 0.2}},
            "method.generator_times.low: 0.9",
        ),
        ({"critic_times": {"kind": "log_normal", "std": 0.0}}, "method.critic_times.std: 0.0"),
        ({"critic_times": {"mean": 1.0}}, "method.critic_times.kind: 'auto': expected log_normal"),
        ({"critic_times": {"kind": "log_normal", "low": 0.1}}, "method.critic_times.kind: 'log_normal'"),
        ({"critic_times": {"hihg": 0.5}}, "method.critic_times.hihg: unknown field; did you mean high"),
    ],
)
def test_options_that_cannot_be_are_refused_by_their_path(options, words):
    recipe = to_dict(
        Recipe("out", TeacherConfig(path=""), SiD.Config(), DataConfig(prompts=""), TrainConfig(steps=1))
    )
    recipe["method"] |= options
    with pytest.raises(RecipeError, match=words):
        from_dict(recipe)


def test_options_survive_the_recipe_file():
    config = SiD.Config(num_steps=4, critic_times=TimeLaw("log_normal", mean=-1.2, std=1.2), kappa4=3.0)
    recipe = Recipe("out", TeacherConfig(path=""), config, DataConfig(prompts=""), TrainConfig(steps=1))
    assert from_dict(to_dict(recipe)).method == config


def test_options_that_do_not_fit_the_teacher_are_refused(ring, fitted):
    for options, words in [
        ({"start": 1000}, "method.start: .*1000"),
        ({"num_steps": 4, "start": 625}, "method.start: .*multiple"),
        ({"times": [100, 200]}, "method.times: .*falling"),
        ({"guidance_scale": 2.0}, "method.guidance_scale: 2: expected 1, because this teacher has no null"),
        ({"kappa1": 2.0}, "method.kappa1: 2: expected 1"),
        ({"kappa4": 2.0}, "method.kappa4: 2: expected 1"),
        (
            {"gan_weight": 1e-3},
            "method.taps: 'mid_block' is no block of the network; top-level blocks: layers",
        ),
    ]:
        with pytest.raises(RecipeError, match=words):
            toy(ring, fitted, **options)


def test_the_trainer_counts_images_between_updates_and_the_rate_falls_with_the_root(
    ring, fitted, monkeypatch
):
    trainer, told = toy(ring, fitted, steps=8, batch_size=16, critic_steps=2), []
    monkeypatch.setattr(Role, "update_average", lambda role, *a: told.append((role.name, *a)))
    trainer.roles["student"].config = RoleConfig(kind="full", lr=1.0, inverse_sqrt=4)
    student = next(phase for phase in trainer.phases if "student" in phase.train)
    rates = []
    for _ in range(8):
        rates.append(trainer.learning_rate(trainer.roles["student"], student))
        trainer.iterate()
    assert [a for a in told if a[0] == "critic"] == [("critic", k + 1, 16, 16 * k) for k in range(8)]
    of_student = [a for a in told if a[0] == "student"]
    assert [a[2] for a in of_student] == [32] * 4 and [a[3] % 32 for a in of_student] in ([0] * 4, [16] * 4)
    assert rates == pytest.approx([1, 1, 1, 1, 1, (4 / 5) ** 0.5, (4 / 6) ** 0.5, (4 / 7) ** 0.5])


# ------------------------------------------------------------------------------------------------------------- SiDA
def adversarial(sdxl, cls=SiD, **options):
    """SiDA, or a relative of it, on the tiny SDXL as a recipe builds it, with random latents as real images."""
    lora = RoleConfig(rank=2, lr=1e-2)
    options = {"gan_weight": 1e-3, "gan_schedule": (4, 8), **options}
    recipe = Recipe(
        output="",
        teacher=TeacherConfig(path=""),
        method=cls.Config(guidance_scale=2.0, **options),
        data=DataConfig(prompts=""),
        train=TrainConfig(steps=100, batch_size=2),
        roles={"student": lora, "critic": lora},
    )
    roles, method = build(recipe, sdxl, Process())
    prompts = sdxl.encode(["red apple", "blue bird", "a dog", "a cat"])
    latents = torch.randn(4, *sdxl.latent_shape, generator=torch.Generator().manual_seed(0))
    stores = {"latents": Rows(4, latents=latents), "captions": Rows(4, **prompts.tensors)}
    data = Batches(Rows(4, **prompts.tensors), sdxl.latent_shape, batch_size=2, **stores)
    return Trainer(method, roles, data, recipe.train, quiet=True)


def test_with_a_gan_the_student_waits_then_learns_from_scores_then_from_both(sdxl):
    trainer, seen = adversarial(sdxl), []
    trainer.method.logits = lambda x_t, t, c, inner=trainer.method.logits: (
        seen.append(len(x_t)) or inner(x_t, t, c)
    )
    student = []
    for _ in range(5):
        before = trainer.updates["student"]
        trainer.iterate()
        student.append(trainer.updates["student"] - before)
    # Two images an iteration; thresholds 4 and 8. The discriminator sees 4 rows, the student 2.
    assert student == [0, 0, 1, 1, 1]
    assert seen == [4, 4, 4, 4, 4, 2]
    assert SiD.needs(SiD.Config(gan_weight=1e-3)) == ("prompts", "images")
    assert SiD.needs(SiD.Config()) == ("prompts",)
    assert trainer.method.heads() == {}  # the discriminator has no weights of its own


@pytest.mark.parametrize("lean", [False, True])
def test_the_adversarial_mix_by_hand(sdxl, lean, monkeypatch):
    weights = []
    weigh = objectives.identity_weight
    spy = lambda *a, **k: weights.append(weigh(*a, **k)) or weights[-1]  # noqa: E731
    monkeypatch.setattr(objectives, "identity_weight", spy)
    trainer = adversarial(sdxl, lean=lean)
    perturb(trainer)
    method = trainer.method
    for role in trainer.roles.values():
        role.requires_grad_(role.name == "student")
    plain = method.generator_loss(trainer.data.batch(0, 0), Progress(2, per_iteration=2))["sid"].detach()
    logits = []
    method.logits = lambda x_t, t, c, inner=method.logits: logits.append(200 * inner(x_t, t, c)) or logits[-1]
    mixed = method.generator_loss(trainer.data.batch(0, 0), Progress(4, per_iteration=2))["sid"]
    assert plain.abs() > 1e-4 and logits[0].min() < -10  # both terms and the clamp are there to be seen
    fooled = torch.nn.functional.softplus(-logits[0].detach().clamp(-10, 10)).mean(1)
    assert logits[0].shape == (2, 64)  # the map of the middle block, 8 x 8
    expected = 0.5 * plain + 0.5 * 1e-3 * (fooled * weights[-1]).mean()
    torch.testing.assert_close(mixed.detach(), expected)
    up = [w for n, w in trainer.roles["student"].weights.items() if "lora_B" in n]
    assert sum(g.abs().sum() for g in torch.autograd.grad(mixed, up)) > 0


def test_the_logits_are_the_channel_mean_of_the_critic(sdxl):
    trainer = adversarial(sdxl)
    method, batch = trainer.method, trainer.data.batch(0, 0)
    maps = []
    hook = method.critic.net.mid_block.register_forward_hook(lambda _m, _i, out: maps.append(out.detach()))
    x_t, t = torch.randn(batch.shape), torch.full((2,), 500.0)
    found = method.logits(x_t, t, batch.cond)
    hook.remove()
    torch.testing.assert_close(found, maps[0].float().mean(1).flatten(1))


def test_real_and_fake_share_noise_and_time_and_keep_their_captions(sdxl):
    trainer, seen = adversarial(sdxl, discriminator_weight=3.0), []
    method, batch = trainer.method, trainer.data.batch(0, 0)
    answer = torch.cat([torch.full((2, 4), 1.5), torch.full((2, 4), -0.5)])
    method.logits = lambda x_t, t, c: seen.append((x_t, t, c)) or answer
    student = method.student
    made = []
    student.x0 = lambda *a, inner=student.x0: made.append(inner(*a)) or made[-1]
    losses = method.critic_loss(batch, Progress())
    x_t, t, cond = seen[0]
    assert torch.equal(t[:2], t[2:])
    a, s = (v.view(2, 1, 1, 1).float() for v in (SD.alpha(t[:2]), SD.sigma(t[:2])))
    torch.testing.assert_close(
        (x_t[:2] - a * batch.real) / s, (x_t[2:] - a * made[0]) / s, rtol=1e-3, atol=1e-3
    )
    assert torch.equal(cond["embeds"], torch.cat([batch.real_cond["embeds"], batch.cond["embeds"]]))
    entropy = (math.log1p(math.exp(-1.5)) + math.log1p(math.exp(-0.5))) / 2
    pixels = math.prod(batch.shape[1:])
    assert losses["discriminator"].item() == pytest.approx(3 * entropy / pixels, rel=1e-5)


def test_every_noise_level_teaches_the_discriminator_alike_also_with_the_weight_of_edm(sdxl):
    """The mean of lambda times the mean of all cross-entropies, as published: a clean sample counts no more."""
    trainer, seen = adversarial(sdxl, critic_loss="edm"), []
    method, batch = trainer.method, trainer.data.batch(0, 0)
    answer = torch.zeros(4, 4, requires_grad=True)
    method.logits = lambda x_t, t, c: seen.append(t[:2]) or answer
    (slope,) = torch.autograd.grad(method.critic_loss(batch, Progress())["discriminator"], answer)
    (t,) = seen
    weights = SD.log_snr(t).exp() + 4
    assert weights.max() > 1.05 * weights.min()  # these levels would be told apart
    size = weights.mean().item() / math.prod(batch.shape[1:])
    expected = torch.tensor([-1.0, -1.0, 1.0, 1.0])[:, None].expand(4, 4) * size / 2 / 2 / 2 / 4
    torch.testing.assert_close(slope, expected, rtol=1e-5, atol=0)


# ------------------------------------------------------------------------------------------------------ distributions
@pytest.fixture(scope="module")
def distilled(ring, fitted):
    """Alpha -> a trained student of one step, and its distance before."""

    @cache
    def train(alpha, steps=400, batch_size=256):
        trainer = toy(ring, fitted, steps=steps, batch_size=batch_size, alpha=alpha)
        before = distance(trainer, ring)
        trainer.train()
        return trainer, before

    return train


@pytest.mark.slow
@pytest.mark.parametrize("alpha", [1.0, pytest.param(1.2, marks=pytest.mark.long)])
def test_one_step_reaches_the_ring(ring, distilled, alpha):
    trainer, before = distilled(alpha)
    assert before > 0.3
    assert distance(trainer, ring) < 0.06  # 0.03 and 0.035; below 0.03 after 700 of 512


@pytest.mark.long
def test_the_naive_loss_does_not_reach_the_ring(ring, fitted, monkeypatch):
    def naive(x0, real, fake, weight, alpha, _subtracted):
        return (weight[:, None] * (real - fake) ** 2).mean()

    monkeypatch.setattr(objectives, "score_identity", naive)
    trainer = toy(ring, fitted, steps=350, batch_size=512)
    trainer.train()
    assert distance(trainer, ring) > 0.3  # where the right one is at 0.03 by 400


def test_a_short_run_is_on_its_way(ring, fitted):
    trainer = toy(ring, fitted, steps=120, batch_size=256)
    start = distance(trainer, ring)
    trainer.train()
    assert distance(trainer, ring) < 0.4 * start


def test_the_last_share_of_a_run_trains_the_last_step_alone(ring, fitted):
    trainer = toy(ring, fitted, steps=40, batch_size=8, num_steps=4, last_share=0.25)
    found = []
    for i in range(40):
        batch, progress = trainer.data.batch(i, 0), Progress(i, 40)
        trainer.method.critic_loss(batch, progress)
        found.append(batch.carry["exit"])
        trainer.method.generator_loss(batch, progress)
        assert batch.carry["exit"] == found[-1]
    assert set(found[:30]) == {0, 1, 2, 3} and set(found[30:]) == {3}


@pytest.mark.long
def test_four_steps_reach_the_ring_closer_than_one_step_at_equal_iterations(ring, fitted, distilled):
    """The uniform mixture trains every step towards the data, and each on what the ones before it made."""
    found = {}
    four = toy(ring, fitted, steps=700, batch_size=512, num_steps=4, last_share=0.3)
    four.train()
    for steps, trainer in ((1, distilled(1.0, 700, 512)[0]), (4, four)):
        student = trainer.method.student
        with toys.averaged(trainer.roles["student"]), torch.no_grad():
            for step in range(steps):
                made = student.rollout(Rng(7).normal(6000, 2), NONE, Rng(6).normal_like, step)
                found[steps, step + 1] = energy_distance(made, ring.sample(6000, Rng(9)))
    print(found)
    assert found[4, 4] < 0.03 and found[4, 4] < 0.9 * found[1, 1] and found[4, 4] < found[4, 1], found


@pytest.mark.long
def test_the_ring_on_a_flow():
    teacher = GaussianMixture.ring(Flow(), radius=2.2, std=0.2)
    torch.manual_seed(0)
    net = fit(teacher, Mlp(), prediction="flow")
    trainer = toy(teacher, net, steps=350, batch_size=512, prediction="flow")
    assert trainer.method.weight == "1-sigma" and trainer.method.student.times == [1.0]
    start = distance(trainer, teacher)
    trainer.train()
    assert distance(trainer, teacher) < min(0.06, 0.5 * start)


@pytest.mark.long
def test_the_ring_on_edm_with_its_two_time_laws(ring, fitted):
    """The critic's law hardly meets the highest noise of the student's, so the network has to be preconditioned."""
    trainer = toy(ring, fitted, steps=700, batch_size=512)
    views = {n: ScheduleView(view(r.module), EDM()) for n, r in trainer.roles.items()}
    trainer.method = SiD(SiD.Config(critic_loss="edm"), ScheduleView(ring, EDM()), (2,), **views)
    trainer.phases = trainer.method.phases()
    assert distance(trainer, ring) > 0.3
    trainer.train()
    assert distance(trainer, ring) < 0.05
