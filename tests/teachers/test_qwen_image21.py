"""Qwen-Image-2.1: rows of their own length, a text before the last norm, an alpha channel, sizes and grids refused."""

import importlib.metadata
import json
import math
import shutil

import numpy as np
import pytest
import torch
from packaging.version import Version
from PIL import Image
from zoo import ZOO

from fewstep.cost.shapes import Shapeless
from fewstep.cost.skeleton import skeleton_teacher
from fewstep.diffusion.denoiser import Scalar
from fewstep.diffusion.discriminator import Discriminator, tap_features
from fewstep.diffusion.embedding import with_scalar
from fewstep.diffusion.student import Student
from fewstep.diffusion.times import even_times
from fewstep.errors import FewstepError, RecipeError
from fewstep.export import export_student, load_exported, trainer_sample, verify
from fewstep.methods.dmd2 import DMD2
from fewstep.process import Process
from fewstep.recipe import DataConfig, Recipe, RoleConfig, TeacherConfig, TrainConfig
from fewstep.runs.build import build
from fewstep.teachers import load_pipeline, load_teacher
from fewstep.teachers.generate import call_pipeline, generate, opaque
from fewstep.teachers.lengths import token_counts
from fewstep.teachers.load import pipeline_type
from fewstep.teachers.pipelines import check_size
from fewstep.teachers.qwen_image21 import QwenImage21
from fewstep.teachers.tiny import write_tiny_pipeline
from fewstep.training.roles import build_role

NAME = "Qwen-Image-2.1"
HAVE, NEEDS = Version(importlib.metadata.version("diffusers")), QwenImage21.needs["diffusers"]
pytestmark = pytest.mark.skipif(Version(NEEDS) > HAVE, reason=f"needs diffusers {NEEDS}")
PROMPTS = list(ZOO[NAME].prompts)


@pytest.fixture
def teacher(teachers):
    return teachers(NAME)


@pytest.fixture
def copied(teacher, tmp_path):
    return shutil.copytree(teacher.source, tmp_path / "copy")


@pytest.fixture
def calls(teacher):
    """Tokens of the text and samples of each call of the network."""
    seen = []

    def watch(_net, args, kwargs):
        seen.append((kwargs["encoder_hidden_states"].shape[1], len(args[0])))

    handle = teacher.net.register_forward_pre_hook(watch, with_kwargs=True)
    yield seen
    handle.remove()


def noise_for(teacher, rows=2, seed=0):
    return torch.randn(rows, *teacher.latent_shape, generator=torch.Generator().manual_seed(seed))


def stock(teacher, prompts, noise, **options):
    size = {"height": teacher.resolution, "width": teacher.resolution, "output_type": "latent"}
    made = teacher.pipe(
        prompts, latents=teacher.given(noise), **{"num_inference_steps": 2, **size, **options}
    )
    return teacher.unpack(made.images)


# ------------------------------------------------------------------------------------------------------------- texts
def test_a_text_is_the_last_layer_before_its_norm_behind_the_instruction(teacher):
    pipe, held = teacher.pipe, []
    text = pipe.prompt_template_t2i.format("a fox")
    ids = pipe.processor.tokenizer(text, return_tensors="pt")
    norm = pipe.text_encoder.model.language_model.norm
    handle = norm.register_forward_hook(lambda _module, inputs, output: held.append((inputs[0], output)))
    with torch.no_grad():
        pipe.text_encoder(**ids)
    handle.remove()
    before, after = (value[0, pipe._drop_idx :] for value in held[0])
    cond = teacher.encode(["a fox"])
    end = int(cond["lengths"])
    assert end == len(before) == len("a fox") + 8 and int(cond["mask"].sum()) == end
    torch.testing.assert_close(cond["embeds"][0, :end], before)
    assert not cond["embeds"][0, end:].any() and (before - after).abs().max() > 0.1


def test_texts_are_encoded_together_as_alone(teacher):
    both = teacher.encode(PROMPTS)
    for row, prompt in enumerate(PROMPTS):
        for name, value in teacher.encode([prompt]).tensors.items():
            torch.testing.assert_close(both[name][row], value[0], rtol=1e-4, atol=1e-4)


def test_the_null_text_is_blank_as_the_stock_calls_empty_one(teacher):
    for text in ("", " "):
        for name, value in teacher.encode([text]).tensors.items():
            torch.testing.assert_close(teacher.denoiser.null[name], value)


def test_a_longer_text_than_is_kept_is_refused_and_the_longest_is_not(teacher):
    longest = "x" * (1024 - 8)
    assert int(teacher.encode([longest])["lengths"]) == 1024 == teacher.blank(1)["embeds"].shape[1]
    with pytest.raises(FewstepError, match=r"prompt 'xxxx.*' has 1025 tokens .*at most 1024; shorten it"):
        teacher.encode(["a", longest + "x"])


