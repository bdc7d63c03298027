"""``builtin:emoji-edm``: its labels, its drawings, and the recipe that trains it."""

import numpy as np
import pytest
import torch

from fewstep import load_teacher
from fewstep import recipe as recipes
from fewstep.cli import eval as commands
from fewstep.cli import main
from fewstep.data import emoji
from fewstep.data.images import load_images
from fewstep.data.prompts import load_prompts
from fewstep.errors import FewstepError
from fewstep.evaluation.models import Model
from fewstep.evaluation.of_run import real_images
from fewstep.evaluation.yardstick import open_real
from fewstep.recipe import DataConfig
from fewstep.report.log import read_metrics
from fewstep.runs.library import load_recipe
from fewstep.runs.preview import Preview
from fewstep.runs.smoke import _few_emoji


@pytest.fixture(scope="module")
def recipe(training_recipe):
    return training_recipe("train_emoji_edm")


@pytest.fixture(scope="module")
def teacher():
    return load_teacher("builtin:emoji-edm")


def test_a_kind_is_the_label_that_it_was_trained_as(recipe, teacher):
    """By name or by number, of every drawing; and there is a branch for guidance."""
    names, labels = load_prompts("builtin:emoji-groups"), recipe.data()[1]
    assert torch.equal(teacher.encode(names)["label"], labels) and len(labels) == 1906
    assert len(labels.unique()) == 98 == teacher.net.config.num_class_embeds
    assert (
        teacher.encode(["7"])["label"].tolist() == [7] == teacher.encode([emoji.kinds()[7]])["label"].tolist()
    )
    assert teacher.null()["label"].tolist() == [98] and teacher.autoencoder is None
    with pytest.raises(FewstepError, match="class label 'red apple': expected a number from 0 to 97"):
        teacher.encode(["red apple"])


def test_it_is_taught_what_is_behind_the_noise_on_average(recipe):
    """Against Bayes' rule in float64, among likely images only; without noise it is the image itself."""
    rng = torch.Generator().manual_seed(0)
    images = torch.rand(5, 3, 4, 4, generator=rng) * 2 - 1
    sigma = torch.tensor([0.01, 2.0, 5.0])
    x_t = images[:3] + sigma.view(3, 1, 1, 1) * torch.randn(3, 3, 4, 4, generator=rng)
    likely = torch.tensor([[True] * 5, [True] * 5, [False, False, True, True, True]])
    found = recipe.posterior_mean(x_t, sigma, images, likely)
    distance = (x_t[:, None] - images).double().square().flatten(2).sum(2)
    density = torch.exp(-distance / (2 * sigma.double()[:, None] ** 2)) * likely
    weights = density / density.sum(1, keepdim=True)
    expected = torch.einsum("bn,nchw->bchw", weights, images.double())
    assert torch.allclose(found.double(), expected, atol=1e-5)
    assert torch.allclose(found[0], images[0], atol=1e-6) and weights[1].max() < 0.999


def test_a_dropped_label_leaves_every_drawing_likely_and_another_its_kind(recipe):
    labels = torch.tensor([5, 7, 5, 9])
    told, likely = recipe.told_of(labels, torch.tensor([2, 1, 3]), torch.tensor([False, True, False]))
    assert told.tolist() == [5, 98, 9]
    assert likely.tolist() == [[True, False, True, False], [True] * 4, [False, False, False, True]]


def test_the_loss_is_the_error_of_what_the_network_itself_puts_out(recipe):
    torch.manual_seed(0)
    net, sigma, told = recipe.make_net().eval(), torch.tensor([0.02, 0.7, 30.0]), torch.tensor([3, 98, 0])
    target = torch.rand(3, 3, 32, 32) * 2 - 1
    x_t = target + sigma.view(3, 1, 1, 1) * torch.randn(3, 3, 32, 32)
    size = (sigma**2 + 0.25).sqrt().view(3, 1, 1, 1)
    wanted = (target - 0.25 / size**2 * x_t) * size / (0.5 * sigma.view(3, 1, 1, 1))
    with torch.no_grad():
        raw = net.raw(x_t / size, net.time_of(sigma), net.one_hot(told, 3))
        found = recipe.edm_loss(net, x_t, sigma, told, target)
    assert found.item() == pytest.approx((raw - wanted).square().mean().item(), rel=1e-3)


