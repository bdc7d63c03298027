"""Numbers that go wrong: the sample is left out, then the update, then the run stops where it can be looked at."""

import json
import math
from dataclasses import replace

import pytest
import torch
from toys import SD, Mlp, fit, toy

from fewstep.diffusion.rng import Rng
from fewstep.errors import FewstepError, RecipeError, TrainingError
from fewstep.methods.dmd2 import DMD2
from fewstep.recipe import TrainConfig
from fewstep.report.health import PATIENCE, SIGNS, Watch, warnings
from fewstep.teachers.analytic import GaussianMixture
from fewstep.training import checkpoint

SIZE = 8


@pytest.fixture(scope="module")
def ring():
    return GaussianMixture.ring(SD, radius=2.2, std=0.2)


@pytest.fixture(scope="module")
def fitted(ring):
    torch.manual_seed(0)
    return fit(ring, Mlp(width=32), steps=30)


@pytest.fixture
def trainer(ring, fitted, tmp_path):
    return make(ring, fitted, tmp_path / "run")


def make(ring, fitted, folder=None, accumulate=1, process=None):
    config = DMD2.Config(num_steps=1, start=625, critic_steps=2, gan_weight=1e-2, taps=["layers.0"])
    real = ring.sample(64, Rng("real"))
    made = toy(DMD2, config, ring, fitted, 40, SIZE, real, accumulate=accumulate, process=process)
    made.folder, made.quiet = folder, True
    return made


def weights(trainer, role="student"):
    return torch.cat([w.detach().flatten().clone() for w in trainer.roles[role].weights.values()])


def poison(trainer, bad, value=math.nan, name="real"):
    """Real images of some rows are not finite, as after a damaged or overflown latent."""
    batch = trainer.data.batch

    def damaged(iteration, micro):
        made = batch(iteration, micro)
        for row in bad(iteration, micro):
            getattr(made, name)[row] = value
        return made

    trainer.data.batch = damaged


def said(trainer, monkeypatch):
    lines = []
    monkeypatch.setattr(trainer, "say", lines.append)
    return lines


# ------------------------------------------------------------------------------------------------- sample and update
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_sample_without_a_finite_gradient_is_left_out(trainer, monkeypatch, value):
    poison(trainer, lambda i, m: [3] if i == 1 else [], value)
    lines, before = said(trainer, monkeypatch), weights(trainer, "critic")
    trainer.iterate()
    trainer.iterate()
    assert not lines  # the host learns of it without waiting, one iteration later
    trainer.iterate()
    assert lines == [
        "step 1: critic: 1 of 8 samples left out, not finite: micro-batch 0 sample 3 (critic/discriminator)"
    ]
    assert not weights(trainer, "critic").equal(before) and weights(trainer, "critic").isfinite().all()
    means = trainer.window.means()
    assert means["critic/dropped"] == 1 and means["critic/denoising"].isfinite()
    assert trainer.divergence.skipped == {"generator": 0, "critic": 0}


def test_the_gradient_is_the_mean_of_the_samples_that_are_left(ring, fitted):
    trainer = make(ring, fitted)
    phase, roles = trainer.phases[1], [trainer.roles["critic"], trainer.roles["discriminator"]]
    trainer.turn(trainer.phases[0], [trainer.data.batch(0, 0)])
    for role in trainer.roles.values():
        role.requires_grad_(role in roles)
    batch, gradients = trainer.data.batch(0, 0), []
    for i in range(SIZE):
        one = batch.row(i, Rng(0, "rescue", 0, "critic", 0, i, 0))
        trainer.phases[0].loss(one, trainer.progress)
        sum(phase.loss(one, trainer.progress).values()).backward()
        gradients.append([w.grad for role in roles for w in role.weights.values()])
        for role in roles:
            trainer.optimizers[role.name].zero_grad()
    poison(trainer, lambda i, m: [2])
    got = []
    trainer.update = lambda phase, roles: got.extend(w.grad for role in roles for w in role.weights.values())
    assert trainer.rescue(phase)
    for j, value in enumerate(got):
        wanted = torch.stack([g[j] for i, g in enumerate(gradients) if i != 2]).mean(0)
        assert torch.allclose(value, wanted, atol=1e-6)
    assert len(got) == len(gradients[0])


