"""SIM where everything is known: the gradient theorem by quadrature, and small networks."""

import math

import pytest
import torch
import toys
from test_sid import (  # noqa: F401  (fixtures)
    DOUBLE,
    LABELS,
    PATHS,
    Line,
    Spy,
    differences,
    fitted,
    gradient,
    labelled,
    perturb,
    random_batch,
    ring,
    student_gradient,
)
from toys import NONE, Mlp, distance

from fewstep.diffusion import objectives
from fewstep.diffusion.times import TimeLaw
from fewstep.errors import RecipeError
from fewstep.methods import Progress
from fewstep.methods.sim import SIM
from fewstep.recipe import DataConfig, Recipe, TeacherConfig, TrainConfig, from_dict, to_dict

C = 0.3
DISTANCE = {
    "l2": lambda y: y**2,
    "pseudo_huber": lambda y: (y**2 + C**2).sqrt() - C,
    "log_cosh": lambda y: C**2 * torch.log(torch.cosh(y / C)),
}


def toy(teacher, net, steps=1000, batch_size=64, labels=None, **options):
    return toys.toy(SIM, SIM.Config(**options), teacher, net, steps, batch_size, labels=labels)


# --------------------------------------------------------------------------------------------------------- the theorem
@pytest.fixture(scope="module", params=list(PATHS))
def line(request):
    return Line(PATHS[request.param], fine=True)


def scores(line):
    """``alpha / sigma^2``: a difference of means in units of scores."""
    return (line.schedule.alpha(line.t) / line.schedule.sigma(line.t) ** 2).expand(len(line.times))


def matching(line, theta, name, scale=None):
    x0, _, real, fake = line(theta, line.theta)
    return objectives.implicit_matching(x0, real, fake, line.weight, name, C, scale)


@pytest.mark.parametrize("in_scores", [False, True])
@pytest.mark.parametrize("name", objectives.DISTANCES)
def test_the_gradient_of_any_distance_with_the_law_of_the_noisy_samples_frozen(line, name, in_scores):
    scale = scores(line) if in_scores else torch.ones(len(line.times), **DOUBLE)
    _, x_t, real, _ = line(line.theta, line.theta)

    def frozen(theta):
        y = scale[:, None] * (line.law(theta).x0(x_t, line.times, NONE) - real)
        return line.expectation(DISTANCE[name](y))

    exact = differences(frozen, line.theta)
    found = gradient(lambda theta: matching(line, theta, name, scale), line.theta)
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-7)


def test_a_detached_slope_or_normaliser_is_another_direction(line):
    def loss(theta, how):
        x0, _, real, fake = line(theta, line.theta)
        y = fake - real
        norm = (y**2 + C**2).sqrt()
        if how == "norm":
            norm = norm.detach()
        if how == "slope":
            y, norm = y.detach(), norm.detach()
        return -line.expectation(y / norm * (fake - x0))

    exact = gradient(lambda theta: matching(line, theta, "pseudo_huber"), line.theta)
    torch.testing.assert_close(gradient(lambda theta: loss(theta, "live"), line.theta), exact)
    for how in ("norm", "slope"):
        assert torch.cosine_similarity(gradient(lambda t, h=how: loss(t, h), line.theta), exact, 0) < 0.999


@pytest.mark.parametrize("name", objectives.DISTANCES)
def test_the_distance_of_a_vector_by_hand(name):
    """The slope is the derivative of d, a mean over the entries of a sample, with one norm per sample."""
    x0, real, fake = random_batch()
    weight, scale = torch.rand(6, **DOUBLE), torch.rand(6, **DOUBLE) + 0.5
    y = (scale[:, None] * (fake - real)).requires_grad_()
    if name == "pseudo_huber":
        d = (y.pow(2).mean(1) + C**2).sqrt() - C
    else:
        d = DISTANCE[name](y).mean(1)
    slope = torch.autograd.grad(d.sum(), y)[0]
    exact = -(weight * (slope * scale[:, None] * (fake - x0)).sum(1)).mean()
    torch.testing.assert_close(objectives.implicit_matching(x0, real, fake, weight, name, C, scale), exact)


