"""BOOT where everything is known: its step is DDIM's, its fixed point the teacher's trajectory, and the ring."""

import copy

import pytest
import torch
from toys import NONE, SD, Mlp, TimedMlp, distance, fit, per_noise, toy, view

from fewstep.diffusion import trajectory
from fewstep.diffusion.cond import Cond
from fewstep.diffusion.rng import Rng
from fewstep.diffusion.schedules import EDM, VP, Flow, TrigFlow
from fewstep.diffusion.solvers import ddim
from fewstep.errors import RecipeError
from fewstep.methods import Batch, Progress
from fewstep.methods.boot import BOOT
from fewstep.recipe import RoleConfig
from fewstep.teachers.analytic import GaussianMixture
from fewstep.training.roles import averaged

PATHS = {"vp": SD, "flow": Flow(), "shifted flow": Flow(shift=3.0), "trig": TrigFlow()}
ZERO_SNR = VP([*torch.linspace(0.999, 1e-3, 99).tolist(), 0.0])


def mixture(schedule, labels=False):
    means = torch.tensor([[-1.0, 0.3], [1.2, -0.5]], dtype=torch.float64)
    weights = torch.tensor([[0.9, 0.1], [0.2, 0.8]], dtype=torch.float64) if labels else None
    return GaussianMixture(schedule, means, torch.tensor(0.2, dtype=torch.float64), weights)


def method_of(teacher, net=None, **options):
    torch.manual_seed(0)
    net = net or TimedMlp(16)
    student = view(net, teacher.schedule)
    return BOOT(BOOT.Config(**options), teacher, (2,), student=student), net


def batch_of(size=32, cond=NONE, seed=0):
    return Batch(cond, (size, 2), Rng(seed, "micro"), Rng(seed, "shared"))


def at(schedule, *fractions):
    return [schedule.at(torch.tensor([f], dtype=torch.float64)) for f in fractions]


# ----------------------------------------------------------------------------------------------------- the step
@pytest.mark.parametrize("path", PATHS)
def test_a_step_of_the_signal_is_the_ddim_step(path):
    schedule = PATHS[path]
    eps, y, f = (Rng(i).normal(64, 2).double() for i in range(3))
    for now, following in ((0.99, 0.97), (0.6, 0.4), (0.3, 0.28), (0.05, 0.02)):
        t, s = (time.expand(64) for time in at(schedule, now, following))
        gain = trajectory.signal_gain(schedule, t, s)
        stepped = trajectory.signal_step(y, f, gain)
        x_s = schedule.ddim_step(schedule.add_noise(y, eps, t), f, t, s)
        assert (schedule.add_noise(stepped, eps, s) - x_s).abs().max() < 1e-12
        assert (gain > 0).all() and (gain < 1).all()


@pytest.mark.parametrize("path", PATHS)
def test_the_last_step_lands_on_the_prediction(path):
    t, clean = at(PATHS[path], 0.1, 0.0)
    assert trajectory.signal_gain(PATHS[path], t, clean).item() == 1.0


@pytest.mark.parametrize("boundary", ["exact", "teacher"])
@pytest.mark.parametrize("path", PATHS)
def test_the_recursion_with_a_table_student_is_n_step_ddim(path, boundary):
    """The table is iterated from the boundary through the method's own step; from "exact" it starts at the noise."""
    schedule, nodes = PATHS[path], 12
    teacher = mixture(schedule)
    if boundary == "exact" and path != "vp":
        pytest.skip("zero SNR at the end: the exact signal is 0 / 0 there")
    method, _ = method_of(teacher, boundary=boundary, intervals=nodes)
    eps = Rng(1).normal(50, 2).double()
    level = torch.ones(50, dtype=torch.float64)
    signal = method.edge(eps, 1.0, NONE)
    x = schedule.add_noise(signal, eps, schedule.at(level))
    if boundary == "exact":
        assert (x - eps).abs().max() < 1e-12
    for k in range(nodes, 0, -1):
        now, following = level * k / nodes, level * (k - 1) / nodes
        signal, _ = method.step(signal, eps, now, following, 1.0, NONE)
        t, s = schedule.at(now), schedule.at(following)
        x = schedule.ddim_step(x, teacher.x0(x, t, NONE), t, s)
    assert (signal - x).abs().max() < 1e-12
    if isinstance(schedule, Flow) and schedule.shift == 1:
        assert (signal - ddim(teacher, eps, NONE, nodes)).abs().max() < 1e-12


def test_heun_steps_are_of_second_order():
    teacher = mixture(Flow())
    eps = Rng(1).normal(50, 2).double()
    truth = ddim(teacher, eps, NONE, 1000)

    def error(solver, nodes):
        method, _ = method_of(teacher, solver=solver, intervals=nodes)
        level, signal = torch.ones(50, dtype=torch.float64), torch.zeros_like(eps)
        for k in range(nodes, 0, -1):
            signal, _ = method.step(signal, eps, level * k / nodes, level * (k - 1) / nodes, 1.0, NONE)
        return (signal - truth).abs().mean().item()

    assert error("heun", 40) < 0.25 * error("ddim", 40)
    assert error("heun", 20) / error("heun", 40) > 3 > error("ddim", 20) / error("ddim", 40)


