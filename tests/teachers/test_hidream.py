"""HiDream-I1 on its own: its stock call step by step, its experts, what blocks give, what is refused."""

import json
import math
import shutil
from copy import deepcopy
from functools import partial

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, HiDreamImagePipeline, UniPCMultistepScheduler
from torch import nn
from zoo import ZOO

from fewstep.cost.meter import Meter
from fewstep.cost.shapes import Shapeless
from fewstep.cost.skeleton import skeleton_teacher
from fewstep.diffusion.consistency import central_difference, forward_mode
from fewstep.diffusion.denoiser import Scalar, ScheduleView
from fewstep.diffusion.discriminator import Discriminator, tap_features
from fewstep.diffusion.embedding import with_scalar
from fewstep.diffusion.schedules import TrigFlow
from fewstep.diffusion.student import Student
from fewstep.diffusion.times import even_times
from fewstep.errors import FewstepError
from fewstep.export import export_student, load_exported, trainer_sample, verify
from fewstep.recipe import RoleConfig
from fewstep.teachers import load_teacher
from fewstep.teachers.load import check_origin
from fewstep.teachers.origin import Origin
from fewstep.teachers.pipelines import check_size, fix_shift, size_options
from fewstep.teachers.resize import resize
from fewstep.teachers.schedulers import schedule_of, scheduler_sample
from fewstep.teachers.tiny import write_tiny_pipeline
from fewstep.training.roles import build_role

PROMPTS = list(ZOO["HiDream"].prompts)


@pytest.fixture(scope="module")
def teacher(teachers):
    return teachers("HiDream")


@pytest.fixture(scope="module")
def untouched(teacher):
    """The stock pipeline of the same files, as diffusers loads it."""
    pipe = HiDreamImagePipeline.from_pretrained(teacher.source)
    pipe.set_progress_bar_config(disable=True)
    pipe.transformer.requires_grad_(False)
    return pipe


def noise_of(teacher, seed=0):
    return torch.randn(2, *teacher.latent_shape, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------------- the stock call
SCHEDULERS = {
    "of its files": None,
    "by the size": FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_image_seq_len=64, max_shift=3.0
    ),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_step_of_a_guided_stock_call_is_ours(name, teacher, untouched, monkeypatch):
    """Its prediction at each step, and where our steps with its scheduler end."""
    scheduler, seen, x = deepcopy(SCHEDULERS[name] or untouched.scheduler), [], noise_of(teacher)
    kind = type(scheduler)
    step = kind.step
    monkeypatch.setattr(untouched, "scheduler", scheduler)
    monkeypatch.setattr(kind, "step", lambda self, *a, **k: seen.append(a) or step(self, *a, **k))
    call = {"num_inference_steps": 4, "guidance_scale": 4.0, "output_type": "latent"}
    expected = untouched(PROMPTS, latents=x, **call).images
    monkeypatch.setattr(kind, "step", step)
    monkeypatch.setattr(teacher.pipe, "scheduler", deepcopy(scheduler))
    fix_shift(teacher.pipe, teacher.resolution)
    cond, moved = teacher.encode(PROMPTS), 0.0
    assert len(seen) == 4
    for theirs, t, held in seen:
        with torch.no_grad():
            given = held, torch.full((2,), float(t) / 1000), cond
            ours = teacher.denoiser.predict(*given, guidance=4.0)
            moved = max(moved, (ours - teacher.denoiser.predict(*given)).abs().max().item())
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert moved > 1e-2
    ours, times = teacher.pipe.scheduler, [float(t) / 1000 for _, t, _ in seen]
    if name == "by the size":  # whose grid ends elsewhere than that of the same shift for good
        path = schedule_of(ours)
        assert path.shift == pytest.approx(math.exp(0.5 + 0.65 * (64 - 256) / (4096 - 256)))
        even = torch.linspace(1, 1e-3, 4, dtype=torch.float64).tolist()
        assert times == pytest.approx([path.shifted(u) for u in even])
        ours = FlowMatchEulerDiscreteScheduler(shift=1.0)
        told = partial(ours.set_timesteps, sigmas=times)
        monkeypatch.setattr(ours, "set_timesteps", lambda *_, **__: told())
    own = scheduler_sample(teacher.denoiser, ours, x, cond, 4, guidance=4.0)
    torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-4)