def grads(function):
    leaves = [v.requires_grad_() for v in random_batch()]
    return torch.autograd.grad(function(*leaves), leaves)


def test_l2_is_sid_at_alpha_one_up_to_the_weight():
    sigma, weight = torch.linspace(0.5, 3, 6, **DOUBLE), torch.rand(6, **DOUBLE)
    sim = grads(lambda *v: objectives.implicit_matching(*v, weight, "l2", scale=1 / sigma**2))
    sid = grads(lambda *v: objectives.score_identity(*v, 2 * weight / sigma**4, 1.0))
    for a, b in zip(sim, sid):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)


def test_large_and_small_constants():
    weight = torch.ones(6, **DOUBLE)
    huge, l2 = (
        grads(lambda *v: objectives.implicit_matching(*v, weight, "pseudo_huber", 1e5)),
        grads(lambda *v: objectives.implicit_matching(*v, weight, "l2")),
    )
    for a, b in zip(huge, l2):
        torch.testing.assert_close(1e5 * a, b / 2, rtol=1e-8, atol=1e-10)
    smooth = grads(lambda *v: objectives.implicit_matching(*v, weight, "log_cosh", 1e4))
    for a, b in zip(smooth, l2):
        torch.testing.assert_close(a, b / 2, rtol=1e-6, atol=1e-8)
    # With a small one the difference has no length any more: each sample pulls on x0 with the same force.
    pull, _, _ = grads(lambda *v: objectives.implicit_matching(*v, weight, "pseudo_huber", 1e-9))
    torch.testing.assert_close(pull.norm(dim=1), torch.full((6,), math.sqrt(5) / 30, **DOUBLE))


def test_a_sample_that_is_not_finite_is_left_out():
    x0, real, fake = (v.requires_grad_() for v in random_batch())
    with torch.no_grad():
        fake[1, 2] = torch.nan
    weight, keep = torch.ones(6, **DOUBLE), torch.tensor([0, 2, 3, 4, 5])
    loss = objectives.implicit_matching(x0, real, fake, weight)
    alone = objectives.implicit_matching(x0[keep], real[keep], fake[keep], weight[keep]) * 5 / 6
    torch.testing.assert_close(loss, alone)
    for a, b in zip(*(torch.autograd.grad(v, (x0, real, fake)) for v in (loss, alone))):
        torch.testing.assert_close(a, b)
    with pytest.raises(ValueError, match="expected one of"):
        objectives.implicit_matching(x0, real, fake, weight, "l1")


# ------------------------------------------------------------------------------------------------------------- the toy
def test_the_slope_of_teacher_and_of_critic_matter(ring, fitted):  # noqa: F811
    plain = toy(ring, fitted)
    perturb(plain)
    loss, exact = student_gradient(plain)
    for whom in ("teacher", "critic"):
        trainer = toy(ring, fitted)
        perturb(trainer)
        spy = Spy(getattr(trainer.method, whom), lambda x_t, mean: mean.detach())
        setattr(trainer.method, whom, spy)
        value, found = student_gradient(trainer)
        torch.testing.assert_close(value, loss)
        assert (found - exact).norm() > 0.05 * exact.norm()


@pytest.mark.parametrize("name", objectives.DISTANCES)
def test_a_critic_that_meets_the_teacher_is_a_fixed_point(ring, fitted, name):  # noqa: F811
    trainer = toy(ring, fitted, distance=name, weight="1/sigma")
    trainer.method.critic = ring
    assert not student_gradient(trainer)[1].any()


@pytest.mark.parametrize("options", [{}, {"distance": "log_cosh", "num_steps": 4}])
def test_the_lean_turn_is_the_joint_one(ring, fitted, options):  # noqa: F811
    results = []
    for lean in (False, True):
        trainer = toy(ring, fitted, lean=lean, **options)
        perturb(trainer)
        results.append(student_gradient(trainer))
    (loss, exact), (lean_loss, found) = results
    torch.testing.assert_close(lean_loss, loss)
    torch.testing.assert_close(found, exact, rtol=1e-3, atol=1e-5 * exact.abs().max())


