"""Turns of sCM, LADD and SANA-Sprint: who gets which gradient, scale, time and noise; and where they converge."""

import math

import pytest
import torch
from torch import nn
from toys import NONE, Mlp, distance, fit, per_noise, toy, view

from fewstep.diffusion import objectives
from fewstep.diffusion.cond import Cond
from fewstep.diffusion.denoiser import ScheduleView
from fewstep.diffusion.rng import Rng
from fewstep.diffusion.schedules import EDM, Flow, TrigFlow
from fewstep.diffusion.solvers import ddim
from fewstep.errors import RecipeError
from fewstep.methods import Batch, Progress
from fewstep.methods.ladd import LADD, Adversary
from fewstep.methods.sana_sprint import SanaSprint
from fewstep.methods.scm import SCM
from fewstep.recipe import RoleConfig
from fewstep.teachers.analytic import GaussianMixture
from fewstep.training.roles import averaged

SPRINT = {"taps": ["layers.0", "layers.2"], "guidance_embedding": False, "guidance_scale": 1.0}


@pytest.fixture(scope="module")
def ring():
    return GaussianMixture.ring(Flow(), radius=1.4, std=0.13)


@pytest.fixture(scope="module")
def fitted(ring):
    torch.manual_seed(0)
    # What is fitted half passes its fault on: with 300 steps its own ODE ends 0.044 from the ring, with 600 0.009.
    return fit(ring, Mlp(smooth=8), steps=600, prediction="flow")


def flow_view(net):
    return view(net, Flow(), "flow")


def batch_of(ring, rows=32, iteration=0, cond=NONE):
    real = ring.sample(rows, Rng("real", iteration))
    rng = Rng("micro", iteration)
    return Batch(cond=cond, shape=(rows, 2), rng=rng, shared=Rng(0), real=real, real_cond=cond)


def copy_of(net):
    import copy

    return copy.deepcopy(net).requires_grad_(True)


def sprint(fitted, **options):
    config = SanaSprint.Config(**{**SPRINT, **options})
    torch.manual_seed(0)
    return SanaSprint(config, flow_view(fitted), (2,), student=flow_view(copy_of(fitted)))


def gradients(module):
    return [p.grad for p in module.parameters()]


# ------------------------------------------------------------------------------------------------------------ sCM
def test_the_forward_that_is_differentiated_and_the_one_that_is_trained_are_the_same(ring, fitted):
    method = SCM(SCM.Config(), ring, (2,), student=flow_view(fitted))
    seen = {}
    derivative, predict = method.term.derivative, method.term.student.predict

    def derive(*args):
        seen["sg"], tangent = derivative(*args)
        return seen["sg"], tangent

    def trained(*args):
        seen["trained"] = predict(*args)
        return seen["trained"]

    method.term.derivative, method.term.student.predict = derive, trained
    method.loss(batch_of(ring), Progress(5, 10))
    assert (seen["sg"] - seen["trained"]).abs().max() < 1e-6
    assert not seen["sg"].requires_grad


def test_the_velocitys_error_falls_on_a_fixed_batch_before_the_warmup(ring, fitted):
    torch.manual_seed(1)
    net = Mlp(smooth=8)  # not the teacher's weights
    method = SCM(SCM.Config(warmup=1000), ring, (2,), student=flow_view(net))
    optimizer, errors = torch.optim.Adam(net.parameters(), 3e-3), []
    for _ in range(60):
        batch = batch_of(ring, 256)
        optimizer.zero_grad()
        method.loss(batch, Progress(0, 10))["consistency"].backward()
        optimizer.step()
        errors.append(batch.log["tangent"].item())  # rms of cos^2(t) (F - teacher's)
    assert errors[-1] < 0.75 * errors[0]


