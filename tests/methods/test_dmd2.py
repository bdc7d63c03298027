"""DMD2 where everything is known: closed-form teachers, a small network, and a tiny SDXL for the bookkeeping."""

import math
from collections import Counter
from functools import partial

import pytest
import torch
import toys
from toys import BATCH, NONE, SD, Mlp, Rows, distance, fit, view

from fewstep.data.batches import Batches
from fewstep.diffusion import objectives
from fewstep.diffusion.rng import Rng
from fewstep.diffusion.schedules import Flow
from fewstep.errors import RecipeError
from fewstep.methods import Progress
from fewstep.methods.dmd2 import DMD2
from fewstep.methods.fdistill import FDistill
from fewstep.process import Process
from fewstep.recipe import DataConfig, Recipe, RoleConfig, TeacherConfig, TrainConfig
from fewstep.runs.build import build
from fewstep.teachers.analytic import GaussianMixture
from fewstep.training.trainer import Trainer


@pytest.fixture(scope="module")
def ring():
    return GaussianMixture.ring(SD, radius=2.2, std=0.2)


@pytest.fixture(scope="module")
def fitted(ring):
    """The pretrained network that student and critic start from."""
    torch.manual_seed(0)
    return fit(ring, Mlp())


def toy(teacher, net, steps=1000, batch_size=BATCH, real=None, accumulate=1, **options):
    """DMD2 in one step, data-free unless told otherwise."""
    config = DMD2.Config(**{"num_steps": 1, "start": 999, "gan_weight": 0.0, **options})
    return toys.toy(DMD2, config, teacher, net, steps, batch_size, real, accumulate)


# ---------------------------------------------------------------------------------------------------- distributions
def test_one_step_dmd2_reaches_the_ring(ring, fitted):
    trainer = toy(ring, fitted, steps=350, batch_size=256)
    assert distance(trainer, ring) > 1.0  # the student starts as the teacher's network at one step
    trainer.train()
    assert distance(trainer, ring) < 0.05


@pytest.mark.parametrize("flip", [False, True])
def test_the_direction_of_the_score_difference_matters(ring, fitted, flip, monkeypatch):
    matching = objectives.distribution_matching
    if flip:
        flipped = lambda x0, real, fake, weight: matching(x0, fake, real, weight)  # noqa: E731
        monkeypatch.setattr(objectives, "distribution_matching", flipped)
    trainer = toy(ring, fitted, steps=150)
    start = distance(trainer, ring)
    trainer.train()
    assert distance(trainer, ring) > start if flip else distance(trainer, ring) < 0.2 * start


@pytest.mark.slow
def test_four_steps_on_a_shifted_flow_reach_the_ring():
    teacher = GaussianMixture.ring(Flow(shift=3.0), radius=2.2, std=0.2)
    torch.manual_seed(0)
    # A network that is half fitted keeps student and critic at 0.09: velocities are harder to learn than v.
    net = fit(teacher, Mlp(), steps=600, prediction="flow")
    config = DMD2.Config(num_steps=4, gan_weight=0.0)
    trainer = toys.toy(DMD2, config, teacher, net, 800, prediction="flow")
    assert trainer.method.student.times == pytest.approx([1.0, 0.9, 0.75, 0.5])
    assert distance(trainer, teacher) > 0.1
    trainer.train()
    assert distance(trainer, teacher) < 0.03


