"""Transformer teachers: tiny pipelines of their classes against the stock pipelines themselves."""

import inspect

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from fewstep.discriminator import Discriminator
from fewstep.errors import FewstepError
from fewstep.export import export_student, load_exported, student_scheduler, trainer_sample, verify
from fewstep.floor import calibrate, floor_sampler, sample, write_floor
from fewstep.generate import generate
from fewstep.roles import RoleConfig, build_role, lora_targets
from fewstep.schedules import VP, Flow
from fewstep.solvers import FLOOR, ddim, scheduler_sample
from fewstep.student import Student, even_times
from fewstep.teachers import load_teacher
from fewstep.teachers.base import schedule_of, size_options
from fewstep.teachers.tiny import write_tiny_pipeline

FLOWS = ("StableDiffusion3Pipeline", "SanaPipeline")
CLASSES = (*FLOWS, "PixArtAlphaPipeline", "PixArtSigmaPipeline")
PROMPTS = ["red apple", "a dog on a skateboard"]


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """Pipeline class -> a frozen tiny teacher of it."""
    made = {}

    def get(name):
        if name not in made:
            made[name] = load_teacher(str(write_tiny_pipeline(name, tmp_path_factory.mktemp(name))))
        return made[name]

    return get


def noise_for(teacher, rows=2):
    return torch.randn(rows, *teacher.latent_shape, generator=torch.Generator().manual_seed(0))


def stock(teacher, noise, **call):
    options = {**size_options(teacher.pipe, teacher.resolution), "output_type": "latent", **call}
    return teacher.pipe(PROMPTS, latents=noise.clone(), **options).images


