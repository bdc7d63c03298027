"""What a run logs of its health is true: lag where the critic has something to follow, moments of the student's own."""

import math
from dataclasses import replace

import pytest
import torch
from toys import NONE, SD, Mlp, fit, toy, view

from fewstep.diffusion.rng import Rng
from fewstep.methods import METHODS
from fewstep.methods.base import Batch, Progress
from fewstep.methods.verdicts import settled, verdicts, weighted
from fewstep.recipe import RoleConfig
from fewstep.report.health import SIGNS, sign_of
from fewstep.teachers.analytic import GaussianMixture
from fewstep.training.means import Means

HEALTHY = {sign.name: sign for sign in SIGNS}


@pytest.fixture(scope="module")
def ring():
    return GaussianMixture.ring(SD, radius=2.2, std=0.2)


@pytest.fixture(scope="module")
def fitted(ring):
    torch.manual_seed(0)
    return fit(ring, Mlp(), steps=50)


def logged(name, ring, net, phase=0, before=lambda method: None, **options):
    """What one turn of a phase logs."""
    method = METHODS[name]
    real = ring.sample(64, Rng("real"))
    trainer = toy(method, method.Config(**options), ring, net, steps=8, batch_size=64, real=real)
    before(trainer.method)
    batch = trainer.data.batch(0, 0)
    trainer.phases[phase].loss(batch, Progress(4, 8, 64))
    return {key: value.item() for key, value in batch.log.items()}


def test_where_student_and_teacher_meet_the_lag_is_small_and_not_a_quotient_of_noise():
    batch, rng = Batch(NONE, (64, 2), Rng(0), Rng(1)), Rng("x")
    x0, real = rng.normal(64, 2), rng.normal(64, 2)
    batch.note_lag(x0, real, real + 1e-6 * rng.normal(64, 2))
    assert abs(batch.log["critic_lag"]) < HEALTHY["critic_lag"].high
    far = real + rng.normal(64, 2)
    batch.note_lag(x0, real, far)
    delta = real - far
    expected = (delta * (far - x0)).mean() / delta.square().mean()
    assert batch.log["critic_lag"].item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("spread", [0.2, 1.0, 1.5])
def test_moments_at_a_level_are_those_of_what_was_noised_to_it(spread):
    batch, rng = Batch(NONE, (20_000, 2), Rng(0), Rng(1)), Rng("x")
    x0, t = 0.3 + spread * rng.normal(20_000, 2), torch.tensor(700.0)
    x_s = SD.add_noise(x0, rng.normal(20_000, 2), t.expand(len(x0)))
    batch.note_latents(x_s, SD.alpha(t).float(), SD.sigma(t).float())
    assert batch.log["latent_mean"].item() == pytest.approx(0.3, abs=0.1)
    assert batch.log["latent_std"].item() == pytest.approx(spread, abs=0.15)
    batch.note_latents(x0)
    assert batch.log["latent_std"].item() == pytest.approx(x0.std().item(), rel=1e-5)


def test_the_mean_of_pixels_has_no_range_and_that_of_latents_has():
    """Drawings on white have a mean of 0.6, and so has a healthy student of them."""
    for pixels, name in ((True, "pixel_mean"), (False, "latent_mean")):
        batch = Batch(NONE, (4, 2), Rng(0), Rng(1), pixels=pixels)
        batch.note_latents(torch.full((4, 2), 0.6))
        assert batch.log.keys() == {name, "latent_std"} and batch.log[name].item() == pytest.approx(0.6)
        assert batch.view(slice(1), slice(1)).pixels == pixels
        assert (sign_of(f"health/{name}") is None) == pixels


def test_phased_dmd_knows_a_lag_in_its_last_phase_only_and_a_spread_in_all(ring, fitted):
    first, last = (logged("phased_dmd", ring, fitted, phase) for phase in (0, 2))
    assert "critic_lag" not in first and "critic_lag" in last
    assert {"latent_mean", "latent_std"} <= first.keys() & last.keys()


