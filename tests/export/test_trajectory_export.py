"""Exports of BOOT and Hyper-SD: what stock diffusers does with them, at every number of steps."""

import copy
import json

import numpy as np
import pytest
import torch
from PIL import Image
from processes import without_fewstep
from test_end_to_end import PROMPTS, REFUSE, tiny

from fewstep.cli import main
from fewstep.diffusion.denoiser import Scalar
from fewstep.diffusion.embedding import given_to_sinusoids, time_embedder, told_at, with_scalar
from fewstep.diffusion.schedules import Flow
from fewstep.diffusion.student import Student
from fewstep.diffusion.times import uniform_times
from fewstep.errors import RecipeError
from fewstep.export import (
    export_student,
    load_exported,
    stock_sample,
    student_scheduler,
    trainer_sample,
    verify,
)
from fewstep.export.fold import folded, folded_lora
from fewstep.export.lora import Lora
from fewstep.export.weights import merged
from fewstep.export.write import check_exportable
from fewstep.recipe import RoleConfig
from fewstep.runs.prepare import smooth_time
from fewstep.runs.session import execute
from fewstep.teachers import load_teacher
from fewstep.training.roles import build_role
from fewstep.vision.reward import load_reward, of_latents


# ---------------------------------------------------------------------------------------------------- schedulers
def scheduler_of(sdxl, steps, noise, **options):
    return student_scheduler(sdxl.pipe.scheduler, uniform_times(steps, 999), noise, **options)


@pytest.mark.parametrize("noise", ["ddim", "tcd", "fresh"])
def test_one_scheduler_has_the_even_times_of_every_number_of_steps(sdxl, noise):
    scheduler, _ = scheduler_of(sdxl, 8, noise)
    for steps in (8, 4, 2, 1):
        scheduler.set_timesteps(steps)
        assert scheduler.timesteps.tolist() == uniform_times(steps, 999)


@pytest.mark.parametrize("noise", ["tcd", "fresh"])
def test_a_dedicated_one_step_model_is_called_at_800(sdxl, noise):
    scheduler, call = student_scheduler(sdxl.pipe.scheduler, [800], noise)
    shorter = "num_inference_steps" in call  # an even grid of a shorter table
    scheduler.set_timesteps(1) if shorter else scheduler.set_timesteps(timesteps=call["timesteps"])
    assert scheduler.timesteps.tolist() == [800]
    table = sdxl.pipe.scheduler.alphas_cumprod
    assert scheduler.alphas_cumprod[800].item() == pytest.approx(table[800].item(), rel=1e-5)


@pytest.mark.parametrize(
    "noise, eta", [("ddim", 0.0), ("tcd", 0.0), ("tcd", 0.3), ("tcd", 1.0), ("fresh", 0.0)]
)
def test_one_step_is_the_prediction_itself(sdxl, noise, eta):
    scheduler, call = scheduler_of(sdxl, 8, noise, eta=eta)
    assert call.get("eta") == (eta if noise == "tcd" else None)
    scheduler.set_timesteps(1)
    x, eps = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.ones(2, 4, 8, 8)
    schedule = sdxl.denoiser.schedule
    x0 = schedule.convert(eps, x, torch.full((2,), 999.0), "eps", "x0")
    options = {"eta": eta} if noise == "tcd" else {}
    made = scheduler.step(eps, scheduler.timesteps[0], x, return_dict=False, **options)[0]
    assert (made - x0).abs().max() < 2e-4 * x0.abs().max()
    if noise == "tcd" and eta == 0:  # on the teacher's own table noise of 0.03 is left
        from diffusers import TCDScheduler

        own = TCDScheduler.from_config(sdxl.pipe.scheduler.config)
        own.set_timesteps(1)
        left = (
            own.step(eps, own.timesteps[0], x, return_dict=False, eta=eta)[0]
            - own.alphas_cumprod[0].sqrt() * x0
        )
        assert left.abs().max() == pytest.approx(0.0292, abs=2e-3)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_tcd_steps_are_the_students(sdxl, eta):
    """Four steps of a known prediction, our loop against the scheduler, with the same noise."""
    scheduler, call = scheduler_of(sdxl, 4, "tcd", eta=eta)
    scheduler.set_timesteps(4)

    class Half:
        schedule = sdxl.denoiser.schedule

        def x0(self, x_t, t, cond, *, guidance=1.0):
            return 0.5 * torch.tanh(x_t)

    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    draws = torch.Generator().manual_seed(1)
    own = Student(Half(), uniform_times(4, 999), "tcd", eta=eta).sample(
        noise, None, lambda x: torch.randn(x.shape, generator=draws)
    )
    x, generator = noise, torch.Generator().manual_seed(1)
    for time in scheduler.timesteps:
        t = time.expand(2).double()
        eps = Half.schedule.convert(0.5 * torch.tanh(x), x, t, "x0", "eps")
        x = scheduler.step(eps, time, x, eta=call["eta"], generator=generator, return_dict=False)[0]
    assert (x - own).abs().max() < 1e-4


