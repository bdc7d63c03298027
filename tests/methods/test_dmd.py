"""DMD where everything is known: the regression term, the order of updates, and the ring."""

import pytest
import torch
from toys import NONE, SD, Mlp, Rows, distance, fit, toy

from fewstep.diffusion.rng import Rng
from fewstep.diffusion.solvers import ddim
from fewstep.errors import RecipeError
from fewstep.methods import Batch, Progress
from fewstep.methods.dmd import DMD
from fewstep.teachers.analytic import GaussianMixture


@pytest.fixture(scope="module")
def ring():
    return GaussianMixture.ring(SD, radius=2.2, std=0.2)


@pytest.fixture(scope="module")
def fitted(ring):
    torch.manual_seed(0)
    return fit(ring, Mlp())


@pytest.fixture(scope="module")
def pairs(ring):
    noise = Rng("pairs").normal(4096, 2)
    return noise, ddim(ring, noise, NONE, 40)


def paired(ring, fitted, pairs, steps=500, **options):
    trainer = toy(DMD, DMD.Config(**options), ring, fitted, steps=steps)
    trainer.data.pairs = Rows(len(pairs[0]), noise=pairs[0], x0=pairs[1])
    trainer.data.pair_conditions = Rows(len(pairs[0]), id=torch.arange(len(pairs[0])))
    return trainer


def batch(trainer, i=0):
    return trainer.data.batch(i, 0)


def test_the_regression_alone_learns_the_teachers_map_without_a_critic(ring, fitted, pairs):
    trainer = paired(ring, fitted, pairs, steps=300, matching_weight=0.0)
    assert set(trainer.roles) == {"student"} and trainer.method.critic is None
    assert set(trainer.method.generator_loss(batch(trainer), Progress())) == {"regression"}
    noise = Rng("held out").normal(512, 2)
    truth = ddim(ring, noise, NONE, 40)
    error = lambda: (trainer.method.student.sample(noise, NONE, torch.randn_like) - truth).square().mean()  # noqa: E731
    before = error()
    trainer.train()
    assert error() < 0.15 * before


def test_the_student_has_its_turn_every_so_many_updates_of_a_critic_that_sees_fresh_samples_meanwhile(
    ring, fitted, pairs
):
    trainer = paired(ring, fitted, pairs, steps=4, critic_steps=2)
    seen, inner = [], trainer.method.generate
    trainer.method.generate = lambda noise, cond, batch: seen.append(len(noise)) or inner(noise, cond, batch)
    for _ in range(4):
        trainer.iterate()
    assert trainer.updates == {"student": 2, "critic": 4}
    fresh = trainer.config.batch_size
    assert seen == [2 * fresh, fresh, 2 * fresh, fresh]  # on its own turn with the pairs


@pytest.mark.parametrize("match_pairs", [False, True])
def test_pairs_keep_their_own_conditions_in_every_network(ring, fitted, pairs, match_pairs):
    """Those of the student's one forward, and of teacher and critic where pairs are matched too."""
    trainer = paired(ring, fitted, pairs, match_pairs=match_pairs)
    trainer.data.pair_conditions = Rows(len(pairs[0]), id=10_000 + torch.arange(len(pairs[0])))
    method, sample, seen = trainer.method, batch(trainer), {}

    def watched(name, view):
        plain = view.x0
        view.x0 = lambda x, t, cond, **options: (
            seen.update({name: cond["id"]}) or plain(x, t, cond, **options)
        )

    watched("student", method.student.denoiser), watched("critic", method.critic)
    free, both = sample.cond["id"], torch.cat([sample.cond["id"], sample.pair_cond["id"]])
    assert (sample.pair_cond["id"] >= 10_000).all() and (free < 10_000).all()
    method.generator_loss(sample, Progress())
    assert seen["student"].equal(both) and seen["critic"].equal(both if match_pairs else free)
    seen.clear()
    method.critic_loss(sample, Progress())
    assert seen["critic"].equal(both if match_pairs else free)


def test_the_regression_gradient_is_that_of_the_weighted_squared_error(ring, fitted, pairs):
    trainer = paired(ring, fitted, pairs, regression_weight=0.5)
    method, sample = trainer.method, batch(trainer)
    loss = method.generator_loss(sample, Progress())["regression"]
    made = method.student.x0(sample.pairs[0], 0, NONE)
    assert loss.item() == pytest.approx(0.5 * (made - sample.pairs[1]).square().mean().item(), rel=1e-5)
    loss.backward()
    assert any(w.grad.abs().sum() > 0 for w in trainer.roles["student"].weights.values())


@pytest.mark.parametrize("match_pairs", [False, True])
def test_the_critic_learns_from_the_very_samples_of_the_students_turn(ring, fitted, pairs, match_pairs):
    trainer = paired(ring, fitted, pairs, match_pairs=match_pairs)
    method, sample = trainer.method, batch(trainer)
    method.generator_loss(sample, Progress())
    x0 = sample.carry["x0"]
    assert len(x0) == 512 * (1 + match_pairs) and not x0.requires_grad
    assert method.critic_loss(sample, Progress())["denoising"].requires_grad
    assert [phase.name for phase in method.phases()] == ["generator", "critic"]
    trainer.iterate()
    assert trainer.updates == {"student": 1, "critic": 1}


def test_without_regression_no_pairs_are_needed(ring, fitted):
    config = DMD.Config(regression_weight=0.0)
    assert DMD.needs(config) == ("prompts",) and "pairs" in DMD.needs(DMD.Config())
    losses = toy(DMD, config, ring, fitted).method.generator_loss(
        Batch(NONE, (8, 2), Rng(0), Rng(1)), Progress()
    )
    assert set(losses) == {"dm"}


def test_a_weight_scales_the_score_difference(ring, fitted, pairs):
    one, third = (paired(ring, fitted, pairs, matching_weight=w) for w in (1.0, 1 / 3))
    losses = [t.method.generator_loss(batch(t), Progress()) for t in (one, third)]
    assert losses[1]["dm"].item() == pytest.approx(losses[0]["dm"].item() / 3, rel=1e-5)
    assert losses[1]["regression"].item() == losses[0]["regression"].item()
    with pytest.raises(RecipeError, match=r"method\.matching_weight: 0\.0: expected a positive number with"):
        DMD.Config(matching_weight=0.0, regression_weight=0.0)


@pytest.mark.slow
def test_one_step_dmd_reaches_the_ring(ring, fitted, pairs):
    trainer = paired(ring, fitted, pairs, steps=450)
    assert distance(trainer, ring) > 1.0
    trainer.train()
    assert distance(trainer, ring) < 0.03
