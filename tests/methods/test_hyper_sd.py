"""Hyper-SD where everything is known: segments, jumps, targets, stages, and the ring."""

import pytest
import torch
from torch import nn
from toys import NONE, SD, Mlp, energy_distance, fit, per_noise, toy, view

from fewstep.diffusion import objectives, trajectory
from fewstep.diffusion.cond import Cond
from fewstep.diffusion.rng import Rng
from fewstep.diffusion.schedules import Flow, TrigFlow
from fewstep.diffusion.solvers import ddim
from fewstep.diffusion.student import Student
from fewstep.errors import RecipeError
from fewstep.methods import Batch, Progress
from fewstep.methods.dmd import DMD
from fewstep.methods.hyper_sd import HyperSD
from fewstep.recipe import RoleConfig
from fewstep.runs.library import load_recipe
from fewstep.teachers.analytic import GaussianMixture
from fewstep.training.roles import averaged

PATHS = {"vp": SD, "flow": Flow(shift=3.0), "trig": TrigFlow()}


def mixture(schedule, labels=False):
    means = torch.tensor([[-1.0, 0.3], [1.2, -0.5]], dtype=torch.float64)
    weights = torch.tensor([[0.9, 0.1], [0.2, 0.8]], dtype=torch.float64) if labels else None
    return GaussianMixture(schedule, means, torch.tensor(0.2, dtype=torch.float64), weights)


def full(value, rows=64):
    return torch.full((rows,), value, dtype=torch.float64)


def batch_of(size=64, cond=NONE, seed=0, **more):
    real = Rng(seed, "real").normal(size, 2).double()
    return Batch(cond, (size, 2), Rng(seed, "micro"), Rng(seed, "shared"), real=real, real_cond=cond, **more)


class Known:
    """A denoiser given as a function of (x_t, t); remembers what it was asked."""

    null = None

    def __init__(self, function, schedule=SD):
        self.function, self.schedule, self.asked = function, schedule, []

    def x0(self, x_t, t, cond, *, guidance=1.0):
        self.asked.append((x_t, t, guidance))
        return self.function(x_t, t)


def method_of(teacher, student=None, target=None, **options):
    options = {"segments": [4], "solver_steps": 8, "target": "live", **options}
    student = student or Known(lambda x, t: teacher.x0(x, t, NONE), teacher.schedule)
    extra = {} if target is None else {"target": target}
    return HyperSD(HyperSD.Config(**options), teacher, (2,), student=student, **extra)


# ------------------------------------------------------------------------------------------------------ segments
def test_nodes_on_a_boundary_belong_to_the_segment_below():
    n = torch.tensor([1000, 999, 876, 875, 874, 500, 501, 125, 124, 1])
    start = trajectory.segment_start(n, 1000, 8) * 1000
    assert start.tolist() == [875, 875, 875, 750, 750, 375, 500, 0, 0, 0]


@pytest.mark.parametrize("nodes, segments", [(1000, 8), (50, 8), (40, 4), (8, 8), (50, 1), (7, 3)])
def test_a_segment_begins_below_its_nodes_and_landings_lie_between(nodes, segments):
    n = torch.arange(1, nodes + 1)
    start = trajectory.segment_start(n, nodes, segments)
    assert (
        (start < n / nodes).all() and (start >= n / nodes - 1 / segments - 1e-12).all() and (start >= 0).all()
    )
    assert ((start * segments).round() - start * segments).abs().max() < 1e-12
    for end in ("random", "segment"):
        method = method_of(mixture(SD), segments=[segments], solver_steps=nodes, end=end)
        now, before, landing = method.term.draw_levels(0, batch_of(4000))
        begin = trajectory.segment_start((now * nodes).round(), nodes, segments)
        assert (begin <= landing).all() and (landing <= before).all() and (before < now).all()
        assert (now - before <= 1 / nodes + 1e-12).all()
        assert landing.equal(begin) is (end == "segment" or nodes == segments)
        if end == "random":  # anywhere between, evenly
            between = before > begin
            share = ((landing - begin) / (before - begin))[between]
            assert nodes == segments or abs(share.mean() - 0.5) < 0.03 < share.std()
        times = [SD.at(level) for level in (now, before, landing)]
        assert (times[0] > times[1]).all() and (times[1] >= times[2]).all()