def test_the_gradient_on_a_flow_is_the_analytic_one():
    """Gaussians: the mean of ``fake - real`` is ``(m - mu) s^2 / (alpha^2 v + s^2)`` for equal variances v.

    Per sample it is divided by ``|x0 - real|``, so the constant is left open; direction and level are not.
    """
    flow, size = Flow(), 20000
    teacher, fake = (
        GaussianMixture(flow, torch.tensor([[m]]).double(), torch.tensor(0.09).double()) for m in (0.4, -0.1)
    )
    method = object.__new__(DMD2)
    method.config = DMD2.Config(gan_weight=0.0, time_range=(0.3, 0.7))
    method.teacher, method.critic = teacher, fake
    x0 = fake.sample(size, Rng("x0")).requires_grad_()
    batch = Batches(Rows(10, id=torch.arange(10)), (1,), batch_size=size, per_iteration=1).batch(0, 0)
    seen, matching = {}, objectives.distribution_matching
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            objectives,
            "distribution_matching",
            lambda x, real, fake, w: (seen.update(d=fake - real, w=w), matching(x, real, fake, w))[1],
        )
        method.matching(x0, NONE, batch).backward()
    u = 0.3 + 0.4 * (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    expected = (-0.5 * u**2 / ((1 - u) ** 2 * 0.09 + u**2)).mean()
    assert seen["d"].mean().item() == pytest.approx(expected.item(), abs=0.01)
    assert (x0.grad < 0).double().mean() > 0.99  # descent moves the student up, to the teacher


def test_the_critic_of_a_fixed_student_becomes_its_exact_posterior_mean(ring, fitted):
    means = torch.tensor([[1.0, 0.5], [-1.5, -0.5]])
    student = GaussianMixture(SD, means, torch.tensor([[0.5, 0.1], [0.1, 0.3]]), torch.tensor([0.3, 0.7]))

    class Fixed:
        schedule, draws = SD, 0

        def x0(self, x_t, t, cond, *, guidance=1.0):
            Fixed.draws += 1
            return student.sample(len(x_t), Rng("fixed", Fixed.draws))

    trainer = toy(ring, fitted)
    method, steps = trainer.method, 700
    method.student.denoisers = [Fixed()] * method.student.num_steps
    optimizer = torch.optim.Adam(trainer.roles["critic"].weights.values())
    for i in range(steps):
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 - i / steps)
        optimizer.zero_grad()
        sum(method.critic_loss(trainer.data.batch(i, 0), Progress(i)).values()).backward()
        optimizer.step()

    rng = Rng("check")
    for level in (100, 300, 500, 700, 900):
        t = torch.full((2000,), float(level))
        x_t = SD.add_noise(student.sample(2000, rng), rng.normal(2000, 2), t)
        with torch.no_grad():
            learned = method.critic.x0(x_t, t, NONE)
        exact, other = student.x0(x_t, t, NONE), ring.x0(x_t, t, NONE)
        error = (learned - exact).square().mean()
        assert error < 0.02 * student.variances.mean()
        assert error < 0.02 * (exact - other).square().mean()  # far from the teacher, where it came from


# ------------------------------------------------------------------------------------------------- what goes where
class Spy:
    """A closed-form teacher that remembers the times, conditions and guidance it was asked for."""

    def __init__(self, ring):
        self.ring, self.schedule, self.calls = ring, SD, []

    def x0(self, x_t, t, cond, *, guidance=1.0):
        self.calls.append((t, cond, guidance))
        return self.ring.x0(x_t, t, cond) + (guidance - 1)


def test_guidance_is_on_the_real_score_only_and_inside_the_normaliser(ring, fitted, monkeypatch):
    teacher, seen = Spy(ring), {}
    trainer = toy(teacher, fitted, batch_size=64, guidance_scale=8.0)
    critic = trainer.method.critic = Spy(ring)
    weight = objectives.matching_weight
    monkeypatch.setattr(
        objectives, "matching_weight", lambda *a, **k: (seen.update(real=a[2]), weight(*a, **k))[1]
    )
    x0 = trainer.method.matching(torch.zeros(64, 2), NONE, trainer.data.batch(0, 0))
    assert [c[2] for c in teacher.calls] == [8.0] and [c[2] for c in critic.calls] == [1.0]
    assert torch.equal(teacher.calls[0][0], critic.calls[0][0])
    assert x0.ndim == 0 and seen["real"].mean() > 4  # the guided mean is 7 higher than the plain one


def test_the_student_learns_at_times_20_to_980_and_the_critic_at_all(ring, fitted):
    teacher = Spy(ring)
    trainer = toy(teacher, fitted, batch_size=20000)
    critic = trainer.method.critic = Spy(ring)
    batch = trainer.data.batch(0, 0)
    trainer.method.generator_loss(batch, Progress())
    critic.calls.clear()
    trainer.method.critic_loss(batch, Progress())
    of_student, of_critic = teacher.calls[0][0], critic.calls[0][0]
    assert (of_student.min().item(), of_student.max().item()) == (20, 980)
    assert (of_critic.min().item(), of_critic.max().item()) == (0, 999)