@pytest.mark.parametrize("every", [1, 3])
def test_warmup_counts_student_updates(ring, fitted, every, monkeypatch):
    from fewstep.diffusion import consistency

    seen, tangent = [], consistency.tangent
    monkeypatch.setattr(consistency, "tangent", lambda *args: seen.append(args[-1]) or tangent(*args))
    config = SanaSprint.Config(**SPRINT, warmup=4, student_every=every)
    trainer = toy(
        SanaSprint, config, flow_view(fitted), fitted, 20, 8, ring.sample(64, Rng(1)), prediction="flow"
    )
    for _ in range(5 * every + 1):
        trainer.iterate()
    assert seen == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]
    assert trainer.updates["discriminator"] == 5 * every + 1 and trainer.updates["student"] == 6


def test_warmup_goes_on_where_a_checkpoint_left_it(ring, fitted, tmp_path, monkeypatch):
    from fewstep.diffusion import consistency

    seen, tangent = [], consistency.tangent
    monkeypatch.setattr(consistency, "tangent", lambda *args: seen.append(args[-1]) or tangent(*args))

    def trainer():
        made = toy(SCM, SCM.Config(warmup=8), ring, fitted, 20, 8, ring.sample(64, Rng(1)), prediction="flow")
        made.folder = tmp_path
        return made

    first = trainer()
    for _ in range(3):
        first.iterate()
    first.save()
    second = trainer()
    assert second.restore()
    second.iterate()
    assert seen == [0.0, 1 / 8, 2 / 8, 3 / 8]


# ----------------------------------------------------------------------------------------------------------- hinge
def test_hinge_pulls_real_up_and_fake_down_and_the_student_raises_what_it_makes():
    real, fake = (torch.tensor([[-0.5, 0.2, 3.0]], requires_grad=True) for _ in range(2))
    of_real, of_fake = torch.autograd.grad(objectives.hinge_discriminator(real, fake), (real, fake))
    torch.testing.assert_close(of_real, torch.tensor([[-1 / 3, -1 / 3, 0.0]]))  # beyond 1 nothing is gained
    torch.testing.assert_close(of_fake, torch.tensor([[1 / 3, 1 / 3, 1 / 3]]))
    (of_student,) = torch.autograd.grad(objectives.hinge_generator(fake), fake)
    torch.testing.assert_close(of_student, torch.full((1, 3), -1 / 3))
    zero = torch.zeros(2, 3)
    assert objectives.hinge_discriminator(zero, zero) == 2


def test_discriminators_turn_leaves_the_student_alone_and_the_students_the_heads_of_a_frozen_backbone(
    ring, fitted
):
    method, batch = sprint(fitted), batch_of(ring)
    student, heads = method.student.denoiser.net, method.adversary.discriminator
    sum(method.discriminator_loss(batch, Progress(0, 10)).values()).backward()
    assert all(g is None for g in gradients(student)) and all(g is not None for g in gradients(heads))
    assert all(g is None for g in gradients(fitted))
    heads.zero_grad()
    sum(method.student_loss(batch, Progress(0, 10)).values()).backward()
    assert all(g is None for g in gradients(fitted))
    assert sum(g.abs().sum() for g in gradients(student)) > 0


def test_the_adversarial_gradient_reaches_the_sample_through_the_frozen_teacher(ring, fitted):
    """It is the chain rule over noise, backbone and heads, and no part of it is cut."""
    method = sprint(fitted)
    x0 = ring.sample(4, Rng(2)).requires_grad_()
    loss = method.adversary.student_loss(x0, NONE, Rng("j"))
    (gradient,) = torch.autograd.grad(loss, x0)
    assert (gradient.abs().sum(1) > 0).all()
    step = 1e-2 * nn.functional.normalize(gradient)
    with torch.no_grad():
        up, down = (method.adversary.student_loss(x0 + s, NONE, Rng("j")) for s in (step, -step))
    assert (up - down).item() == pytest.approx(2 * (gradient * step).sum().item(), rel=0.05)


class Judged:
    """Notes what the discriminator is shown."""

    def __init__(self, adversary):
        self.seen, self.inner = [], adversary.judge

    def __call__(self, x0, cond, t, eps):
        self.seen.append((x0, cond, t, eps))
        return self.inner(x0, cond, t, eps)