def test_a_loss_that_is_not_finite_counts_even_where_its_gradient_is(trainer, monkeypatch):
    lines, loss = said(trainer, monkeypatch), trainer.phases[0].loss

    def infinite(batch, progress):
        return {"dm": loss(batch, progress)["dm"] + math.inf}

    trainer.phases[0] = replace(trainer.phases[0], loss=infinite)
    before = weights(trainer)
    trainer.iterate()
    trainer.divergence.settle()
    assert weights(trainer).equal(before) and trainer.divergence.skipped["generator"] == 1
    assert lines[0].startswith(
        "step 0: generator: update left out, not finite: micro-batch 0 sample 0 (generator/dm)"
    )
    assert lines[0].endswith("and 5 more")


def test_an_accumulated_update_keeps_its_good_micro_batches(ring, fitted, monkeypatch):
    trainer = make(ring, fitted, accumulate=3)
    poison(trainer, lambda i, m: range(SIZE) if m == 1 else [])
    lines = said(trainer, monkeypatch)
    before = weights(trainer, "critic")
    trainer.iterate()
    assert weights(trainer, "critic").equal(before)
    trainer.divergence.settle()
    assert "critic: 8 of 24 samples left out" in lines[0] and not weights(trainer, "critic").equal(before)


def test_a_good_update_is_what_it_was_without_the_check(ring, fitted):
    # The check reads the norm that clipping needs anyhow, and seeds the backward pass with exactly 1.
    trainer = make(ring, fitted)
    x = torch.tensor(3.0, requires_grad=True)
    trainer.backward(x * x)
    assert x.grad == 6
    y = torch.tensor(math.inf, requires_grad=True)
    trainer.backward(y * 1)
    assert y.grad.isnan()


# ------------------------------------------------------------------------------------------------ giving up, snapshot
def test_after_ten_updates_in_a_row_the_run_stops_and_the_snapshot_shows_it_again(ring, fitted, tmp_path):
    trainer = make(ring, fitted, tmp_path)
    poison(trainer, lambda i, m: range(SIZE) if i >= 5 else [])
    with pytest.raises(
        TrainingError, match=r"step 14: the gradient of critic and discriminator .* 10 times"
    ) as stop:
        trainer.train()
    assert f"fewstep replay {tmp_path}" in str(stop.value) and stop.value.code == 3
    at_stop = weights(trainer, "critic")
    again = make(ring, fitted)
    assert checkpoint.fault(tmp_path / "diverged") is None
    assert again.restore(tmp_path / "diverged") and again.progress.iteration == 15
    assert weights(again, "critic").equal(at_stop)
    poison(again, lambda i, m: range(SIZE))
    with pytest.raises(TrainingError, match="step 14"):
        again.iterate()
    healthy = make(ring, fitted)
    healthy.restore(tmp_path / "diverged")
    assert healthy.divergence.skipped["critic"] == 9
    healthy.iterate()
    assert healthy.divergence.skipped["critic"] == 0


def test_nine_in_a_row_are_survived(trainer):
    poison(trainer, lambda i, m: range(SIZE) if 2 <= i < 11 else [])
    trainer.train()
    assert trainer.progress.iteration == 40 and all(
        weights(trainer, r).isfinite().all() for r in trainer.roles
    )


def test_a_run_may_go_back_with_a_lower_rate(ring, fitted, tmp_path, monkeypatch):
    trainer = make(ring, fitted, tmp_path)
    trainer.config = TrainConfig(
        40, SIZE, checkpoint_every=4, log_every=1, keep=8, rollbacks=1, sample_every=0
    )
    seen = []
    # What diverges is cured by the lower rate.
    poison(trainer, lambda i, m: range(SIZE) if i >= 10 and trainer.rolled_back == 0 else [])
    rate = trainer.learning_rate

    def spy(role, phase):
        seen.append((trainer.progress.iteration, role.name, rate(role, phase)))
        return seen[-1][2]

    monkeypatch.setattr(trainer, "learning_rate", spy)
    lines = said(trainer, monkeypatch)
    trainer.train()
    assert "back to step 8, learning rates times 0.5" in lines[-1]
    before, after = (r for i, name, r in seen if i == 9 and name == "critic")
    assert after == before / 2
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 41))
    # It stops when that is used up, and never returns to a checkpoint within the streak.
    other = make(ring, fitted, tmp_path / "b")
    other.config = trainer.config
    poison(other, lambda i, m: range(SIZE) if i >= 10 else [])
    lines = said(other, monkeypatch)
    with pytest.raises(TrainingError, match="step 19"):
        other.train()
    assert sum("back to step" in line for line in lines) == 1


