"""The training-free floor: the search against brute force and closed forms, and what stock pipelines make of it."""

import itertools
import json

import numpy as np
import pytest
import torch
from toys import NONE, SD
from zoo import EDITS

from fewstep.cli import main
from fewstep.diffusion.cond import Cond
from fewstep.diffusion.few_steps import Paths, best_nodes, jump, levels, node_weights, reference_times, sample
from fewstep.diffusion.rng import Rng
from fewstep.diffusion.schedules import Flow
from fewstep.diffusion.walks import known_walks, walk
from fewstep.errors import FewstepError
from fewstep.evaluation.floor import FAMILIES, End, Search, calibrate
from fewstep.evaluation.models import Model
from fewstep.evaluation.prompts import Prompts
from fewstep.evaluation.sampling import Job, _describe
from fewstep.evaluation.stock import (
    FREE_U,
    ays_times,
    floor_sampler,
    free_u,
    free_u_of,
    read_floor,
    stock_call,
    stock_scheduler,
    write_floor,
)
from fewstep.teachers.analytic import GaussianMixture
from fewstep.teachers.schedulers import FLOOR, schedule_of, scheduler_sample


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


# ------------------------------------------------------------------------------------------------------- the choice
class Alone:
    """A closed-form teacher as the search takes one; there is no network to give Free-U to."""

    def __init__(self, schedule):
        self.ring, self.schedule, self.net = GaussianMixture.ring(schedule), schedule, None

    def x0(self, x_t, t, cond, *, guidance=1.0):
        return self.ring.x0(x_t, t, cond, guidance=guidance)


def misled(orders=(1, 2)):
    """Costs of paths that say nothing of others: the only nodes that they leave are the first ones."""
    costs = np.full((30, 30, 31), np.inf)
    for h, i, j in itertools.product(range(30), range(30), range(31)):
        if h <= i < j and j in (i + 1, 30):
            costs[h, i, j] = 1
    return dict.fromkeys(orders, costs)


def search_of(schedule, costs, families=FAMILIES, held=64, seed=2):
    teacher, times = Alone(schedule), reference_times(schedule, 30)
    order = 1 if isinstance(schedule, Flow) else 2
    noise = Rng(seed).normal(held, 2)
    ends = [End(z, NONE, sample(teacher, z, NONE, times, order=order)[2]) for z in noise.split(40)]
    return Search(teacher, "StableDiffusionPipeline", 1.0, families, False, times, costs, ends)


@pytest.mark.parametrize("steps", [1, 2, 4, 6, 8])
@pytest.mark.parametrize("schedule", [SD, Flow(3.0)], ids=["table", "flow"])
def test_a_floor_is_never_worse_than_the_even_grid_however_the_search_was_misled(schedule, steps):
    costs = misled((1,) if isinstance(schedule, Flow) else (1, 2))
    search = search_of(schedule, costs)
    entry = search.schedule(steps)
    errors = entry["error"]
    chosen = walk(schedule, entry["family"], entry["times"], entry["order"], entry.get("stop"))
    assert search.error(chosen) == errors[entry["family"]] == min(errors.values()) <= errors["even"]
    if steps > 1:
        assert errors["searched"] > errors["even"]  # it was misled
    other = search_of(schedule, costs, held=400, seed=3)  # and on paths that nobody chose by
    grids = (walk(schedule, "even", reference_times(schedule, steps), order) for order in costs)
    assert other.error(chosen) <= 1.02 * min(map(other.error, grids))


def test_the_choice_is_among_the_families_asked_for_and_the_even_grid_is_measured_beside_them():
    entry = search_of(SD, misled(), families=("searched",)).schedule(5)
    assert entry["family"] == "searched" and set(entry["error"]) == {"even", "searched"}
    assert entry["error"]["even"] < entry["error"]["searched"]
    stopped = search_of(SD, misled(), families=("stopped",)).schedule(5)
    assert stopped["family"] == "stopped" and 0 < stopped["stop"] < stopped["times"][-1]


def test_each_family_has_the_least_error_of_its_members():
    search = search_of(SD, misled())
    for name, error in search.schedule(5)["error"].items():
        members = [one for one in search.candidates(5) if one.family == name]
        assert {one.order for one in members} == {1, 2}
        assert error == min(map(search.error, members)) < max(map(search.error, members))
    assert {one.family for one in search.candidates(5)} == set(FAMILIES)