def test_the_critic_learns_from_the_sample_of_the_student_turn_made_before_the_update(
    ring, fitted, monkeypatch
):
    trainer, learned = toy(ring, fitted, batch_size=64, critic_steps=2), []
    denoising = objectives.denoising
    monkeypatch.setattr(
        objectives, "denoising", lambda p, x0, w: (learned.append(x0), denoising(p, x0, w))[1]
    )
    generated = lambda i: trainer.method.generate(trainer.data.batch(i, 0))[0].detach()  # noqa: E731
    before = generated(0)
    trainer.iterate()
    assert torch.equal(learned[0], before) and not torch.equal(learned[0], generated(0))
    assert not learned[0].requires_grad
    # On its own turns the critic learns from a fresh sample of the student as it is.
    fresh = generated(1)
    trainer.iterate()
    assert torch.equal(learned[1], fresh) and not learned[1].requires_grad


def test_exit_steps_are_shared_by_all_micro_batches_and_uniform(ring, fitted):
    trainer = toy(ring, fitted, batch_size=2, num_steps=4, accumulate=3)
    method, exits = trainer.method, []
    method.student.rollout = lambda noise, cond, draw, exit_step: exits.append(exit_step) or noise
    for iteration in range(1200):
        for micro in range(3):
            method.generate(trainer.data.batch(iteration, micro))
    of_iteration = torch.tensor(exits).view(1200, 3)
    assert (of_iteration == of_iteration[:, :1]).all()
    counts = of_iteration[:, 0].bincount(minlength=4)
    assert len(counts) == 4
    assert ((counts - 300) ** 2 / 300).sum() < 16.3  # chi-square, 3 degrees of freedom, p = 0.001


def test_student_of_real_latents_starts_from_noise_at_its_first_time_only(ring, fitted):
    real = torch.full((64, 2), 50.0)
    trainer = toy(ring, fitted, batch_size=64, real=real, num_steps=4, student_input="real")
    method, calls = trainer.method, []
    method.student.denoisers = [view(fitted)] * method.student.num_steps
    method.student.denoiser.x0 = lambda x_t, t, cond: calls.append((x_t, t, cond)) or x_t
    method.generate(trainer.data.batch(0, 0))
    (x_t, t, cond) = calls[0]
    assert set(t.tolist()) == {999, 749, 499, 249}
    assert x_t[t == 999].abs().max() < 5  # unit noise, although sqrt(abar) * 50 is 3.4
    assert x_t[t == 999].mean().abs() < 1
    for time in (749, 499, 249):
        mean = 50 * SD.alpha(torch.tensor(time)).item()
        assert (x_t[t == time].mean() - mean).abs() < 1
    assert (cond["id"] >= 5000).all()  # captions of the real images


def test_real_and_fake_meet_the_discriminator_with_their_own_conditions(ring, fitted):
    real = torch.arange(64.0)[:, None].expand(64, 2) + 100
    trainer = toy(ring, fitted, batch_size=16, real=real, gan_weight=5e-3, taps=["layers.4"])
    method, batch, seen = trainer.method, trainer.data.batch(0, 0), []

    def logits(_denoiser, x_t, t, cond):
        seen.append((x_t, t, cond["id"]))
        return torch.where(cond["id"] >= 5000, 100.0, -100.0)[:, None]

    method.discriminator.logits = logits
    method.noised = lambda x0, batch, *_range: (x0, torch.zeros(len(x0)))
    losses = method.critic_loss(batch, Progress())
    x, _, ids = seen[0]
    assert torch.equal(ids, torch.cat([batch.real_cond["id"], batch.cond["id"]]))
    assert torch.equal(x, torch.cat([batch.real, batch.carry["x0"]]))
    assert torch.equal(x[:16, 0] - 100 + 5000, ids[:16].float())  # each image beside its own caption
    assert losses["discriminator"].item() < 1e-6  # real is what it calls real: swapped, the loss would be 2
    generator = method.generator_loss(batch, Progress())
    assert torch.equal(seen[1][2], batch.cond["id"])
    assert generator["gan"].item() == pytest.approx(5e-3 * 100)


def test_real_and_fake_are_noised_each_at_its_own_time(ring, fitted):
    trainer = toy(ring, fitted, batch_size=16, real=torch.randn(64, 2), gan_weight=5e-3, taps=["layers.4"])
    times = []
    trainer.method.discriminator.logits = lambda _d, x, t, c: times.append(t) or torch.zeros(len(x), 1)
    losses = trainer.method.critic_loss(trainer.data.batch(0, 0), Progress())
    assert len(times[0]) == 32 and len(times[0].unique()) > 25
    assert losses["discriminator"].item() == pytest.approx(1e-2 * 2 * math.log(2))


