"""What every method of the score-distillation family promises, on one 16-dimensional conditional mixture.

The path on which networks see noise is a matter of bookkeeping: gradients are the same on all. One step reaches the
mixture, and several steps come closer than their first.
"""

import pytest
import torch
from toys import SD, Mlp, Rows, energy_distance, fit, labelled_mixture, labels_of, toy, view

from fewstep.diffusion import objectives
from fewstep.diffusion.cond import Cond
from fewstep.diffusion.denoiser import all_of_it, plainly
from fewstep.diffusion.rng import Rng
from fewstep.diffusion.schedules import EDM, Flow, Schedule, change_schedule
from fewstep.diffusion.solvers import ddim
from fewstep.diffusion.times import TimeLaw
from fewstep.methods import METHODS, Progress
from fewstep.recipe import RoleConfig
from fewstep.training.roles import averaged

LABELS = torch.arange(1000) % 4
GAN = {"gan_weight": 1e-3, "taps": ["layers.4"]}
# Options that are no paper's but suit a toy; what is guided is guided elsewhere.
OPTIONS = {
    "dmd": {},
    "dmd2": {"num_steps": 1, "critic_steps": 2, "gan_weight": 0.0},
    "diff_instruct": {},
    "swiftbrush": {"guidance_scale": 1.0, "guide_critic": False, "null_probability": 0.0},
    "sid": {},
    "sim": {"c": 0.3},
    "uni_instruct": {"gan_weight": 1e-3, "taps": ["layers.0"], "gan_schedule": (0, 0)},
    "fdistill": {"num_steps": 1, "critic_steps": 2, **GAN},
    "disback": {"nodes": 3, "record_steps": 20, "backtrack_steps": 40},
    "multi_student": {"parts": 2, "critic_steps": 2, "gan_weight": 0.0},
}
FEW = {  # f-distill and DisBack roll out as DMD2 does, SIM as SiD, whose four steps are tried on the ring
    "dmd2": {"num_steps": 4, "critic_steps": 2, "gan_weight": 0.0},
    "phased_dmd": {"num_steps": 4, "critic_steps": 2},
}


SOON = {"dmd2", "fdistill", "multi_student"}  # there by 250 iterations, the others by 400


@pytest.fixture(scope="module")
def mixture():
    return labelled_mixture()


@pytest.fixture(scope="module")
def fitted(mixture):
    torch.manual_seed(0)
    return fit(mixture, Mlp(width=192, dim=16, labels=4), steps=400)


@pytest.fixture(scope="module")
def pairs(mixture):
    noise = Rng("pairs").normal(1000, 16)
    return {"noise": noise, "x0": ddim(mixture, noise, Cond({"label": LABELS}), 20)}


def trainer_of(name, mixture, fitted, pairs, options=None, **train):
    method = METHODS[name]
    config = method.Config(**(OPTIONS[name] if options is None else options))
    real = None
    if "images" in method.needs(config):
        real = mixture.sample(1000, Rng("real"), Cond({"label": LABELS}))
    trainer = toy(method, config, mixture, fitted, labels=LABELS, real=real, **train)
    if "pairs" in method.needs(config):
        trainer.data.pairs, trainer.data.pair_conditions = Rows(1000, **pairs), Rows(1000, label=LABELS)
    return trainer


# ------------------------------------------------------------------------------------------- the same on every path
PATHS = {"flow": Flow(), "shifted flow": Flow(shift=3.0), "edm": EDM()}
# Weights that are functions of the path by definition take a kind that is not; losses are those of x0.
PLAIN = {
    "swiftbrush": {"guidance_scale": 2.0, "weight": "kl", "critic_loss": "x0"},
    "diff_instruct": {"guidance_scale": 2.0, "critic_loss": "x0"},
    "sid": {"guidance_scale": 2.0, "weight": "l1"},
    "sid, four steps": {"guidance_scale": 2.0, "weight": "1-sigma", "num_steps": 4},
    "sim": {"guidance_scale": 2.0, "weight": "alpha/sigma"},
    "uni_instruct": {"guidance_scale": 2.0, "weight": "l1", "through_ratio": True, **OPTIONS["uni_instruct"]},
    "dmd2": {"guidance_scale": 2.0, "num_steps": 4, **GAN},
    "fdistill": {"guidance_scale": 2.0, **OPTIONS["fdistill"]},
    "disback": {"guidance_scale": 2.0, **OPTIONS["disback"]},
    "multi_student": {"guidance_scale": 2.0, "parts": 2, **GAN},
    "phased_dmd": {"guidance_scale": 2.0},
    "phased_dmd, kl": {"guidance_scale": 2.0, "weight": "kl"},
    "dmd": {"guidance_scale": 2.0, "match_pairs": True},
}


