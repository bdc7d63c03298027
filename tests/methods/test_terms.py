"""The terms that methods share, by hand; their options; rows of a micro-batch."""

import math
from dataclasses import dataclass

import pytest
import torch
from toys import NONE, SD

from fewstep.diffusion.cond import Cond
from fewstep.diffusion.rng import Rng
from fewstep.diffusion.schedules import EDM, Flow
from fewstep.errors import RecipeError
from fewstep.methods import METHODS, Batch, terms
from fewstep.methods.base import Expected, Options


class Linear:
    """x0 = scale x_t + guidance."""

    def __init__(self, scale, schedule=SD, prediction="x0"):
        self.scale, self.schedule, self.prediction = scale, schedule, prediction

    def x0(self, x_t, t, cond, *, guidance=1.0):
        return self.scale * x_t + (guidance[:, None] if torch.is_tensor(guidance) else guidance)


def batch(rows=4, **fields):
    return Batch(Cond({"label": torch.arange(rows)}), (rows, 3), Rng(0), Rng(1), **fields)


# ------------------------------------------------------------------------------------------------- the critic's
@pytest.mark.parametrize("kind", ["native", "x0", "eps", "v", "edm", "scaled_eps"])
def test_the_critics_regression_by_hand(kind):
    scale = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    critic, t = Linear(scale, prediction="v"), torch.tensor([10, 500, 900])
    target, x_t = (Rng(i).normal(3, 5).double() for i in (2, 3))
    target.requires_grad_()
    factor = torch.tensor([1.0, 2.0, 0.5])
    loss = terms.regression(critic, kind, target, x_t, t, NONE, guidance=2.0, factor=factor)
    a, s = SD.alpha(t), SD.sigma(t)
    weight = {"native": 1 / s**2, "v": 1 / s**2, "x0": torch.ones(3), "eps": (a / s) ** 2}
    weight |= {"edm": (a / s) ** 2 + 4, "scaled_eps": a**2 * (a / s) ** 2}
    error = ((0.7 * x_t + 2 - target) ** 2).mean(1)
    assert loss.item() == pytest.approx((weight[kind] * factor * error).mean().item(), rel=1e-6)
    loss.backward()
    assert scale.grad and target.grad is None


def test_a_sample_that_is_not_finite_teaches_the_critic_nothing():
    scale = torch.tensor(0.7, requires_grad=True)
    target, x_t, t = Rng(2).normal(4, 5), Rng(3).normal(4, 5), torch.tensor([10, 500, 900, 30])
    good = terms.regression(Linear(scale), "x0", target[:3], x_t[:3], t[:3], NONE)
    target[3, 1] = x_t[3, 1] = torch.nan
    loss = terms.regression(Linear(scale), "x0", target, x_t, t, NONE)
    torch.testing.assert_close(loss, good * 3 / 4)
    (gradient,) = torch.autograd.grad(loss, scale)
    assert gradient.isfinite() and gradient != 0


@pytest.mark.parametrize("name", sorted(METHODS))
def test_no_method_that_has_a_critic_is_lost_to_one_bad_sample(name):
    from test_contract import STEPS, trainer_of

    trainer = trainer_of(name)
    if "critic" not in trainer.roles or name == "dd2":  # whose samples are tokens
        pytest.skip("no critic of samples")
    for _ in range(STEPS):
        progress, batches = trainer.progress, trainer.batches(trainer.progress.iteration)
        for phase in trainer.phases:
            if phase.loss is None or not phase.due(progress):
                continue
            losses = phase.loss(batches[0], progress)
            for held in [batches[0], *batches[0].carry.get("parts", [])]:
                if "x0" in held.carry:
                    held.carry["x0"] = held.carry["x0"].clone()
                    held.carry["x0"][0] = torch.nan
            if "critic" in phase.name and "denoising" in losses:
                assert losses["denoising"].isfinite(), (name, phase.name)
        trainer.progress.iteration += 1