def test_words_are_counted_by_the_processors_tokenizer(teacher):
    assert token_counts(teacher.pipe, ["four", "a"]) == [4, 1]


# -------------------------------------------------------------------------------------------------- rows by themselves
def test_the_stock_call_reads_a_text_otherwise_beside_a_longer_one_and_we_do_not(teacher):
    """Which is why each row has a call of its own: the image's places begin behind the padding."""
    noise, short = noise_for(teacher), [PROMPTS[0], "a much longer text about a red apple on a table"]
    alone, beside = stock(teacher, short[:1], noise[:1]), stock(teacher, short, noise)[:1]
    assert (alone - beside).abs().max() > 1e-3
    t, cond = torch.full((2,), 0.6), teacher.encode(short)
    with torch.no_grad():
        ours = teacher.denoiser.predict(noise, t, cond)[:1]
        torch.testing.assert_close(teacher.denoiser.predict(noise[:1], t[:1], cond.rows(slice(0, 1))), ours)
    made = call_pipeline(
        teacher.pipe,
        short,
        torch.Generator().manual_seed(0),
        latents=teacher.given(noise),
        num_inference_steps=2,
        height=teacher.resolution,
        width=teacher.resolution,
        output_type="latent",
    ).images
    torch.testing.assert_close(teacher.unpack(made)[:1], alone)


@pytest.mark.parametrize("guidance, rows", [(1.0, 2), (0.0, 2), (3.0, 4)])
def test_a_batch_is_as_many_calls_whatever_the_lengths(guidance, rows, teacher, calls):
    """Processes that shard a network call it equally often; without guidance no null branch is computed."""
    for prompts in (PROMPTS, ["a", "b"]):
        calls.clear()
        with torch.no_grad():
            teacher.denoiser.predict(
                noise_for(teacher), torch.full((2,), 0.5), teacher.encode(prompts), guidance=guidance
            )
        assert len(calls) == rows and all(count == 1 for _, count in calls)
        lengths = teacher.encode(prompts)["lengths"].tolist()
        null = [int(teacher.denoiser.null["lengths"])] * 2
        expected = {1.0: lengths, 0.0: null, 3.0: null + lengths}[guidance]
        assert [length for length, _ in calls] == expected


def test_each_row_has_its_own_time(teacher):
    cond, x, t = teacher.encode(PROMPTS), noise_for(teacher), torch.tensor([0.9, 0.2])
    with torch.no_grad():
        both = teacher.denoiser.predict(x, t, cond)
        for row in (0, 1):
            one = slice(row, row + 1)
            torch.testing.assert_close(teacher.denoiser.predict(x[one], t[one], cond.rows(one)), both[one])
        assert (both - teacher.denoiser.predict(x, t.flip(0), cond)).abs().max() > 1e-3


def test_the_text_knows_neither_time_nor_image(teacher):
    """So what the stock call keeps of it from its first step is what every step would make."""
    held, block = [], teacher.net.get_submodule("transformer_blocks.1")
    handle = block.register_forward_hook(lambda _module, _inputs, output: held.append(output))
    cond = teacher.encode(PROMPTS[:1])
    with torch.no_grad():
        for seed, time in ((0, 0.9), (1, 0.2)):
            teacher.denoiser.predict(noise_for(teacher, 1, seed), torch.full((1,), time), cond)
    handle.remove()
    end = int(cond["lengths"])
    assert torch.equal(held[0][:, :end], held[1][:, :end])
    assert (held[0] - held[1])[:, end:].abs().max() > 1e-2
    noise = noise_for(teacher)
    kept, anew = (stock(teacher, PROMPTS, noise, use_kv_cache=kept) for kept in (True, False))
    torch.testing.assert_close(kept, anew, rtol=1e-4, atol=1e-5)


# -------------------------------------------------------------------------------------------------------------- heads
def test_one_forward_gives_score_and_logits_of_every_row(teacher):
    judge = Discriminator(
        teacher.denoiser, ["transformer_blocks.0", "transformer_blocks.1"], teacher.latent_shape
    )
    noise = torch.randn(2, *teacher.latent_shape, generator=torch.Generator().manual_seed(3))
    cond, t = teacher.encode(["red apple", "a dog on a skateboard"]), torch.full((2,), 0.6)
    slopes = []
    for guidance in (1.0, 3.0):
        x = noise.clone().requires_grad_()
        judged, x0 = judge.judged(teacher.denoiser, x, t, cond, guidance)
        (slope,) = torch.autograd.grad(judged.sum(), x)
        torch.testing.assert_close(x0, teacher.denoiser.x0(noise, t, cond, guidance=guidance))
        slopes.append(slope)
    x = noise.clone().requires_grad_()
    logits = judge.logits(teacher.denoiser, x, t, cond)
    torch.testing.assert_close(judged, logits)
    (slope,) = torch.autograd.grad(logits.sum(), x)
    assert slope.flatten(1).abs().amax(1).min() > 0
    for other in slopes:
        torch.testing.assert_close(other, slope)


