"""`fewstep prepare`: the time embedding becomes smooth, the pipeline stays what it was, and the stop rule stops."""

import json
import math
import os
import signal

import pytest
import torch
from processes import together

from fewstep.cli import main
from fewstep.data.images import load_images
from fewstep.diffusion.cond import Cond
from fewstep.diffusion.embedding import time_embedder
from fewstep.diffusion.rng import Rng
from fewstep.errors import FewstepError, Interrupted
from fewstep.methods.base import Batch, Progress
from fewstep.runs import prepare as preparing
from fewstep.runs.prepare import PrepareConfig, mixed, prepare, smooth_time, stiffness, turns_of
from fewstep.teachers import load_teacher


@pytest.fixture
def teacher(tiny_sdxl):
    return load_teacher(str(tiny_sdxl))


@pytest.fixture
def images(tmp_path):
    from fewstep.runs.smoke import _few_emoji

    return load_images(str(_few_emoji(tmp_path)))


def copy_of(teacher):
    import copy

    return teacher.denoiser.with_net(copy.deepcopy(teacher.net).requires_grad_(True))


def test_turns_are_those_of_the_sinusoids_over_the_teachers_times(teacher):
    turns, longest = turns_of(teacher.denoiser, teacher.latent_shape)
    _, _, sinusoids = time_embedder(teacher.net)
    assert longest == 999 and len(turns) == sinusoids.num_channels
    grid = torch.linspace(0, longest, 40_001)
    waves = sinusoids(grid)
    for column in range(len(turns)):
        crossings = (waves[1:, column] * waves[:-1, column] < 0).sum().item()
        assert crossings / 2 == pytest.approx(turns[column].item(), abs=1.01)


def test_fast_sinusoids_are_cut_for_good_and_the_rest_is_fitted(teacher):
    denoiser = copy_of(teacher)
    _, before, sinusoids = time_embedder(teacher.net)
    cut = smooth_time(denoiser, teacher.latent_shape, 1.0)
    _, mlp, cut_off = time_embedder(denoiser.net)
    fast = turns_of(denoiser, teacher.latent_shape)[0] > 1
    assert 0 < cut == fast.sum() < len(fast)
    assert mlp.linear_1.weight[:, fast].eq(0).all() and not mlp.linear_1.weight[:, ~fast].eq(0).any()
    grid = torch.linspace(0, 999, 500)
    only_cut = copy_of(teacher)
    smooth_time(only_cut, teacher.latent_shape, 1.0, steps=0)
    with torch.no_grad():
        old, new, unfitted = (m(sinusoids(grid)) for m in (before, mlp, time_embedder(only_cut.net)[1]))
    assert (new - old).norm() < (unfitted - old).norm()
    optimizer = torch.optim.AdamW(mlp.parameters(), lr=1e-2)
    mlp(cut_off(grid)).square().mean().backward()
    optimizer.step()
    assert mlp.linear_1.weight[:, fast].eq(0).all()


def test_stiffness_is_the_ratio_of_the_two_parts_of_the_derivative(teacher):
    """A velocity ``a x + b sin(w t)`` has them in closed form."""

    class Wave(torch.nn.Module):
        def forward(self, x, t, **_):
            return (0.5 * x + torch.sin(3 * t).view(-1, 1, 1, 1).to(x),)

    from fewstep.diffusion.denoiser import NetDenoiser
    from fewstep.diffusion.schedules import TrigFlow

    denoiser = NetDenoiser(Wave(), TrigFlow(), "v", lambda net, x, t, cond: net(x, t)[0])
    x, ode, t = (
        torch.zeros(1, 2, 3, 3),
        torch.full((1, 2, 3, 3), 0.7),
        torch.tensor([0.4], dtype=torch.float64),
    )
    expected = 3 * abs(math.cos(1.2)) / (0.5 * 0.7)
    assert stiffness(denoiser, x, t, ode, Cond({})) == pytest.approx(expected, rel=1e-5)