# -------------------------------------------------------------------------------------------- the score difference
def test_matching_by_hand():
    config = terms.Matching(guidance_scale=3.0, weight="kl", time_range=(0.3, 0.6))
    x0, made = Rng(5).normal(4, 3).double().requires_grad_(), batch()
    loss = terms.matching(config, Linear(0.5), Linear(0.2), x0, NONE, made)
    rng = Rng(0)
    t = SD.draw_times(rng.uniform(4), 0.3, 0.6)
    x_t = SD.add_noise(x0, rng.normal_like(x0), t)
    weight = (SD.alpha(t) / SD.sigma(t)) ** 2
    expected = weight[:, None] * ((0.2 * x_t + 1) - (0.5 * x_t + 3)) / 12  # only the teacher is guided
    (found,) = torch.autograd.grad(loss, x0)
    torch.testing.assert_close(found, expected.detach())
    assert made.log.keys() == {"critic_lag", "latent_mean", "latent_std"}


@pytest.mark.parametrize(
    "schedule", [SD, Flow(), EDM(), Flow(shift=3.0)], ids=["vp", "flow", "edm", "shifted"]
)
def test_the_teacher_is_guided_at_some_times_as_fractions_of_the_schedule(schedule):
    """Of noise levels drawn as the score difference draws them, a quarter each below and above the range."""
    config = terms.Matching(guidance_scale=3.0, guidance_time_range=(0.25, 0.75), weight="one")
    t = schedule.draw_times((torch.arange(8) + 0.5) / 8)
    found = config.guidance_at(t, schedule)
    assert found.tolist() == [1.0, 1.0, 3.0, 3.0, 3.0, 3.0, 1.0, 1.0]
    ends = schedule.draw_times(torch.tensor([0.25, 0.75]))
    assert config.guidance_at(ends, schedule).tolist() == [3.0, 3.0]
    whole = terms.Matching(guidance_scale=3.0, guidance_time_range=[0.0, 1.0])
    assert whole.guidance_at(t, schedule) == 3.0  # a number: a teacher that is not guided has one forward
    x0, made = Rng(5).normal(64, 3).double().requires_grad_(), batch(64)
    plain = Linear(0.5, schedule)
    loss = terms.matching(config, plain, Linear(0.5, schedule), x0, NONE, made)
    (moved,) = torch.autograd.grad(loss, x0)
    t = schedule.draw_times(Rng(0).uniform(64), *config.time_range)
    expected = 1 - config.guidance_at(t, schedule)  # fake - real, where all else is the same
    assert {*expected.tolist()} == {0.0, -2.0}
    torch.testing.assert_close(moved, expected[:, None].expand(64, 3).double() / (64 * 3), check_dtype=False)


@pytest.mark.parametrize("schedule", [SD, Flow()], ids=["vp", "flow"])
def test_a_log_normal_law_of_times_is_edms(schedule):
    config = terms.Matching(time_law="log_normal", weight="one")
    _, t = config.noised(torch.zeros(20000, 3), schedule, batch())
    level = (schedule.sigma(t) / schedule.alpha(t)).log().double()
    assert level.mean().item() == pytest.approx(-1.2, abs=0.03)
    assert level.std().item() == pytest.approx(1.2, abs=0.03)
    x0, made = Rng(5).normal(64, 3).double().requires_grad_(), batch(64)
    loss = terms.matching(config, Linear(0.5, schedule), Linear(0.2, schedule), x0, NONE, made)
    (moved,) = torch.autograd.grad(loss, x0)
    x_t, _ = config.noised(x0, schedule, batch(64))
    torch.testing.assert_close(moved, ((0.2 - 0.5) * x_t).detach() / (64 * 3))


@pytest.mark.parametrize(
    "name, options, said",
    [
        (
            "dmd2",
            {"time_range": (0.0, 0.5)},
            r"time_range: \(0\.0, 0\.5\): expected \(0\.02, 0\.98\) with time_law",
        ),
        (
            "dmd2",
            {"one_noise": True, "gan_time_range": (0.02, 0.98)},
            "one_noise: true: expected .*time_law uniform",
        ),
        ("fdistill", {}, "time_law: log_normal: expected uniform"),
        ("phased_dmd", {}, "time_law: log_normal: expected uniform"),
    ],
)
def test_a_law_that_has_no_range_or_a_method_cannot_have_is_refused(name, options, said):
    with pytest.raises(RecipeError, match=rf"^method\.{said}"):
        METHODS[name].Config(time_law="log_normal", **options)