class On:
    """A denoiser on another path."""

    prediction, guide, embeds_guidance = "x0", staticmethod(plainly), False

    def __init__(self, denoiser, schedule):
        self.denoiser, self.schedule = denoiser, schedule
        self.net, self.null = getattr(denoiser, "net", None), getattr(denoiser, "null", None)
        self.example, self.image_of, self.image_first = denoiser.example, all_of_it, False

    def x0(self, x_t, t, cond, *, guidance=1.0):
        x, s = change_schedule(x_t, t, self.schedule, self.denoiser.schedule)
        return self.denoiser.x0(x, s, cond, guidance=guidance)

    def predict(self, x_t, t, cond, guidance=1.0):
        x, s = change_schedule(x_t, t, self.schedule, self.denoiser.schedule)
        self.denoiser.predict(x, s, cond)  # whose blocks are tapped
        return self.x0(x_t, t, cond, guidance=guidance)


class FirstScaled(Rng):
    """Its first normal numbers, the student's noise, are noise of the student's first level."""

    scale = 1.0

    def normal(self, *shape):
        scale, self.scale = self.scale, 1.0
        return scale * super().normal(*shape)


def times_on(schedule, times):
    """Stable Diffusion's times as those of equal noise."""
    return schedule.t_from_log_snr(SD.log_snr(torch.as_tensor(times, dtype=torch.float64)))