def test_the_error_is_of_the_sample_with_the_noise_of_its_stop():
    search = search_of(SD, misled())
    one = next(one for one in search.candidates(6) if one.stop and one.order == 1)
    ends = torch.cat([end.sample for end in search.held])
    made = [
        sample(search.denoiser, end.noise, NONE, one.times, order=1, end=one.end(SD))[2]
        for end in search.held
    ]
    rms = (torch.cat(made) - ends).square().mean().sqrt().item()
    assert search.error(one) == pytest.approx(rms) != pytest.approx(search.error(one._replace(stop=None)))


def test_searched_are_the_best_nodes_of_each_guess_of_what_an_error_matters():
    times = reference_times(SD, 30)
    costs = paths_of(GaussianMixture.ring(SD), times, 2).costs(SD, 2)
    search = search_of(SD, {2: costs})
    found = {one.times for one in search.candidates(6) if one.family == "searched"}
    guesses = [best_nodes(costs * weights, 6)[0] for weights in node_weights(SD, times)]
    assert found == {tuple(times[i] for i in nodes) for nodes in guesses} and len(found) > 1


def test_paths_that_are_held_out_are_others_than_those_searched(sdxl, monkeypatch):
    seen, held = [], []
    monkeypatch.setattr(Paths, "add", lambda self, states, *_: seen.append(states[0]))
    monkeypatch.setattr(
        Search, "schedule", lambda self, num_steps: held.extend(end.noise for end in self.held)
    )
    calibrate(sdxl, ["a", "b", "c"], [2], guidance=1.0, num=10, reference_steps=3, batch_size=4)
    searched, other = torch.cat(seen), torch.cat(held)
    assert len(searched) == 10 and len(other) == 5
    assert (searched[:, None] - other[None]).abs().amax((2, 3, 4)).min() > 0.1


def test_prompts_with_references_want_a_teacher_that_reads_them(sdxl, teachers):
    with pytest.raises(
        FewstepError, match="prompts: the first edit: a StableDiffusionXLPipeline reads no reference"
    ):
        calibrate(sdxl, EDITS, [2], guidance=1.0)
    with pytest.raises(FewstepError, match="prompts: number 1, 'a cat', has no reference image"):
        calibrate(teachers("Qwen-Image-Edit"), ["a cat"], [2], guidance=1.0)


# --------------------------------------------------------------------------------------------------- stock pipelines
@pytest.fixture(scope="module")
def found(sdxl):
    return calibrate(sdxl, ["a cat", "a dog"], [2, 3], guidance=1.0, num=4, reference_steps=8)


def test_record_is_whole(found):
    assert list(found["schedules"]) == ["2", "3"] and found["families"] == list(FAMILIES)
    for n, entry in found["schedules"].items():
        times = entry["times"]
        assert len(times) == int(n) and times[0] == 999 and set(entry["error"]) == set(FAMILIES)
        assert entry["error"][entry["family"]] == min(entry["error"].values())
        assert set(entry["call"]) == {{1: "sigmas", 2: "timesteps"}[entry["order"]]}
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def record_of(schedule, *walks):
    """A record of these walks, as `calibrate` writes it."""
    entries = {}
    for one in walks:
        entry = {"family": one.family, "order": one.order, "times": list(one.times), "error": {}}
        entry |= {"stop": one.stop} if one.stop is not None else {}
        entry |= {"free_u": FREE_U} if one.free_u else {}
        entries[str(len(one.times))] = {**entry, "call": stock_call(schedule, one)}
    return {"schema": 2, "schedules": entries}


def candidates(order):
    """One of each family, of 3 steps; and a stopped one of 16, from where on DPM-Solver's last jump is another."""
    named = {one.family: one for one in known_walks(SD, 3, order)}
    named["fractional"] = walk(SD, "fractional", [999.0, 500.5, 20.25], order)
    named["long"] = next(one for one in known_walks(SD, 16, order) if one.family == "stopped")
    return named


