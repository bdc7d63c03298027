"""Phased DMD where everything is known: exact targets, the variance collapse of the biased one, and the ring."""

import math

import pytest
import torch
from torch import nn
from toys import NONE, SD, Mlp, distance, fit, toy

from fewstep.diffusion import objectives
from fewstep.diffusion.denoiser import NetDenoiser
from fewstep.diffusion.rng import Rng
from fewstep.diffusion.schedules import EDM, Flow
from fewstep.errors import RecipeError
from fewstep.methods import Batch, Progress
from fewstep.methods.phased_dmd import PhasedDMD
from fewstep.teachers.analytic import GaussianMixture

LEVELS = {"vp": (SD, 300.0, (301.0, 500.0, 900.0)), "flow": (Flow(), 0.5, (0.51, 0.7, 0.95)),
          "edm": (EDM(), 1.0, (1.05, 3.0, 30.0))}  # fmt: skip
ATOMS = torch.tensor([-1.0, 0.0, 1.0, 2.0], dtype=torch.float64)


def mean_of_x_s(x_t, s, t, schedule):
    """Posterior over the four atoms (B, 4), and E[x_s | x_t, atom] (B, 4), by completing the square."""
    a_t, a_s, sigma_t, sigma_s = schedule.alpha(t), schedule.alpha(s), schedule.sigma(t), schedule.sigma(s)
    a_ts, _ = schedule.transition(s, t)
    offset = x_t[:, None] - a_t[:, None] * ATOMS
    posterior = (-0.5 * (offset / sigma_t[:, None]) ** 2).softmax(1)
    return posterior, a_s[:, None] * ATOMS + (a_ts * sigma_s**2 / sigma_t**2)[:, None] * offset


@pytest.mark.parametrize("path", LEVELS)
@pytest.mark.parametrize("kind", ["eps", "x0", "v", "flow"])
def test_the_target_between_is_unbiased_on_four_atoms(path, kind):
    schedule, low, times = LEVELS[path]
    if kind == "v" and path != "vp":
        pytest.skip("v is a prediction of variance-preserving paths")
    x_t = torch.linspace(-4, 4, 41, dtype=torch.float64) * (1 if path != "edm" else 10)
    s = torch.full_like(x_t, low)
    for time in times:
        t = torch.full_like(x_t, time)
        posterior, x_s = mean_of_x_s(x_t, s, t, schedule)
        a_ts, sigma_ts = schedule.transition(s, t)
        eps = (x_t[:, None] - a_ts[:, None] * x_s) / sigma_ts[:, None]  # linear, so means map to means
        rows = [
            objectives.denoising_target_between(x_s[:, i], eps[:, i], s, t, schedule)[0] for i in range(4)
        ]
        target = (posterior * torch.stack(rows, 1)).sum(1)
        truth = (posterior * ATOMS).sum(1)
        convert = lambda x0, t=t: schedule.convert(x0, x_t, t, "x0", kind)  # noqa: E731
        assert (convert(target) - convert(truth)).abs().max() < 1e-10 * max(1.0, convert(truth).abs().max())
        biased = (posterior * x_s).sum(1) / schedule.alpha(s)
        assert (
            biased - truth
        ).abs().max() > 0.02  # the plausible wrong target, farther off the nearer t is to s


def test_the_target_between_is_finite_and_bounded_near_its_level():
    x_s, eps = torch.randn(64, 3), torch.randn(64, 3)
    s, t = torch.full((64,), 0.5), torch.full((64,), 0.501)
    target, weight = objectives.denoising_target_between(x_s, eps, s.double(), t.double(), Flow())
    assert target.isfinite().all() and (weight.sqrt()[:, None] * (target - x_s / 0.5)).abs().max() < 30


def test_from_clean_samples_the_target_is_the_sample_itself():
    x_s, eps = torch.randn(8, 3, dtype=torch.float64), torch.randn(8, 3, dtype=torch.float64)
    s, t = torch.zeros(8, dtype=torch.float64), torch.full((8,), 0.4, dtype=torch.float64)
    target, _ = objectives.denoising_target_between(x_s, eps, s, t, Flow())
    assert (target - x_s).abs().max() < 1e-15