def test_heads_read_the_image_of_every_row_and_end_the_last_call(teacher, calls):
    taps = ["transformer_blocks.0", "transformer_blocks.1"]
    x, t, cond = noise_for(teacher).requires_grad_(), torch.full((2,), 0.5), teacher.encode(PROMPTS)
    features = tap_features(teacher.denoiser, taps, x, t, cond)
    assert [f.shape for f in features] == [(2, 16, 32)] * 2 and len(calls) == 2
    for row in (0, 1):
        one = slice(row, row + 1)
        alone = tap_features(teacher.denoiser, taps, x[one], t[one], cond.rows(one))
        for both, own in zip(features, alone):
            torch.testing.assert_close(both[one], own)
    # Of the last block exactly these tokens become the prediction.
    norm, proj = teacher.net.norm_out, teacher.net.proj_out
    made = []
    handle = proj.register_forward_hook(lambda _module, _inputs, output: made.append(output[:, -16:]))
    with torch.no_grad():
        predicted = teacher.denoiser.predict(x, t, cond)
        scale = norm.linear(norm.silu(teacher.net.time_text_embed(t[:1], features[1])))
        own = proj(norm.norm(features[1]) * (1 + scale[:, None]))
    handle.remove()
    torch.testing.assert_close(teacher.unpack(own), predicted, rtol=1e-4, atol=1e-5)
    features[1].sum().backward()
    assert (x.grad.flatten(1).abs().sum(1) > 0).all()


def test_a_head_of_a_sharded_network_waits_for_every_row_too(teacher, monkeypatch):
    """Which may not be interrupted: after the last row its calls go on without a graph."""
    monkeypatch.setattr(teacher.net, "unshard", None, raising=False)
    judge = Discriminator(teacher.denoiser, ["transformer_blocks.0"], teacher.latent_shape)
    x = noise_for(teacher).requires_grad_()
    logits = judge.logits(teacher.denoiser, x, torch.full((2,), 0.5), teacher.encode(PROMPTS))
    assert logits.shape == (2, 16) and torch.is_grad_enabled()
    logits.sum().backward()
    assert (x.grad.flatten(1).abs().sum(1) > 0).all()


# ------------------------------------------------------------------------------------------------------------- images
def test_what_covers_white_is_the_last_channel():
    images = np.array([[[[0.2, 0.4, 0.6, 1.0], [0.2, 0.4, 0.6, 0.0], [0.2, 0.4, 0.6, 0.5]]]])
    assert opaque(images)[0, 0] == pytest.approx(np.array([[0.2, 0.4, 0.6], [1, 1, 1], [0.6, 0.7, 0.8]]))
    plain = images[..., :3]
    assert opaque(plain) is plain


def test_generated_images_are_the_stock_ones_over_white(teacher):
    size = {"height": teacher.resolution, "width": teacher.resolution, "num_inference_steps": 2}
    ours = generate(teacher.pipe, PROMPTS, size, quiet=True)[0]
    assert ours.shape == (2, 64, 64, 3)
    for row, prompt in enumerate(PROMPTS):
        made = teacher.pipe([prompt], generator=torch.Generator().manual_seed(row), **size).images[0]
        assert made.mode == "RGBA" and np.asarray(made)[..., 3].std() > 1
        white = Image.alpha_composite(Image.new("RGBA", made.size, "white"), made).convert("RGB")
        assert abs(ours[row].astype(int) - np.asarray(white)).max() <= 2


# ----------------------------------------------------------------------------------------------------------- refusals
def test_a_student_that_is_told_a_scalar_is_refused_for_it_could_not_be_exported(teacher):
    """Exports keep it as a part of a bias, of which this network has none; and a call has two times for each row."""
    with pytest.raises(
        RecipeError, match=r"QwenImage21Transformer2DModel has no time embedding .* with a bias"
    ):
        with_scalar(teacher.denoiser, "level", Scalar(1.0))