@pytest.mark.parametrize("name", CLASSES)
def test_schedule_and_prediction_are_the_schedulers(name, teachers):
    denoiser = teachers(name).denoiser
    if name in FLOWS:  # SANA's DPM-Solver holds a table of alphas too, which means nothing
        assert isinstance(denoiser.schedule, Flow) and denoiser.prediction == "flow"
        assert (denoiser.schedule.shift, denoiser.schedule.time_scale) == (3.0, 1000)
    else:
        assert isinstance(denoiser.schedule, VP) and denoiser.prediction == "eps"


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_x0_is_the_stock_pipelines_own_prediction(name, guidance, teachers):
    """One Euler or DDIM step from the noisiest time to zero is the x0 prediction."""
    teacher = teachers(name)
    noise, before = noise_for(teacher), teacher.pipe.scheduler
    teacher.pipe.scheduler = FLOOR["ddim"](before)
    try:
        expected = stock(teacher, noise, num_inference_steps=1, guidance_scale=guidance)
    finally:
        teacher.pipe.scheduler = before
    t = torch.full((2,), teacher.denoiser.schedule.t_max)
    with torch.no_grad():
        own = teacher.denoiser.x0(noise, t, teacher.encode(PROMPTS), guidance=guidance)
    assert (own - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize("solver", list(FLOOR))
@pytest.mark.parametrize("name", FLOWS)
def test_our_sampler_reproduces_stock_sampling_with_the_same_scheduler(name, solver, teachers):
    teacher = teachers(name)
    noise, before, cond = noise_for(teacher), teacher.pipe.scheduler, teacher.encode(PROMPTS)
    own = scheduler_sample(teacher.denoiser, FLOOR[solver](before), noise, cond, 3, guidance=2.0)
    teacher.pipe.scheduler = FLOOR[solver](before)
    try:
        expected = stock(teacher, noise, num_inference_steps=3, guidance_scale=2.0)
    finally:
        teacher.pipe.scheduler = before
    torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-4)
    if (
        solver == "euler"
    ):  # the floor's Euler is our own first-order solver: no step is wasted at the clean end
        torch.testing.assert_close(
            ddim(teacher.denoiser, noise, cond, 3, guidance=2.0), own, rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("name", FLOWS)
def test_a_stock_flow_pipeline_walks_exactly_the_sigmas_of_the_searched_floor(name, teachers, tmp_path):
    teacher = teachers(name)
    noise, before = noise_for(teacher), teacher.pipe.scheduler
    record = calibrate(teacher, PROMPTS, [3], guidance=2.0, num=2, reference_steps=6)
    write_floor(tmp_path, before, record)
    scheduler, call = floor_sampler(str(tmp_path), teacher.pipe, before, 3)
    sigmas = record["schedules"]["3"]["sigmas"]
    assert record["solver"] == "euler" and call == {"sigmas": sigmas} and sigmas[0] == 1.0
    teacher.pipe.scheduler = scheduler
    try:
        made = stock(teacher, noise, guidance_scale=2.0, **call)
    finally:
        teacher.pipe.scheduler = before
    assert scheduler.sigmas.tolist() == pytest.approx([*sigmas, 0.0])
    own = sample(teacher.denoiser, noise, teacher.encode(PROMPTS), sigmas, order=1, guidance=2.0)[2]
    torch.testing.assert_close(made, own, rtol=1e-4, atol=1e-4)
    with pytest.raises(FewstepError, match=r"--solver dpm\+\+: no stock scheduler"):
        calibrate(teacher, PROMPTS, [3], guidance=2.0, solver="dpm++")
    with pytest.raises(FewstepError, match=f"no table for {name}"):
        floor_sampler("ays", teacher.pipe, before, 4)


@pytest.mark.parametrize("name", CLASSES)
def test_padding_of_the_prompt_changes_nothing(name, teachers):
    """Conditions are cut to the tokenizer's limit; the stock call pads further and masks."""
    teacher = teachers(name)
    cond, null = teacher.encode(PROMPTS), teacher.denoiser.null
    assert len(cond) == 2 and len(null) == 1
    assert {k: v.shape[1:] for k, v in cond.tensors.items()} == {
        k: v.shape[1:] for k, v in null.tensors.items()
    }
    if "mask" not in cond.tensors:
        return
    limit, teacher.pipe.tokenizer.model_max_length = teacher.pipe.tokenizer.model_max_length, 30
    try:
        short = teacher.encode(PROMPTS)
    finally:
        teacher.pipe.tokenizer.model_max_length = limit
    assert short["mask"].shape[1] == 30 < cond["mask"].shape[1]
    x, t = noise_for(teacher), torch.full((2,), teacher.denoiser.schedule.t_max / 2)
    with torch.no_grad():
        torch.testing.assert_close(
            teacher.denoiser.predict(x, t, short), teacher.denoiser.predict(x, t, cond), rtol=1e-4, atol=1e-5
        )


def test_the_null_of_sana_has_no_instruction(teachers):
    teacher = teachers("SanaPipeline")
    default = inspect.signature(type(teacher.pipe).__call__).parameters["complex_human_instruction"].default
    _, _, embeds, mask = teacher.pipe.encode_prompt(["a"], True, complex_human_instruction=default)
    torch.testing.assert_close(teacher.denoiser.null["embeds"], embeds)
    assert torch.equal(teacher.denoiser.null["mask"], mask)


@pytest.mark.parametrize("name", CLASSES)
def test_images_go_to_scaled_latents_and_back(name, teachers):
    teacher = teachers(name)
    images = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8)
    latents = teacher.latents(images, torch.Generator().manual_seed(0))
    assert latents.shape == (2, *teacher.latent_shape)
    vae, factor = teacher.pipe.vae, teacher.pipe.vae.config.scaling_factor
    shift = vae.config.get("shift_factor") or 0.0
    pixels = images.permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        code = vae.encode(pixels)
        raw = (
            code.latent
            if hasattr(code, "latent")
            else code.latent_dist.sample(torch.Generator().manual_seed(0))
        )
        torch.testing.assert_close(latents, (raw - shift) * factor)
        decoded = vae.decode(latents / factor + shift, return_dict=False)[0]
    assert teacher.decode(latents).shape == (2, 32, 32, 3)
    expected = ((decoded / 2 + 0.5).clamp(0, 1) * 255).round().permute(0, 2, 3, 1)
    assert (torch.tensor(teacher.decode(latents)).float() - expected).abs().max() <= 1