@pytest.mark.parametrize(
    "name, options",
    [
        ("dmd2", {"gan_weight": 0.0}),
        ("sim", {}),
        ("diff_instruct", {}),
        ("swiftbrush", {"guidance_scale": 1.0, "null_probability": 0.0}),
        ("sid", {}),
    ],
)
def test_a_critic_that_follows_the_student_has_a_lag(name, options, ring, fitted):
    method = METHODS[name]
    phases = [phase.name for phase in toy(method, method.Config(**options), ring, fitted).phases]
    log = logged(name, ring, fitted, phases.index("generator"), **options)
    assert {"critic_lag", "latent_mean", "latent_std"} <= log.keys()


@pytest.mark.parametrize(
    "name, change",
    [
        ("swiftbrush", lambda method: setattr(method.config, "guidance_scale", 4.5)),
        ("sid", lambda method: setattr(method, "kappas", (1.0, -1.0, -1.0, 1.0))),
    ],
)
def test_a_critic_that_is_no_posterior_mean_has_none(name, change, ring, fitted):
    def guided(method):
        change(method)
        for one in (method.teacher, method.critic):
            plain = one.x0
            one.x0 = lambda x_t, t, cond, *, guidance=1.0, plain=plain: plain(x_t, t, cond)

    try:
        options = {"guidance_scale": 1.0, "null_probability": 0.0} if name == "swiftbrush" else {}
        log = logged(name, ring, fitted, 0 if name == "swiftbrush" else 1, guided, **options)
    finally:
        vars(ring).pop("x0", None)
    assert "critic_lag" not in log and "latent_std" in log


def test_a_consistency_student_that_has_collapsed_is_seen(ring, fitted):
    """Its own x0 is looked at, and not the latents that it learns from."""
    healthy = logged("scm", ring, fitted, warmup=1)["latent_std"]

    def collapse(method):  # F = x_t cos t / sin t - c / sin t has f = c
        student = method.term.student
        flat = lambda kind, x_t, t, cond, **_: (torch.cos(t)[:, None] * x_t - 0.1) / torch.sin(t)[:, None]  # noqa: E731
        student.predict = method.term.exact.predict = flat

    assert healthy > 0.5
    assert logged("scm", ring, fitted, before=collapse, warmup=1)["latent_std"] < HEALTHY["latent_std"].low


@pytest.mark.parametrize("name, options, begins", [
    ("disback", {"nodes": 2, "record_steps": 5, "backtrack_steps": 5}, {"generator": 10, "critic": 10}),
    ("sid", {"gan_weight": 1e-3, "gan_schedule": (50, 100), "taps": ["layers.0"]}, {"critic": 0, "generator": 4}),
])  # fmt: skip
def test_rates_warm_up_from_where_a_phase_begins(name, options, begins, ring, fitted):
    method, role = METHODS[name], RoleConfig(kind="full", lr=1.0, warmup=4, weight_decay=0.0)
    real = ring.sample(64, Rng("real"))
    trainer = toy(
        method, method.Config(**options), ring, fitted, 40, 16, real=real, student=role, critic=role
    )
    for phase in (p for p in trainer.phases if p.name in begins):
        rates = []
        for iteration in range(20):
            trainer.progress.iteration = iteration
            if phase.due(trainer.progress):
                rates.append((iteration, trainer.learning_rate(trainer.roles[phase.train[0]], phase)))
        begin = begins[phase.name]
        assert rates[:5] == [(begin + i, min(1.0, (i + 1) / 4)) for i in range(5)]