@pytest.mark.parametrize("name", ["DiT", "UNet2D"])
def test_pipelines_that_hand_on_no_eta_are_asked_for_another_noise(name, teachers):
    teacher = teachers(name)
    for noise in ("tcd", "fresh", "ddim"):
        student = Student(teacher.denoiser, [999, 499], noise, eta=1.0)
        if noise == "tcd":
            with pytest.raises(
                RecipeError, match=r"^method\.noise: tcd: a \w+ hands its scheduler no eta; use fresh"
            ):
                check_exportable(student, [RoleConfig()], teacher)
        else:
            check_exportable(student, [RoleConfig()], teacher)


def test_a_flow_has_no_tcd_steps():
    from diffusers import FlowMatchEulerDiscreteScheduler

    with pytest.raises(RecipeError, match=r"method\.noise: tcd"):
        student_scheduler(FlowMatchEulerDiscreteScheduler(shift=3.0), [1.0], "tcd")
    assert Flow().at(torch.tensor([1.0, 0.0])).tolist() == [1.0, 0.0]


# ------------------------------------------------------------------------------------------------------- folding
@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("name", ["EDM", "PixArt-alpha"])
def test_what_a_student_is_told_is_in_the_bias_of_a_pipeline_whatever_is_adapted(
    name, kind, teachers, tmp_path
):
    teacher = teachers(name)
    path, layer = told_at(teacher.net)
    before = path.replace("map_layer1", "map_layer0").replace("linear_2", "linear_1")
    targets = [before, path] if kind == "lora" else None
    config = RoleConfig(kind=kind, rank=2, alpha=4.0, targets=targets)
    role = build_role("student", teacher.net, config)
    told = with_scalar(teacher.denoiser.with_net(role.module), "level", Scalar(0.3, scale=100.0))
    role.collect()
    with torch.no_grad():
        for n, weight in role.weights.items():
            if "level_embedding" in n or ".lora_B." in n:
                weight += 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(len(n)))
    student = Student(told, [teacher.denoiser.schedule.t_max])
    check_exportable(student, [config], teacher)
    prompts = PROMPTS[:2] if name.startswith("Pix") else ["1", "2"]
    own = trainer_sample(student, teacher, prompts)
    untold = trainer_sample(
        Student(teacher.denoiser.with_net(role.module), student.times), teacher, prompts
    )  # its call leaves the embedding without a value
    scale = own.std().item()
    assert (own - untold).abs().max() > 0.05 * scale
    export_student(
        tmp_path / "e", teacher, student, {"student": role.final_weights()}, [config], about={"method": "x"}
    )
    assert verify(tmp_path / "e", own, teacher, prompts, 1e-4 * scale, "float32") < 1e-4 * scale


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("times", [[999], [999, 749, 499, 249]])
@pytest.mark.parametrize("scalar", [Scalar(0.0), Scalar(0.7, scale=3.0)])
def test_what_a_student_is_told_is_folded_into_stock_weights(sdxl, kind, times, scalar):
    adapted = (
        {"targets": ["to_q", "time_embedding.linear_2"]} if kind == "lora" else {}
    )  # where the fold goes, too
    role = build_role("student", sdxl.net, RoleConfig(kind=kind, rank=2, alpha=2.0, **adapted))
    student = with_scalar(sdxl.denoiser.with_net(role.module), "level", scalar)
    role.collect()
    with torch.no_grad():
        for name, weight in role.weights.items():
            if "embedding" in name or ".lora_B." in name:
                weight += 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(len(name)))
    weights = {name.replace(".default.", "."): w.detach() for name, w in role.weights.items()}
    plain = build_role("plain", sdxl.net, RoleConfig(kind="full")).module
    if kind == "full":
        plain.load_state_dict({**plain.state_dict(), **folded(weights, sdxl.net, "level", scalar)})
    else:
        state = folded_lora(weights, sdxl.net, "level", scalar, torch.tensor(times, dtype=torch.float32))
        assert all(".lora_" in name for name in state)
        plain.load_state_dict({**plain.state_dict(), **merged(sdxl.net, state)})
    cond = sdxl.encode(PROMPTS[:2])
    x = torch.randn(2, *sdxl.latent_shape, generator=torch.Generator().manual_seed(0))
    for time in times:
        t = torch.full((2,), float(time))
        told = student.predict(x, t, cond)
        assert (sdxl.denoiser.with_net(plain).predict(x, t, cond) - told).abs().max() < 1e-4
        assert (
            student.predict(x, t, type(cond)({**cond.tensors, "level": torch.ones(2) * 1.5})) - told
        ).abs().max() > 1e-3