def test_a_further_weight_multiplies_the_difference_sample_by_sample():
    x0, t = Rng(5).normal(3, 2).requires_grad_(), torch.tensor([0.2, 0.5, 0.9])
    real, fake = torch.zeros(3, 2), torch.ones(3, 2)
    loss = terms.difference("one", x0, real, fake, Flow(), t, batch(3), torch.tensor([1.0, 0.0, 3.0]))
    (found,) = torch.autograd.grad(loss, x0)
    torch.testing.assert_close(found, torch.tensor([[1.0, 1.0], [0.0, 0.0], [3.0, 3.0]]) / 6)


def test_samples_are_made_once_an_iteration_and_without_gradient():
    weight, calls = torch.ones(2, requires_grad=True), []
    made = batch()
    first, second = (terms.carried(made, lambda: calls.append(0) or 2 * weight) for _ in range(2))
    assert first is second and len(calls) == 1 and not first.requires_grad


# ---------------------------------------------------------------------------------------------------------- options
def test_each_group_says_what_it_expects_and_the_first_fault_is_told():
    @dataclass
    class Config(terms.Critic, terms.Matching):
        most: int = 3
        plain: bool = True

        def expected(self) -> Expected:
            return {
                "most": (self.critic_steps <= self.most, "at least critic_steps"),
                "plain": (self.plain, "true"),
            }

    assert issubclass(Config, Options) and Config(critic_steps=3).critic_loss == "native"
    for options, message in (
        (
            {"time_range": (0.5, 0.5), "critic_steps": 0},
            r"method\.time_range: \(0\.5, 0\.5\): expected 0 <= low < high",
        ),
        ({"critic_steps": 0}, r"^method\.critic_steps: 0: expected at least 1$"),
        ({"critic_steps": 4}, r"^method\.most: 3: expected at least critic_steps$"),
        ({"plain": False, "critic_steps": 3}, r"^method\.plain: false: expected true$"),
    ):
        with pytest.raises(RecipeError, match=message):
            Config(**options)


# ------------------------------------------------------------------------------------------------------------- rows
def test_a_view_has_its_rows_and_the_whole_batchs_randomness():
    whole = batch(
        real=torch.arange(4.0)[:, None],
        real_cond=Cond({"label": 10 + torch.arange(4)}),
        index=torch.arange(4),
        carry={"x0": 1},
        log={"a": torch.ones(1)},
    )
    view = whole.view(torch.tensor([1, 3]), torch.tensor([0]), share=0.5)
    assert view.cond["label"].tolist() == [1, 3] and view.shape == (2, 3) and view.rng is whole.rng
    assert view.real.tolist() == [[0.0]] and view.real_cond["label"].tolist() == [10]
    assert (view.share, view.real_share, view.carry, view.log) == (0.5, 1.0, {}, {})
    assert whole.carry == {"x0": 1} and len(whole.log) == 1
    one = whole.row(2, Rng(9))
    assert one.cond["label"].tolist() == [2] and one.index.tolist() == [2] and one.rng is not whole.rng
    assert one.real.tolist() == [[2.0]] and one.shape == (1, 3)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("dmd2", {"gan_weight": -1.0}),
        ("dmd2", {"guidance_scale": math.nan}),
        ("dmd2", {"start": math.inf}),
        ("dmd2", {"taps": []}),
        ("dmd2", {"times": [999.0, math.nan]}),
        ("hyper_sd", {"gan_weight": [0.1, -0.1, 0.1, 0.1]}),
        ("hyper_sd", {"one_step_time": math.nan}),
        ("dd2", {"initial_share": math.nan}),
        ("scm", {"warmup": -1}),
        ("ladd", {"early": -1}),
    ],
)
def test_numbers_are_finite_and_weights_not_negative_in_every_method(method, options):
    with pytest.raises(RecipeError, match=rf"^method\.{next(iter(options))}: .*: expected "):
        METHODS[method].Config(**options)


def test_no_adversarial_term_needs_no_blocks_and_a_tiny_network_has_others():
    config = METHODS["dmd2"].Config
    assert config(gan_weight=0.0, taps=[]).taps == []
    large = config(taps=["transformer_blocks.12", "transformer_blocks.18"])
    assert large.smoke().taps == ["transformer_blocks.0", "transformer_blocks.1"]
    assert large.smoke().critic_steps == 2 and config().smoke().taps == ["mid_block"]