@pytest.mark.parametrize("name", ["even", "karras", "power", "stopped", "fractional", "long"])
@pytest.mark.parametrize("order", [1, 2])
def test_a_stock_pipeline_makes_exactly_the_jumps_of_a_walk(sdxl, tmp_path, monkeypatch, order, name):
    """The network is called at its times, fractions too, and the latents are those of our own sampler."""
    import diffusers

    one = candidates(order)[name]
    steps = len(one.times)
    write_floor(tmp_path, sdxl.pipe.scheduler, record_of(SD, one))
    scheduler, call = floor_sampler(str(tmp_path), sdxl.pipe, sdxl.pipe.scheduler, steps)
    kind = {1: "EulerDiscreteScheduler", 2: "DPMSolverMultistepScheduler"}[order]
    stock = getattr(diffusers, kind).from_pretrained(tmp_path / f"{steps}-steps")
    assert type(scheduler) is type(stock) and stock.config == scheduler.config
    assert call == read_floor(tmp_path)["schedules"][str(steps)]["call"]
    seen = []
    handle = sdxl.net.register_forward_hook(lambda _m, args, _o: seen.append(float(args[1])))
    monkeypatch.setattr(sdxl.pipe, "scheduler", stock)
    noise = Rng(3).normal(1, *sdxl.latent_shape)
    try:
        made = sdxl.pipe("a cat", latents=noise, output_type="latent", guidance_scale=1.0, **call).images
    finally:
        handle.remove()
    assert seen == pytest.approx(list(one.times), abs=1e-2)
    cond, end = sdxl.encode(["a cat"]), one.end(SD)
    ours = sample(sdxl.denoiser, noise, cond, one.times, order=order, end=end)[2]
    torch.testing.assert_close(made, ours, rtol=1e-3, atol=1e-3)


def test_a_stop_is_seen_in_the_latents(sdxl):
    """Or the test above would hold of schedulers that go on to zero."""
    noise, cond, one = Rng(3).normal(1, *sdxl.latent_shape), sdxl.encode(["a cat"]), candidates(2)["stopped"]
    stopped, clean = (
        sample(sdxl.denoiser, noise, cond, one.times, order=2, end=end)[2]
        for end in (one.end(SD), (1.0, 0.0))
    )
    assert (stopped - clean).abs().max() > 0.05


def test_a_table_without_signal_at_its_end_is_walked_from_there():
    """Zero terminal SNR: a walk begins in noise alone, and nothing is other than finite."""
    from diffusers import DDIMScheduler

    config = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    theirs = DDIMScheduler(**config, rescale_betas_zero_snr=True, prediction_type="v_prediction")
    schedule = schedule_of(theirs)
    for order, family in itertools.product((1, 2), ("even", "karras", "power", "stopped")):
        one = next(one for one in known_walks(schedule, 4, order) if one and one.family == family)
        stock = stock_scheduler(theirs, one)
        stock.set_timesteps(**stock_call(schedule, one))
        made = stock.init_noise_sigma * torch.ones(1, 1, 1, 1)
        for t in stock.timesteps:
            stock.scale_model_input(made, t)
            made = stock.step(torch.full_like(made, -2.0), t, made, return_dict=False)[0]
        assert one.times[0] == 999 == pytest.approx(float(stock.timesteps[0]), abs=1.0)
        assert made.isfinite().all() and made.abs().max() < 20


# ------------------------------------------------------------------------------------------------------------ Free-U
def test_free_u_is_a_candidate_where_it_is_asked_for(sdxl, monkeypatch):
    options = {"guidance": 1.0, "num": 2, "reference_steps": 4, "families": ["even"]}
    plain = calibrate(sdxl, ["a cat"], [2], **options)["schedules"]["2"]
    freed = calibrate(sdxl, ["a cat"], [2], **options, freed=True)["schedules"]["2"]
    assert (
        set(freed["error"]) == {"even", "even, Free-U"} and freed["error"]["even"] == plain["error"]["even"]
    )
    assert freed["error"]["even, Free-U"] != freed["error"]["even"] and free_u_of(sdxl.net) is None
    monkeypatch.setattr(Search, "error", lambda self, one: 0.0 if one.free_u else 1.0)
    assert calibrate(sdxl, ["a cat"], [2], **options, freed=True)["schedules"]["2"]["free_u"] == FREE_U