def test_a_step_of_training_draws_noise_and_drops_labels_as_said(recipe, tmp_path, monkeypatch):
    """One label in ten, noise of log-mean 0.6 and log-spread 1.4, each image and label of the same row."""
    images, labels = torch.randn(98, 3, 4, 4), torch.arange(98)
    monkeypatch.setattr(recipe, "data", lambda: (images, labels))
    seen = {}

    class Once:
        def __init__(self, *args, **options):
            pass

        def train(self, steps, cooldown, loss):
            loss()

    def note(net, x_t, sigma, told, target):
        return seen.update(x_t=x_t, sigma=sigma, told=told, target=target)

    monkeypatch.setattr(recipe, "Run", Once)
    monkeypatch.setattr(recipe, "edm_loss", note)
    recipe.train_net(tmp_path, 1, 0, batch=20_000)
    dropped = seen["told"] == 98
    assert dropped.float().mean().item() == pytest.approx(0.1, abs=0.01)
    told, logs = seen["told"][~dropped], seen["sigma"].log()
    assert logs.mean().item() == pytest.approx(0.6, abs=0.04) and logs.std().item() == pytest.approx(
        1.4, abs=0.04
    )
    assert torch.allclose(seen["target"][~dropped], images[told], atol=1e-5)  # one drawing of each kind here
    noise = (seen["x_t"][~dropped] - images[told]) / seen["sigma"][~dropped].view(-1, 1, 1, 1)
    assert noise.std().item() == pytest.approx(1, abs=0.01)


def test_the_drawings_are_those_that_it_was_trained_on(recipe, teacher):
    """Rounded to what a picture holds, and nothing resizes them again on the way to training or measuring."""
    images, labels = recipe.data()
    exact = (images.permute(0, 2, 3, 1) + 1) * 127.5
    small = torch.from_numpy(emoji.small())
    assert small.shape == exact.shape == (1906, 32, 32, 3)
    assert (small - exact).abs().max() <= 0.5 + 1e-3 and (small - exact).abs().mean() > 0.01
    found = load_images("builtin:emoji-32")
    assert found.captions == emoji.groups() == load_prompts("builtin:emoji-32")
    assert all(np.array_equal(found.load(i, 32), emoji.small()[i]) for i in (0, 700, 1905))
    same, real = real_images(
        found, teacher.resolution, DataConfig("builtin:emoji-groups", "builtin:emoji-32")
    )
    assert same is found and np.array_equal(real.images, emoji.small())
    for opened in (open_real("builtin:emoji-32"), commands._open("builtin:emoji-32", None)):
        assert np.array_equal(opened.images, emoji.small())
    assert open_real("builtin:emoji").images.shape[1] == 64 and emoji.pictures("builtin:no") is None


def test_the_network_in_training_is_the_stock_pipelines(recipe, tmp_path):
    torch.manual_seed(0)
    net = recipe.make_net().eval()
    for weight in net.parameters():  # some begin at zero
        weight.data.add_(0.05 * torch.randn_like(weight))
    net.half().float()  # as saved
    torch.save({"ema": net.state_dict()}, tmp_path / "net.pt")
    recipe.save_pipeline(tmp_path, tmp_path / "pipeline")
    saved = load_teacher(str(tmp_path / "pipeline"))
    x, sigma = torch.randn(3, 3, 32, 32), torch.tensor([0.1, 1.0, 20.0])
    told = saved.encode([emoji.kinds()[k] for k in (3, 50, 97)])
    with torch.no_grad():
        own = net(x, sigma, torch.tensor([3, 50, 97]))[0]
        assert torch.allclose(own, saved.denoiser.x0(x, sigma, told), atol=1e-3)
        free = net(x, sigma, torch.full((3,), 98))[0]
        guided = saved.denoiser.x0(x, sigma, told, guidance=2.0)
    assert (own - free).abs().max() > 0.01 and torch.allclose(guided, 2 * own - free, atol=1e-3)


