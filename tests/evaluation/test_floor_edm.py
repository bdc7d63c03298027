"""The training-free floor of EDM pipelines: walks in sigma, and Heun's steps, which are two calls each but the last."""

import json
from itertools import pairwise

import pytest
import torch
from toys import NONE

from fewstep import load_teacher
from fewstep.cli import main
from fewstep.diffusion.few_steps import Paths, reference_times, sample
from fewstep.diffusion.rng import Rng
from fewstep.diffusion.schedules import EDM
from fewstep.diffusion.walks import known_walks, walk
from fewstep.errors import FewstepError
from fewstep.evaluation.floor import End, Search, calibrate
from fewstep.evaluation.models import Model
from fewstep.evaluation.stock import read_floor, stock_call, write_floor
from fewstep.teachers.analytic import GaussianMixture
from fewstep.teachers.tiny import write_tiny_pipeline

SIGMAS = EDM()
KINDS = {"euler": (1, False), "dpm++": (2, False), "heun": (2, True)}


class Counted:
    """A closed-form teacher on EDM's path that counts its calls; there is no network to give Free-U to."""

    def __init__(self):
        self.ring, self.schedule, self.net, self.calls = GaussianMixture.ring(SIGMAS), SIGMAS, None, 0

    def x0(self, x_t, t, cond, *, guidance=1.0):
        self.calls += 1
        return self.ring.x0(x_t, t, cond, guidance=guidance)


def test_the_even_grid_is_even_in_the_seventh_root_and_leaves_the_clean_end_out():
    times = reference_times(SIGMAS, 4)
    roots = [t ** (1 / 7) for t in [*times, SIGMAS.t_min]]
    gaps = [a - b for a, b in pairwise(roots)]
    assert times[0] == 80.0 and len(times) == 4 and gaps == pytest.approx([gaps[0]] * 4)


def test_karras_nodes_meet_the_least_level_and_powers_leave_it_out():
    for order in (1, 2):
        walks = {}
        for one in known_walks(SIGMAS, 4, order):
            walks.setdefault(one.family, []).append(one)
        assert {name: len(found) for name, found in walks.items()} == {"even": 1, "karras": 3, "power": 3}
        for rho, karras, power in zip((5, 7, 12), walks["karras"], walks["power"]):
            for one, last in ((karras, []), (power, [0.002])):
                roots = [t ** (1 / rho) for t in [*one.times, *last]]
                gaps = [a - b for a, b in pairwise(roots)]
                assert (
                    one.times[0] == pytest.approx(80.0)
                    and gaps == pytest.approx([gaps[0]] * len(gaps))
                    and one.stop is None
                )
            assert karras.times[-1] == pytest.approx(0.002) and power.times[-1] > 0.003
        assert walks["power"][1].times == pytest.approx(
            walks["even"][0].times
        )  # levels are no integers at any order


def test_heuns_steps_are_of_second_order():
    """On a Gaussian, whose ODE is known: x goes as the root of s^2 + sigma^2."""
    spread = 0.5
    teacher = GaussianMixture(SIGMAS, torch.zeros(1, 1).double(), torch.tensor(spread**2).double())
    noise, errors = torch.ones(1, 1).double(), {}
    for steps in (40, 80):
        times = reference_times(SIGMAS, steps)
        states = sample(teacher, noise, NONE, times, heun=True)[0][:, 0, 0]
        exact = 80 * ((spread**2 + torch.tensor(times).double() ** 2) / (spread**2 + 80**2)).sqrt()
        errors[steps] = (states - exact).abs().max().item()
    assert errors[40] / errors[80] == pytest.approx(4, abs=0.7) and errors[80] < 0.05


def ring_search(families=("even", "searched", "karras", "power"), solvers=tuple(KINDS)):
    teacher, times = Counted(), reference_times(SIGMAS, 30)
    paths = Paths.none(times)
    paths.add(*sample(teacher, Rng(0).normal(256, 2), NONE, times, heun=True))
    noise = Rng(2).normal(64, 2)
    ends = [End(z, NONE, sample(teacher, z, NONE, times, heun=True)[2]) for z in noise.split(40)]
    costs = {order: paths.costs(SIGMAS, order) for order in (1, 2)}
    return Search(teacher, "EDMPipeline", 1.0, families, False, times, costs, ends, solvers)


@pytest.mark.parametrize("calls", [1, 2, 3, 4, 5, 9])
def test_every_walk_of_a_floor_makes_as_many_calls(calls):
    search = ring_search()
    found = list(search.candidates(calls))
    assert {one.heun for one in found} == ({False, True} if calls % 2 else {False})
    assert {one.family for one in found} == {"even", "searched", "karras", "power"}
    for one in found:
        search.denoiser.calls = 0
        sample(search.denoiser, Rng(1).normal(1, 2), NONE, one.times, order=one.order, heun=one.heun)
        assert search.denoiser.calls == calls


def test_the_error_of_a_heun_walk_is_of_heuns_sample():
    search = ring_search()
    one = next(one for one in search.candidates(9) if one.heun)
    ends = torch.cat([end.sample for end in search.held])
    made = [sample(search.denoiser, end.noise, NONE, one.times, heun=True)[2] for end in search.held]
    rms = (torch.cat(made) - ends).square().mean().sqrt().item()
    assert search.error(one) == pytest.approx(rms) != pytest.approx(search.error(one._replace(heun=False)))


def test_the_best_walk_beats_the_even_grid_of_every_solver_and_says_its_jumps():
    for calls in (5, 9):
        entry = ring_search().schedule(calls)
        assert entry["error"][entry["family"]] == min(entry["error"].values()) < entry["error"]["even"]
    heun = ring_search(solvers=("heun",)).schedule(9)
    assert heun["heun"] is True and len(heun["times"]) == 5 and heun["call"] == {"sigmas": heun["times"]}
    assert "heun" not in ring_search(solvers=("euler",)).schedule(9)


