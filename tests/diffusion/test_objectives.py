"""Losses against their definitions and against the exact gradient of a KL divergence."""

import math

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler

from fewstep.diffusion import objectives as o
from fewstep.diffusion.cond import Cond
from fewstep.diffusion.schedules import EDM, KINDS, VP, Flow
from fewstep.teachers.analytic import GaussianMixture

SD = VP.from_scheduler(DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"))


def numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ------------------------------------------------------------------------------------------ distribution matching
def test_matching_gradient_is_weight_times_fake_minus_real_over_numel():
    x0, weight = numbers(4, 3, 2, 2).requires_grad_(), torch.tensor([1.0, 0.5, 2.0, 0.0]).double()
    real, fake = numbers(4, 3, 2, 2, seed=1), numbers(4, 3, 2, 2, seed=2)
    (grad,) = torch.autograd.grad(o.distribution_matching(x0, real, fake, weight), x0)
    torch.testing.assert_close(grad, weight.view(4, 1, 1, 1) * (fake - real) / x0.numel())


@pytest.mark.parametrize("kind", o.MATCHING_WEIGHTS)
def test_nothing_but_x0_itself_carries_the_matching_gradient(kind):
    # Scores and normaliser are functions of x0 here; were any of them not detached, the gradient would differ.
    x0, t = numbers(4, 8).requires_grad_(), torch.tensor([20, 300, 700, 980])
    real, fake = torch.sin(x0), torch.cos(2 * x0)
    weight = o.matching_weight(kind, x0, real, SD, t)
    (grad,) = torch.autograd.grad(o.distribution_matching(x0, real, fake, weight), x0)
    expected = (weight.view(4, 1) * (fake - real)).detach() / x0.numel()
    torch.testing.assert_close(grad, expected)


def student_gradient(m, s, t, schedule, flip=False):
    """Gradient of the surrogate for a 1-D Gaussian student m + s z with exact scores of both sides.

    The direction is linear in z and in the noise, so two points, -1 and 1, in each integrate it exactly.
    """
    points = torch.tensor([-1.0, 1.0], dtype=torch.float64)
    z, eps = torch.cartesian_prod(points, points).split(1, dim=1)
    x0, times = m + s * z, torch.full((4,), t, dtype=torch.float64)
    mean, variance = torch.tensor([[0.4]], dtype=torch.float64), torch.tensor([[0.49]], dtype=torch.float64)
    real = GaussianMixture(schedule, mean, variance)
    fake = GaussianMixture(schedule, m.view(1, 1), s.view(1, 1) ** 2)
    x_t = schedule.add_noise(x0, eps, times)
    mu_real, mu_fake = real.x0(x_t, times, Cond({})), fake.x0(x_t, times, Cond({}))
    if flip:
        mu_real, mu_fake = mu_fake, mu_real
    weight = o.matching_weight("kl", x0, mu_real, schedule, times)
    return torch.autograd.grad(o.distribution_matching(x0, mu_real, mu_fake, weight), (m, s))


def kl(m, s, t, schedule):
    """KL between student N(m, s^2) and teacher N(0.4, 0.7^2), both noised to level t."""
    time = torch.tensor([t], dtype=torch.float64)
    a, sigma = schedule.alpha(time), schedule.sigma(time)
    p, q = (a * s) ** 2 + sigma**2, (a * 0.7) ** 2 + sigma**2
    return (0.5 * (torch.log(q / p) + (p + (a * (m - 0.4)) ** 2) / q - 1)).sum()


LEVELS = [(SD, 20.0), (SD, 399.0), (SD, 980.0), (Flow(), 0.05), (Flow(), 0.9), (EDM(), 0.1), (EDM(), 40.0)]


@pytest.mark.parametrize("schedule, t", LEVELS)
@pytest.mark.parametrize("mean, scale", [(-0.3, 1.5), (1.0, 0.2), (0.4, 0.7)])
def test_matching_gradient_with_weight_kl_is_the_gradient_of_the_kl(schedule, t, mean, scale):
    m, s = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (mean, scale))
    exact = torch.autograd.grad(kl(m, s, t, schedule), (m, s))
    torch.testing.assert_close(student_gradient(m, s, t, schedule), exact, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("flip", [False, True])
def test_descent_lowers_the_kl_and_a_flipped_sign_raises_it(flip):
    m, s = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (-0.3, 1.5))
    start = kl(m, s, 399.0, SD).item()
    for _ in range(20):
        dm, ds = student_gradient(m, s, 399.0, SD, flip)
        with torch.no_grad():
            m -= 0.2 * dm
            s -= 0.2 * ds
    end = kl(m, s, 399.0, SD).item()
    assert end > 1.1 * start if flip else end < 0.5 * start


def test_l1_normaliser_is_per_sample_with_a_floor():
    x0, real = numbers(3, 2, 4, 4), numbers(3, 2, 4, 4, seed=1)
    x0[2] = real[2]  # a student that has met its teacher
    weight = o.matching_weight("l1", x0, real, SD, torch.zeros(3), floor=1e-3)
    expected = [1 / (x0[i] - real[i]).abs().mean() for i in range(2)]
    torch.testing.assert_close(weight[:2], torch.stack(expected))
    assert weight[2].item() == pytest.approx(1e3)
    changed = x0.clone()
    changed[0] += 5
    torch.testing.assert_close(
        o.matching_weight("l1", changed, real, SD, torch.zeros(3))[1], weight[1]
    )  # one sample's distance is not another's


