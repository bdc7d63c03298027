"""The training-free floor: the search against brute force and closed forms, and what stock pipelines make of it."""

import itertools
import json

import numpy as np
import pytest
import torch
from toys import NONE, SD

from fewstep.cli import main
from fewstep.diffusion.cond import Cond
from fewstep.diffusion.few_steps import Paths, best_nodes, jump, levels, node_weights, reference_times, sample
from fewstep.diffusion.rng import Rng
from fewstep.diffusion.schedules import Flow
from fewstep.errors import FewstepError
from fewstep.evaluation.floor import ays_times, calibrate, floor_sampler, read_floor, write_floor
from fewstep.teachers.analytic import GaussianMixture
from fewstep.teachers.schedulers import FLOOR, scheduler_sample


def paths_of(teacher, times, order, count=256):
    paths = Paths.none(times)
    noise = Rng(0).normal(count, teacher.means.shape[1])
    for part in noise.split(100):
        paths.add(*sample(teacher, part, NONE, times, order=order))
    return paths


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 6])
def test_dynamic_programming_equals_brute_force(steps, order):
    costs = np.random.default_rng(steps).uniform(size=(7, 7, 8))
    if order == 1:
        costs[:] = costs[np.arange(7), np.arange(7)]
    for h, i, j in itertools.product(range(7), range(7), range(8)):
        if not h <= i < j:
            costs[h, i, j] = np.inf

    def total(nodes):
        befores = [nodes[0], *nodes[:-1]]  # the first jump has no node before it; the last is of first order
        jumps = [costs[h, i, j] for h, i, j in zip(befores, nodes[:-1], nodes[1:])]
        return sum(jumps) + costs[nodes[-1], nodes[-1], 7]

    every = [(0, *rest) for rest in itertools.combinations(range(1, 7), steps - 1)]
    nodes, cost = best_nodes(costs, steps)
    assert nodes == list(min(every, key=total)) and cost == pytest.approx(min(map(total, every)))


PATHS = pytest.mark.parametrize(
    "schedule, order", [(SD, 1), (SD, 2), (Flow(3.0), 1)], ids=["ddim", "dpm++", "flow euler"]
)


@PATHS
def test_costs_are_the_errors_of_the_jumps(schedule, order):
    """The Gram matrix gives what making every jump on the stored paths would give."""
    teacher, times = GaussianMixture.ring(schedule), reference_times(schedule, 6)
    costs = paths_of(teacher, times, order).costs(schedule, order)
    states, predictions, end = sample(teacher, Rng(0).normal(256, 2), NONE, times, order=order)
    level = levels(schedule, times).T
    for h, i, j in ((0, 0, 1), (2, 2, 6), (1, 3, 5), (0, 2, 3), (3, 4, 6)):
        second = h < i and order == 2 and j < 6
        a, b, c = map(float, jump(level[h] if second else None, level[i], level[j]))
        made = a * states[i] + b * predictions[i] + c * predictions[h]
        squared = (made - (states[j] if j < 6 else end)).square().mean().item() / (level[j] ** 2).sum()
        assert costs[h, i, j] == pytest.approx(squared, rel=1e-4, abs=1e-9)
    assert np.isinf(costs[1, 2, 2]) and np.isinf(costs[0, 3, 1])


def test_jumps_along_the_reference_cost_nothing():
    teacher = GaussianMixture.ring(SD)
    times = reference_times(SD, 8)
    costs = paths_of(teacher, times, 2).costs(SD, 2)
    nodes, cost = best_nodes(costs, 8)
    assert nodes == list(range(8)) and cost < 1e-9


def test_a_gaussian_is_solved_best_where_its_signal_appears():
    """For data of standard deviation s every first-order jump is known: the search finds the best pair of nodes."""
    teacher = GaussianMixture(SD, torch.zeros(1, 1), torch.tensor(0.05**2))
    times = reference_times(SD, 40)
    nodes, _ = best_nodes(paths_of(teacher, times, 1).costs(SD, 1), 2)
    noise = torch.ones(1, 1)
    end = sample(teacher, noise, NONE, times, order=1)[2]
    errors = [float((sample(teacher, noise, NONE, [999.0, t], order=1)[2] - end).abs()) for t in times[1:]]
    found = errors[nodes[1] - 1]
    even = float((sample(teacher, noise, NONE, [999.0, 499.0], order=1)[2] - end).abs())
    assert found < 0.5 * even


@PATHS
def test_found_nodes_beat_the_even_grid_on_a_ring(schedule, order):
    teacher = GaussianMixture.ring(schedule)
    times = reference_times(schedule, 30)
    costs = paths_of(teacher, times, order).costs(schedule, order)
    noise = Rng(1).normal(500, 2)  # others than those of the paths
    end = sample(teacher, noise, NONE, reference_times(schedule, 100), order=order)[2]

    def error(nodes):
        return (sample(teacher, noise, NONE, nodes, order=order)[2] - end).square().mean().sqrt().item()

    for steps in (4, 8):
        found = error([times[i] for i in best_nodes(costs, steps)[0]])
        assert found < 0.6 * error(reference_times(schedule, steps))