def gradients(name, mixture, fitted, pairs, schedule):
    """Of every phase of a method, by phase and weight."""
    kind = name.split(",")[0]
    method, options = METHODS[kind], PLAIN[name]
    trainer = trainer_of(kind, mixture, fitted, pairs, options, batch_size=16)
    steps = getattr(trainer.method.student, "num_steps", 1)
    times = times_on(schedule, [900, 800, 600, 400][:steps]).tolist()
    where = {"times": times} if hasattr(trainer.method.config, "times") else {"start": times[0]}
    views = {
        n: On(view(trainer.roles[n].module), schedule) for n in method.networks_for(trainer.method.config)
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        built = method(method.Config(**options, **where), On(mixture, schedule), (16,), **views)
    built.prepare(Rows(1000, label=LABELS))
    first = torch.tensor(times[:1], dtype=torch.float64)
    scale = (
        schedule.sigma(first) / schedule.begin(torch.ones_like(first), first)
    ).item()  # EDM's samplers scale it
    weights = {n: trainer.roles[n].weights for n in views}
    weights |= {n: dict(head.named_parameters()) for n, head in built.heads().items()}
    found = {}
    for phase in (phase for phase in built.phases() if phase.loss):
        batch = trainer.data.batch(0, 0)
        batch.rng, batch.shared = FirstScaled("phase"), Rng("shared")
        batch.rng.scale = scale
        if batch.pairs:
            batch.pairs = (scale * batch.pairs[0], batch.pairs[1])
        if kind == "dmd" and phase.name == "critic":  # learns from what the student's turn left
            built.generator_loss(batch, Progress())
        loss = sum(phase.loss(batch, Progress(1000, 2000, 16)).values())
        trained = {f"{r}/{k}": w for r in phase.train for k, w in weights[r].items()}
        grads = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
        found |= {f"{phase.name}/{k}": g for k, g in zip(trained, grads) if g is not None}
    return found


class Marked(On):
    """Predicts one number everywhere, and keeps what it was asked."""

    def __init__(self, denoiser, mark):
        super().__init__(denoiser, denoiser.schedule)
        self.mark, self.asked = mark, []

    def x0(self, x_t, t, cond, *, guidance=1.0):
        self.asked.append((guidance, t))
        return 0 * super().x0(x_t, t, cond, guidance=guidance) + self.mark


# SiD guides both, SwiftBrush's published code too.
GUIDED_CRITICS = {"sid", "uni_instruct", "swiftbrush"}


@pytest.mark.parametrize("name", PLAIN)
def test_the_teacher_is_guided_and_the_student_is_led_from_the_critic_to_it(
    name, mixture, fitted, pairs, monkeypatch
):
    """What the student's turn asks of both networks, at which times, and in which place either answer stands."""
    kind = name.split(",")[0]
    method, options = METHODS[kind], {**PLAIN[name], "guidance_scale": 2.0}
    trainer = trainer_of(kind, mixture, fitted, pairs, options, batch_size=16)
    config, teacher = trainer.method.config, Marked(mixture, 7.0)
    views = {n: view(trainer.roles[n].module) for n in method.networks_for(config)}
    critics = {n: Marked(v, -7.0) for n, v in views.items() if n.startswith("critic")}
    built = method(config, teacher, (16,), **{**views, **critics})
    built.prepare(Rows(1000, label=LABELS))
    stood = []

    def standing(inner):
        def spy(x0, real, fake, *rest, **more):
            stood.append((real.detach().unique().tolist(), fake.detach().unique().tolist()))
            return inner(x0, real, fake, *rest, **more)

        return spy

    for term in ("distribution_matching", "score_identity", "expanded_divergence", "implicit_matching"):
        monkeypatch.setattr(objectives, term, standing(getattr(objectives, term)))
    for phase in built.phases():
        if phase.loss is None or not any(role.startswith("student") for role in phase.train):
            continue
        phase.loss(trainer.data.batch(0, 0), Progress(1000, 2000, 16))
    assert stood and all(pair == ([7.0], [-7.0]) for pair in stood)
    assert {float(g) for g, _ in teacher.asked} == {2.0}
    scale = 2.0 if kind in GUIDED_CRITICS else 1.0
    for critic in critics.values():
        assert critic.asked and {float(g) for g, _ in critic.asked} == {scale}
    low, high = getattr(config, "time_range", (0.0, 1.0))
    for _, t in teacher.asked:
        assert (t >= low * SD.t_max - 1).all() and (t <= high * SD.t_max + 1).all()


@pytest.mark.parametrize("name", PLAIN)
def test_the_gradient_is_the_same_on_every_path(name, mixture, fitted, pairs, monkeypatch):
    """VP, flow, shifted flow and EDM, at equal noise: for every method, every phase and every weight."""

    def levels(schedule, u):
        return times_on(schedule, 700 + 250 * u)

    for cls in (Schedule, *Schedule.__subclasses__()):
        if "draw_times" in vars(cls):
            monkeypatch.setattr(cls, "draw_times", lambda self, u, *_range: levels(self, u))
    monkeypatch.setattr(TimeLaw, "draw", lambda self, schedule, rng, n: levels(schedule, rng.uniform(n)))
    expected = gradients(name, mixture, fitted, pairs, SD)
    for path, schedule in PATHS.items():
        found = gradients(name, mixture, fitted, pairs, schedule)
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            far = (found[key] - value).norm() / value.norm().clamp(min=1e-9)
            assert far < 2e-3, (path, key, far)
    assert any(value.norm() > 1e-6 for value in expected.values())


# --------------------------------------------------------------------------------------------------- the scale of Adam
def weights_of(trainer):
    return {
        f"{n}.{k}": w.detach().clone() for n, role in trainer.roles.items() for k, w in role.weights.items()
    }


@pytest.mark.parametrize("name", OPTIONS)
def test_adam_walks_as_on_the_loss_of_published_code(name, mixture, fitted, pairs, monkeypatch):
    """A sum over 16 entries for score identities and Diff-Instruct, else a mean, at an eps that outweighs gradients.

    At SD1.5's size a mean leaves Adam gradients 16,384 times smaller against eps 1e-8.
    """
    published = 16.0 if name in ("sid", "uni_instruct", "sim", "diff_instruct") else 1.0
    one = RoleConfig(kind="full", lr=1e-2, eps=1.0, weight_decay=0.0)
    ends = []
    for ours in (True, False):
        with monkeypatch.context() as patch:
            if not ours:
                patch.setattr(METHODS[name], "sums", False)
            trainer = trainer_of(
                name, mixture, fitted, pairs, batch_size=16, student=one, critic=one, heads=one
            )
        trainer.config.clip_norm = float("inf")
        begin = weights_of(trainer)
        if not ours:
            plain = trainer.backward
            trainer.backward = lambda loss, plain=plain: plain(published * loss)
        for _ in range(4):
            trainer.iterate()
        ends.append(weights_of(trainer))
    assert any((weight - begin[key]).norm() > 1e-4 for key, weight in ends[0].items())
    for key, weight in ends[0].items():
        torch.testing.assert_close(weight, ends[1][key], rtol=0, atol=1e-6)


# ------------------------------------------------------------------------------------------------------ distributions
def joint_distance(made, cond, mixture):
    """Energy distance of samples with their labels beside them."""
    beside = 3 * torch.nn.functional.one_hot(cond["label"]).float()
    data = mixture.sample(len(made), Rng(9), cond)
    return energy_distance(torch.cat([made, beside], 1), torch.cat([data, beside], 1))


def distance_after(trainer, mixture, step, count=3000):
    """Of what the student predicts in one of its steps."""
    student, cond = trainer.method.student, labels_of(mixture, Rng(8), count)
    noise = Rng(7).normal(count, 16)
    with (
        averaged(*(role for name, role in trainer.roles.items() if name.startswith("student"))),
        torch.no_grad(),
    ):
        if not hasattr(student, "rollout"):
            return joint_distance(student.sample(noise, cond, Rng(6).normal_like), cond, mixture)
        return joint_distance(student.rollout(noise, cond, Rng(6).normal_like, step), cond, mixture)


OTHERS = {
    "dmd",
    "sid",
    "sim",
    "fdistill",
    "swiftbrush",
    "diff_instruct",
    "disback",
}  # which reach the ring in files of their own


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.long) if name in OTHERS else name for name in OPTIONS]
)
def test_one_step_reaches_the_conditional_mixture(name, mixture, fitted, pairs):
    trainer = trainer_of(name, mixture, fitted, pairs, steps=300 if name in SOON else 500, batch_size=256)
    assert distance_after(trainer, mixture, 0) > 0.2
    trainer.train()
    assert distance_after(trainer, mixture, 0) < 0.05


@pytest.mark.long
@pytest.mark.parametrize("name", FEW)
def test_four_steps_come_closer_than_the_first_of_them_alone(name, mixture, fitted, pairs):
    steps = 600 if name == "dmd2" else 300
    trainer = trainer_of(name, mixture, fitted, pairs, FEW[name], steps=steps, batch_size=256)
    trainer.train()
    found = [distance_after(trainer, mixture, step) for step in (0, 3)]
    assert found[1] < 0.7 * found[0], found