def test_without_a_gan_it_runs_without_images(ring, fitted):
    config = DMD2.Config(gan_weight=0.0)
    assert DMD2.needs(config) == ("prompts",)
    assert DMD2.needs(DMD2.Config()) == ("prompts", "images")
    assert DMD2.needs(DMD2.Config(gan_weight=0.0, student_input="real")) == ("prompts", "images")
    trainer = toy(ring, fitted, batch_size=4)
    assert trainer.method.heads() == {} and trainer.data.batch(0, 0).real is None
    metrics = trainer.turn(trainer.phases[0], [trainer.data.batch(0, 0)])
    health = {"health/critic_lag", "health/latent_mean", "health/latent_std"}
    assert set(metrics) == {"generator/dm", "generator/grad_norm"} | health
    metrics = trainer.turn(trainer.phases[1], [trainer.data.batch(0, 0)])
    assert set(metrics) == {"critic/denoising", "critic/grad_norm"}


# ------------------------------------------------------------------------------------------------- tiny SDXL
def spine(sdxl, method=DMD2, **options):
    """DMD2 on the tiny SDXL as a recipe builds it, with random latents as real images."""
    lora = RoleConfig(rank=2, lr=1e-2)
    recipe = Recipe(
        output="",
        teacher=TeacherConfig(path=""),
        method=method.Config(num_steps=1, start=399, guidance_scale=2.0, critic_steps=3, **options),
        data=DataConfig(prompts=""),
        train=TrainConfig(steps=100, batch_size=2),
        roles={"student": lora, "critic": lora, "discriminator": RoleConfig(kind="full")},
    )
    roles, method = build(recipe, sdxl, Process())
    prompts = sdxl.encode(["red apple", "blue bird", "a dog", "a cat"])
    latents = torch.randn(4, *sdxl.latent_shape, generator=torch.Generator().manual_seed(0))
    stores = {"latents": Rows(4, latents=latents), "captions": Rows(4, **prompts.tensors)}
    data = Batches(Rows(4, **prompts.tensors), sdxl.latent_shape, batch_size=2, **stores)
    return Trainer(method, roles, data, recipe.train, quiet=True)