@pytest.mark.parametrize(
    "name", ["SD 3", "FLUX.1-dev", "Qwen-Image", "SANA", "PixArt-Sigma", "prepared SANA"]
)
def test_the_fold_is_made_at_what_the_sinusoids_are_given(name, teachers):
    """Some networks multiply t in [0, 1] by 1000 themselves, in their sinusoids or before."""
    teacher = teachers(name.removeprefix("prepared "))
    denoiser, times = teacher.denoiser, teacher.denoiser.schedule.at(torch.tensor([1.0, 0.4])).tolist()
    if name.startswith("prepared"):
        denoiser = denoiser.with_net(copy.deepcopy(teacher.net))
        smooth_time(denoiser, teacher.latent_shape, 2.0, steps=1)
    role = build_role("student", denoiser.net, RoleConfig(rank=2))
    student = with_scalar(denoiser.with_net(role.module), "level", Scalar(0.7))
    role.module.level_embedding.embedder.linear_2.bias.data.fill_(0.5)
    role.collect()
    weights = {name.replace(".default.", "."): w.detach() for name, w in role.weights.items()}
    given = given_to_sinusoids(denoiser, teacher.latent_shape, times)
    plain = build_role("plain", denoiser.net, RoleConfig(kind="full")).module
    state = folded_lora(weights, denoiser.net, "level", Scalar(0.7), given)
    plain.load_state_dict({**plain.state_dict(), **merged(denoiser.net, state)})
    cond = teacher.encode(["red apple"])
    x = torch.randn(1, *teacher.latent_shape, generator=torch.Generator().manual_seed(0))
    for time in times:
        t = torch.full((1,), time)
        told = student.predict(x, t, cond)
        assert (denoiser.predict(x, t, cond) - told).abs().max() > 1e-3
        assert (denoiser.with_net(plain).predict(x, t, cond) - told).abs().max() < 1e-4


def test_the_fold_is_made_at_the_times_of_every_number_of_steps(sdxl, monkeypatch):
    role = build_role("student", sdxl.net, RoleConfig(rank=2, targets=["to_q"]))
    student = with_scalar(sdxl.denoiser.with_net(role.module), "level", Scalar(0.7))
    role.module.level_embedding.embedder.linear_2.bias.data.fill_(0.5)
    role.collect()
    several = [Student(student, times) for times in ([999, 499], [799, 299, 99])]
    monkeypatch.setattr(several[0], "variants", lambda: several)
    state = Lora(sdxl, several[0], [role.config]).alone(role.final_weights(), role.config)
    plain = build_role("plain", sdxl.net, RoleConfig(kind="full")).module
    plain.load_state_dict({**plain.state_dict(), **merged(sdxl.net, state)})
    cond = sdxl.encode(PROMPTS[:1])
    x = torch.randn(1, *sdxl.latent_shape, generator=torch.Generator().manual_seed(0))
    for time in (999, 499, 799, 299, 99):
        t = torch.full((1,), float(time))
        told = student.predict(x, t, cond)
        assert (sdxl.denoiser.with_net(plain).predict(x, t, cond) - told).abs().max() < 1e-4


def test_a_lora_on_the_first_layer_of_the_time_embedding_is_refused_before_training(sdxl):
    student = Student(with_scalar(sdxl.denoiser.with_net(build_role("s", sdxl.net, RoleConfig(kind="full")).module),
                                  "level", Scalar(0.0)), [999])  # fmt: skip
    path, _, _ = time_embedder(sdxl.net)
    check_exportable(student, [RoleConfig(rank=2, targets=["to_q"])], sdxl)
    with pytest.raises(RecipeError, match=rf"{path}\.linear_1"):
        check_exportable(student, [RoleConfig(rank=2, targets=["to_q", f"{path}.linear_1"])], sdxl)


# ------------------------------------------------------------------------------------------------------ real runs
@pytest.fixture(scope="module")
def hyper(tiny_sdxl, tmp_path_factory):
    words = ("--method.segments", "[4, 2, 1]", "--method.gan_weight", "0.1", "--train.steps", "8")
    more = ("--method.score_length", "1.0", "--method.feedback_length", "1.0", "--method.keep_weight", "1.0")
    reward = ("--method.reward", "test_trajectory_export:redness", "--train.checkpoint_every", "0")
    folder = tmp_path_factory.mktemp("hyper")
    return execute(
        tiny("sdxl_hyper_sd", tiny_sdxl, folder, *words, *more, *reward, "--discriminator.lr", "1e-3")
    )