def test_null_lands_anywhere_but_at_the_beginning_of_a_single_segment():
    config = HyperSD.Config()
    assert [config.lands(i) for i in range(4)] == ["random", "random", "random", "segment"]
    config = HyperSD.Config(segments=[2, 1], end=["segment", "random"])
    assert [config.lands(i) for i in range(2)] == ["segment", "random"]


def test_no_one_prediction_serves_every_landing_place_of_a_single_segment():
    """Why: the x0 that makes one jump from the noisiest level exact differs between landing places."""
    teacher, x = mixture(Flow()), torch.randn(256, 2, generator=torch.Generator().manual_seed(0)).double()
    path, schedule, wanted = [x], teacher.schedule, []
    for k in range(400, 0, -1):
        t, s = full(k / 400, 256), full((k - 1) / 400, 256)
        path.append(schedule.ddim_step(path[-1], teacher.x0(path[-1], t, NONE), t, s))
    for k in (399, 300, 200, 100, 0):
        s = k / 400
        wanted.append((path[400 - k] - s * x) / (1 - s))
    assert (torch.stack(wanted).std(0)).mean() > 0.3


# --------------------------------------------------------------------------------------------------------- jumps
@pytest.mark.parametrize("path", PATHS)
def test_a_jump_of_zero_length_is_the_identity(path):
    schedule = PATHS[path]
    x, f = Rng(1).normal(4, 2).double(), Rng(2).normal(4, 2).double()
    t = schedule.at(torch.tensor([0.0, 0.2, 0.7, 1.0], dtype=torch.float64))
    assert trajectory.jump(schedule, x, f, t, t).equal(x)


@pytest.mark.parametrize("path", PATHS)
def test_an_infinitesimal_jump_of_the_exact_teacher_is_the_step_of_the_ode(path):
    schedule = PATHS[path]
    teacher, x = mixture(schedule), Rng(1).normal(64, 2).double()
    t = full(400.4 if path == "vp" else 0.6)
    h = 1e-5
    x0 = teacher.x0(x, t, NONE)
    eps = schedule.convert(x0, x, t, "x0", "eps")
    a, s = schedule.d_alpha(t)[:, None], schedule.d_sigma(t)[:, None]
    slope = (x - trajectory.jump(schedule, x, x0, t, t - h)) / h
    assert (slope - (a * x0 + s * eps)).abs().max() < 1e-4


@pytest.mark.parametrize("path", PATHS)
def test_a_jump_to_the_clean_end_is_the_prediction(path):
    schedule, x, f = PATHS[path], Rng(1).normal(64, 2).double(), Rng(2).normal(64, 2).double()
    landed = trajectory.jump(schedule, x, f, schedule.at(full(0.7)), schedule.at(full(0.0)))
    assert (landed - f).abs().max() < 1e-12


# ------------------------------------------------------------------------------------------------------ the loss
def test_the_goal_of_the_lowest_node_of_a_segment_is_the_teachers_own_step():
    teacher = mixture(SD)
    nonsense = Known(lambda x, t: 100 + x)
    method = method_of(teacher, target=nonsense, segments=[8], solver_steps=8, end="segment")
    _, made, goal, end = method.term.inconsistency(0, batch_of())
    batch = batch_of()
    now, _, _ = method.term.draw_levels(0, batch)
    t, s = SD.at(now), SD.at(end)
    x_t = SD.add_noise(batch.real, batch.rng.normal_like(batch.real), t)
    assert (goal - SD.ddim_step(x_t, teacher.x0(x_t, t, NONE), t, s)).abs().max() < 1e-12
    assert (made - goal).abs().max() < 1e-12  # for the student knows the teacher by heart


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("segments", [1, 2])
def test_the_teachers_own_trajectories_are_the_fixed_point(path, segments):
    """A Gaussian teacher, whose N-step DDIM map from each node to the end of its segment is linear, as the student."""
    schedule, nodes = PATHS[path], 8
    teacher = GaussianMixture(schedule, torch.zeros(1, 2).double(), torch.tensor(0.3).double())

    def consistent(x, t):
        """x0 with which one jump lands where all the teacher's steps down to the end of the segment land."""
        rows = []
        for row, time in zip(x, t.tolist()):
            k = next(k for k in range(nodes + 1) if abs(max(at(k), schedule.t_min) - time) < 1e-9)
            if k == 0:
                rows.append(row)
                continue
            first = int(trajectory.segment_start(torch.tensor([k]), nodes, segments).item() * nodes)
            y = row[None]
            for j in range(k, first, -1):
                y = schedule.ddim_step(
                    y, teacher.x0(y, full(at(j), 1), NONE), full(at(j), 1), full(at(j - 1), 1)
                )
            now, end = full(at(k), 1), full(at(first), 1)
            ratio = schedule.sigma(end) / schedule.sigma(now)
            rows.append(((y - ratio * row) / (schedule.alpha(end) - schedule.alpha(now) * ratio))[0])
        return torch.stack(rows)

    def at(k):
        return schedule.at(torch.tensor(k / nodes).double()).item()

    options = {"segments": [segments], "solver_steps": nodes, "end": "segment"}
    exact = method_of(teacher, Known(consistent, schedule), **options)
    assert exact.consistency(0, batch_of(16), Progress())["consistency"] < 1e-20
    other = method_of(teacher, Known(lambda x, t: consistent(x, t) + 0.01 * x, schedule), **options)
    assert other.consistency(0, batch_of(16), Progress())["consistency"] > 1e-7


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.7, dtype=torch.float64))