def test_a_student_that_has_not_changed_is_an_error(ring, fitted, tmp_path, monkeypatch):
    trainer = make(ring, fitted, tmp_path)
    monkeypatch.setattr(trainer, "update", lambda phase, roles: torch.zeros(()))
    with pytest.raises(
        TrainingError,
        match=r"the weights of student have not changed in 40 steps; look at roles\.student\.lr",
    ):
        trainer.train()
    # Also over a restart: the first weights are part of the checkpoint.
    resumed = make(ring, fitted, tmp_path)
    assert resumed.restore()
    with pytest.raises(TrainingError, match="have not changed"):
        resumed.train()


def test_a_turn_again_runs_before_it_what_is_due_and_logs_its_own_numbers_only(trainer):
    trainer.iterate()
    calls, loss = [], trainer.phases[0].loss
    spy = lambda batch, progress: (calls.append(progress.iteration), loss(batch, progress))[1]  # noqa: E731
    trainer.phases[0] = replace(trainer.phases[0], loss=spy)
    counts = dict(trainer.window.counts)
    for step, times in ((0, SIZE), (1, 0)):  # the generator's turn comes every second iteration
        trainer.progress.iteration = step
        calls.clear()
        assert trainer.rescue(trainer.phases[1]) and len(calls) == times
    assert trainer.window.counts["health/critic_lag"] == counts["health/critic_lag"]
    assert trainer.window.counts["critic/denoising"] == counts["critic/denoising"] + 2


def test_a_row_of_a_batch_is_a_batch(trainer):
    batch = trainer.data.batch(0, 0)
    one = batch.row(3, Rng("row"))
    assert one.shape == (1, 2) and one.real.equal(batch.real[3:4]) and one.index.equal(batch.index[3:4])
    assert len(one.cond) == len(one.real_cond) == 1 and one.carry == one.log == {}


def test_a_good_update_ends_a_streak_and_only_a_bad_one_takes_the_snapshot(trainer):
    watched = trainer.divergence
    watched.skipped["critic"] = watched.MAX_SKIPPED - 1
    watched.note(0, {"critic": torch.tensor(True)})
    assert not watched.at_the_end()
    watched.settle()
    assert watched.skipped["critic"] == 0
    watched.skipped["critic"] = watched.MAX_SKIPPED - 1
    watched.note(1, {"critic": torch.tensor(False)})
    assert watched.at_the_end()
    watched.last = type(watched.last)()
    poison(trainer, lambda i, m: [0])
    watched.note(0, {"critic": torch.tensor(False)})
    watched.settle()
    assert trainer.finite == {}  # what the turn again found is no part of the next iteration


def test_the_last_iteration_is_looked_at_too(trainer, monkeypatch):
    poison(trainer, lambda i, m: [0] if i == 39 else [])
    lines = said(trainer, monkeypatch)
    trainer.train()
    assert any("step 39: critic: 1 of 8 samples left out" in line for line in lines)


def test_roll_backs_are_counted_over_the_checkpoints_they_return_to(ring, fitted, tmp_path):
    trainer = make(ring, fitted, tmp_path)
    trainer.config = TrainConfig(40, SIZE, checkpoint_every=4, keep=8, rollbacks=2, sample_every=0)
    poison(trainer, lambda i, m: range(SIZE) if i >= 5 else [])
    with pytest.raises(TrainingError, match="step 14"):
        trainer.train()
    assert trainer.rolled_back == 2
    assert checkpoint.every(tmp_path / "checkpoints")[0].name == "step_00000004"
    trainer.save()
    again = make(ring, fitted, tmp_path)
    assert again.restore() and again.rolled_back == 2


def test_means_go_on_and_a_signal_judges_nothing(ring, fitted, tmp_path):
    trainer = make(ring, fitted, tmp_path)
    trainer.config = TrainConfig(40, SIZE, checkpoint_every=4, best="critic/denoising", sample_every=0)
    trainer.iterate()
    trainer._record()
    trainer.iterate()
    trainer.save()  # not a step at which the best is judged
    assert not trainer.best
    again = make(ring, fitted, tmp_path)
    assert again.restore()
    for one, two in ((trainer.window, again.window), (trainer.judged, again.judged)):
        assert one.counts and one.counts == two.counts
        assert all(two.sums[name].item() == pytest.approx(value.item()) for name, value in one.sums.items())