def test_the_shift_by_size_is_of_the_networks_most_tokens_whatever_the_scheduler_says(tmp_path):
    """At the sizes of diffusers' own tests: 4096 tokens, and a network that says 256."""
    options = {"patch_size": 2, "max_resolution": (32, 32), "num_layers": 1, "num_single_layers": 1}
    path = write_tiny_pipeline("HiDreamImagePipeline", tmp_path, **options, llama_layers=[0, 1])
    teacher = load_teacher(str(path))
    assert teacher.net.max_seq == 256 and teacher.encode(["a"])["layers"].shape[1] == 2
    stock = HiDreamImagePipeline.from_pretrained(path)
    stock.set_progress_bar_config(disable=True)
    by_size = {"use_dynamic_shifting": True, "base_image_seq_len": 1, "max_shift": 9.0}
    for pipe in (stock, teacher.pipe):
        pipe.scheduler = FlowMatchEulerDiscreteScheduler(**by_size)
    x = noise_of(teacher)[:1]
    made = stock(["a"], latents=x, num_inference_steps=1, guidance_scale=1.0, output_type="latent").images
    fix_shift(teacher.pipe)
    assert teacher.pipe.scheduler.config.shift == pytest.approx(math.exp(0.5))
    own = scheduler_sample(teacher.denoiser, teacher.pipe.scheduler, x, teacher.encode(["a"]), 1)
    torch.testing.assert_close(own, made, rtol=1e-4, atol=1e-4)
    assert stock.scheduler.timesteps.tolist() == teacher.pipe.scheduler.timesteps.tolist()
    shift = type(teacher)(teacher.pipe, teacher.source).denoiser.schedule.shift
    assert shift == pytest.approx(math.exp(0.5))


def test_layers_are_kept_once_and_texts_with_their_padding(teacher, untouched):
    cond = teacher.encode(PROMPTS)
    shapes = {name: value.shape for name, value in cond.tensors.items()}
    assert shapes == {name: value.shape for name, value in teacher.blank(2).tensors.items()}
    assert shapes["layers"] == (2, 3, 128, 24)  # of layers 0, 1, 3 and 3
    with torch.no_grad():
        t5, _, llama, _, pooled, _ = untouched.encode_prompt(PROMPTS, do_classifier_free_guidance=False)
    assert torch.equal(cond["layers"], torch.stack([llama[0], llama[1], llama[3]], 1))
    assert torch.equal(cond["embeds"], t5) and torch.equal(cond["pooled"], pooled)
    x, t = noise_of(teacher), torch.full((2,), 0.5)
    with torch.no_grad():
        plain = teacher.denoiser.predict(x, t, cond)
        for name in ("embeds", "layers"):  # the last token is padding
            other = type(cond)({**cond.tensors, name: cond[name].clone()})
            other[name][..., -1, :] += 1.0
            assert (teacher.denoiser.predict(x, t, other) - plain).abs().max() > 1e-5


# ------------------------------------------------------------------------------------------------------- experts
def layers(net):
    return [module for module in net.modules() if hasattr(module, "moe_infer")]


@pytest.mark.parametrize("cast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_give_what_they_give_in_the_stock_network(dtype, cast, teacher, untouched):
    ours, stock = (deepcopy(layers(net)[0]).to(dtype) for net in (teacher.net, untouched.transformer))
    tokens = torch.randn(2, 50, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=cast):
        expected = stock(tokens)
        made = ours(tokens), ours.train()(tokens)
    for one in made:
        assert one.dtype == expected.dtype and torch.equal(one, expected)


@pytest.mark.parametrize("train", [False, True])
def test_gradients_are_those_of_the_stock_path_that_has_some(train, teacher, untouched):
    """Which is that of train mode; its inference has none, and here both modes have it."""
    stock, own = deepcopy(untouched.transformer).train().requires_grad_(True), deepcopy(teacher.net)
    own.requires_grad_(True).train(train)
    cond, t = teacher.encode(PROMPTS), torch.full((2,), 0.5)
    weight = noise_of(teacher, 1)
    inputs = [noise_of(teacher).requires_grad_() for _ in range(2)]
    for net, x in zip((stock, own), inputs):
        made = teacher.denoiser.with_net(net).predict(x, t, cond)
        (made * weight).sum().backward()
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad, rtol=1e-3, atol=1e-4)
    theirs = dict(stock.named_parameters())
    for name, parameter in own.named_parameters():
        scale = max(1.0, theirs[name].grad.abs().max().item())
        torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-3, atol=1e-4 * scale)
    routed = [n for n in theirs if ".experts." in n or ".gate." in n]
    assert len(routed) == 4 * (4 * 3 + 1) and all(theirs[n].grad.abs().sum() > 0 for n in routed)


