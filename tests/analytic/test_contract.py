"""What every registered method promises: it runs, touches only its own roles, and resumes bit for bit."""

import pytest
import torch
from token_toys import known_pairs, known_teacher, token_toy
from toys import SD, Mlp, Rows, TimedMlp, fit, toy, view

from fewstep.methods import METHODS
from fewstep.rng import Rng
from fewstep.teachers.analytic import GaussianMixture

GAN = {"gan_weight": 1e-2, "taps": ["layers.0"]}
OPTIONS = {
    "dmd2": {"num_steps": 2, "start": 999, "critic_steps": 2, **GAN},
    "phased_dmd": {"num_steps": 4, "critic_steps": 2},
    "fdistill": {"num_steps": 1, "start": 999, "critic_steps": 2, **GAN},
    "swiftbrush": {"guidance_scale": 1.0, "null_probability": 0.0},
    "hyper_sd": {"segments": [4, 1], "stage_teacher": "previous", "solver_steps": 8, "score_length": 1.0},
    "ladd": {"taps": ["layers.0", "layers.2"]},
    "sana_sprint": {"taps": ["layers.0", "layers.2"], "guidance_embedding": False, "guidance_scale": 1.0},
    "dd1": {"entries": [0, 2], "split": 2},
    "dd2": {"critic_steps": 2, "initial_share": 0.25, "regression_share": 0.25, "head_width": 16},
    "disback": {"nodes": 2, "record_steps": 2, "backtrack_steps": 2, "critic_steps": 1},
}
JUDGES = {"ladd", "sana_sprint"}  # they see through the teacher's own network
STEPS = 8


@pytest.fixture(scope="module")
def ring():
    return GaussianMixture.ring(SD, radius=2.2, std=0.2)


@pytest.fixture(scope="module")
def fitted(ring):
    torch.manual_seed(0)
    return fit(ring, Mlp(), steps=50)


def trainer_of(name, ring, fitted):
    method = METHODS[name]
    if name == "boot":
        torch.manual_seed(0)
        fitted = TimedMlp().requires_grad_(False)
    config = method.Config(**OPTIONS.get(name, {}))
    if method.teacher_kind == "autoregressive":
        teacher = known_teacher()
        return token_toy(method, config, teacher, STEPS, 16, known_pairs(teacher, 64))
    real = ring.sample(64, Rng("real")) if "images" in method.needs(config) else None
    teacher = view(fitted) if name in JUDGES else ring
    trainer = toy(method, config, teacher, fitted, steps=STEPS, batch_size=16, real=real)
    if "pairs" in method.needs(config):
        trainer.data.pairs = Rows(64, noise=Rng("n").normal(64, 2), x0=ring.sample(64, Rng("p")))
        trainer.data.pair_conditions = Rows(64, id=torch.arange(64))
    return trainer


def weights(trainer):
    return {
        f"{r}/{n}": w.detach().clone() for r, role in trainer.roles.items() for n, w in role.weights.items()
    }


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"multi_student"}))  # it has tests of its own
def test_a_method_runs_changes_only_what_a_phase_names_and_leaves_the_rest_alone(name, ring, fitted):
    trainer = trainer_of(name, ring, fitted)
    frozen = [p.clone() for p in fitted.parameters()]
    named = {role for phase in trainer.phases for role in phase.train}
    assert named == set(trainer.roles)  # nobody is built for nothing
    before = weights(trainer)
    inner, turns = trainer.turn, []

    def turn(phase, batches):
        start = weights(trainer)
        result = inner(phase, batches)
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


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"multi_student"}))
def test_a_resumed_run_ends_where_an_undisturbed_one_ends(name, ring, fitted, tmp_path):
    def run(folder, *stops):
        for stop in stops:
            trainer = trainer_of(name, ring, fitted)
            trainer.folder = tmp_path / folder
            trainer.restore()
            while trainer.progress.iteration < stop:
                trainer.iterate()
            trainer.save()
        return weights(trainer)

    once, twice = run("once", STEPS), run("twice", 3, 5, STEPS)
    assert all(once[key].equal(twice[key]) for key in once)
