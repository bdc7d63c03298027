"""Uni-Instruct where everything is known: exact expectations on a line, and its place in SiDA's turn."""

import pytest
import torch
from test_sid import PATHS, Line, adversarial, differences, gradient, perturb
from toys import NONE, SD

from fewstep.diffusion import objectives
from fewstep.errors import RecipeError
from fewstep.methods import Progress
from fewstep.methods.sid import SiD
from fewstep.methods.uni_instruct import UniInstruct
from fewstep.recipe import DataConfig, Recipe, TeacherConfig, TrainConfig, from_dict, to_dict


class Weighted(Line):
    """A line whose noisy samples are weighted by h of their density ratio."""

    def log_ratio(self, x_t, critic):
        return self.teacher.log_prob(x_t, self.times) - self.law(critic).log_prob(x_t, self.times)

    def expanded(self, theta, kind):
        """``E h(r) |real - fake|^2``; critic and ratio follow the student."""
        _, x_t, real, fake = self(theta, theta)
        h = objectives.divergence_weight(kind, self.log_ratio(x_t, theta).exp())
        return self.expectation(h[:, None] * (real - fake) ** 2)

    def loss(self, theta, kind, alpha, through=True, scale=1.0):
        x0, x_t, real, fake = self(theta, self.theta)
        a, s = self.schedule.alpha(self.times), self.schedule.sigma(self.times)
        told = (x0, real, fake, self.weight, x_t, self.log_ratio(x_t, self.theta), kind, alpha)
        return objectives.expanded_divergence(*told, scale * a / s**2 if through else None)


@pytest.fixture(scope="module", params=list(PATHS))
def line(request):
    return Weighted(PATHS[request.param])


@pytest.mark.parametrize("kind", objectives.DIVERGENCES)
def test_alpha_one_half_through_the_ratio_is_half_the_gradient(kind, line):
    exact = differences(lambda theta: line.expanded(theta, kind), line.theta)
    found = 2 * gradient(lambda theta: line.loss(theta, kind, 0.5), line.theta)
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-5)
    if kind != "rkl":  # of which nothing depends on the ratio
        for other in (
            gradient(lambda theta: line.loss(theta, kind, 0.5, through=False), line.theta),
            gradient(lambda theta: line.loss(theta, kind, 0.5, scale=-1.0), line.theta),
        ):
            assert torch.cosine_similarity(other, exact, 0) < 0.999


@pytest.mark.parametrize("kind", objectives.DIVERGENCES)
def test_alpha_one_has_the_law_of_the_noisy_samples_frozen(kind, line):
    _, x_t, real, _ = line(line.theta, line.theta)
    h = objectives.divergence_weight(kind, line.log_ratio(x_t, line.theta).exp())

    def frozen(theta):
        return line.expectation(h[:, None] * (real - line.law(theta).x0(x_t, line.times, NONE)) ** 2)

    found = 2 * gradient(lambda theta: line.loss(theta, kind, 1.0), line.theta)
    torch.testing.assert_close(found, differences(frozen, line.theta), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", objectives.DIVERGENCES)
def test_slopes_are_those_of_the_weights(kind):
    log_r = torch.linspace(-2, 3, 40, dtype=torch.float64, requires_grad=True)
    h = objectives.divergence_weight(kind, log_r.exp()) + 0 * log_r  # reverse KL's is a constant
    (slope,) = torch.autograd.grad(h.sum(), log_r)
    torch.testing.assert_close(objectives.SLOPES[kind](log_r.detach().exp()), slope)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 1.2])
def test_reverse_kl_is_sids(alpha):
    g = torch.Generator().manual_seed(0)
    x0, x_t, real, fake = (torch.randn(4, 2, 3, 3, generator=g) for _ in range(4))
    weight, log_ratio = torch.rand(4, generator=g), torch.randn(4, generator=g)
    found = objectives.expanded_divergence(x0, real, fake, weight, x_t, log_ratio, "rkl", alpha)
    torch.testing.assert_close(found, objectives.score_identity(x0, real, fake, weight, alpha))