# --------------------------------------------------------------------------------------------------- the boundary
def test_the_boundary_is_right_where_the_schedule_ends_at_a_non_zero_snr():
    for schedule, exact in ((SD, True), (Flow(), False), (ZERO_SNR, False)):
        assert method_of(mixture(schedule))[0].exact is exact
    eps = Rng(1).normal(50, 2).double()
    last = torch.full((50,), SD.t_max, dtype=torch.float64)
    signal = trajectory.terminal_signal(eps, SD)
    assert (SD.add_noise(signal, eps, last) - eps).abs().max() < 1e-12
    # The teacher's prediction there is another start, off by alpha f: the paper's boundary is for zero SNR.
    teacher = mixture(SD)
    other = SD.add_noise(teacher.x0(eps, last, NONE), eps, last)
    assert 0.01 < (other - eps).abs().max() < 3 * SD.alpha(last)[0]


def test_on_edms_path_all_begins_at_sigma_times_noise(monkeypatch):
    schedule, eps, given = EDM(), Rng(1).normal(5, 2).double(), {}
    last = torch.full((5,), schedule.t_max, dtype=torch.float64)
    assert schedule.begin(eps, last).equal(80 * eps)
    assert trajectory.terminal_signal(eps, schedule).abs().max() == 0
    method, _ = method_of(mixture(schedule))
    for name in ("student", "teacher"):
        monkeypatch.setattr(
            getattr(method, name), "x0", lambda x, *_, name=name, **__: given.setdefault(name, x)
        )
    method.exact = False
    method.signal(eps, last / 80, 1.0, NONE), method.edge(eps, 1.0, NONE)
    assert all(x.equal(80 * eps) for x in given.values()) and len(given) == 2


def test_at_the_start_every_level_is_the_teachers_prediction_from_pure_noise():
    torch.manual_seed(1)
    net = TimedMlp(16, labels=2)
    teacher = view(copy.deepcopy(net))
    method, _ = method_of(teacher, net, guidance_range=(1.0, 4.0), guidance_scale=2.0)
    noise, cond = Rng(2).normal(8, 2), Cond({"label": torch.tensor([0, 1] * 4)})
    expected = teacher.x0(noise, torch.full((8,), SD.t_max, dtype=torch.float64), cond)
    for level in (1.0, 0.5, 0.0):
        made = method.signal(noise, torch.full((8,), level).double(), torch.full((8,), 3.0), cond)
        assert made.equal(expected)
    assert method.student.sample(noise, cond, None).equal(expected)
    with torch.no_grad():  # trained, it tells levels and guidance apart
        for name in ("level", "guidance"):
            torch.nn.init.normal_(getattr(net, f"{name}_embedding").embedder.linear_2.weight)
    answers = [
        method.signal(noise, torch.full((8,), level).double(), torch.full((8,), g), cond)
        for level, g in ((1.0, 2.0), (0.5, 2.0), (0.0, 2.0), (0.0, 3.0))
    ]
    assert all((a - b).abs().max() > 1e-3 for i, a in enumerate(answers) for b in answers[:i])
    # Outside of training it is at the clean end and at the scale of the export.
    assert torch.allclose(method.student.sample(noise, cond, None), answers[2], atol=1e-5)


# ------------------------------------------------------------------------------------------------------- the loss
def tabled(method, teacher, nodes, off=0.0):
    """The method with a student that knows N-step DDIM by heart, and asked at the nodes only."""
    table = {}

    def signal(noise, level, guidance, cond):
        y = trajectory.terminal_signal(noise.double(), teacher.schedule)
        rows = []
        for i, k in enumerate((level * nodes).round().long().tolist()):
            one, value = torch.ones(1, dtype=torch.float64), y[i : i + 1]
            for j in range(nodes, k, -1):
                eps = noise[i : i + 1].double()
                value, _ = method.step(value, eps, one * j / nodes, one * (j - 1) / nodes, 1.0, cond)
            key = (i, k)
            table.setdefault(key, (value + off * (k == 3)).detach().requires_grad_())
            rows.append(table[key])
        return torch.cat(rows)

    method.signal = signal
    method.draw_levels = lambda u: (torch.full_like(u, 4 / nodes), torch.full_like(u, 3 / nodes))
    return table


def test_the_teachers_trajectory_is_the_fixed_point_and_nothing_else():
    teacher = mixture(SD)
    for off, zero in ((0.0, True), (0.01, False)):
        method, _ = method_of(teacher, intervals=10)
        tabled(method, teacher, 10, off)
        loss = method.loss(batch_of(4), Progress())
        assert (loss["bootstrap"].item() < 1e-20) is zero
        assert loss["boundary"].item() < 1e-15