# ------------------------------------------------------------------------------------------------------ roles, taps
@pytest.mark.parametrize("name", CLASSES)
def test_lora_adapts_attention_and_feed_forward_of_every_block(name, teachers):
    net = teachers(name).net
    role = build_role("student", net, RoleConfig(rank=2))
    layers = set(lora_targets(net, role.config.targets))
    for index in range(2):
        inside = {n.split(f"transformer_blocks.{index}.")[1] for n in layers if f"blocks.{index}." in n}
        assert any(n.endswith("to_q") for n in inside) and any(n.startswith("ff.") for n in inside)
    assert not [n for n in layers if "proj_out" in n or "embed" in n]  # narrower than a usual rank


@pytest.mark.parametrize("name", CLASSES)
def test_shells_checkpointing_and_hooks_give_the_plain_gradient(name, tmp_path, teachers):
    x, gradients = noise_for(teachers(name)), []
    for checkpointing in (False, True):
        teacher = load_teacher(teachers(name).source)
        role = build_role("student", teacher.net, RoleConfig(rank=2))
        if checkpointing:
            teacher.net.enable_gradient_checkpointing()
            role = build_role("student", teacher.net, RoleConfig(rank=2))
            role.module.train()
        g = torch.Generator().manual_seed(1)
        for weight in role.weights.values():
            weight.data = 0.2 * torch.randn(weight.shape, generator=g)
        denoiser = teacher.denoiser.with_net(role.module)
        t = torch.full((2,), 0.5 * teacher.denoiser.schedule.t_max)
        denoiser.x0(x, t, teacher.encode(PROMPTS)).square().mean().backward()
        gradients.append({n: w.grad for n, w in role.weights.items()})
        assert all(p.grad is None for p in teacher.net.parameters())
    assert all(g is not None for g in gradients[0].values())
    for name_, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name_], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", CLASSES)