@pytest.mark.parametrize("distance", ["mse", "huber"])
def test_gradient_reaches_the_students_jump_only(distance):
    teacher, net = mixture(SD), Scaled()
    student = Known(lambda x, t: net.scale * x)
    method = method_of(teacher, student, segments=[1], distance=distance)  # the target is the live student
    loss = method.consistency(0, batch_of(), Progress())["consistency"]
    loss.backward()
    _, made, goal, end = method.term.inconsistency(0, batch_of())
    error = made - goal
    weight = 2 * error if distance == "mse" else error / (error**2 + 1e-6).sqrt()
    x_t = made / net.scale  # one segment lands on the prediction itself, scale x_t
    assert not goal.requires_grad and (end == 0).all()
    assert torch.allclose(net.scale.grad, (weight * x_t).mean())


def test_the_target_is_an_average_or_the_live_student():
    ring = GaussianMixture.ring(SD, radius=2.2, std=0.2)
    torch.manual_seed(0)
    net = fit(ring, Mlp(16), steps=5)
    role = RoleConfig(kind="full", lr=1e-2, weight_decay=0.0)
    real = ring.sample(256, Rng("r"))
    for target in ("ema", "live"):
        config = HyperSD.Config(segments=[2], target=target, target_decay=0.75)
        trainer = toy(HyperSD, config, ring, net, steps=3, batch_size=16, real=real, student=role)
        assert ("target" in trainer.roles) is (target == "ema")
        if target == "live":
            assert trainer.method.term.target is trainer.method.student.denoiser
            continue
        expected = [w.detach().clone() for w in trainer.roles["student"].weights.values()]
        for _ in range(3):
            trainer.iterate()
            weights = trainer.roles["student"].weights.values()
            expected = [0.75 * e + 0.25 * w for e, w in zip(expected, weights)]
        for e, w in zip(expected, trainer.roles["target"].weights.values()):
            torch.testing.assert_close(w, e)
        assert trainer.method.term.target.net is trainer.roles["target"].module


def test_stages_resume_each_other_and_the_previous_one_may_teach():
    ring = GaussianMixture.ring(SD, radius=2.2, std=0.2)
    torch.manual_seed(0)
    net = fit(ring, Mlp(16), steps=5)
    config = HyperSD.Config(
        segments=[4, 2, 1], lengths=[1, 1, 2], stage_teacher="previous", guidance_scale=1.0
    )
    role = RoleConfig(kind="full", lr=1e-2, weight_decay=0.0)
    real = ring.sample(256, Rng("r"))
    trainer = toy(HyperSD, config, ring, net, steps=8, batch_size=16, real=real, student=role)
    assert trainer.method.shares()[:3] == [(0.0, 0.25), (0.25, 0.5), (0.5, 1.0)]

    def weights(name):
        return torch.cat([w.detach().flatten() for w in trainer.roles[name].weights.values()])

    names, snapshots = [], {}
    for i in range(8):
        snapshots[i], before = weights("student"), dict(trainer.window.counts)
        trainer.iterate()
        logged = [n for n, count in trainer.window.counts.items() if count > before.get(n, 0)]
        names += [n.split("/")[0] for n in logged if n.endswith("consistency")]
        expected = {0: 0, 1: 0, 2: 2, 3: 2}.get(i, 4)  # of the stage's beginning; at first it is the teacher
        assert weights("previous").equal(snapshots[expected])
    assert names == ["stage_1"] * 2 + ["stage_2"] * 2 + ["stage_3"] * 4