@pytest.mark.parametrize(
    "solver, calls", [("own", [1, 3, 35]), ("heun", [1, 3, 35]), ("ddim", [1, 2, 18]), ("dpm++", [1, 2, 18])]
)
def test_named_solvers_of_an_edm_pipeline(teacher, solver, calls, monkeypatch):
    """Heun's 18 steps are 35 calls, as in the paper; those of one call a step are at as many steps."""
    monkeypatch.setattr(teacher.pipe, "scheduler", teacher.pipe.scheduler)
    model, seen = Model(teacher.pipe, {"pipeline": "builtin:emoji-edm"}), []
    monkeypatch.setattr(
        teacher.net, "forward", lambda x, sigma, _label: seen.append(float(sigma)) or (0.5 * x,)
    )
    for steps, wanted in zip((1, 2, 18), calls):
        seen.clear()
        teacher.pipe(["3"], output_type="latent", **model.prepare(steps, solver))
        assert len(seen) == wanted and seen[0] == pytest.approx(80)
    assert model.prepare(2, solver)["guidance_scale"] == 1.0
    if solver == "own":
        teacher.pipe(["3"], num_inference_steps=2, output_type="latent")
        seen.clear()
        teacher.pipe(["3"], output_type="latent")  # whatever was asked for before
        assert len(seen) == 35
    assert teacher.pipe.scheduler.config.solver == {"own": "heun", "ddim": "euler"}.get(solver, solver)


@pytest.mark.parametrize(
    "asked, said",
    [
        (
            {"solver": "lcm"},
            "--solver lcm: an EDM pipeline has none; expected --solver ddim, euler, heun or dpm",
        ),
        ({"timesteps": [3, 1]}, "--timesteps 3,1: an EDM pipeline has none"),
        ({"solver": "unipc"}, "UniPCMultistepScheduler: no solver of an EDM pipeline"),
        ({"solver": "ays"}, "solver ays: no table for EDMPipeline"),
    ],
)
def test_what_an_edm_pipeline_has_not_is_refused(teacher, asked, said):
    with pytest.raises(FewstepError, match=said):
        Model(teacher.pipe, {"pipeline": "builtin:emoji-edm"}).prepare(2, **asked)


def test_a_label_among_the_samples_that_is_no_class_is_refused_by_its_field(teacher, tmp_path):
    recipe = recipes.override(
        load_recipe("emoji_edm_sid_1step"), ["--samples.prompts", "[any food fruit, '98']"]
    )
    with pytest.raises(
        FewstepError, match=r"^samples\.prompts: class label '98': expected a number from 0 to 97"
    ):
        Preview(recipe, teacher, None, [], ["3"], tmp_path)


def test_a_student_in_pixels_logs_their_mean_which_has_no_range(tmp_path):
    assert main(["train", "cifar10_sid_1step", "--smoke", "--output", str(tmp_path / "run")]) == 0
    logged = {key for record in read_metrics(tmp_path / "run" / "metrics.jsonl") for key in record}
    assert "health/pixel_mean" in logged and "health/latent_mean" not in logged


def test_a_smoke_run_has_the_captions_that_its_teacher_knows(tmp_path):
    def captions(name, prompts):
        return load_images(str(_few_emoji(tmp_path / name, prompts=prompts))).captions

    for prompts in ("builtin:emoji-groups", "builtin:emoji-32"):
        assert set(captions(prompts[8:], prompts)) <= set(emoji.kinds())
    assert captions("labels", "builtin:imagenet-classes") == [str(k) for k in range(8)]
    assert set(captions("names", "builtin:emoji")) <= set(emoji.names())