def test_token_heads_on_blocks_pass_gradient_to_the_image(name, teachers):
    teacher = teachers(name)
    taps = ["transformer_blocks.0", "transformer_blocks.1"]
    judge = Discriminator(teacher.denoiser, taps, teacher.latent_shape)
    x = noise_for(teacher).requires_grad_()
    t = torch.full((2,), 0.5 * teacher.denoiser.schedule.t_max)
    logits = judge.logits(teacher.denoiser, x, t, teacher.encode(PROMPTS))
    tokens = (teacher.latent_shape[1] // teacher.net.config.patch_size) ** 2
    assert logits.shape == (2, 2 * tokens)
    logits.sum().backward()
    assert x.grad.abs().sum() > 0


# ---------------------------------------------------------------------------------------------------------- export
def student_of(teacher, times, noise="fresh", kind="lora"):
    role = build_role("student", teacher.net, RoleConfig(kind=kind, rank=4, alpha=2))
    g = torch.Generator().manual_seed(1)
    for weight in role.weights.values():
        weight.data = weight.data + 0.05 * torch.randn(weight.shape, generator=g)
    return role, Student(teacher.denoiser.with_net(role.module), times, noise)


@pytest.mark.parametrize("noise", ["fresh", "ddim", "fixed"])
@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("name", FLOWS)
def test_stock_diffusers_samples_a_flow_student(name, steps, noise, teachers, tmp_path):
    teacher = teachers(name)
    times = even_times(teacher.denoiser.schedule, steps)
    role, student = student_of(teacher, times, noise)
    own = trainer_sample(student, teacher, PROMPTS)
    untrained = trainer_sample(Student(teacher.denoiser, times, noise), teacher, PROMPTS)
    assert (own - untrained).abs().max() > 1e-2  # otherwise the comparison would prove nothing
    export_student(
        tmp_path / "e",
        teacher,
        student,
        {"student": role.final_weights()},
        role.config,
        about={"method": "x"},
    )
    assert (tmp_path / "e" / "pytorch_lora_weights.safetensors").is_file()
    assert verify(tmp_path / "e", own, teacher, PROMPTS, 1e-4, "float32") < 1e-4
    pipe, record = load_exported(tmp_path / "e")
    assert record["timesteps"] == pytest.approx(times)


@pytest.mark.parametrize("noise", ["fresh", "ddim"])
@pytest.mark.parametrize(
    "times, by_number",
    [
        ([1.0], True),
        ([1.0, 0.783], True),  # SANA-Sprint's two steps
        ([1.0, 0.75, 0.5, 0.25], True),
        ([1.0, 0.9, 0.75, 0.5], False),  # a shift is no even grid
        ([0.7], False),
    ],
)
def test_a_flow_schedulers_file_gives_the_trained_times(times, by_number, noise, tmp_path):
    """The first and all later times, from the file alone where the grid is even; diffusers' own grids are others."""
    scheduler, call = student_scheduler(FlowMatchEulerDiscreteScheduler(shift=3.0), times, noise)
    assert ("num_inference_steps" in call) == by_number and call.pop("guidance_scale") == 0.0
    scheduler.save_pretrained(tmp_path)
    loaded = type(scheduler).from_pretrained(tmp_path)
    loaded.set_timesteps(**call)
    assert loaded.timesteps.tolist() == pytest.approx([1000 * t for t in times], abs=1e-3)
    assert loaded.sigmas.tolist() == pytest.approx([*times, 0.0], abs=1e-6)
    plain = FlowMatchEulerDiscreteScheduler(shift=3.0)
    plain.set_timesteps(4)
    assert plain.timesteps.tolist() == pytest.approx(
        [1000, 858, 602, 8.9], abs=0.5
    )  # the last step is wasted


@pytest.mark.parametrize("noise", ["fresh", "ddim"])
def test_the_last_step_of_a_flow_scheduler_is_the_x0_prediction(noise):
    x, velocity = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    scheduler, call = student_scheduler(FlowMatchEulerDiscreteScheduler(), [0.7], noise)
    call.pop("guidance_scale")
    scheduler.set_timesteps(**call)
    made = scheduler.step(velocity, scheduler.timesteps[0], x).prev_sample
    torch.testing.assert_close(made, x - 0.7 * velocity)


@pytest.mark.parametrize("name", ["PixArtSigmaPipeline"])
def test_a_lora_of_a_pipeline_without_lora_files_is_exported_merged(name, teachers, tmp_path):
    teacher = teachers(name)
    role, student = student_of(teacher, [999, 499])
    own = trainer_sample(student, teacher, PROMPTS)
    export_student(
        tmp_path / "e",
        teacher,
        student,
        {"student": role.final_weights()},
        role.config,
        about={"method": "x"},
    )
    assert (tmp_path / "e" / "pipeline" / "model_index.json").is_file()
    scale = own.abs().max().item()
    assert verify(tmp_path / "e", own, teacher, PROMPTS, 1e-4 * scale, "float32") < 1e-4 * scale


@pytest.mark.parametrize("name", FLOWS)
def test_a_sample_is_the_same_in_any_batch(name, teachers, tmp_path):
    """Stable Diffusion 3's pipeline keeps its generator from the scheduler; fresh noise would depend on the batch."""
    teacher = teachers(name)
    role, student = student_of(teacher, [1.0, 0.5])
    export_student(
        tmp_path / "e",
        teacher,
        student,
        {"student": role.final_weights()},
        role.config,
        about={"method": "x"},
    )
    pipe, record = load_exported(tmp_path / "e")
    both = generate(pipe, PROMPTS, record["call"], quiet=True)[0]
    single = generate(pipe, PROMPTS, record["call"], batch_size=1, quiet=True)[0]
    assert abs(both.astype(int) - single.astype(int)).max() <= 1
    assert (both[0] != both[1]).any()


def test_a_shift_that_depends_on_the_size_is_refused():
    with pytest.raises(FewstepError, match="use_dynamic_shifting"):
        schedule_of(FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True))
    assert isinstance(schedule_of(DDIMScheduler()), VP)