def test_an_expert_that_no_token_chose_has_a_gradient_of_zero(teacher):
    layer = deepcopy(layers(teacher.net)[0]).requires_grad_(True)
    layer.gate.weight.data[2:] = 0
    layer.gate.weight.data[:2] = 10.0
    layer(torch.ones(1, 3, 32)).sum().backward()
    assert [layer.experts[i].w1.weight.grad.any().item() for i in range(4)] == [True, True, False, False]


def test_smaller_networks_of_the_class_have_it_too(teacher):
    small = resize(teacher, {"num_layers": 1, "llama_layers": [0, 1, 3]}, "x")
    given = noise_of(teacher).requires_grad_(), torch.full((2,), 0.5), teacher.encode(PROMPTS)
    teacher.denoiser.with_net(small.requires_grad_(True)).predict(*given).square().sum().backward()
    assert all(layer.experts[0].w1.weight.grad.any() for layer in layers(small)) and len(layers(small)) == 3


def test_full_students_are_recomputed_to_the_same_gradient(teacher):
    found = []
    for checkpointing in (False, True):
        role = build_role(
            "student", teacher.net, RoleConfig(kind="full", gradient_checkpointing=checkpointing)
        )
        role.module.train(checkpointing)
        made = teacher.denoiser.with_net(role.module).x0(
            noise_of(teacher), torch.full((2,), 0.5), teacher.encode(PROMPTS)
        )
        made.square().mean().backward()
        found.append({name: weight.grad for name, weight in role.weights.items()})
    silent = [name for name, gradient in found[0].items() if gradient is None]
    assert all("single_stream_blocks.1" not in name for name in silent) and len(silent) < 10
    for name, gradient in found[0].items():
        if gradient is not None:
            torch.testing.assert_close(found[1][name], gradient, rtol=1e-3, atol=1e-5)


@torch.no_grad()
def test_forward_mode_agrees_with_the_difference_where_no_token_changes_its_experts(tmp_path):
    path = write_tiny_pipeline("HiDreamImagePipeline", tmp_path, num_activated_experts=4)
    teacher = load_teacher(str(path))
    torch.manual_seed(0)
    x, ode = torch.randn(2, 2, *teacher.latent_shape)
    t, cond = torch.tensor([0.6, 1.2], dtype=torch.float64), teacher.encode(PROMPTS)
    seen = ScheduleView(teacher.denoiser.exact(), TrigFlow())
    primal, exact = forward_mode(lambda x, t: seen.predict("v", x, t, cond), x, t, ode)
    mean, estimate = central_difference(lambda x, t: seen.predict("v", x, t, cond), x, t, ode, 1e-4)
    assert (mean - primal).abs().max() < 1e-3 * primal.abs().max()
    assert (estimate - exact).norm() < 1e-2 * exact.norm() and exact.norm() > 1e-3


def test_a_plan_counts_the_experts_that_a_token_has():
    """Two of four, the shared one, the choice: arithmetic of the whole layer at the published size, and a gradient."""
    with Shapeless():
        net = skeleton_teacher("HiDream-ai/HiDream-I1-Full", dtype="bfloat16").net
        layer = layers(net)[0]
        tokens = torch.empty(1, 4097, 2560, dtype=torch.bfloat16)
        with torch.no_grad(), Meter() as meter:
            assert layer(tokens).shape == tokens.shape
    width, shared = 6912, 3584  # 2/3 of 4 x 2560, and of half of it, in steps of 256
    assert meter.flops["bfloat16"] == 2 * 4097 * (2 * 3 * 2560 * width + 3 * 2560 * shared + 2560 * 4)
    given = made = 2 * 8194 * 2560  # bytes of the tokens of all experts; each holds its own in three widths
    assert given + made < meter.peak < given + made + 2 * 4097 * 2560 + 3 * 2 * 2049 * width