def test_gradient_flows_only_through_the_answer_below_and_the_one_at_the_edge():
    teacher = mixture(SD)
    method, _ = method_of(teacher, intervals=10, boundary_weight=2.0)
    table = tabled(method, teacher, 10, off=0.01)
    with torch.no_grad():
        method.loss(batch_of(4), Progress())
        for (_row, k), value in table.items():
            if k == 10:
                value += 0.1
    loss = method.loss(batch_of(4), Progress())
    sum(loss.values()).backward()
    levels = {k for (_, k), value in table.items() if value.grad is not None}
    assert levels == {3, 10}
    t, s = at(SD, 0.4, 0.3)
    gain = trajectory.signal_gain(SD, t, s)
    for (_, k), value in table.items():
        if k == 3:  # of mean |y - T|^2 / gain^2 over 4 x 2 entries, y - T = 0.01
            assert torch.allclose(value.grad, (2 * 0.01 / gain**2 / 8).expand_as(value), rtol=1e-6)
        if k == 10:
            assert torch.allclose(value.grad, torch.full_like(value, 2.0 * 2 * 0.1 / 8), rtol=1e-6)


def test_the_student_is_given_the_first_noise_and_the_noisiest_time_only():
    teacher = mixture(SD)
    method, net = method_of(teacher)
    seen = []
    net.register_forward_pre_hook(lambda _m, args: seen.append(args))
    method.loss(batch_of(32), Progress())
    noise = batch_of(32).rng.normal(32, 2)
    assert len(seen) == 2  # one without gradient, one with
    for x, t in seen:
        assert x.equal(noise) or x.equal(torch.cat([noise, noise]))  # whatever was re-noised for the teacher
        assert (t == SD.t_max).all()


def test_guidance_is_the_teachers_alone_once_per_sample_and_told_to_the_student():
    teacher = mixture(SD, labels=True)
    asked, told = [], []

    class Watched:
        schedule, null = SD, teacher.null

        def x0(self, x_t, t, cond, *, guidance=1.0):
            asked.append(guidance)
            return teacher.x0(x_t.double(), t, cond, guidance=guidance).to(x_t)

    net = TimedMlp(16, labels=2)
    cond = Cond({"label": torch.tensor([0, 1] * 4)})
    method, _ = method_of(Watched(), net, guidance_scale=3.0)
    method.loss(batch_of(8, cond), Progress())
    assert asked == [3.0]
    asked.clear()
    options = {"guidance_scale": 3.0, "guidance_range": (1.0, 5.0)}
    method, _ = method_of(Watched(), TimedMlp(16, labels=2), **options)
    inner = method.student.x0
    method.student.x0 = lambda x, i, c: told.append(c["guidance"]) or inner(x, i, c)
    method.loss(batch_of(8, cond), Progress())
    assert len(asked) == 1 and asked[0].std() > 0.1 and 1 <= asked[0].min() <= asked[0].max() <= 5
    assert told[0].equal(asked[0]) and told[1].equal(asked[0].repeat(2))
    # u + g (c - u), exactly once
    x_t, t = Rng(3).normal(8, 2).double(), torch.full((8,), 500.0).double()
    u, c = teacher.x0(x_t, t, cond, guidance=0.0), teacher.x0(x_t, t, cond)
    guided = method.teacher.x0(x_t, t, cond, guidance=asked[0])
    assert torch.allclose(guided, u + asked[0][:, None] * (c - u))


@pytest.mark.parametrize(
    "options, field",
    [
        ({"intervals": 1}, "method.intervals: 1"),
        ({"boundary_weight": -1.0}, "method.boundary_weight: -1"),
        ({"guidance_range": (4.0, 2.0)}, "method.guidance_range"),
        ({"guidance_range": (2.0, 4.0), "guidance_scale": 5.0}, "method.guidance_range"),
    ],
)
def test_impossible_options_are_refused(options, field):
    with pytest.raises(RecipeError, match=field):
        BOOT.Config(**options)


def test_a_network_without_a_time_embedding_is_refused():
    with pytest.raises(RecipeError, match="Mlp has no time embedding"):
        BOOT(BOOT.Config(), mixture(SD), (2,), student=view(Mlp(16)))


# ------------------------------------------------------------------------------------------------------- the ring
@pytest.mark.long
def test_one_step_reaches_the_ring():
    ring = GaussianMixture.ring(SD, radius=2.2, std=0.2)
    torch.manual_seed(0)
    net, steps = fit(ring, TimedMlp(), steps=600), 2200
    role = RoleConfig(kind="full", lr=3e-3, ema=0.95, weight_decay=0.0, decay=steps)
    trainer = toy(BOOT, BOOT.Config(intervals=25), ring, net, steps=steps, student=role)
    before = distance(trainer, ring)
    for _ in range(steps):
        trainer.iterate()
    reached = distance(trainer, ring)
    assert reached < 0.03 < 0.5 < before
    noise = Rng(7).normal(3000, 2)
    with averaged(trainer.roles["student"]):
        made = trainer.method.student.sample(noise, NONE, None)
    assert per_noise(made, ddim(ring, noise, NONE, 250), "boot", reached) < 0.15
