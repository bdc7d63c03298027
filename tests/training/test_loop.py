"""What the loop itself promises: nothing is asked of the device within a step, and a bad update changes nothing."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from toys import SD, Mlp, fit, toy

from fewstep.diffusion.rng import Rng
from fewstep.methods import METHODS
from fewstep.methods.base import Phase, Progress
from fewstep.teachers.analytic import GaussianMixture
from fewstep.training import checkpoint

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


def due(phase, steps=12):
    return [i for i in range(steps) if phase.due(Progress(i, steps))]


def test_a_phase_that_is_due_once_is_so_where_its_share_or_its_condition_begins():
    assert due(Phase("", (), None, once=True)) == [0]
    assert due(Phase("", (), None, once=True, share=(0.25, 1.0))) == [3]
    later = lambda progress: progress.iteration >= 5  # noqa: E731
    assert due(Phase("", (), None, once=True, when=later)) == [5]
    assert due(Phase("", (), None, once=True, when=later, share=(0.5, 1.0))) == [6]
    assert due(Phase("", (), None, once=True, when=later, share=(0.0, 0.25))) == []
    twice = lambda progress: progress.iteration % 6 < 2  # noqa: E731
    assert due(Phase("", (), None, once=True, when=twice)) == [0, 6]
    assert due(Phase("", (), None, share=(0.25, 0.5), every=2)) == [3, 5]


def test_weights_are_copied_before_the_first_turn_and_not_again(ring):
    trainer = trainer_of(
        "dmd2", ring, {"num_steps": 1, "critic_steps": 1, "start": 625, "gan_weight": 0.0}, steps=4
    )
    flat = lambda name: torch.cat([w.detach().flatten() for w in trainer.roles[name].weights.values()])  # noqa: E731
    copies = Phase("copy", ("critic",), None, once=True, share=(0.5, 1.0), follows=("student", 0.0))
    trainer.phases.insert(0, copies)
    seen, turn = [], trainer.turn

    def watched(phase, batches):
        result = turn(phase, batches)
        seen.append((trainer.progress.iteration, phase.name, flat("critic").equal(flat("student"))))
        return result

    trainer.turn = watched
    for _ in range(4):
        trainer.iterate()
    assert [(i, same) for i, name, same in seen if name == "copy"] == [(2, True)]
    assert not any(same for i, name, same in seen if i > 2 or name == "critic")


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_gradient_is_the_mean_of_micro_batches_and_no_longer_than_it_may_be(accumulate, ring, monkeypatch):
    trainer = trainer_of("dmd2", ring, {**GAN, "gan_weight": 0.0}, steps=8, accumulate=accumulate)
    phase = next(phase for phase in trainer.phases if phase.name == "critic")
    weights = list(trainer.roles["critic"].weights.values())
    taken = []
    monkeypatch.setattr(
        "fewstep.training.trainer.take_step", lambda *_: taken.append([w.grad.clone() for w in weights])
    )
    for clip in (1e9, 1e-3):
        trainer.config.clip_norm = clip
        trainer.turn(phase, trainer.batches(0))
    parts = [
        torch.autograd.grad(sum(phase.loss(batch, trainer.progress).values()), weights)
        for batch in trainer.batches(0)
    ]
    mean = [torch.stack(gradients).mean(0) for gradients in zip(*parts)]
    whole, clipped = taken
    for gradient, wanted in zip(whole, mean):
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-8)
    length = torch.cat([g.flatten() for g in clipped]).norm().item()
    assert length == pytest.approx(1e-3, rel=1e-3) and torch.cat([g.flatten() for g in whole]).norm() > 1e-2


def test_cpu_seconds_are_the_process_own_go_on_after_a_stop_and_are_unknown_of_older_runs(
    ring, tmp_path, monkeypatch
):
    clock = [100.0]
    monkeypatch.setattr("fewstep.training.trainer.time.process_time", lambda: clock[0])

    def run(steps):
        trainer = trainer_of("sid", ring, {}, steps=steps)
        trainer.folder, iterate = tmp_path / "run", trainer.iterate

        def costs():
            iterate()
            clock[0] += 2.5

        trainer.iterate = costs
        trainer.restore()
        trainer.train()
        return trainer

    assert run(2).cpu_seconds == 5
    clock[0] = 3.0  # another process has its own
    assert run(4).cpu_seconds == 10
    monkeypatch.setattr("fewstep.training.checkpoint.load", without_cpu_seconds(checkpoint.load))
    assert run(5).cpu_seconds is None


def without_cpu_seconds(load):
    """A checkpoint as earlier releases wrote it."""

    def older(*args):
        state = load(*args)
        del state["cpu_seconds"]
        return state

    return older