def drawn():
    return Batch(NONE, (4, 2), Rng(3), Rng(4))


@pytest.mark.parametrize("misaligned", [False, True])
def test_real_and_fake_are_judged_behind_the_same_noise_at_the_same_level(ring, fitted, misaligned):
    config = LADD.Config(taps=["layers.0"], misaligned=misaligned)
    adversary = Adversary(config, flow_view(fitted), (2,))
    adversary.judge = judged = Judged(adversary)
    labels = Cond({"id": torch.arange(4)})
    real, fake = ring.sample(4, Rng(1)), ring.sample(4, Rng(2))
    adversary.discriminator_loss(real, fake, labels, drawn())
    x0, cond, t, eps = judged.seen[0]
    count = 3 if misaligned else 2
    assert len(x0) == count * 4 and all(t[:4].equal(part) for part in t.split(4))
    assert all(eps[:4].equal(part) for part in eps.split(4))
    assert x0[:4].equal(real) and x0[4:8].equal(fake)
    assert all(cond["id"][4 * k : 4 * k + 4].equal(labels["id"]) for k in range(count))
    if misaligned:  # others' images under these captions
        assert x0[8:].equal(real[[3, 0, 1, 2]])
        adversary.discriminator_loss(real[:1], fake[:1], labels.rows(slice(0, 1)), drawn())
        assert len(judged.seen[1][0]) == 2  # alone, nothing can be misaligned


def test_noise_of_the_discriminator_follows_its_law(fitted):
    adversary = Adversary(
        LADD.Config(taps=["layers.0"], noise_mean=0.7, noise_std=0.9), flow_view(fitted), (2,)
    )
    t, _ = adversary.noise(torch.zeros(50_000, 2), Rng(4))
    logit = torch.logit(t)
    assert logit.mean() == pytest.approx(0.7, abs=0.02) and logit.std() == pytest.approx(0.9, abs=0.02)


# ------------------------------------------------------------------------------------------------------------ LADD
@pytest.mark.parametrize(
    "iteration, expected", [(0, [0, 0, 0.5, 0.5]), (9, [0, 0, 0.5, 0.5]), (10, [0.7, 0.1, 0.1, 0.1])]
)
def test_levels_are_proposed_as_the_paper_does(ring, fitted, iteration, expected):
    method = LADD(
        LADD.Config(taps=["layers.0"], early=10), flow_view(fitted), (2,), student=flow_view(fitted)
    )
    seen, x0 = [], method.student.denoiser.x0
    method.student.denoiser.x0 = lambda x_t, t, cond: seen.append((x_t, t)) or x0(x_t, t, cond)
    method.generate(batch_of(ring, 4000), Progress(iteration, 100))
    x_t, t = seen[0]
    shares = [(t - level).abs().lt(1e-9).double().mean().item() for level in (1.0, 0.75, 0.5, 0.25)]
    assert shares == pytest.approx(expected, abs=0.03)
    if expected[0]:
        assert x_t[t == 1].std() == pytest.approx(1, abs=0.03)


def test_ladds_noisiest_input_on_edms_path_is_sigma_times_noise(ring, fitted):
    net = view(fitted, EDM())
    method = LADD(LADD.Config(taps=["layers.0"], early=0), net, (2,), student=view(fitted, EDM()))
    seen, x0 = [], method.student.denoiser.x0
    method.student.denoiser.x0 = lambda x_t, t, cond: seen.append((x_t, t)) or x0(x_t, t, cond)
    method.generate(batch_of(ring, 4000), Progress(1, 100))
    x_t, t = seen[0]
    assert x_t[t == 80].std() == pytest.approx(80, rel=0.03)


def test_levels_become_the_students_times_for_each_number_of_steps(fitted):
    config = LADD.Config(taps=["layers.0"], num_steps=[4, 2, 1])
    student = LADD(config, flow_view(fitted), (2,), student=flow_view(fitted)).student
    assert student.times == pytest.approx([1, 0.75, 0.5, 0.25])
    assert student.at(2).times == pytest.approx([1, 0.5]) and student.at(1).times == [1.0]