def test_a_pipeline_is_given_free_u_and_loses_it_again(sdxl, tmp_path, monkeypatch):
    monkeypatch.setattr(sdxl.pipe, "scheduler", sdxl.pipe.scheduler)
    one = candidates(1)["power"]._replace(free_u=True)
    write_floor(tmp_path, sdxl.pipe.scheduler, record_of(SD, one))
    model = Model(sdxl.pipe, {"pipeline": "tiny"})
    noise, cond = Rng(3).normal(1, *sdxl.latent_shape), sdxl.encode(["a cat"])

    def stock(solver):
        call = model.prepare(3, solver, 1.0)
        return sdxl.pipe("a cat", latents=noise, output_type="latent", **call).images

    made = stock(str(tmp_path))
    assert free_u_of(sdxl.net) == FREE_U
    ours = sample(sdxl.denoiser, noise, cond, one.times, order=1)[2]
    torch.testing.assert_close(made, ours, rtol=1e-3, atol=1e-3)
    stock("ddim")
    assert free_u_of(sdxl.net) is None
    plain = sample(sdxl.denoiser, noise, cond, one.times, order=1)[2]
    assert (made - plain).abs().max() > 0.01


def test_images_of_a_floor_that_changed_its_end_or_free_u_are_not_kept(sdxl, tmp_path, monkeypatch):
    """The call is the same; what differs stands in the manifest that decides whether images are kept."""
    monkeypatch.setattr(sdxl.pipe, "scheduler", sdxl.pipe.scheduler)
    model, runs = Model(sdxl.pipe, {"pipeline": "tiny"}), []
    both = candidates(2)
    for one in (both["power"], both["stopped"], both["power"]._replace(free_u=True)):
        write_floor(tmp_path / "floor", model.scheduler, record_of(SD, one))
        job = Job(3, str(tmp_path / "floor"), 1.0)
        call = model.prepare(job.steps, job.solver, job.guidance)
        runs.append(_describe(model, Prompts(("a",)), job, call)["run"])
    free_u(sdxl.net, None)
    assert len({str(run["timesteps"]) for run in runs}) == 1 and len({str(run) for run in runs}) == 3


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
    said = capsys.readouterr().out
    record = read_floor(tmp_path / "f")
    entry = record["schedules"]["2"]
    assert f"{entry['family']}, order {entry['order']}: 999, " in said
    assert record["guidance_scale"] == 3 and record["schedules"]["1"]["times"] == [999]
    assert (tmp_path / "f" / "2-steps" / "scheduler_config.json").is_file()
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
    assert {key: manifest["run"].get(key) for key in entry["call"]} == entry["call"]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"steps": [0]}, "--steps 0: expected numbers from 1 to 5"),
        ({"steps": [2, 6]}, "--steps 2,6.*raise --reference-steps"),
        ({"num": 1}, "--num 1: expected at least 2"),
        ({"solver": "lcm"}, "--solver lcm: expected one of euler, dpm"),
        (
            {"solver": "heun", "steps": [3]},
            "--solver heun: no stock scheduler of a StableDiffusionXLPipeline",
        ),
        ({"families": ["even", "odd"]}, "--families odd: expected some of even, searched, ays, karras"),
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
    assert sorted(p.name for p in (tmp_path / "f").iterdir()) == ["2-steps", "3-steps", "thesis.json"]


def test_a_condition_with_guidance_is_used(sdxl):
    noise, cond = Rng(5).normal(1, *sdxl.latent_shape), sdxl.encode(["a cat"])
    assert isinstance(cond, Cond)
    one, three = (sample(sdxl.denoiser, noise, cond, [999.0, 499.0], guidance=g)[2] for g in (1.0, 3.0))
    assert (one - three).abs().max() > 1e-4


@pytest.mark.parametrize(
    "words", [["--guidance", "3"], ["--prompts", "x.txt"], ["--num", "8"], ["--free-u"], ["--seed", "4"]]
)
def test_what_a_recipe_says_of_its_floor_is_not_said_twice(words, tmp_path, capsys):
    """An option of the search would be left aside without a word, and the numbers be those of something else."""
    out = ["--steps", "2", "--out", str(tmp_path / "floor")]
    assert main(["floor", "emoji_dmd2_4step", *out, *words]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"fewstep: {words[0]}") and "give --evaluation." in said
    assert not (tmp_path / "floor").exists()


def test_shapes_that_a_recipes_teacher_does_not_make_are_refused_before_anything_is_drawn(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("fewstep.evaluation.of_run.evaluate_run", lambda *_: pytest.fail("drawn"))
    shapes = json.dumps([{"size": [32, 128]}, {"size": [128, 32]}])
    words = ["--steps", "2", "--out", str(tmp_path / "floor"), "--data.shapes", shapes]
    assert main(["floor", "emoji_dmd2_4step", *words]) == 2
    said = capsys.readouterr().err
    assert said.startswith("fewstep: data.shapes") and "teacher.resolution among them" in said