@pytest.mark.parametrize("size", [48, 80])
def test_sizes_that_the_stock_call_rounds_are_refused(size, teacher):
    with pytest.raises(FewstepError, match=rf"teacher.resolution: {size}: expected a multiple of 32"):
        load_teacher(teacher.source, resolution=size)
    with pytest.raises(FewstepError, match=rf"--size {size}: expected a multiple of 32 pixels"):
        check_size(teacher.pipe, size)
    check_size(teacher.pipe, 96)


def test_a_pipeline_with_a_grid_of_its_own_is_refused(copied):
    """Its call walks that grid whatever the number of steps: a student's would not be the trained one."""
    index = json.loads((copied / "model_index.json").read_text())
    (copied / "model_index.json").write_text(json.dumps({**index, "sample_sigmas": [1.0, 0.7, 0.4]}))
    pipe = pipeline_type("QwenImage21Pipeline").from_pretrained(copied)
    pipe.set_progress_bar_config(disable=True)
    pipe("a", num_inference_steps=7, height=64, width=64, output_type="latent")
    assert pipe.num_timesteps == 3
    with pytest.raises(FewstepError, match=r"sample_sigmas, a grid of 3 steps .*expected null"):
        load_pipeline(str(copied))


def test_older_diffusers_has_no_stand_in_either_and_says_so(monkeypatch, tmp_path):
    version = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda of: "0.40.0" if of == "diffusers" else version(of)
    )
    with pytest.raises(
        FewstepError, match=r"is a QwenImage21Pipeline, .* 0.40.0 is too old; expected 0.41 or newer"
    ):
        write_tiny_pipeline("QwenImage21Pipeline", tmp_path / "t")


# ------------------------------------------------------------------------------------------------ published and exports
def test_the_published_configuration_is_that_of_the_classes_in_diffusers():
    """Sizes of the files in bf16: 14.2, 0.68 and 17.5 GB."""
    with Shapeless():
        teacher = skeleton_teacher("Qwen/Qwen-Image-2.1", dtype="bfloat16")
    pipe = teacher.pipe
    counts = [
        sum(p.numel() for p in part.parameters()) for part in (teacher.net, pipe.vae, pipe.text_encoder)
    ]
    assert counts == [7_115_124_736, 337_740_404, 8_767_123_696]
    assert teacher.latent_shape == (64, 64, 64) and teacher.resolution == 1024
    mu = 0.5 + 0.4 * (4096 - 256) / (8192 - 256)  # a latent is a token
    assert teacher.denoiser.schedule.shift == pytest.approx(math.exp(mu))
    assert teacher.blank(2)["embeds"].shape == (2, 1024, 4096)
    mean, factor = teacher.latent_scale()
    assert mean.shape == factor.shape == (64, 1, 1) and mean[0] == pytest.approx(0.5126)
    assert 1 / factor[-1] == pytest.approx(3.8161)


def test_a_method_may_be_taught_without_guidance(teacher):
    recipe = Recipe(
        output="none",
        teacher=TeacherConfig(path=teacher.source),
        method=DMD2.Config(num_steps=2, guidance_scale=1.0, gan_weight=0.0),
        data=DataConfig(prompts="none"),
        train=TrainConfig(steps=1, device="cpu"),
        roles=dict.fromkeys(("student", "critic"), RoleConfig(rank=2)),
    )
    roles, method = build(recipe, teacher, Process())
    assert set(roles) == {"student", "critic"} and method.config.guidance_scale == 1.0


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_student_comes_back_from_its_export(kind, teachers, tmp_path):
    teacher = load_teacher(teachers(NAME).source, resolution=64)
    role = build_role("student", teacher.net, RoleConfig(kind=kind, rank=4, alpha=2))
    g = torch.Generator().manual_seed(1)
    for weight in role.weights.values():
        weight.data = weight.data + 0.05 * torch.randn(weight.shape, generator=g)
    times = even_times(teacher.denoiser.schedule, 4)
    student = Student(teacher.denoiser.with_net(role.module), times, "fresh")
    own = trainer_sample(student, teacher, PROMPTS)
    about, weights = {"method": "x"}, {"student": role.final_weights()}
    folder = export_student(tmp_path / "e", teacher, student, weights, [role.config], about=about)
    assert verify(folder, own, teacher, PROMPTS, 1e-4, "float32") < 1e-4
    pipe, record = load_exported(folder)
    assert type(pipe).__name__ == "QwenImage21Pipeline" and pipe.config.sample_sigmas is None
    assert record["call"] == {"num_inference_steps": 4, "height": 64, "width": 64}
    card = (folder / "README.md").read_text()
    mu = math.log(teacher.denoiser.schedule.shift)
    assert f"ModelSamplingFlux before it: max_shift and base_shift both {round(mu, 4)}" in card
    if kind == "lora":
        assert "To `models/loras` go `pytorch_lora_weights.safetensors`" in card