def test_guidance_is_the_original_teachers_exactly_once():
    teacher, asked = mixture(SD, labels=True), []
    cond = Cond({"label": torch.tensor([0, 1] * 32)})

    class Watched:
        schedule, null = SD, teacher.null

        def x0(self, x_t, t, cond, *, guidance=1.0):
            asked.append(guidance)
            return teacher.x0(x_t, t, cond, guidance=guidance)

    def run(stage, **options):
        asked.clear()
        student, target, previous = (Known(lambda x, t: x) for _ in range(3))
        config = HyperSD.Config(segments=[2, 1], **options)
        networks = {"student": student, "target": target}
        if config.stage_teacher == "previous":
            networks["previous"] = previous
        HyperSD(config, Watched(), (2,), **networks).consistency(stage, batch_of(64, cond), Progress())
        assert all(g == 1.0 for d in (student, target, previous) for _, _, g in d.asked)
        return list(asked), len(previous.asked)

    assert run(0, guidance_scale=3.0) == ([3.0], 0)
    assert run(0, guidance_scale=3.0, stage_teacher="previous") == ([3.0], 0)
    assert run(1, guidance_scale=3.0, stage_teacher="previous") == ([], 1)
    (drawn,), _ = run(0, guidance_range=(7.0, 8.0))
    assert drawn.shape == (64,) and 7 <= drawn.min() < drawn.max() <= 8


# ------------------------------------------------------------------------------------------------ discriminator
def test_heads_take_the_goal_for_real_within_the_segment_and_the_student_follows():
    torch.manual_seed(0)
    teacher = view(Mlp(32).requires_grad_(False))
    options = {"segments": [4], "solver_steps": 8, "gan_weight": 0.5, "taps": ["layers.0"], "target": "live"}
    net = Mlp(32)
    method = HyperSD(HyperSD.Config(**options), teacher, (2,), student=view(net))
    batch = batch_of()
    batch.real = batch.real.float()
    seen = []
    inner = method.term.discriminator.logits
    method.term.discriminator.logits = lambda judge, x, t, cond: (
        seen.append((x, t)) or inner(judge, x, t, cond)
    )
    losses = method.consistency(0, batch, Progress())
    x_fake, t = seen[0]
    end = batch.carry["end"]
    assert (
        (t >= SD.at(end).clamp(min=0)).all()
        and (t <= SD.at((end + 0.25).clamp(max=1.0))).all()
        and t.std() > 0
    )
    assert losses["gan"].item() == pytest.approx(
        0.5 * objectives.gan_generator(inner(teacher, x_fake, t, NONE)).item()
    )
    grads = torch.autograd.grad(losses["gan"], list(net.parameters()), retain_graph=True)
    assert max(g.abs().max() for g in grads) > 0  # through the frozen teacher
    batch.carry["made"] = batch.carry["made"] + 1e4  # told apart from the goal whatever noise is added
    loss = method.discrimination(0, batch, Progress())["discriminator"]
    loss.backward()
    assert all(p.grad is None for p in [*net.parameters(), *teacher.net.parameters()])
    both, t = seen[1]
    assert both[:64].abs().max() < 100 < both[64:].abs().min()
    real, fake = inner(teacher, both, t, NONE).chunk(2)
    assert torch.allclose(loss, objectives.gan_discriminator(real, fake))