@pytest.mark.parametrize(
    "method, options, message",
    [
        (LADD, {"num_steps": [3]}, "method.num_steps"),
        (LADD, {"proposals": [1.0]}, "method.proposals"),
        (LADD, {"proposals": [0.5, 0.1, 0.1, 0.1]}, "1 in all"),
        (LADD, {"taps": []}, "method.taps"),
        (LADD, {"noise_std": 0.0}, "method.noise_std"),
        (LADD, {"student_every": 0}, "method.student_every"),
        (SCM, {"angles": [[2.0]]}, "method.angles"),
        (SCM, {"angles": []}, "method.angles"),
        (SCM, {"angles": [[1.5], [1.4]]}, "one for each"),
        (SCM, {"tangent_constant": 0.0}, "method.tangent_constant"),
        (SanaSprint, {"max_time": 2.0}, "method.max_time"),
        (SanaSprint, {"guidance_scale": 7.0}, "within those that are trained"),
    ],
)  # fmt: skip
def test_impossible_options_are_refused(method, options, message):
    with pytest.raises(RecipeError, match=message):
        method.Config(**options)


# ----------------------------------------------------------------------------------------------------- SANA-Sprint
@pytest.mark.parametrize("probability", [0.0, 0.5, 1.0])
def test_the_noisiest_level_replaces_the_drawn_one_by_pi_half_and_not_by_its_probability(
    ring, fitted, probability
):
    method = sprint(fitted, max_time=probability)
    seen = []
    method.term.student.x0 = lambda x_t, t, cond: seen.append((x_t, t)) or x_t
    x0 = 100 + ring.sample(4000, Rng(1))
    method.generate(x0, NONE, Rng(2))
    x_t, t = seen[0]
    first = t == math.pi / 2
    assert first.double().mean() == pytest.approx(probability, abs=0.03)
    assert not ((t - 0.5).abs() < 1e-6).any()
    assert (x_t[first].abs() < 6).all()  # pure noise, no trace of the data
    assert x_t[~first].mean() > 6 or probability == 1


def test_each_sample_has_one_scale_for_its_teacher_and_its_student(ring, fitted):
    method, seen = sprint(fitted), {}
    method.config.guidance_embedding, method.config.guidance_scales = True, [4.0, 4.5, 5.0]
    plain = method.term.teacher.predict

    def teacher(kind, x_t, t, cond, guidance):
        assert "guidance" not in cond.tensors
        seen["teacher"] = guidance
        return plain(kind, x_t, t, cond)

    inner = method.term.student.predict

    def student(kind, x_t, t, cond, **_):
        seen.setdefault("student", []).append(cond["guidance"])
        return inner(kind, x_t, t, NONE)

    method.term.teacher.predict, method.term.student.predict = teacher, student
    method.student_loss(batch_of(ring, 300), Progress(0, 10))
    assert all(scale.equal(seen["teacher"]) for scale in seen["student"]) and len(seen["student"]) == 2
    assert set(seen["teacher"].tolist()) == {4.0, 4.5, 5.0}


def test_guidance_of_each_sample_is_its_own_in_the_teachers_prediction():
    weights = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    halves = GaussianMixture(Flow(), torch.tensor([[-1.0, 0.0], [1.0, 0.5]]), torch.tensor(0.04), weights)
    torch.manual_seed(0)
    net = view(Mlp(labels=2), Flow(), "flow")
    x, t, cond = Rng(1).normal(3, 2), torch.full((3,), 0.6), Cond({"label": torch.tensor([0, 1, 0])})
    for denoiser in (halves, net):
        mixed = denoiser.x0(x, t, cond, guidance=torch.tensor([0.0, 1.0, 4.5]))
        for i, scale in enumerate((0.0, 1.0, 4.5)):
            torch.testing.assert_close(mixed[i], denoiser.x0(x, t, cond, guidance=scale)[i])


