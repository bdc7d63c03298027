"""What every registered method promises: it runs, touches only its own roles, and resumes bit for bit."""

from dataclasses import replace
from functools import cache

import pytest
import torch
from processes import together
from safetensors.torch import load_file, save_file
from standin import deaf
from token_toys import known_pairs, known_teacher, token_toy
from toys import SD, Mlp, Rows, TimedMlp, fit, toy, view

from fewstep.diffusion.cond import Cond
from fewstep.diffusion.rng import Rng
from fewstep.errors import RecipeError
from fewstep.methods import METHODS
from fewstep.methods.base import Progress
from fewstep.teachers.analytic import GaussianMixture
from fewstep.training.sharding import whole

GAN = {"gan_weight": 1e-2, "taps": ["layers.0"]}
# Turns that only options bring.
VARIANTS = {
    "boot, heun": {"solver": "heun", "guidance_range": (1.0, 2.0)},
    "dmd2, real": {"student_input": "real", "num_steps": 2, "start": 999, **GAN},
    "dmd2, one noise": {"one_noise": True, "gan_time_range": (0.02, 0.98), **GAN},
    "hyper_sd, gan": {"segments": [2, 1], "guidance_range": (1.0, 2.0), **GAN},
    "phased_dmd, kl": {"weight": "kl", "critic_steps": 1},
    "sid, gan": {"num_steps": 2, "gan_schedule": (16, 32), "guidance_scale": 2.0, **GAN},
    "swiftbrush, null": {"guidance_scale": 2.0, "null_probability": 0.5},
}
JUDGES = {"ladd", "sana_sprint"}  # they see through the teacher's own network
STEPS = 8
LABELS = torch.arange(64) % 2


@cache
def teacher():
    """A ring of two labels, four modes each, and a network that knows it a little."""
    ring = GaussianMixture.ring(SD, radius=2.2, std=0.2)
    halves = GaussianMixture(SD, ring.means, ring.variances, torch.eye(2).repeat_interleave(4, 1) / 4)
    torch.manual_seed(0)
    return halves, fit(halves, Mlp(width=32, labels=2), steps=50)


@cache
def unlabelled():
    """The same ring without labels, and so without a null one."""
    ring = GaussianMixture.ring(SD, radius=2.2, std=0.2)
    torch.manual_seed(0)
    return ring, fit(ring, Mlp(width=32), steps=5)


def trainer_of(name, config=None, labels=2, **options):
    (halves, fitted), method = teacher() if labels else unlabelled(), METHODS[name]
    if name == "boot":
        torch.manual_seed(0)
        fitted = TimedMlp(labels=labels).requires_grad_(False)
    config = config or method.Config.toy()
    if method.teacher_kind == "autoregressive":
        tokens = known_teacher()
        return token_toy(method, config, tokens, STEPS, 16, known_pairs(tokens, 64), **options)
    cond = Cond({"label": LABELS}) if labels else None
    real = halves.sample(64, Rng("real"), cond) if "images" in method.needs(config) else None
    options = {"steps": STEPS, "batch_size": 16, "real": real, **options}
    options["labels"] = LABELS if labels else None
    judged = name in JUDGES or (name == "hyper_sd" and config.gan_weight)
    trainer = toy(method, config, view(fitted) if judged else halves, fitted, **options)
    if "pairs" in method.needs(config):
        trainer.data.pairs = Rows(64, noise=Rng("n").normal(64, 2), x0=halves.sample(64, Rng("p"), cond))
        trainer.data.pair_conditions = Rows(64, **({"label": LABELS} if labels else {"id": torch.arange(64)}))
    return trainer


def weights(trainer):
    return {
        f"{r}/{n}": w.detach().clone() for r, role in trainer.roles.items() for n, w in role.weights.items()
    }


@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_method_runs_changes_only_what_a_phase_names_and_leaves_the_rest_alone(name):
    trainer, (_, fitted) = trainer_of(name), teacher()
    frozen = [p.clone() for p in fitted.parameters()]
    named = {role for phase in trainer.phases for role in phase.train}
    assert named == set(trainer.roles)  # nobody is built for nothing
    before = weights(trainer)
    inner, turns = trainer.turn, []

    def turn(phase, batches):
        start = weights(trainer)
        result = inner(phase, batches)
        with deaf():  # on an accelerator the test may look
            changed = {
                key.split("/")[0] for key, value in weights(trainer).items() if not value.equal(start[key])
            }
        copied = name == "disback"  # a node takes over the weights of the one before it
        assert changed <= set(phase.train) or copied, (phase.name, changed)
        turns.append(phase.name)
        return result

    trainer.turn = turn
    for _ in range(STEPS):
        trainer.iterate()
    after = weights(trainer)
    assert {key.split("/")[0] for key in after if not after[key].equal(before[key])} == set(trainer.roles)
    assert all(a.equal(b) for a, b in zip(frozen, fitted.parameters()))
    assert set(turns) == {phase.name for phase in trainer.phases}
    assert all(value.isfinite().all() for value in after.values())


DIFFUSION = sorted(name for name, method in METHODS.items() if method.teacher_kind == "diffusion")