def test_a_checkpoint_of_other_weights_is_refused(ring, fitted, tmp_path):
    make(ring, fitted, tmp_path).save()
    wider, fewer = make(ring, Mlp(width=16).requires_grad_(False), tmp_path), make(ring, fitted, tmp_path)
    del fewer.roles["critic"]
    for other, odd in ((wider, r"critic/weight/layers\.0\.bias"), (fewer, "critic/weight/")):
        with pytest.raises(FewstepError, match=rf"step_00000000: .*e\.g\. .*{odd}.*; resume its own run"):
            other.restore()


def test_impossible_options():
    for field, value in (
        ("rollbacks", -1),
        ("rollback_lr", 0.0),
        ("clip_norm", 0.0),
        ("checkpoint_every", -1),
    ):
        with pytest.raises(RecipeError, match=rf"train\.{field}: {value}"):
            TrainConfig(1, **{field: value})


# ------------------------------------------------------------------------------------------------------------ warnings
@pytest.mark.parametrize(
    "metric, value, cause",
    [
        ("health/critic_lag", 0.9, "critic does not know"),
        ("health/critic_lag_2", -0.9, "critic does not know"),
        ("health/latent_mean", 0.8, "drift"),
        ("health/latent_std", 0.1, "collapse"),
        ("health/latent_std", 2.5, "saturate"),
        ("generator/grad_norm", 0.0, "no gradient arrives"),
        ("critic/dropped", 2.0, "no finite gradient"),
    ],
)
def test_what_leaves_its_normal_range_is_said_once_with_cause_and_remedy(metric, value, cause):
    watch = Watch()
    found = [watch.read({"step": i, metric: value}) for i in range(2 * PATIENCE)]
    assert [len(lines) for lines in found] == [0] * (PATIENCE - 1) + [1] + [0] * PATIENCE
    assert cause in found[PATIENCE - 1][0] and f"{metric} is {value:.3g} (normal: " in found[PATIENCE - 1][0]
    # A single value out of range is an accident, and a recovery is forgiven.
    ups = [
        {metric: value},
        {metric: value},
        {metric: (0.0 if "grad" not in metric else 1.0) + ("std" in metric)},
    ]
    watch = Watch()
    assert not any(watch.read(record) for record in ups * 5)
    assert warnings([{"step": i, metric: value} for i in range(5)])[0].startswith(f"step {PATIENCE - 1}: ")


def test_healthy_numbers_and_other_metrics_raise_nothing():
    record = {
        "step": 1,
        "health/critic_lag": 0.1,
        "health/latent_std": 1.1,
        "generator/dm": 1e9,
        "critic/x": None,
    }
    assert not any(Watch().read(record) for _ in range(9))
    assert all(sign.low < sign.high and (sign.below or sign.above) for sign in SIGNS)


def test_a_resumed_run_goes_on_counting():
    early = [{"step": i, "health/latent_std": 3.0} for i in range(PATIENCE - 1)]
    assert len(Watch(early).read({"health/latent_std": 3.0})) == 1


def test_the_report_shows_the_warnings(tmp_path):
    from fewstep.report.report import write_report

    rows = [{"step": i, "health/latent_std": 2.5, "generator/<b>": 1.0} for i in range(1, 6)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = write_report(tmp_path).read_text()
    assert (
        "step 3: health/latent_std is 2.5 (normal: near 1" in page
        and "<b>latent_std</b>: normal is near 1" in page
    )


def test_the_last_update_of_a_phase_is_made_good_before_its_roles_begin_again(trainer, monkeypatch):
    """Otherwise what is left of it would be added to weights and moments that are new."""
    critic = trainer.phases[1]
    begun = replace(critic, name="critic_2", share=(0.125, 1.0), fresh=("critic",))
    trainer.phases[1:] = [replace(critic, share=(0.0, 0.125)), begun]
    trainer.divergence.skipped["critic_2"] = 0
    poison(trainer, lambda i, m: [3] if i == 4 else [])
    lines = said(trainer, monkeypatch)
    for _ in range(6):
        trainer.iterate()
    trainer.divergence.settle()
    assert [line.split(":")[0] for line in lines] == ["step 4"]
    assert trainer.optimizers["critic"].state_dict()["state"][0]["step"] == 1