def test_lambda_weighs_the_students_adversarial_term_and_nothing_else(ring, fitted):
    methods = [sprint(fitted, adversarial_weight=w) for w in (1.0, 0.5)]
    one, half = (method.student_loss(batch_of(ring), Progress(0, 10)) for method in methods)
    assert half["adversarial"].item() == pytest.approx(0.5 * one["adversarial"].item(), rel=1e-5)
    assert half["consistency"] == one["consistency"]
    hinges = [method.discriminator_loss(batch_of(ring), Progress(0, 10))["hinge"] for method in methods]
    assert hinges[0] == hinges[1] != 0


def test_what_the_discriminator_sees_was_made_under_the_trained_scales(ring, fitted):
    method, seen = sprint(fitted), []
    method.config.guidance_embedding, method.config.guidance_scales = True, [4.0, 5.0]
    inner = method.term.student.x0

    def student(x_t, t, cond):
        seen.append(cond["guidance"])
        return inner(x_t, t, NONE)

    method.term.student.x0 = student
    method.discriminator_loss(batch_of(ring, 300), Progress(0, 10))
    (scale,) = seen
    assert set(scale.tolist()) == {4.0, 5.0}


# ------------------------------------------------------------------------------------------------------ convergence
def converge(method, config, ring, fitted, steps, teacher=None):
    student = RoleConfig(kind="full", lr=4e-4, ema=0.99, weight_decay=0.0, decay=steps)
    trainer = toy(
        method, config, teacher or ring, fitted, steps, real=ring.sample(20_000, Rng("real")), prediction="flow",
        student=student, heads=RoleConfig(kind="full", lr=1e-3, weight_decay=0.0),
    )  # fmt: skip
    if teacher is not None and hasattr(trainer.method, "term"):  # the exact one where no features are needed
        trainer.method.term.teacher = ScheduleView(ring, TrigFlow())
    for _ in range(steps):
        trainer.iterate()
    noise = Rng(7).normal(3000, 2)
    with averaged(trainer.roles["student"]):
        made = trainer.method.student.sample(noise, NONE, Rng(6).normal_like)
    reached = distance(trainer, ring)
    return reached, per_noise(made, ddim(ring, noise, NONE, 200), method.name, reached)


@pytest.mark.slow
def test_scm_reaches_the_ring_in_one_step(ring, fitted):
    reached, apart = converge(SCM, SCM.Config(warmup=150, time_mean=-0.4), ring, fitted, 250)
    assert reached < 0.03 and apart < 0.2


@pytest.mark.slow
def test_scm_with_ladd_reaches_the_ring_in_one_step(ring, fitted):
    options = {
        **SPRINT,
        "angles": [[math.pi / 2]],
        "warmup": 150,
        "time_mean": -0.4,
        "prior": "one",
        "misaligned": False,
        "noise_mean": -1.0,
    }
    config = SanaSprint.Config(**options)
    reached, apart = converge(SanaSprint, config, ring, fitted, 250, flow_view(fitted))
    assert reached < 0.02 and apart < 0.2


@pytest.mark.long
def test_ladd_alone_reaches_the_ring(ring, fitted):
    config = LADD.Config(taps=["layers.0", "layers.2", "layers.4"], num_steps=[1], early=0, noise_mean=-1.0)
    assert converge(LADD, config, ring, fitted, 500, flow_view(fitted))[0] < 0.02


def test_misaligned_images_are_fakes(ring, fitted):
    """Known logits: the real ones are far above their bound, and whatever else is judged is far above its own."""
    adversary = Adversary(LADD.Config(taps=["layers.0"], misaligned=True), flow_view(fitted), (2,))
    adversary.judge = lambda x0, *_: torch.cat([torch.full((4, 1), v) for v in (5.0, -5.0, 3.0)])
    real, fake = ring.sample(4, Rng(1)), ring.sample(4, Rng(2))
    assert adversary.discriminator_loss(real, fake, NONE, drawn()).item() == (0 + (0 + 4) / 2)