@pytest.mark.parametrize("name", [n for n in DIFFUSION if n != "multi_student"])  # which splits conditions
def test_a_teacher_without_a_null_condition_is_distilled_at_guidance_1_alone(name):
    """And what would need one is refused by the option that asks for it."""
    trainer, config = trainer_of(name, labels=0), METHODS[name].Config.toy()
    assert trainer.method.teacher.null is None
    before = weights(trainer)
    trainer.train()
    assert any(not w.equal(before[n]) for n, w in weights(trainer).items())
    learnt = {"null_probability": 0.1} if hasattr(config, "null_probability") else {}
    for option, value in {"guidance_scale": 3.0, "guidance_range": (1.0, 3.0)}.items():
        if hasattr(config, option):
            asking = replace(config, **{option: value}, **learnt)
            with pytest.raises(RecipeError, match=rf"^method\.{option}: 3: expected 1, .* no null condition"):
                trainer_of(name, asking, labels=0)


@pytest.mark.parametrize("name", VARIANTS)
def test_turns_that_only_options_bring_run_too(name):
    method = name.split(",")[0]
    trainer = trainer_of(method, METHODS[method].Config(**VARIANTS[name]))
    before = weights(trainer)
    for _ in range(STEPS):
        trainer.iterate()
    after = weights(trainer)
    assert {key.split("/")[0] for key in after if not after[key].equal(before[key])} == set(trainer.roles)
    assert all(value.isfinite().all() for value in after.values())


@pytest.mark.parametrize("name", sorted(METHODS))
def test_any_turn_can_be_taken_again_sample_by_sample(name):
    # As after an update without a finite gradient; all samples are good here.
    trainer, again = trainer_of(name), {phase.name for phase in trainer_of(name).phases if phase.loss}
    for step in range(STEPS):
        trainer.iterate()
        due = [p for p in trainer.phases if p.name in again and p.due(Progress(step, STEPS, 16))]
        for phase in due:
            trainer.progress.iteration = step
            assert trainer.rescue(phase)
            assert trainer.window.means()[f"{phase.name}/dropped"] == 0
            again.remove(phase.name)
        trainer.progress.iteration = step + 1
    assert not again
    assert all(value.isfinite().all() for value in weights(trainer).values())


@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_resumed_run_ends_where_an_undisturbed_one_ends(name, tmp_path):
    def run(folder, *stops):
        for stop in stops:
            trainer = trainer_of(name)
            trainer.folder = tmp_path / folder
            trainer.restore()
            while trainer.progress.iteration < stop:
                trainer.iterate()
            trainer.save()
        return weights(trainer)

    once, twice = run("once", STEPS), run("twice", 3, 5, STEPS)
    assert all(once[key].equal(twice[key]) for key in once)


def whole_run(name, process=None, folder=None, stops=(STEPS,)):
    """All trained weights after a run of two micro-batches an iteration, over one process or two, resumed at stops."""
    accumulate = 2 if process is None else 2 // process.world
    for stop in stops:
        trainer = trainer_of(name, accumulate=accumulate, process=process)
        trainer.folder = folder
        trainer.restore()
        while trainer.progress.iteration < stop:
            trainer.iterate()
        trainer.save()
    return {
        f"{name}/{role}/{key}": whole(weight).clone()
        for role, owner in trainer.roles.items()
        for key, weight in owner.weights.items()
    }


@pytest.mark.slow
def test_two_processes_train_what_one_trains_with_accumulation_and_resume_exactly(tmp_path):
    def both(process):
        found = {}
        for name in METHODS:
            found |= whole_run(name, process)
            resumed = whole_run(name, process, tmp_path / name, (3, STEPS))
            found |= {f"resumed/{key}": value for key, value in resumed.items()}
        if process.main:
            save_file(found, output)

    output = tmp_path / "weights.safetensors"
    together(2, both, tmp_path)
    two = load_file(output)
    for name in METHODS:
        one = whole_run(name)
        assert one.keys() == {key for key in two if key.startswith(name + "/")}
        far = {key: (one[key] - two[key]).abs().max().item() for key in one}
        assert max(far.values()) < 1e-4, (name, max(far, key=far.get), max(far.values()))
        assert all(two[key].equal(two[f"resumed/{key}"]) for key in one), name


GUIDED_BY_TIME = sorted(n for n in DIFFUSION if hasattr(METHODS[n].Config.toy(), "guidance_time_range"))


@pytest.mark.parametrize("name", GUIDED_BY_TIME)
def test_the_teacher_is_guided_at_the_times_of_guidance_time_range_alone(name, monkeypatch):
    learnt = {"null_probability": 0.1, "guide_critic": True} if name == "swiftbrush" else {}
    config = replace(METHODS[name].Config.toy(), guidance_scale=3.0, guidance_time_range=(0.4, 0.7), **learnt)
    trainer, asked = trainer_of(name, config), {"teacher": [], "critic": []}
    for who, seen in asked.items() if learnt else [("teacher", asked["teacher"])]:
        x0 = getattr(trainer.method, who).x0

        def spy(x, t, cond, *, guidance=1.0, x0=x0, seen=seen):
            seen.append((t, guidance))
            return x0(x, t, cond)

        monkeypatch.setattr(getattr(trainer.method, who), "x0", spy)
    for _ in range(STEPS):
        trainer.iterate()
    for seen in filter(None, asked.values()):  # a guided critic is guided where the teacher is
        scales = [(t, g) for t, g in seen if torch.is_tensor(g)]
        assert scales and all(torch.is_tensor(g) or g == 1.0 for _, g in seen)
        t, g = (torch.cat(parts) for parts in zip(*scales))
        assert g.equal(torch.where((t >= 400) & (t <= 700), 3.0, 1.0)) and 0 < (g == 3).sum() < len(g)
    assert bool(asked["critic"]) == bool(learnt)