# ---------------------------------------------------------------------------------------------- affine experts
class Affine(nn.Module):
    """One step of an expert: x0 is an affine function of its input."""

    def __init__(self, dim=1):
        super().__init__()
        self.scale, self.shift = (
            nn.Parameter(torch.ones(dim).double()),
            nn.Parameter(torch.zeros(dim).double()),
        )
        self.dim, self.labels = dim, 0

    def forward(self, x):
        return self.scale * x + self.shift


class GaussianCritic:
    """The exact minimiser of the critic's objective for Gaussian samples at level s, recomputed when asked."""

    def __init__(self, schedule, biased=False):
        self.schedule, self.biased, self.moments = schedule, biased, None

    def x0(self, x_t, t, cond, *, guidance=1.0):
        mean, variance, s = self.moments
        a_ts, sigma_ts = self.schedule.transition(s, t)
        a_s, sigma_s = self.schedule.alpha(s), self.schedule.sigma(s)
        a_t = self.schedule.alpha(t)
        offset = x_t - (a_ts * mean)[:, None]
        total = (a_ts**2 * variance + sigma_ts**2)[:, None]
        x_s = mean[:, None] + (a_ts * variance)[:, None] / total * offset
        eps = sigma_ts[:, None] / total * offset
        if self.biased:
            return x_s / a_s[:, None]
        return x_s / a_s[:, None] - (a_t * sigma_s**2 / (a_s**2 * sigma_ts))[:, None] * eps


def affine_method(schedule, teacher, biased=False, **options):
    config = PhasedDMD.Config(**{"num_steps": 2, "phases": 2, "times": [1.0, 0.5], "weight": "kl", **options})
    nets = {f"student_{k}": Affine() for k in (1, 2)}
    experts = {n: NetDenoiser(net, schedule, "x0", lambda m, x, t, c: m(x)) for n, net in nets.items()}
    for denoiser in experts.values():
        denoiser.x0 = lambda x_t, t, cond, guidance=1.0, d=denoiser: d.net(x_t.double())
    critic = GaussianCritic(schedule, biased)
    return PhasedDMD(config, teacher, (1,), critic=critic, **experts), nets, critic


def batch_of(i, size=4096):
    rng = Rng(0, "micro", i)
    return Batch(NONE, (size, 1), rng, Rng(0, "shared", i))


def exact_moments(x_s, level):
    return x_s.mean().expand(len(x_s)), x_s.var().expand(len(x_s)), level


def descend(method, net, critic, k, steps=700):
    """The expert of phase k against its exact critic."""
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
    for i in range(steps):
        batch = batch_of(i)
        with torch.no_grad():
            x_s = method.arrive(k, batch_of(i))[0]
            level = torch.full((len(x_s),), 0.0 if method.last(k) else method.levels[k], dtype=torch.float64)
            critic.moments = exact_moments(x_s, level)
        optimizer.param_groups[0]["lr"] = 0.02 * (1 - i / steps)
        optimizer.zero_grad()
        sum(method.generator_loss(k, batch, Progress()).values()).mul(1e3).backward()
        optimizer.step()
    return method.arrive(k, batch_of(10**6, 40000))[0].detach()


@pytest.mark.parametrize("biased", [False, True])
def test_two_affine_experts_reach_the_data_and_the_biased_target_collapses_the_variance(biased):
    flow, mean, variance = Flow(), 0.7, 0.3
    teacher = GaussianMixture(flow, torch.tensor([[mean]]).double(), torch.tensor(variance).double())
    method, nets, critic = affine_method(flow, teacher, biased)
    landed = descend(method, nets["student_1"], critic, 0)
    truth = (0.5 * mean, 0.25 * variance + 0.25)
    if biased:
        assert landed.var() < 0.6 * truth[1]
        return
    assert landed.mean().item() == pytest.approx(truth[0], abs=0.03)
    assert landed.var().item() == pytest.approx(truth[1], abs=0.03)
    final = descend(method, nets["student_2"], critic, 1)
    assert final.mean().item() == pytest.approx(mean, abs=0.03)
    assert final.var().item() == pytest.approx(variance, abs=0.03)