# --------------------------------------------------------------------------------------------------- stock pipelines
@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("edm") / "tiny"
    return load_teacher(str(write_tiny_pipeline("EDMPipeline", folder, num_class_embeds=10)))


@pytest.mark.parametrize("solver", KINDS)
def test_a_stock_pipeline_makes_exactly_the_jumps_of_a_walk(tiny, tmp_path, monkeypatch, solver):
    order, heun = KINDS[solver]
    one = walk(SIGMAS, "power", [80.0, 7.25, 0.9, 0.1], order)._replace(heun=heun)
    calls = 7 if heun else 4
    entry = {"family": one.family, "order": order, "times": list(one.times), "call": stock_call(SIGMAS, one)}
    record = {"schema": 2, "schedules": {str(calls): {**entry, **({"heun": True} if heun else {})}}}
    write_floor(tmp_path / "floor", tiny.pipe.scheduler, record)
    monkeypatch.setattr(tiny.pipe, "scheduler", tiny.pipe.scheduler)
    call = Model(tiny.pipe, {"pipeline": "tiny"}).prepare(calls, str(tmp_path / "floor"), 1.0)
    assert tiny.pipe.scheduler.config.solver == solver
    seen, noise = [], Rng(3).normal(1, *tiny.latent_shape)
    handle = tiny.net.register_forward_hook(lambda _m, args, _o: seen.append(float(args[1])))
    try:
        made = tiny.pipe(["3"], latents=noise, output_type="latent", **call).images
    finally:
        handle.remove()
    where = [80.0, 7.25, 7.25, 0.9, 0.9, 0.1, 0.1] if heun else [80.0, 7.25, 0.9, 0.1]
    assert seen == pytest.approx(where)
    ours = sample(tiny.denoiser, noise, tiny.encode(["3"]), one.times, order=order, heun=heun)[2]
    torch.testing.assert_close(made, ours, rtol=1e-4, atol=1e-4)


def test_a_search_from_the_command_line(tmp_path, capsys):
    folder = write_tiny_pipeline("EDMPipeline", tmp_path / "tiny", num_class_embeds=10)
    (tmp_path / "p.txt").write_text("1\n7")
    words = [
        "floor",
        str(folder),
        "--steps",
        "2,3",
        "--num",
        "2",
        "--reference-steps",
        "5",
        "--device",
        "cpu",
    ]
    words += ["--prompts", str(tmp_path / "p.txt")]
    assert main([*words, "--out", str(tmp_path / "f")]) == 0
    capsys.readouterr()
    assert main([*words[:3], "3", *words[4:], "--solver", "heun", "--out", str(tmp_path / "h")]) == 0
    entry = read_floor(tmp_path / "h")["schedules"]["3"]
    assert entry["heun"] and f"{entry['family']}, Heun: 80, " in capsys.readouterr().out
    found = read_floor(tmp_path / "f")["schedules"]
    assert set(found["3"]["error"]) == {"even", "searched", "karras", "power"}
    draw = [
        "eval",
        "generate",
        str(folder),
        "--steps",
        "3",
        "--solver",
        str(tmp_path / "h"),
        "--device",
        "cpu",
    ]
    draw += ["--prompts", str(tmp_path / "p.txt"), "--speed-runs", "1", "--out", str(tmp_path / "images")]
    assert main(draw) == 0
    manifest = json.loads((tmp_path / "images" / "3-steps" / "manifest.json").read_text())
    assert manifest["run"]["sigmas"] == entry["times"] and manifest["speed"]["nfe"] == 3


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"solver": "heun"},
            "--steps 3,4: steps are calls, of which Heun's K steps make 2 K - 1: expected odd",
        ),
        (
            {"families": ["stopped"]},
            "--families stopped: a EDMPipeline has none of these; expected .* karras, power",
        ),
        ({"freed": True}, "--free-u: a EDMPrecond has no skip connections"),
    ],
)
def test_bad_requests_come_before_the_network(tiny, options, message, monkeypatch):
    monkeypatch.setattr("fewstep.evaluation.floor.sample", lambda *_, **__: pytest.fail("ran"))
    with pytest.raises(FewstepError, match=message):
        calibrate(tiny, ["1"], [3, 4], **{"guidance": 1.0, "num": 2, "reference_steps": 5, **options})


def test_levels_of_a_call_fall_to_something_above_zero(tiny):
    for sigmas in ([], [1.0, 2.0], [1.0, 0.0]):
        with pytest.raises(
            ValueError, match=r"sigmas \[.*: expected at least one, falling, finite and above 0"
        ):
            tiny.pipe("3", sigmas=sigmas)
    with pytest.raises(ValueError, match="expected 1 or more, or sigmas"):
        tiny.pipe.scheduler.set_timesteps()


def test_the_reference_is_heuns(tiny, monkeypatch):
    """And is made of the even grid of as many steps, searched paths and those held out alike."""
    from fewstep.evaluation import floor

    made, plain = [], floor.sample
    monkeypatch.setattr(Search, "schedule", lambda *_: {})
    monkeypatch.setattr(
        floor,
        "sample",
        lambda *args, **options: made.append((args[3], options)) or plain(*args, **options),
    )
    calibrate(tiny, ["1"], [3], guidance=1.0, num=2, reference_steps=5)
    assert len(made) == 2 and all(options["heun"] for _, options in made)
    assert all(times == reference_times(SIGMAS, 5) for times, _ in made)