def test_a_sample_that_is_not_finite_is_left_out():
    x0, x_t, real, fake = (torch.full((3, 2), v) for v in (0.5, 1.0, 2.0, 1.5))
    real[1, 0] = torch.nan
    log_ratio = torch.tensor([0.0, 0.0, torch.inf])
    found = objectives.expanded_divergence(x0, real, fake, torch.ones(3), x_t, log_ratio, "kl")
    assert found.item() == pytest.approx(0.5 * 1.0 / 3)


@pytest.mark.parametrize("through", [False, True])
def test_the_ratio_is_the_discriminators_bounded_and_its_weight_has_mean_one(sdxl, through, monkeypatch):
    trainer = adversarial(sdxl, UniInstruct, divergence="js", through_ratio=through, alpha=0.5)
    perturb(trainer)
    method, seen = trainer.method, []
    for role in trainer.roles.values():
        role.requires_grad_(role.name == "student")
    times = torch.tensor([300.0, 700.0])
    monkeypatch.setattr(type(method.generator_times), "draw", lambda *a: times)
    logits = torch.tensor([[4.0, 8.0], [1.0, 0.0]])  # 6 is beyond ln 20
    method.logits = lambda x_t, t, c: logits.clone().requires_grad_()
    kept = objectives.expanded_divergence
    spy = lambda *told: seen.append(told) or kept(*told)  # noqa: E731
    monkeypatch.setattr(objectives, "expanded_divergence", spy)
    loss = method.generator_loss(trainer.data.batch(0, 0), Progress(4, per_iteration=2))["sid"]
    ((x0, real, fake, weight, _, log_ratio, kind, alpha, scale),) = seen
    ratio = torch.tensor([20.0, torch.tensor(0.5).exp().item()])
    torch.testing.assert_close(log_ratio.exp(), ratio)
    assert (kind, alpha) == ("js", 0.5) and (scale is not None) == through
    h, plain = ratio / (1 + ratio), 1 / (x0 - real).abs().mean((1, 2, 3)).detach()
    torch.testing.assert_close(weight.detach(), plain / h.mean())
    if through:
        torch.testing.assert_close(scale, (SD.alpha(times) / SD.sigma(times) ** 2).to(scale))
    mixed = 0.5 * kept(*seen[0]) + 0.5 * 1e-3 * (torch.nn.functional.softplus(-logits).mean(1) * plain).mean()
    torch.testing.assert_close(loss.detach(), mixed.detach())


def test_before_the_gan_joins_it_is_sid(sdxl):
    losses = []
    for cls, options in ((SiD, {}), (UniInstruct, {"divergence": "neyman"})):
        trainer = adversarial(sdxl, cls, **options)
        perturb(trainer)
        losses.append(trainer.method.generator_loss(trainer.data.batch(0, 0), Progress(2, per_iteration=2)))
    assert losses[0]["sid"].item() == losses[1]["sid"].item()
    assert UniInstruct.needs(UniInstruct.Config()) == ("prompts", "images")


@pytest.mark.parametrize(
    "options, words",
    [
        ({"gan_weight": 0.0}, r"gan_weight: 0\.0: expected a positive number"),
        ({"kappa3": 2.0}, r"kappa3: 2\.0: expected kappa2's 1"),
        ({"ratio_range": [2.0, 3.0, 4.0]}, "ratio_range"),
        ({"ratio_range": [3.0, 2.0]}, "ratio_range: .*0 < low < high"),
        ({"divergence": "fkl"}, "divergence: 'fkl'"),
    ],
)
def test_options_that_cannot_be_are_refused(options, words):
    recipe = Recipe(
        "out", TeacherConfig(path=""), UniInstruct.Config(), DataConfig(prompts=""), TrainConfig(steps=1)
    )
    plain = to_dict(recipe)
    plain["method"] |= options
    with pytest.raises(RecipeError, match=words):
        from_dict(plain)