# ------------------------------------------------------------------------------------------------ feedback, score
def test_feedback_is_a_hinge_on_the_reward_of_the_students_own_sample():
    teacher, net = mixture(SD), Scaled()
    student = Known(lambda x, t: net.scale * x)
    options = {
        "segments": [1],
        "num_steps": [1],
        "feedback_length": 1.0,
        "reward": "a:b",
        "reward_margin": 1.0,
    }
    method = method_of(teacher, student, **options, reward_weight=2.0, keep_weight=0.0)
    asked = []

    def reward(x0, index):
        asked.append(index)
        return x0[:, 0]

    method.reward = reward
    batch = batch_of(index=torch.arange(64))
    losses = method.feedback(batch, Progress())
    noise = Rng(0, "micro").normal(64, 2)
    missing = 1 - net.scale * noise[:, 0]
    assert torch.allclose(losses["reward"], 2 * missing.clamp(min=0).mean())
    losses["reward"].backward()
    assert torch.allclose(net.scale.grad, -2 * (noise[:, 0] * (missing > 0)).mean().double())
    assert asked[0].equal(torch.arange(64)) and set(losses) == {"reward"}
    assert torch.allclose(batch.log["reward"], (net.scale * noise[:, 0]).mean())
    method = method_of(teacher, student, **options, keep_weight=0.5)
    method.reward = reward
    kept = method.feedback(batch_of(index=torch.arange(64)), Progress())
    assert set(kept) == {"reward", "consistency"} and kept["consistency"] > 0


def test_the_score_stage_is_dmd_beside_the_last_consistency():
    teacher, net = mixture(SD), Scaled()
    student, critic = Known(lambda x, t: net.scale * x), Known(lambda x, t: 0.5 * x)
    config = HyperSD.Config(segments=[1], target="live", score_length=1.0, score_weight=3.0, keep_weight=0.5)
    method = HyperSD(config, teacher, (2,), student=student, critic=critic)
    assert HyperSD.networks_for(config) == ("student", "critic")
    assert [p.name for p in method.phases()] == ["stage_1", "score", "critic"]
    losses = method.score(batch_of(), Progress())
    dmd = DMD(DMD.Config(regression_weight=0.0), teacher, (2,), student=student, critic=critic)
    alone = batch_of()
    assert torch.allclose(losses["dm"], 3 * dmd.generator_loss(alone, Progress())["dm"])
    assert torch.allclose(losses["consistency"], 0.5 * method.term.inconsistency(0, alone)[0])


# -------------------------------------------------------------------------------------------------------- steps
def test_tcd_steps_lie_between_deterministic_and_fresh_ones():
    noise, denoiser = Rng(1).normal(16, 2).double(), Known(lambda x, t: 0.8 * x)

    def sample(kind, eta=0.0):
        student = Student(denoiser, [999, 749, 499, 249], kind, eta=eta)
        return student.sample(noise, NONE, Rng(2).normal_like)

    assert sample("tcd", 0.0).equal(sample("ddim"))
    assert (sample("tcd", 1.0) - sample("fresh")).abs().max() < 1e-12
    assert (
        (sample("tcd", 0.3) - sample("ddim")).abs().max()
        > 1e-2
        < (sample("tcd", 0.3) - sample("fresh")).abs().max()
    )


def test_one_student_has_the_even_times_of_every_number_of_steps():
    method = method_of(mixture(SD), segments=[8, 4, 2, 1], solver_steps=40)
    assert method.student.grids[8] == [999, 874, 749, 624, 499, 374, 249, 124]
    assert method.student.grids[4] == [999, 749, 499, 249] and method.student.grids[1] == [999]
    flow = method_of(mixture(Flow(shift=3.0)), segments=[4, 1], solver_steps=40)
    assert flow.student.grids[4] == pytest.approx([1.0, 0.9, 0.75, 0.5])
    dedicated = method_of(mixture(SD), num_steps=[1], one_step_time=800.0)
    assert dedicated.student.times == [800.0]


@pytest.mark.parametrize(
    "options, field",
    [
        ({"segments": []}, "method.segments"),
        ({"segments": [80]}, "method.segments"),
        ({"lengths": [1.0]}, "method.lengths"),
        ({"lengths": [1.0, 1.0, 1.0, -1.0]}, "method.lengths"),
        ({"score_length": -1.0}, "method.score_length"),
        ({"end": ["random"]}, "method.end"),
        ({"gan_weight": [0.1, 0.1]}, "method.gan_weight"),
        ({"eta": 1.5}, "method.eta"),
        ({"target_decay": 2.0}, "method.target_decay"),
        ({"feedback_length": 1.0}, "method.reward: null"),
        ({"num_steps": [0]}, "method.num_steps"),
        ({"guidance_range": (8.0, 7.0)}, "method.guidance_range"),
    ],
)
def test_impossible_options_are_refused(options, field):
    with pytest.raises(RecipeError, match=field):
        HyperSD.Config(**options)


