"""What the loop itself promises: nothing is asked of the device within a step, and a bad update changes nothing."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from toys import SD, Mlp, fit, toy

from fewstep.diffusion.rng import Rng
from fewstep.methods import METHODS
from fewstep.teachers.analytic import GaussianMixture

GAN = {"gan_weight": 1e-2, "taps": ["layers.0"], "num_steps": 2, "start": 999, "critic_steps": 2}


class Questions(TorchDispatchMode):
    """Counts values asked of a tensor by the host, where a GPU's queue would have to drain first."""

    ASKED = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function in self.ASKED
        return function(*args, **(kwargs or {}))


@pytest.fixture
def ring():
    return GaussianMixture.ring(SD, radius=2.2, std=0.2)


def trainer_of(name, ring, options, **train):
    torch.manual_seed(0)
    method = METHODS[name]
    real = ring.sample(64, Rng("real"))
    return toy(
        method, method.Config(**options), ring, fit(ring, Mlp(), steps=5), batch_size=16, real=real, **train
    )


@pytest.mark.parametrize("name, options", [("dmd2", GAN), ("fdistill", GAN), ("sid", {}), ("sim", {})])
def test_the_host_asks_the_device_nothing_within_a_step(name, options, ring, monkeypatch):
    trainer = trainer_of(name, ring, options, steps=4)
    integer = lambda self, below: torch.randint(below, (1,), generator=self.generator).numpy()[0].item()  # noqa: E731
    monkeypatch.setattr(Rng, "integer", integer)  # drawn on the CPU: a GPU is not asked
    trainer.iterate()
    with Questions() as questions:
        trainer.iterate()
        trainer.iterate()
    assert questions.count == 0
    with Questions() as questions:
        trainer._record()
    assert questions.count == 0  # one transfer of all numbers, no question for each
    with Questions() as questions:
        bool(torch.ones(()))
    assert questions.count == 1


def test_an_update_without_a_finite_gradient_changes_neither_weights_nor_moments(ring):
    trainer = trainer_of("dmd2", ring, {**GAN, "gan_weight": 0.0}, steps=8)
    student = trainer.roles["student"]
    phase = trainer.phases[0]
    trainer.iterate()

    def state():
        moments = trainer.optimizers["student"].state
        return [t.clone() for w in student.weights.values() for t in (w.detach(), *moments[w].values())]

    before = state()
    for w in student.weights.values():
        w.grad = torch.full_like(w, float("inf"))
    trainer.update(phase, [student])
    assert all(a.equal(b) for a, b in zip(before, state()))
    assert not trainer.finite["generator"]
    for w in student.weights.values():
        w.grad = torch.ones_like(w)
    trainer.update(phase, [student])
    assert not any(a.equal(b) for a, b in zip(before, state()))
    assert trainer.finite["generator"]