def test_weights_leave_the_end_alone_and_stay_finite_without_signal():
    for schedule in (SD, Flow()):
        for weights in node_weights(schedule, reference_times(schedule, 5)):
            assert weights.shape == (6,) and np.isfinite(weights).all() and weights[-1] == 1
        # From nothing to the guess that early errors die out, and to the one that they grow.
        assert [w[2] for w in node_weights(schedule, reference_times(schedule, 5))] == pytest.approx(
            [level_share(schedule) ** power for power in (0, -2, -1, 1, 2)]
        )


def level_share(schedule):
    """Signal of the third of five nodes, where signal and noise are a vector of length 1."""
    alpha, sigma = levels(schedule, reference_times(schedule, 5))[:, 2]
    return alpha / np.hypot(alpha, sigma)


# ------------------------------------------------------------------------------------------------------- AYS tables
@pytest.mark.parametrize("name", ["StableDiffusion", "StableDiffusionXL"])
def test_ays_tables(name):
    from diffusers.schedulers import AysSchedules

    ten = ays_times(f"{name}Pipeline", SD, 10)
    assert ten == AysSchedules[f"{name}Timesteps"]
    twenty = ays_times(f"{name}Pipeline", SD, 20)
    assert all(abs(a - b) <= 1 for a, b in zip(twenty[::2], ten))  # every other node is one of the ten
    for steps in (1, 4, 5, 13):
        times = ays_times(f"{name}Pipeline", SD, steps)
        assert len(times) == steps and times[0] == 999 and times == sorted(set(times), reverse=True)
    halfway = SD.log_snr(torch.tensor([ten[0], twenty[1], ten[1]], dtype=torch.float64))
    assert halfway[1] == pytest.approx((halfway[0] + halfway[2]).item() / 2, abs=0.02)  # log-linear in sigma


def test_ays_of_another_pipeline_is_refused():
    with pytest.raises(FewstepError, match="no table for SanaPipeline; there are those of StableDiffusion"):
        ays_times("SanaPipeline", SD, 4)


# --------------------------------------------------------------------------------------------------- stock pipelines
@pytest.fixture(scope="module")
def found(sdxl):
    return calibrate(sdxl, ["a cat", "a dog"], [2, 3], guidance=1.0, num=4, reference_steps=8)


def test_record_is_whole(found):
    assert list(found["schedules"]) == ["2", "3"] and found["solver"] == "dpm++"
    grid = [int(t) for t in reference_times(SD, 8)]
    for n, entry in found["schedules"].items():
        times = entry["timesteps"]
        assert len(times) == int(n) and times[0] == 999 and set(times) <= set(grid) | {499, 666, 332}
        assert set(entry["error"]) == {"searched", "even", "ays"}
    assert json.loads(json.dumps(found, allow_nan=False)) == found


@pytest.mark.parametrize("solver", ["dpm++", "euler"])
def test_the_exported_scheduler_walks_exactly_these_times_in_a_stock_pipeline(sdxl, found, tmp_path, solver):
    """The network is called at the found nodes, and the latents are those of our own sampler."""
    from diffusers import DPMSolverMultistepScheduler

    write_floor(tmp_path, sdxl.pipe.scheduler, {**found, "solver": solver})
    scheduler, call = floor_sampler(str(tmp_path), sdxl.pipe, sdxl.pipe.scheduler, 3)
    times = found["schedules"]["3"]["timesteps"]
    assert call == {"timesteps": times}
    stock = DPMSolverMultistepScheduler.from_pretrained(tmp_path, subfolder="scheduler")
    assert stock.config == scheduler.config
    seen = []
    handle = sdxl.net.register_forward_hook(lambda _m, args, _o: seen.append(float(args[1])))
    before = sdxl.pipe.scheduler
    noise = Rng(3).normal(1, *sdxl.latent_shape)
    try:
        sdxl.pipe.scheduler = stock
        made = sdxl.pipe("a cat", latents=noise, output_type="latent", guidance_scale=1.0, **call).images
    finally:
        sdxl.pipe.scheduler = before
        handle.remove()
    assert seen == times
    order = {"dpm++": 2, "euler": 1}[solver]
    ours = sample(sdxl.denoiser, noise, sdxl.encode(["a cat"]), [float(t) for t in times], order=order)[2]
    torch.testing.assert_close(made, ours, rtol=1e-3, atol=1e-3)