def snapshot(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def changed(before, module):
    return any(not torch.equal(value, before[name]) for name, value in module.state_dict().items())


@pytest.mark.parametrize("on_student_turn", [True, False])
def test_student_learns_every_third_iteration_and_the_critic_on_all_or_on_the_others(sdxl, on_student_turn):
    trainer, history = spine(sdxl, critic_on_student_turn=on_student_turn), []
    for _ in range(4):
        before = {name: snapshot(role.module) for name, role in trainer.roles.items()}
        trainer.iterate()
        history.append({name: changed(before[name], role.module) for name, role in trainer.roles.items()})
    assert [h["student"] for h in history] == [True, False, False, True]
    critic = [True] * 4 if on_student_turn else [False, True, True, False]
    assert [h["critic"] for h in history] == [h["discriminator"] for h in history] == critic
    assert trainer.updates == {"student": 2, "critic": sum(critic), "discriminator": sum(critic)}


@pytest.mark.parametrize("judge", ["critic", "teacher"])
def test_each_turn_has_gradients_in_its_own_roles_only_and_the_teacher_never_moves(sdxl, judge):
    teacher, trainer = snapshot(sdxl.net), spine(sdxl, discriminator_on=judge)
    update, seen = trainer.update, []

    def spy(phase, roles):
        graded = {n for n, r in trainer.roles.items() if any(w.grad is not None for w in r.weights.values())}
        seen.append((graded, {role.name for role in roles}))
        return update(phase, roles)

    trainer.update = spy
    for phase in trainer.phases:
        others = {n: snapshot(r.module) for n, r in trainer.roles.items() if n not in phase.train}
        trainer.turn(phase, [trainer.data.batch(0, 0)])
        assert not any(changed(others[n], trainer.roles[n].module) for n in others)
        assert all(w.grad is None for r in trainer.roles.values() for w in r.weights.values())
    assert seen == [({"student"},) * 2, ({"critic", "discriminator"},) * 2]
    assert not changed(teacher, sdxl.net)
    assert all(p.grad is None and not p.requires_grad for p in sdxl.net.parameters())


def counted(networks):
    """Counts the forwards of modules by name, from now on."""
    calls = Counter()
    for name, module in networks.items():
        module.forward = partial(
            lambda f, name, *a, **k: (calls.update([name]), f(*a, **k))[1], module.forward, name
        )
    return calls


@pytest.mark.parametrize("judge", ["critic", "teacher"])
def test_the_gradient_at_one_noise_is_that_of_two_forwards_at_equal_draws(sdxl, judge):
    """And the network that judges is called once for both; guidance alone takes its null condition beside."""
    trainer = spine(sdxl, discriminator_on=judge, one_noise=True, gan_time_range=(0.02, 0.98))
    method, weights = trainer.method, list(trainer.roles["student"].weights.values())
    for role in trainer.roles.values():
        for weight in role.weights.values():
            torch.nn.init.normal_(weight, std=0.2)
        role.requires_grad_(role.name == "student")
    try:
        calls = counted({"teacher": sdxl.net, **{n: trainer.roles[n].module for n in ("student", "critic")}})
        together = method.generator_loss(trainer.data.batch(0, 0), Progress())
        assert calls == {"student": 1, "critic": 1, "teacher": 2 if judge == "teacher" else 1}
    finally:
        del sdxl.net.forward

    batch = trainer.data.batch(0, 0)
    x0, cond = method.generate(batch)
    x_t, t = method.noised(x0, batch, *method.config.time_range)
    with torch.no_grad():
        real, fake = sdxl.denoiser.x0(x_t, t, cond, guidance=2.0), method.critic.x0(x_t, t, cond)
    logits = method.discriminator.logits(method.judge, x_t, t, cond)
    apart = {
        "dm": objectives.distribution_matching(
            x0, real, fake, objectives.matching_weight("l1", x0, real, sdxl.denoiser.schedule, t)
        ),
        "gan": method.config.gan_weight * objectives.gan_generator(logits),
    }
    for name in ("dm", "gan"):
        found, wanted = (
            torch.autograd.grad(loss[name], weights, retain_graph=True) for loss in (together, apart)
        )
        assert sum(g.abs().sum() for g in wanted) > 0
        for a, b in zip(found, wanted):
            assert (a - b).norm() < 1e-2 * b.norm()  # of entries that cancel, processors keep other digits


def test_one_noise_needs_one_law_of_times():
    with pytest.raises(
        RecipeError, match=r"method.one_noise: true: expected .*gan_time_range that is time_range"
    ):
        DMD2.Config(one_noise=True)
    with pytest.raises(RecipeError, match="positive gan_weight"):
        DMD2.Config(one_noise=True, gan_weight=0.0, gan_time_range=(0.02, 0.98))


def test_f_distill_asks_its_judge_once_for_score_and_ratio(sdxl):
    for judge, expected in (("critic", {"student": 1, "teacher": 1, "critic": 2}),
                            ("teacher", {"student": 1, "teacher": 3, "critic": 1})):  # fmt: skip
        trainer = spine(sdxl, FDistill, discriminator_on=judge)
        calls = counted({"teacher": sdxl.net, **{n: trainer.roles[n].module for n in ("student", "critic")}})
        try:
            trainer.method.generator_loss(trainer.data.batch(0, 0), Progress())
            assert calls == expected
        finally:
            del sdxl.net.forward


def test_the_adversarial_gradient_reaches_the_student(sdxl):
    trainer = spine(sdxl)
    for role in trainer.roles.values():
        role.requires_grad_(role.name == "student")
    losses = trainer.method.generator_loss(trainer.data.batch(0, 0), Progress())
    up = [w for n, w in trainer.roles["student"].weights.items() if "lora_B" in n]
    for term in ("dm", "gan"):
        grads = torch.autograd.grad(losses[term], up, retain_graph=True)
        assert all(g.isfinite().all() for g in grads) and sum(g.abs().sum() for g in grads) > 0


def test_the_discriminator_may_be_shown_the_less_noisy_part_only(ring, fitted):
    real = ring.sample(64, Rng(1))
    options = {"gan_weight": 1e-3, "taps": ["layers.0"], "gan_time_range": (0.0, 0.3)}
    trainer = toy(ring, fitted, batch_size=64, real=real, **options)
    method, seen, inner = trainer.method, [], trainer.method.discriminator.logits
    method.discriminator.logits = lambda judge, x_t, t, cond: seen.append(t) or inner(judge, x_t, t, cond)
    batch = trainer.data.batch(0, 0)
    method.generator_loss(batch, Progress())
    method.critic_loss(batch, Progress())
    assert len(seen) == 2 and all(200 < t.max() <= 300 for t in seen)
    with pytest.raises(RecipeError, match=r"method\.gan_time_range"):
        DMD2.Config(gan_time_range=(0.5, 0.2))