# -------------------------------------------------------------------------------------------------------- blocks
def test_what_a_student_is_told_is_added_to_its_time(teacher):
    role = build_role("student", teacher.net, RoleConfig(kind="full"))
    view = with_scalar(teacher.denoiser.with_net(role.module), "level", Scalar(1.0))
    given = noise_of(teacher), torch.full((2,), 0.5)
    cond = teacher.encode(PROMPTS)
    with torch.no_grad():
        assert torch.equal(view.predict(*given, cond), teacher.denoiser.predict(*given, cond))
        nn.init.normal_(view.net.level_embedding.embedder.linear_2.weight)
        told = [
            view.predict(*given, type(cond)({**cond.tensors, "level": torch.full((2,), v)}))
            for v in (1.0, 5.0)
        ]
    assert (told[0] - told[1]).abs().max() > 1e-3


@pytest.mark.parametrize("tap", ZOO["HiDream"].taps)
def test_heads_read_the_image_which_comes_first(tap, teacher):
    held = []
    block = teacher.net.get_submodule(tap)
    handle = block.register_forward_hook(lambda _module, _inputs, output: held.append(output))
    given = noise_of(teacher), torch.full((2,), 0.5), teacher.encode(PROMPTS)
    try:
        with torch.no_grad():
            (features,) = tap_features(teacher.denoiser, [tap], *given)
    finally:
        handle.remove()
    image = held[0][0] if isinstance(held[0], tuple) else held[0][:, :64]
    assert features.shape == (2, 64, 32) and torch.equal(features, image)
    judge = Discriminator(teacher.denoiser, [tap], teacher.latent_shape, conditional=True)
    assert isinstance(judge.projections[0], nn.Linear)
    assert judge.logits(teacher.denoiser, *given).shape == (2, 64)


def test_adapters_leave_out_what_is_routed(teacher):
    role = build_role("student", teacher.net, RoleConfig(rank=2))
    layers = {name.split(".lora_")[0] for name in role.weights}
    inside = {n.split("double_stream_blocks.0.block.")[1] for n in layers if "double_stream_blocks.0." in n}
    attention = {f"attn1.to_{part}{text}" for part in ("q", "k", "v", "out") for text in ("", "_t")}
    forward = {f"{name}.w{i}" for name in ("ff_i.shared_experts", "ff_t") for i in (1, 2, 3)}
    assert inside == attention | forward
    assert not [n for n in layers if ".experts." in n or "caption" in n or "final" in n]


def test_adapters_on_experts_are_trained_and_exported_when_a_recipe_names_them(teacher, tmp_path):
    """As the page of this teacher has it."""
    config = RoleConfig(rank=2, targets=["to_q", "to_k", "to_v", "to_out", "w1", "w2", "w3"])
    role = build_role("student", teacher.net, config)
    g = torch.Generator().manual_seed(1)
    for weight in role.weights.values():
        weight.data += 0.1 * torch.randn(weight.shape, generator=g)
    student = Student(teacher.denoiser.with_net(role.module), [1.0, 0.5], "fresh")
    student.denoisers[0].x0(
        noise_of(teacher), torch.ones(2), teacher.encode(PROMPTS)
    ).square().mean().backward()
    routed = [weight for name, weight in role.weights.items() if ".experts." in name]
    assert len(routed) == 2 * 3 * 4 * 4 and all(weight.grad.any() for weight in routed)
    own = trainer_sample(student, teacher, PROMPTS)
    weights = {"student": role.final_weights()}
    export_student(tmp_path / "e", teacher, student, weights, [role.config], about={"method": "x"})
    assert verify(tmp_path / "e", own, teacher, PROMPTS, 1e-4, "float32") < 1e-4


