"""Two real processes (gloo) that go wrong on one of them: both take the same decision, at the same step."""

import math
import os
import signal

import pytest
import torch
from processes import together
from test_divergence import SIZE, make, poison
from toys import SD, Mlp, fit

from fewstep.errors import Interrupted, TrainingError
from fewstep.recipe import TrainConfig
from fewstep.teachers.analytic import GaussianMixture
from fewstep.training import checkpoint
from fewstep.training.sharding import whole


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    ring = GaussianMixture.ring(SD, radius=2.2, std=0.2)
    torch.manual_seed(0)
    fitted, folder = fit(ring, Mlp(width=8), steps=30), tmp_path_factory.mktemp("ranks")

    def trainer_of(process, name, steps=24, **config):
        trainer = make(ring, fitted, folder / name, process=process)
        config = {"checkpoint_every": 2, "log_every": 1, "keep": 20, "sample_every": 0, **config}
        trainer.config = TrainConfig(steps, SIZE, **config)
        trainer.progress.steps, trainer.lines = steps, []
        trainer.say = trainer.lines.append
        return trainer

    def total(trainer):
        return [float(whole(w).double().sum()) for r in trainer.roles.values() for w in r.weights.values()]

    def on(process, rows):
        """Micro-batches of rank 1 only; the micro-batch's number is the rank's where nothing is accumulated."""
        return lambda iteration, micro: rows(iteration) if micro == 1 else []

    def everything(process):
        answers = {}
        trainer = trainer_of(process, "sample", steps=4)
        poison(trainer, on(process, lambda i: [3] if i == 1 else []))
        trainer.train()
        answers["sample"] = trainer.lines, total(trainer), trainer.divergence.skipped

        trainer = trainer_of(process, "stop", rollbacks=1)
        poison(trainer, on(process, lambda i: range(SIZE) if i >= 5 else []))
        try:
            trainer.train()
        except TrainingError as error:
            answers["stop"] = (
                str(error),
                trainer.rolled_back,
                [line for line in trainer.lines if "back" in line],
            )

        trainer = trainer_of(process, "signal", steps=6)
        iterate = trainer.iterate

        def signalled():
            if trainer.progress.iteration == 2 and process.rank == 1:
                os.kill(os.getpid(), signal.SIGUSR1)
            iterate()

        trainer.iterate = signalled
        try:
            trainer.train()
        except Interrupted as error:
            answers["signal"] = error.step, error.code, total(trainer)

        # The newest checkpoint is damaged, and what a rank other than the first finds is of no weight.
        if process.main:
            (folder / "signal" / "checkpoints" / "step_00000003" / "state.json").write_text("{}")
        process.barrier()
        resumed = trainer_of(process, "signal", steps=6)
        if not process.main:
            checkpoint.newest = lambda *_: None
        assert resumed.restore()
        answers["resumed"] = resumed.progress.iteration
        resumed.train()
        straight = trainer_of(process, "straight", steps=6)
        straight.train()
        answers["exact"] = all(a == b for a, b in zip(total(resumed), total(straight)))
        return answers

    return together(2, everything, folder), folder


def test_a_sample_that_is_bad_on_one_rank_is_left_out_on_both(found):
    (one, two), _ = found
    lines, weights, skipped = one["sample"]
    assert len(lines) == 1 and "step 1: critic: 1 of 8 samples left out" in lines[0]
    assert all(math.isfinite(value) for value in weights) and not any(skipped.values())
    assert two["sample"][1:] == one["sample"][1:] and len(two["sample"][0]) == 1


def test_both_go_back_and_give_up_together(found):
    (one, two), folder = found
    assert one["stop"][0] == two["stop"][0] and "step 14: the gradient of critic" in one["stop"][0]
    assert one["stop"][1] == two["stop"][1] == 1
    assert (
        one["stop"][2] == two["stop"][2] and "back to step 4, learning rates times 0.5" in one["stop"][2][0]
    )
    assert checkpoint.fault(folder / "stop" / "diverged") is None


def test_a_signal_to_one_rank_stops_both_after_the_same_step(found):
    (one, two), folder = found
    assert one["signal"][0] == two["signal"][0] == 3
    assert (one["signal"][1], two["signal"][1]) == (128 + signal.SIGTERM, 128 + signal.SIGUSR1)
    assert one["signal"][2] == two["signal"][2]


def test_both_resume_from_what_the_first_rank_finds(found):
    (one, two), _ = found
    assert one["resumed"] == two["resumed"] == 2
    assert one["exact"] and two["exact"]