def test_rows_of_the_null_condition_take_the_place_of_dropped_ones():
    cond = Cond({"embeds": torch.ones(3, 2, 4), "mask": torch.ones(3, 2, dtype=torch.long)})
    null = Cond({"embeds": torch.zeros(1, 2, 4), "mask": torch.zeros(1, 2, dtype=torch.long)})
    out = mixed(cond, null, torch.tensor([False, True, False]))
    assert out["embeds"].mean((1, 2)).tolist() == [1, 0, 1] and out["mask"].sum(1).tolist() == [2, 0, 2]
    assert out["mask"].dtype == torch.long and mixed(cond, None, torch.zeros(3).bool()) is cond


def test_the_target_is_the_teachers_under_the_same_conditions_null_ones_included(teacher):
    """A copy of the teacher has no loss whatever is dropped; where all is, only the null condition is asked for."""
    cond = teacher.encode(["a cat", "a dog", "a red apple", "a bird"])
    seen = []

    class Seen:
        def __init__(self, inner):
            self.inner, self.schedule, self.null = inner, inner.schedule, inner.null

        def predict(self, x_t, t, cond, **options):
            seen.append(cond)
            return self.inner.predict(x_t, t, cond, **options)

    for rate in (0.0, 0.5, 1.0):
        config = PrepareConfig(null_probability=rate)
        student = Seen(copy_of(teacher))
        method = preparing.Preparation(config, Seen(teacher.denoiser), student=student)
        real = torch.randn(4, *teacher.latent_shape, generator=torch.Generator().manual_seed(0))
        batch = Batch(cond, real.shape, Rng("dropped"), Rng(2), real=real, real_cond=cond)
        seen.clear()
        assert method.loss(batch, Progress())["prediction"].item() < 1e-9
        of_teacher, of_student = seen
        null = teacher.denoiser.null.expand(4)
        dropped = [bool(torch.equal(of_student["embeds"][i], null["embeds"][i])) for i in range(4)]
        assert sum(dropped) == {0.0: 0, 1.0: 4}.get(rate, sum(dropped)) and (
            rate != 0.5 or 0 < sum(dropped) < 4
        )
        for name in cond.tensors:
            assert torch.equal(of_teacher[name], of_student[name])


def test_a_prepared_pipeline_is_smooth_near_the_teacher_and_loads_in_stock_diffusers(
    teacher, images, tmp_path
):
    out = tmp_path / "smooth"
    config = PrepareConfig(error=1e-9, steps=4, check_every=2, batch_size=2, lr=1e-3)
    record = prepare(teacher, out, images, config, quiet=True)
    assert not record["reached"] and record["after"]["step"] == 4
    assert record["after"]["stiffness"] < 0.5 * record["before"]["stiffness"]
    assert record["before"]["error"] == 0 and record["after"]["error"] < 0.2
    assert json.loads((out / "prepare.json").read_text())["sinusoids_cut"] > 0
    from diffusers import StableDiffusionXLPipeline

    pipe = StableDiffusionXLPipeline.from_pretrained(out, use_safetensors=True)
    pipe.set_progress_bar_config(disable=True)
    assert type(pipe.unet).__name__ == "UNet2DConditionModel"
    kept = load_teacher(str(out))
    x, t = torch.randn(1, *teacher.latent_shape), torch.tensor([500.0])
    cond = teacher.encode(["a cat"])
    exact, ours = (d.x0(x, t, cond) for d in (teacher.denoiser, kept.denoiser))
    assert 0 < (exact - ours).norm() < 0.5 * exact.norm()
    image = pipe("a cat", num_inference_steps=2, height=32, width=32, output_type="np").images
    assert image.shape == (1, 32, 32, 3)