# ------------------------------------------------------------------------------------------------------- the ring
@pytest.mark.slow
@pytest.mark.parametrize(
    "path, prediction, steps",
    [pytest.param("vp", "v", 1800, marks=pytest.mark.long), ("flow", "flow", 900)],
)
def test_one_step_reaches_the_ring_and_the_same_student_takes_more(path, prediction, steps):
    schedule = SD if path == "vp" else Flow()
    ring = GaussianMixture.ring(schedule, radius=2.2, std=0.2)
    torch.manual_seed(0)
    net = fit(ring, Mlp(), steps=300, prediction=prediction)
    role = RoleConfig(kind="full", lr=3e-3, ema=0.95, weight_decay=0.0, decay=steps // 4)
    config = HyperSD.Config(lengths=[1, 1, 1, 3], noise="fresh")
    options = {
        "steps": steps,
        "real": ring.sample(20000, Rng("r")),
        "student": role,
        "prediction": prediction,
    }
    trainer = toy(HyperSD, config, ring, net, **options)
    noise, data = Rng(7).normal(3000, 2), ring.sample(3000, Rng(9))

    def made(num_steps):
        with averaged(trainer.roles["student"]):
            return trainer.method.student.at(num_steps).sample(noise, NONE, Rng(6).normal_like)

    assert energy_distance(made(1), data) > 0.5
    for _ in range(steps):
        trainer.iterate()
    assert all(energy_distance(made(n), data) < 0.03 for n in (1, 2, 4, 8))
    one, solved = made(1), ddim(ring, noise, NONE, 250)
    assert per_noise(one, solved, f"hyper_sd, {path}", energy_distance(one, data)) < 0.15


def test_the_goal_is_the_targets_landing_and_not_the_live_students():
    teacher = mixture(SD)
    live, average = Known(lambda x, t: torch.full_like(x, 5.0)), Known(lambda x, t: torch.full_like(x, -3.0))
    method = method_of(teacher, live, average, segments=[1], end="segment")
    batch = batch_of()
    _, made, goal, _ = method.term.inconsistency(0, batch)
    # From the lowest node the teacher's own step lands there already.
    assert (made == 5).all() and ((goal + 3).abs() < 1e-5).float().mean() > 0.7


def test_what_is_judged_is_diffused_from_where_it_landed():
    """From level r to t the signal shrinks by alpha_t / alpha_r, not by alpha_t."""
    torch.manual_seed(0)
    teacher = view(Mlp(32).requires_grad_(False))
    options = {"segments": [4], "solver_steps": 8, "gan_weight": 0.5, "taps": ["layers.0"], "target": "live"}
    method = HyperSD(HyperSD.Config(**options), teacher, (2,), student=view(Mlp(32)))
    seen = []
    method.term.discriminator.logits = lambda judge, x, t, cond: seen.append((x, t)) or x
    end = torch.full((64,), 0.5)
    method.term.judge(0, torch.full((64, 2), 1e4), end, NONE, batch_of())
    x_t, t = seen[0]
    wanted = (SD.alpha(t) / SD.alpha(SD.at(end))).float()
    torch.testing.assert_close(x_t[:, 0] / 1e4, wanted, rtol=0, atol=1e-3)
    assert (wanted - SD.alpha(t).float()).abs().max() > 0.01


def test_the_noisiest_times_of_an_eps_network_outweigh_the_others_less_by_hubers_distance():
    """At equal errors of eps, x0's are ``sigma / alpha`` of them: four of SDXL's 40 nodes are most of the squares."""
    t = SD.at(torch.arange(1, 41, dtype=torch.float64) / 40)
    error = (SD.sigma(t) / SD.alpha(t))[:, None] * 0.1 * torch.ones(40, 8, dtype=torch.float64)
    shares = {}
    for name, distance in (("mse", nn.functional.mse_loss), ("huber", trajectory.pseudo_huber)):
        made = [row.clone().requires_grad_() for row in error]
        rows = [torch.autograd.grad(distance(row, torch.zeros_like(row)), row)[0] for row in made]
        weights = torch.stack([(g.abs() * e).sum() for g, e in zip(rows, error)])  # as eps sees it
        shares[name] = (weights[-4:].sum() / weights.sum()).item()
    assert shares["mse"] > 0.6 and shares["huber"] < 0.4
    assert load_recipe("sdxl_hyper_sd").method.distance == "huber"