def test_closed_form_weights():
    t, x = torch.tensor([20.0, 980.0]), numbers(2, 3)
    a, s = SD.alpha(t), SD.sigma(t)
    for kind, expected in (("kl", a**2 / s**2), ("vsd", a * s), ("one", torch.ones(2).double())):
        torch.testing.assert_close(o.matching_weight(kind, x, x, SD, t), expected)
    with pytest.raises(ValueError, match="'l2'"):
        o.matching_weight("l2", x, x, SD, t)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_sample_that_is_not_finite_teaches_nothing_while_others_do(bad):
    x0, real, fake = (numbers(3, 4, seed=i) for i in range(3))
    real[1, 2] = bad
    x0.requires_grad_()
    weight = o.matching_weight("l1", x0, real, SD, torch.zeros(3))
    loss = o.distribution_matching(x0, real, fake, weight)
    (grad,) = torch.autograd.grad(loss, x0)
    assert loss.isfinite() and grad.isfinite().all()
    assert not grad[1].any() and grad[0].all() and grad[2].all()


# ------------------------------------------------------------------------------------------------------- denoising
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("schedule", [SD, Flow()], ids=["vp", "flow"])
def test_denoising_with_the_error_weight_is_the_plain_mse_of_that_prediction(schedule, kind):
    t = schedule.draw_times(torch.linspace(0.1, 0.9, 6).double())
    x0, eps, guess = numbers(6, 3, 2), numbers(6, 3, 2, seed=1), numbers(6, 3, 2, seed=2)
    x_t = schedule.add_noise(x0, eps, t)
    target, prediction = (schedule.convert(x, x_t, t, "x0", kind) for x in (x0, guess))
    loss = o.denoising(guess, x0, schedule.error_weight(kind, t))
    torch.testing.assert_close(loss, F.mse_loss(prediction, target))


def test_denoising_teaches_the_critic_and_not_the_sample():
    x0, guess = numbers(6, 3).requires_grad_(), numbers(6, 3, seed=1).requires_grad_()
    o.denoising(guess, x0, torch.ones(6)).backward()
    assert x0.grad is None
    torch.testing.assert_close(guess.grad, 2 * (guess - x0).detach() / 18)


# ------------------------------------------------------------------------------------------------------------- GAN
def test_gan_losses_are_cross_entropies_with_the_right_labels():
    real, fake = numbers(5, 2), numbers(5, 2, seed=1)
    one, zero = torch.ones_like(real), torch.zeros_like(real)
    bce = F.binary_cross_entropy_with_logits
    torch.testing.assert_close(o.gan_discriminator(real, fake), bce(real, one) + bce(fake, zero))
    torch.testing.assert_close(o.gan_generator(fake), bce(fake, one))
    assert o.gan_discriminator(zero, zero).item() == pytest.approx(2 * math.log(2))
    assert o.gan_generator(zero).item() == pytest.approx(math.log(2))


def test_gan_gradients_push_the_logits_the_right_way():
    real, fake = numbers(5, 1).requires_grad_(), numbers(5, 1, seed=1).requires_grad_()
    of_real, of_fake = torch.autograd.grad(o.gan_discriminator(real, fake), (real, fake))
    assert (of_real < 0).all() and (of_fake > 0).all()
    (of_generator,) = torch.autograd.grad(o.gan_generator(fake), fake)
    assert (of_generator < 0).all()


# --------------------------------------------------------------------------------------------- cross-entropies of SiDA
def test_discrimination_by_hand():
    """Per row half of -log D(real) - log(1 - D(fake)), mean over the map, weighted; rows that do not count add 0."""
    real, fake = (
        torch.tensor([[2.0, 0.0], [1.0, 1.0], [math.nan, 0.0]]),
        torch.tensor([[-1.0, 3.0], [0.5, 0.5], [9.0, 9.0]]),
    )
    weight, keep = torch.tensor([0.5, 3.0, 7.0]), torch.tensor([True, True, False])

    def log_odds(p):  # softplus by its definition
        return math.log1p(math.exp(p))

    first = (log_odds(-2) + log_odds(-1) + log_odds(0) + log_odds(3)) / 4
    second = (log_odds(-1) + log_odds(0.5)) / 2
    found = o.discrimination(real, fake, weight, keep)
    assert found.item() == pytest.approx((0.5 * first + 3 * second) / 3, rel=1e-6)
    chance = o.discrimination(torch.zeros(4, 2), torch.zeros(4, 2), torch.ones(4), torch.ones(4).bool())
    assert chance.item() == pytest.approx(math.log(2))


def test_deception_by_hand():
    fake = torch.tensor([[-1.0, 3.0], [-50.0, -50.0], [math.nan, 0.0]], requires_grad=True)
    weight, keep = torch.tensor([0.5, 3.0, math.inf]), torch.tensor([True, True, False])
    loss = o.deception(fake, weight, keep)
    first = (math.log1p(math.exp(1)) + math.log1p(math.exp(-3))) / 2
    assert loss.item() == pytest.approx((0.5 * first + 3 * math.log1p(math.exp(10))) / 3, rel=1e-6)
    loss.backward()
    assert (fake.grad[0] < 0).all()  # more real
    assert (fake.grad[1:] == 0).all()  # beyond the bound, or not counted