def test_turns_roles_and_logs(ring, fitted):  # noqa: F811
    trainer, seen = toy(ring, fitted, critic_steps=2), []
    update = trainer.update

    def spy(phase, roles):
        graded = [n for n, r in trainer.roles.items() if any(w.grad is not None for w in r.weights.values())]
        seen.append((phase.name, graded))
        return update(phase, roles)

    trainer.update = spy
    trainer.iterate()
    trainer.iterate()
    assert seen == [("critic", ["critic"]), ("generator", ["student"]), ("critic", ["critic"])]
    health = {"health/critic_lag", "health/latent_mean", "health/latent_std"}
    logged = {"critic/denoising", "critic/grad_norm", "generator/sim", "generator/grad_norm"} | health
    assert set(trainer.window.sums) == logged
    assert trainer.method.student.times == [625]
    assert SIM.needs(SIM.Config()) == ("prompts",)


def test_guidance_is_on_the_target_only(labelled):  # noqa: F811
    trainer = toy(labelled, Mlp(width=16, dim=16, labels=4), labels=LABELS, guidance_scale=4.5)
    method, batch = trainer.method, trainer.data.batch(0, 0)
    teacher, critic = method.teacher, method.critic = Spy(method.teacher), Spy(method.critic)
    method.critic_loss(batch, Progress())
    method.generator_loss(batch, Progress())
    assert [c["g"] for c in teacher.calls] == [4.5] and [c["g"] for c in critic.calls] == [1.0, 1.0]
    calls = teacher.calls + critic.calls
    assert all(
        torch.equal(c["cond"]["label"], batch.cond["label"]) for c in calls
    )  # and no caption is dropped
    assert not torch.equal(critic.calls[0]["t"], critic.calls[1]["t"])  # times of its own for each turn
    assert torch.equal(critic.calls[1]["x"], teacher.calls[0]["x"])


def test_the_configuration_reaches_the_loss(ring, fitted, monkeypatch):  # noqa: F811
    seen = []
    spy = lambda *a: seen.append(a) or a[0].sum()  # noqa: E731
    monkeypatch.setattr(objectives, "implicit_matching", spy)
    law = TimeLaw("uniform", 0.3, 0.4)
    trainer = toy(ring, fitted, distance="log_cosh", c=0.7, weight="1/sigma", generator_times=law)
    student_gradient(trainer)
    x0, real, fake, weight, name, c = seen[0]
    assert (name, c) == ("log_cosh", 0.7) and not torch.equal(real, x0)
    assert (
        weight.min() > 1 / 0.7 and weight.unique().numel() > 30
    )  # sigma / (alpha + sigma) < 0.7 below t = 400


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"c": 0.0}, "method.c: 0.0: expected a positive number"),
        ({"num_steps": 0}, "method.num_steps: 0"),
        ({"critic_steps": -1}, "method.critic_steps: -1"),
        ({"distance": "l1"}, "method.distance: 'l1'"),
        ({"weight": "l1"}, "method.weight: 'l1'"),  # it depends on x0, which the theorem forbids
        ({"alpha": 1.0}, "method.alpha: unknown field"),
    ],
)
def test_options_that_cannot_be_are_refused_by_their_path(options, words):
    recipe = to_dict(
        Recipe("out", TeacherConfig(path=""), SIM.Config(), DataConfig(prompts=""), TrainConfig(steps=1))
    )
    recipe["method"] |= options
    with pytest.raises(RecipeError, match=words):
        from_dict(recipe)


def test_guidance_without_a_null_condition_is_refused(ring, fitted):  # noqa: F811
    with pytest.raises(RecipeError, match="guidance_scale: 2: expected 1"):
        toy(ring, fitted, guidance_scale=2.0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "steps, bound, options",
    [
        pytest.param(700, 0.03, {"distance": "pseudo_huber"}, marks=pytest.mark.long),
        (400, 0.06, {"distance": "log_cosh", "c": 0.3}),
    ],
)
def test_one_step_reaches_the_ring(ring, fitted, steps, bound, options):  # noqa: F811
    trainer = toy(ring, fitted, steps=steps, batch_size=512 if steps == 700 else 256, **options)
    assert distance(trainer, ring) > 0.3
    trainer.train()
    assert distance(trainer, ring) < bound