# ------------------------------------------------------------------------------------------- export, refusals
def test_a_full_student_is_an_ordinary_pipeline(teacher, tmp_path):
    """With nothing in its configuration of how it was trained."""
    role = build_role("student", teacher.net, RoleConfig(kind="full"))
    g = torch.Generator().manual_seed(1)
    for weight in role.weights.values():
        weight.data += 0.05 * weight.std().nan_to_num(0) * torch.randn(weight.shape, generator=g)
    student = Student(
        teacher.denoiser.with_net(role.module), even_times(teacher.denoiser.schedule, 2), "fresh"
    )
    own = trainer_sample(student, teacher, PROMPTS)
    untrained = trainer_sample(Student(teacher.denoiser, student.times, "fresh"), teacher, PROMPTS)
    assert (own - untrained).abs().max() > 1e-2
    export_student(
        tmp_path / "e",
        teacher,
        student,
        {"student": role.final_weights()},
        [role.config],
        about={"method": "x"},
    )
    assert verify(tmp_path / "e", own, teacher, PROMPTS, 1e-4, "float32") < 1e-4
    pipe, _ = load_exported(tmp_path / "e")
    assert type(pipe) is HiDreamImagePipeline
    assert pipe.transformer.config.force_inference_output is False
    assert dict(pipe.transformer.config) == {
        **teacher.net.config,
        "_name_or_path": pipe.transformer.config["_name_or_path"],
    }


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_student_that_is_told_more_is_folded_into_an_ordinary_one(kind, teacher, tmp_path):
    role = build_role("student", teacher.net, RoleConfig(kind=kind, rank=2, alpha=2))
    view = with_scalar(teacher.denoiser.with_net(role.module), "level", Scalar(0.7, scale=3.0))
    role.collect()
    g = torch.Generator().manual_seed(1)
    for name, weight in role.weights.items():
        if "level_embedding" in name or ".lora_B." in name:
            weight.data += 0.1 * torch.randn(weight.shape, generator=g)
    student = Student(view, even_times(teacher.denoiser.schedule, 2), "fresh")
    own = trainer_sample(student, teacher, PROMPTS)
    untrained = trainer_sample(Student(teacher.denoiser, student.times, "fresh"), teacher, PROMPTS)
    assert (own - untrained).abs().max() > 1e-2
    weights = {"student": role.final_weights()}
    export_student(tmp_path / "e", teacher, student, weights, [role.config], about={"method": "x"})
    assert verify(tmp_path / "e", own, teacher, PROMPTS, 1e-3, "float32") < 1e-3


def test_other_sizes_are_refused_for_the_stock_call_makes_one(teacher, untouched):
    assert size_options(teacher.pipe, teacher.resolution) == {}
    with pytest.raises(
        FewstepError, match=r"teacher.resolution: 128: a HiDreamImagePipeline makes images of 256 pixels"
    ):
        load_teacher(teacher.source, resolution=128)
    with pytest.raises(
        FewstepError, match=r"--size 128: a HiDreamImagePipeline makes images of 256 pixels only"
    ):
        check_size(teacher.pipe, 128)
    check_size(teacher.pipe, 256)
    made = untouched(["a"], height=128, width=128, num_inference_steps=1, output_type="latent").images
    assert made.shape[2:] == (128, 128)  # of 256 pixels, whatever it is told


@pytest.mark.parametrize("null", [True, False])
def test_a_folder_without_llama_is_refused_with_the_command_that_adds_it(null, teacher, tmp_path):
    """As it is published: listed as null, or not at all."""
    folder = shutil.copytree(teacher.source, tmp_path / "t")
    index = json.loads((folder / "model_index.json").read_text())
    for name in ("text_encoder_4", "tokenizer_4"):
        shutil.rmtree(folder / name)
        index[name] = [None, None]
        if not null:
            del index[name]
    (folder / "model_index.json").write_text(json.dumps(index))
    said = (
        r"without text_encoder_4 and tokenizer_4, which are Llama .*text_encoder_4=\.\.\., .*save_pretrained"
    )
    for ask in (load_teacher, lambda source: check_origin(Origin(source))):
        with pytest.raises(FewstepError, match=said):
            ask(str(folder))


def test_the_scheduler_of_its_files_is_unipc_on_a_flow(teacher):
    assert isinstance(teacher.pipe.scheduler, UniPCMultistepScheduler)
    assert teacher.denoiser.schedule.shift == 3.0