def redness(images, prompts):
    assert len(images) == len(prompts) and set(prompts) <= set(PROMPTS)
    return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))


def test_every_stage_ran_and_the_student_is_verified_at_every_number_of_steps(hyper):
    rows = [json.loads(line) for line in (hyper / "metrics.jsonl").read_text().splitlines()]
    names = {name.split("/")[0] for row in rows for name in row}
    assert {"stage_1", "stage_2", "stage_3", "discriminator_1", "feedback", "score", "critic"} <= names
    record = json.loads((hyper / "export" / "fewstep.json").read_text())
    assert record["kind"] == "lora" and record["scheduler"] == "TCDScheduler"
    assert set(record["steps"]) == {"4", "2", "1"}
    assert record["steps"]["2"]["call"]["num_inference_steps"] == 2 and record["call"]["eta"] == 1.0


def test_each_image_is_drawn_under_its_prompt(hyper, tmp_path, monkeypatch):
    colours = {"a cat": 40, "red apple": 200}

    def draw(_pipe, prompts, _call, seed):
        return np.stack([np.full((32, 32, 3), colours[prompt], np.uint8) for prompt in prompts]), None

    monkeypatch.setattr("fewstep.teachers.generate.generate", draw)
    words = [word for prompt in colours for word in ("--prompt", prompt)]
    out = tmp_path / "grid.png"
    assert main(["sample", str(hyper), *words, "--num", "2", "--scale", "1", "--out", str(out)]) == 0
    picture = np.asarray(Image.open(out).convert("L"))
    left, right = np.split(picture[:, : picture.shape[1] // 2 * 2], 2, 1)
    for half, colour, other in ((left, 40, 200), (right, 200, 40)):
        assert (half == colour).sum() >= 2 * 32 * 32 and not (half == other).sum() > 100


def test_one_unified_student_is_sampled_at_its_numbers_of_steps(hyper, tmp_path, capsys):
    out = tmp_path / "grid.png"
    for steps in ("1", "2", "4"):
        assert main(["sample", str(hyper), "--prompt", "a cat", "--steps", steps, "--out", str(out)]) == 0
    assert main(["sample", str(hyper), "--prompt", "a cat", "--steps", "3", "--out", str(out)]) == 2
    assert "trained for 4, 2, 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name, words", [("emoji_boot_1step", ("--student.rank", "4")), ("sd15_boot_1step", ())]
)
def test_boot_is_a_lora_or_a_pipeline_of_stock_classes(name, words, tiny_sdxl, tiny_sd15, tmp_path):
    teacher = tiny_sdxl if name.startswith("emoji") else tiny_sd15
    run = execute(
        tiny(name, teacher, tmp_path, *words, "--evaluation.num", "0", "--teacher.attention", "auto")
    )
    code = (run / "export" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    script = tmp_path / "use.py"
    script.write_text(REFUSE + code)
    without_fewstep(script, run / "export")
    teacher = load_teacher(str(teacher))
    pipe, record = load_exported(run / "export")
    assert record["timesteps"] == [999] and record["kind"] == ("lora" if name.startswith("emoji") else "full")
    trained = stock_sample(pipe, record, teacher, PROMPTS[:2])
    pipe.unload_lora_weights() if record["kind"] == "lora" else setattr(pipe, "unet", teacher.net)
    assert (stock_sample(pipe, record, teacher, PROMPTS[:2]) - trained).abs().max() > 1e-3


# --------------------------------------------------------------------------------------------------------- rewards
def plain_number(images, prompts):
    return torch.zeros(len(images))


@pytest.mark.parametrize(
    "spec, message",
    [
        ("no_such_module:function", "No module named"),
        ("test_trajectory_export:nothing", "no attribute"),
        ("test_trajectory_export:PROMPTS", "expected a function"),
        ("redness", "expected module:function"),
        ("clip:/nowhere", "does not exist"),
    ],
)
def test_a_reward_that_is_not_there_is_refused(spec, message):
    with pytest.raises(RecipeError, match=message) as refusal:
        load_reward(spec)
    assert str(refusal.value).startswith("method.reward")


def test_a_reward_has_a_gradient_in_the_latents(sdxl):
    latents = torch.randn(2, *sdxl.latent_shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
    score = of_latents(load_reward("test_trajectory_export:redness"), sdxl, PROMPTS)
    value = score(latents, torch.tensor([1, 3]))
    assert value.shape == (2,) and torch.autograd.grad(value.sum(), latents)[0].abs().max() > 0
    with pytest.raises(RecipeError, match="without gradient"):
        of_latents(plain_number, sdxl, PROMPTS)(latents, torch.tensor([0, 1]))