def test_the_gradient_with_weight_kl_is_the_analytic_one_at_the_level_of_the_phase():
    """dKL/d(mean, scale) of Gaussians at level t, averaged over the very times that were drawn."""
    flow = Flow()
    teacher = GaussianMixture(flow, torch.tensor([[0.4]]).double(), torch.tensor(0.09).double())
    method, nets, critic = affine_method(flow, teacher)
    net, size = nets["student_1"], 400_000
    with torch.no_grad():
        net.scale.fill_(0.8), net.shift.fill_(-0.1)
    level = torch.full((size,), 0.5, dtype=torch.float64)
    with torch.no_grad():
        critic.moments = exact_moments(method.arrive(0, batch_of(0, size))[0], level)
    (method.generator_loss(0, batch_of(0, size), Progress())["dm"] * 1.0).backward()
    # x_s = 0.5 z + 0.5 (scale z + shift): mean 0.5 shift, deviation 0.5 + 0.5 scale
    scale, shift = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (0.8, -0.1))
    t = 0.5 + 0.48 * (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    a_ts = (1 - t) / 0.5
    noise = t**2 - a_ts**2 * 0.25
    mean, var = a_ts * 0.5 * shift, a_ts**2 * (0.5 + 0.5 * scale) ** 2 + noise
    real_mean, real_var = (1 - t) * 0.4, (1 - t) ** 2 * 0.09 + t**2
    kl = 0.5 * (var / real_var + (mean - real_mean) ** 2 / real_var - 1 - (var / real_var).log())
    kl.mean().backward()
    assert net.shift.grad.item() == pytest.approx(shift.grad.item(), rel=0.02)
    assert net.scale.grad.item() == pytest.approx(scale.grad.item(), rel=0.02)


# ------------------------------------------------------------------------------------------------- bookkeeping
@pytest.fixture(scope="module")
def ring():
    return GaussianMixture.ring(SD, radius=2.2, std=0.2)


@pytest.fixture(scope="module")
def fitted(ring):
    torch.manual_seed(0)
    return fit(ring, Mlp())


def test_phases_follow_each_other_and_the_critic_starts_again_from_the_teacher(ring, fitted):
    trainer = toy(PhasedDMD, PhasedDMD.Config(critic_steps=2), ring, fitted, steps=8, batch_size=8)
    weights = lambda name: [w.detach().clone() for w in trainer.roles[name].weights.values()]  # noqa: E731
    same = lambda a, b: all(x.equal(y) for x, y in zip(a, b))  # noqa: E731
    begin = {name: weights(name) for name in trainer.roles}
    for _ in range(4):
        trainer.iterate()
    middle = {name: weights(name) for name in trainer.roles}
    assert not same(begin["student_1"], middle["student_1"]) and same(begin["student_2"], middle["student_2"])
    assert not same(begin["critic"], middle["critic"])
    restarts, inner = [], trainer.restart

    def restart(names):
        inner(names)
        fresh = same(weights("critic"), begin["critic"]) and not trainer.optimizers["critic"].state
        restarts.append((names, trainer.progress.iteration, fresh))

    trainer.restart = restart
    for _ in range(4):
        trainer.iterate()
    assert restarts == [(("critic",), 4, True)]  # once, where the second phase begins
    assert same(middle["student_1"], weights("student_1"))  # frozen in the second phase
    assert not same(begin["student_2"], weights("student_2"))
    assert trainer.updates == {"student_1": 2, "student_2": 2, "critic": 4}


def test_the_critics_loss_between_levels_by_hand(ring, fitted):
    trainer = toy(PhasedDMD, PhasedDMD.Config(), ring, fitted, steps=8, batch_size=8)
    method, batch = trainer.method, trainer.data.batch(0, 0)
    x_s = batch.carry["x0"] = Rng("x_s").normal(8, 2)
    seen, x0 = {}, method.critic.x0
    method.critic.x0 = lambda x_t, t, cond, **o: seen.update(x_t=x_t, t=t) or x0(x_t, t, cond, **o)
    method.times_above = lambda *_: torch.tensor(
        [500, 502, 505, 510, 520, 600, 800, 999]
    )  # from just above 499
    loss = method.critic_loss(0, batch, trainer.progress)["denoising"]
    t, s = seen["t"], torch.full_like(seen["t"], method.levels[0])
    a_ts, s_ts = SD.transition(s, t)
    eps = (seen["x_t"] - a_ts[:, None] * x_s) / s_ts[:, None]
    target, bounded = objectives.denoising_target_between(x_s, eps, s, t, SD)
    assert bounded.min() < 0.5 and bounded.max() == 1
    error = (x0(seen["x_t"], t, batch.cond) - target).square().mean(1)
    weight = SD.error_weight(method.critic.prediction, t)
    assert loss.item() == pytest.approx((weight * bounded * error).mean().item(), rel=1e-4)


def test_an_experts_first_update_sees_the_critic_that_has_started_again(ring, fitted):
    """Not the one of the phase before, which knows another level; and once: later ones see what it has learned."""
    trainer = toy(PhasedDMD, PhasedDMD.Config(critic_steps=2), ring, fitted, steps=8, batch_size=8)
    begin = [w.detach().clone() for w in trainer.roles["critic"].weights.values()]
    seen, turn = [], trainer.turn

    def watched(phase, batches):
        critic = trainer.roles["critic"].weights.values()
        if phase.name.startswith("generator"):
            seen.append((phase.name, all(a.equal(b) for a, b in zip(critic, begin))))
        return turn(phase, batches)

    trainer.turn = watched
    for _ in range(8):
        trainer.iterate()
    assert seen == [
        ("generator_1", True),
        ("generator_1", False),
        ("generator_2", True),
        ("generator_2", False),
    ]


def test_a_run_resumed_at_the_edge_of_a_phase_goes_on_exactly(ring, fitted, tmp_path):
    def run(folder, *stops):
        for stop in stops:
            trainer = toy(PhasedDMD, PhasedDMD.Config(critic_steps=2), ring, fitted, steps=8, batch_size=8)
            trainer.folder = tmp_path / folder
            trainer.restore()
            while trainer.progress.iteration < stop:
                trainer.iterate()
            trainer.save()
        return {f"{r}/{n}": w for r, role in trainer.roles.items() for n, w in role.weights.items()}

    once = run("once", 8)
    for stops in ((3, 8), (4, 8), (5, 8)):
        again = run(f"twice{stops[0]}", *stops)
        assert all(again[name].equal(once[name]) for name in once)


@pytest.mark.parametrize("schedule", [SD, Flow(), Flow(shift=3.0), EDM()])
def test_times_of_a_phase_are_above_its_level_and_reach_the_highest_noise(schedule):
    teacher = GaussianMixture(schedule, torch.zeros(1, 2), torch.tensor(1.0))
    span = schedule.t_max - schedule.t_min
    times = [999, 749, 499, 249] if schedule is SD else [schedule.t_max - span * k / 4 for k in range(4)]
    trainer = toy(PhasedDMD, PhasedDMD.Config(times=times), teacher, Mlp(), prediction="x0", batch_size=8)
    method, batch = trainer.method, Batch(NONE, (20000, 2), Rng(3), Rng(4))
    level = times[2]
    for options in ((), (0.02, 0.98)):
        t = method.times_above(0, batch, *options)
        assert t.min() > level and t.max() > schedule.t_min + 0.85 * span
    assert method.times_above(1, batch).min() < schedule.t_min + 0.01 * span


def test_exit_steps_stay_within_the_phase_and_earlier_experts_get_no_gradient(ring, fitted):
    trainer = toy(PhasedDMD, PhasedDMD.Config(), ring, fitted, batch_size=8)
    method, steps = trainer.method, []
    inner = method.student.x0
    method.student.x0 = lambda x_t, step, cond: (
        steps.append((step, x_t.requires_grad)) or inner(x_t, step, cond)
    )
    for role in trainer.roles.values():
        role.requires_grad_(True)
    exits = set()
    for i in range(16):
        steps.clear()
        x_s, _ = method.arrive(1, Batch(NONE, (8, 2), Rng(i), Rng(i, "shared")))
        exits.add(steps[-1][0])
        assert not any(grad for _, grad in steps) and x_s.requires_grad
        x_s.sum().backward()
        assert all(w.grad is None for w in trainer.roles["student_1"].weights.values())
    assert exits == {2, 3}


def test_options_that_cannot_work_are_refused_by_name():
    for options, words in (
        ({"phases": 3}, "method.phases"),
        ({"solver": "lcm"}, "method.solver"),
        ({"time_range": (0.9, 0.1)}, "method.time_range"),
        ({"critic_steps": 0}, "method.critic_steps"),
    ):
        with pytest.raises(RecipeError, match=words):
            PhasedDMD.Config(**options)


@pytest.mark.slow
def test_four_steps_in_two_phases_reach_the_ring(ring, fitted):
    config = PhasedDMD.Config(critic_steps=3)
    trainer = toy(PhasedDMD, config, ring, fitted, steps=1000)
    start = distance(trainer, ring)
    trainer.train()
    assert distance(trainer, ring) < min(0.03, 0.5 * start)
    assert math.isfinite(start)