def test_it_stops_as_soon_as_both_bounds_are_met(teacher, images, tmp_path):
    config = PrepareConfig(error=10.0, stiffness=1e9, steps=50, check_every=2, batch_size=2)
    record = prepare(teacher, tmp_path / "out", images, config, quiet=True)
    assert record["reached"] and record["after"]["step"] <= 2


@pytest.mark.long
def test_two_processes_prepare_what_one_does_in_twice_as_many_batches(tiny_sdxl, images, tmp_path):
    """The same updates, and columns that are cut stay so where weights are sharded."""

    def prepared(name, accumulate, process=None):
        config = PrepareConfig(
            error=1e-9, steps=3, check_every=2, batch_size=2, lr=1e-3, accumulate=accumulate
        )
        teacher = load_teacher(str(tiny_sdxl))
        return prepare(teacher, tmp_path / name, images, config, process=process, quiet=True)

    (tmp_path / "said").mkdir()
    both = together(2, lambda process: prepared("two", 1, process), tmp_path / "said")
    one = prepared("one", 2)
    assert both[0]["checks"] == both[1]["checks"] and both[0]["batch"] == one["batch"] == 4
    assert [check["step"] for check in both[0]["checks"]] == [0, 2, 3]
    for ours, alone in zip(both[0]["checks"], one["checks"]):
        assert ours == pytest.approx(alone, rel=1e-3)
    nets = {name: load_teacher(str(tmp_path / name)).net.state_dict() for name in ("one", "two")}
    start = load_teacher(str(tiny_sdxl)).net.state_dict()
    moved = max((nets["one"][key] - weight).abs().max() for key, weight in start.items())
    for key, weight in nets["one"].items():
        assert (nets["two"][key] - weight).abs().max() < 0.02 * moved, key
    cut = nets["two"]["time_embedding.linear_1.weight"].eq(0).all(0)
    assert cut.sum() == one["sinusoids_cut"] and not start["time_embedding.linear_1.weight"].eq(0).any()


@pytest.mark.slow
def test_an_interrupted_preparation_goes_on(teacher, images, tmp_path, monkeypatch):
    config = PrepareConfig(error=1e-9, steps=4, check_every=2, batch_size=2)
    loss = preparing.Preparation.loss

    def stop(method, batch, progress):
        if progress.iteration == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss(method, batch, progress)

    monkeypatch.setattr(preparing.Preparation, "loss", stop)
    with pytest.raises(Interrupted, match="SIGTERM at step 2, saved; continue with: the same command") as end:
        prepare(teacher, tmp_path / "twice", images, config, quiet=True)
    assert end.value.code == 143
    monkeypatch.setattr(preparing.Preparation, "loss", loss)
    twice = prepare(load_teacher(teacher.source), tmp_path / "twice", images, config, quiet=True)
    once = prepare(load_teacher(teacher.source), tmp_path / "once", images, config, quiet=True)
    assert [check["step"] for check in twice["checks"]] == [2, 4]
    assert twice["after"]["error"] == pytest.approx(once["after"]["error"], rel=1e-6)


def test_bad_input_is_refused_before_anything_is_loaded(tiny_sdxl, tmp_path, capsys):
    (tmp_path / "there").mkdir()
    words = ["prepare", str(tiny_sdxl), "--images", "builtin:emoji", "--out"]
    assert main([*words, str(tmp_path / "there")]) == 2
    assert "is there already" in capsys.readouterr().err
    assert main([*words, str(tmp_path / "new"), "--turns", "0"]) == 2
    assert "--turns: 0: expected a positive number" in capsys.readouterr().err
    with pytest.raises(FewstepError, match="has none; classes that have"):
        preparing.with_qk_norm(load_teacher(str(tiny_sdxl)).net)
    with pytest.raises(FewstepError, match="no sinusoid of the network turns so little"):
        teacher = load_teacher(str(tiny_sdxl))
        smooth_time(copy_of(teacher), teacher.latent_shape, 1e-9)