def test_named_solvers_are_those_of_diffusers(sdxl):
    for name in FLOOR:
        scheduler, call = floor_sampler(name, sdxl.pipe, sdxl.pipe.scheduler, 4)
        assert type(scheduler) is type(FLOOR[name](sdxl.pipe.scheduler)) and call == {
            "num_inference_steps": 4
        }
    _, call = floor_sampler("ays", sdxl.pipe, sdxl.pipe.scheduler, 10)
    assert call["timesteps"][:3] == [999, 845, 730]


def test_our_even_grid_is_diffusers_dpm_solver(sdxl):
    noise, cond = Rng(4).normal(2, *sdxl.latent_shape), sdxl.encode(["a cat", "a dog"])
    theirs = scheduler_sample(sdxl.denoiser, FLOOR["dpm++"](sdxl.pipe.scheduler), noise, cond, 4)
    ours = sample(sdxl.denoiser, noise, cond, reference_times(SD, 4))[2]
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_command_line(tiny_sdxl, tmp_path, capsys):
    words = [
        "floor",
        str(tiny_sdxl),
        "--steps",
        "1,2",
        "--num",
        "2",
        "--reference-steps",
        "5",
        "--device",
        "cpu",
    ]
    assert main([*words, "--guidance", "3", "--out", str(tmp_path / "f")]) == 0
    assert "searched nodes" in capsys.readouterr().out
    record = read_floor(tmp_path / "f")
    assert record["guidance_scale"] == 3 and record["schedules"]["1"]["timesteps"] == [999]
    assert (tmp_path / "f" / "scheduler" / "scheduler_config.json").is_file()
    (tmp_path / "p.txt").write_text("a\nb")
    words = [
        "eval",
        "generate",
        str(tiny_sdxl),
        "--steps",
        "2",
        "--solver",
        str(tmp_path / "f"),
        "--guidance",
        "1",
    ]
    words += ["--prompts", str(tmp_path / "p.txt"), "--speed-runs", "0", "--device", "cpu"]
    assert main([*words, "--out", str(tmp_path / "images")]) == 0
    manifest = json.loads((tmp_path / "images" / "2-steps" / "manifest.json").read_text())
    assert manifest["run"]["timesteps"] == record["schedules"]["2"]["timesteps"]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"steps": [0]}, "--steps 0: expected numbers from 1 to 5"),
        ({"steps": [2, 6]}, "--steps 2,6.*raise --reference-steps"),
        ({"num": 1}, "--num 1: expected at least 2"),
        ({"solver": "heun"}, "--solver heun: expected one of euler, dpm"),
    ],
)
def test_bad_requests_come_before_the_network(sdxl, options, message, monkeypatch):
    monkeypatch.setattr("fewstep.evaluation.floor.sample", lambda *_, **__: pytest.fail("ran"))
    options = {"steps": [2], "guidance": 1.0, "reference_steps": 5, **options}
    with pytest.raises(FewstepError, match=message):
        calibrate(sdxl, ["a"], **options)


def test_bad_folders(sdxl, found, tmp_path, capsys):
    with pytest.raises(FewstepError, match=r"solver nowhere: expected one of ddim, .*ays, or a folder"):
        floor_sampler("nowhere", sdxl.pipe, sdxl.pipe.scheduler, 4)
    write_floor(tmp_path, sdxl.pipe.scheduler, found)
    with pytest.raises(FewstepError, match=r"4 steps were not searched, only 2, 3; .*--steps 4"):
        floor_sampler(str(tmp_path), sdxl.pipe, sdxl.pipe.scheduler, 4)
    (tmp_path / "floor.json").write_text("{")
    with pytest.raises(FewstepError, match="JSONDecodeError"):
        floor_sampler(str(tmp_path), sdxl.pipe, sdxl.pipe.scheduler, 2)
    assert main(["floor", "builtin:nothing", "--steps", "2", "--out", str(tmp_path / "x")]) == 2
    assert "builtin:emoji-xl" in capsys.readouterr().err


def test_a_floor_takes_the_place_of_an_older_one_and_of_nothing_else(sdxl, found, tmp_path):
    for seed in (1, 2):
        write_floor(tmp_path / "f", sdxl.pipe.scheduler, {**found, "seed": seed})
    assert read_floor(tmp_path / "f")["seed"] == 2
    (tmp_path / "f" / "floor.json").rename(tmp_path / "f" / "thesis.json")
    with pytest.raises(FewstepError, match=r"f is not empty, and no floor\.json says that fewstep made it"):
        write_floor(tmp_path / "f", sdxl.pipe.scheduler, found)
    assert sorted(p.name for p in (tmp_path / "f").iterdir()) == ["scheduler", "thesis.json"]


def test_a_condition_with_guidance_is_used(sdxl):
    noise, cond = Rng(5).normal(1, *sdxl.latent_shape), sdxl.encode(["a cat"])
    assert isinstance(cond, Cond)
    one, three = (sample(sdxl.denoiser, noise, cond, [999.0, 499.0], guidance=g)[2] for g in (1.0, 3.0))
    assert (one - three).abs().max() > 1e-4