@pytest.mark.parametrize("name, options, ends", [
    ("dmd2", {"num_steps": 1, "critic_steps": 1}, {"generator": 20}),
    ("phased_dmd", {"num_steps": 2, "critic_steps": 1}, {"generator_1": 10, "generator_2": 20}),
])  # fmt: skip
def test_rates_fall_to_nothing_at_the_end_of_the_share_of_a_phase(name, options, ends, ring, fitted):
    """Linear over the last ``decay`` iterations: of the run, or of each expert's half of it."""
    method, real = METHODS[name], ring.sample(64, Rng("real"))
    role = RoleConfig(kind="full", lr=1.0, decay=4, weight_decay=0.0)
    config = replace(method.Config.toy(), **options)
    trainer = toy(method, config, ring, fitted, 20, 16, real=real, student=role, critic=role)
    phases = {phase.name: phase for phase in trainer.phases}
    for phase, end in ((phases[name], end) for name, end in ends.items()):
        rates = []
        for trainer.progress.iteration in range(end - 6, end):
            rates.append(trainer.learning_rate(trainer.roles[phase.train[0]], phase))
        assert rates == pytest.approx([1.0, 1.0, 1.0, 0.75, 0.5, 0.25])


def test_verdicts_are_counted_behind_each_quarter_of_noise():
    """By hand: angles 0.1, 0.5, 1.0, 1.5 lie one in each quarter; the fake in the second is taken for real."""
    t = torch.tensor(
        [SD.time_at(torch.tensor(math.cos(a)), torch.tensor(math.sin(a))) for a in (0.1, 0.5, 1.0, 1.5)]
    )
    real = torch.tensor([[2.0, 4.0], [1.0, -3.0], [0.5, 0.5], [0.0, 0.0]])
    fake = torch.tensor([[-1.0, -1.0], [0.5, 1.5], [float("nan"), 0.0], [20.0, 20.0]])
    log = settled(verdicts(SD, (real, t), (fake, t)))
    accuracies = [log[f"discriminator_accuracy_{k}"].item() for k in (1, 2, 3, 4)]
    assert accuracies == [1.0, 0.0, 1.0, 0.25]
    ratios = {k: log[f"density_ratio_{k}"].item() for k in (1, 2, 4)}
    assert ratios == pytest.approx({1: math.exp(-1), 2: math.e, 4: math.exp(10)})
    assert "density_ratio_3" not in log and not any("weight" in name for name in log)
    assert not any("ratio" in name for name in verdicts(SD, (real, t), (fake, t), ratios=False))


def test_what_is_logged_together_is_weighed_together():
    """A batch of one right verdict and one of three wrong ones make a quarter, not a half."""
    means = Means()
    for values in ([1.0], [0.0, 0.0, 0.0]):
        found = weighted("accuracy", torch.tensor(values), torch.ones(len(values), dtype=torch.bool))
        means.add({f"health/{name}": value for name, value in found.items()})
    assert settled(means.means()) == {"health/accuracy": 0.25}


@pytest.mark.parametrize(
    "name, options",
    [
        ("dmd2", {"gan_weight": 1e-2, "taps": ["layers.0"]}),
        ("sid", {"gan_weight": 1e-2, "taps": ["layers.0"], "gan_schedule": (0, 0)}),
        ("ladd", {"taps": ["layers.0"]}),
        ("hyper_sd", {"gan_weight": 1e-2, "taps": ["layers.0"]}),
    ],
)
def test_every_discriminator_logs_its_verdicts(name, options, ring, fitted, tmp_path):
    method = METHODS[name]
    trainer = toy(
        method,
        method.Config(**options),
        view(fitted),
        fitted,
        steps=2,
        batch_size=64,
        real=ring.sample(64, Rng("real")),
    )
    records = []
    trainer.on_record = records.append
    trainer.folder = tmp_path
    trainer.train()
    record = records[-1]
    shares = [value for key, value in record.items() if key.startswith("health/discriminator_accuracy_")]
    assert shares and all(0 <= value <= 1 for value in shares)
    assert any("density_ratio" in key for key in record) == (name != "ladd")
    assert not any("weight of" in key for key in record)
