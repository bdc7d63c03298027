"""Every teacher: a tiny pipeline of its class against the stock pipeline itself."""

import importlib.metadata
import inspect
import math
import re
import shutil
from copy import copy, deepcopy
from functools import wraps

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu
from zoo import ONE_SIZE, ZOO

from fewstep.cli import main
from fewstep.diffusion.cond import Cond, unconditional
from fewstep.diffusion.discriminator import Discriminator, tap_features
from fewstep.diffusion.few_steps import sample
from fewstep.diffusion.schedules import EDM, VP, Flow
from fewstep.diffusion.solvers import ddim
from fewstep.diffusion.student import Student
from fewstep.diffusion.times import even_times
from fewstep.errors import FewstepError, RecipeError
from fewstep.evaluation.floor import calibrate
from fewstep.evaluation.stock import floor_sampler, write_floor
from fewstep.export import (
    check_exportable,
    export_student,
    load_exported,
    student_scheduler,
    trainer_sample,
    verify,
)
from fewstep.recipe import RoleConfig
from fewstep.teachers import load_teacher, pipeline_class_of, register
from fewstep.teachers.flux import pack, unpack
from fewstep.teachers.generate import call_pipeline, generate
from fewstep.teachers.load import ASSETS, BUILTIN, resolve
from fewstep.teachers.norms import keeping_norm
from fewstep.teachers.pipelines import fix_shift, guided, own_guidance, size_options, takes
from fewstep.teachers.schedulers import FLOOR, for_steps, schedule_of, scheduler_sample
from fewstep.teachers.sd import StableDiffusion
from fewstep.training.roles import build_role, lora_targets

TWO_SHIFTS = ("SD 3", "SANA")
RAGGED = ("Qwen-Image", "Qwen-Image-Edit", "Z-Image", "Krea-2", "Qwen-Image-2.1")
FIXED = ("Chroma", "Lumina 2")  # whose texts have the length of the stock call, under a mask
STACKED = ("FLUX.2-dev", "FLUX.2-klein")  # texts of several layers
NEWER = (*RAGGED, *FIXED, *STACKED)
HANDED = ("FLUX.1-dev", "FLUX.1-schnell", *NEWER)  # whose stock call's grid is not the scheduler's
FLOWS = (*TWO_SHIFTS, *HANDED, "HiDream")
BY_SIZE = {name: math.exp(0.5 + 0.65 * (64 - 256) / (4096 - 256)) for name in HANDED[:2]}
QWENS = dict.fromkeys((*RAGGED[:2], RAGGED[-1]), math.exp(0.5 + 0.4 * (16 - 256) / (8192 - 256)))
SHIFTS = {
    **BY_SIZE,
    **QWENS,
    "Z-Image": 6.0,
    "Lumina 2": 6.0,
    "Krea-2": math.exp(0.5 + 0.65 * (16 - 256) / (6400 - 256)),
    **dict.fromkeys(STACKED, math.exp(compute_empirical_mu(64, 50))),
}
TRANSFORMERS = (*FLOWS, "PixArt-alpha", "PixArt-Sigma", "DiT")
EDMS = ("EDM", "EDM2")
IN_PIXELS = ("DiT", "UNet2D", "UNet2D by class")  # their pipelines give no latents
PROMPTS = list(ZOO["SDXL"].prompts)
SHOWN = (
    "SDXL",
    "FLUX.1-dev",
    "Qwen-Image",
    "Z-Image",
    "Lumina 2",
    "PixArt-alpha",
)  # in another form than a square


def in_every_form(*cases):
    """Cases beginning with a name, of squares, then of other forms where the stock pipeline makes them."""
    cases = [case if isinstance(case, tuple) else (case,) for case in cases]
    found = [(*case, "square") for case in cases]
    for case in (case for case in cases if case[0] not in ONE_SIZE):
        for form in ("wide", "tall"):
            shown = case[0] in SHOWN and (form == "wide" or case[0] == "SDXL")
            found.append(pytest.param(*case, form, marks=() if shown else pytest.mark.long))
    return found


def noise_for(teacher):
    """In the layout of the stock pipeline, which draws the very same where it takes no latents."""
    return teacher.unpack(torch.randn(2, *teacher.stock_shape, generator=torch.Generator().manual_seed(0)))


def stock(teacher, prompts, noise=None, **call):
    """(B, C, h, w) where the steps of an ordinary call end, before anything is decoded or clipped."""
    noise = noise_for(teacher) if noise is None else noise
    if teacher.singly and len(prompts) > 1:
        return torch.cat([stock(teacher, [p], noise[i : i + 1], **call) for i, p in enumerate(prompts)])
    ends, kind = [], type(teacher.pipe.scheduler)
    step = kind.step

    @wraps(step)
    def watched(*args, **kwargs):
        made = step(*args, **kwargs)
        ends.append(made[0])
        return made

    options = {**size_options(teacher.pipe, teacher.resolution), **call}
    if takes(teacher.pipe, "latents"):
        options |= {"latents": teacher.given(noise), "output_type": "latent"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, "step", watched)
        call_pipeline(teacher.pipe, prompts, torch.Generator().manual_seed(0), **options)
    return teacher.unpack(ends[-1][: len(prompts)].float())  # DiT steps both branches of its guidance


@pytest.fixture
def with_scheduler(monkeypatch):
    def put(teacher, scheduler):
        monkeypatch.setattr(teacher.pipe, "scheduler", scheduler)
        return teacher

    return put


@pytest.mark.parametrize("name", ZOO)
def test_schedule_and_prediction_are_the_schedulers(name, teachers):
    denoiser = teachers(name).denoiser
    if name in FLOWS:  # SANA's DPM-Solver holds a table of alphas too, which means nothing
        assert isinstance(denoiser.schedule, Flow) and denoiser.prediction == "flow"
        assert (
            denoiser.schedule.shift == pytest.approx(SHIFTS.get(name, 3.0))
            and denoiser.schedule.time_scale == 1000
        )
    elif name in EDMS:
        assert isinstance(denoiser.schedule, EDM) and denoiser.prediction == "x0"
    else:
        assert isinstance(denoiser.schedule, VP)
        assert denoiser.prediction == ("v" if name == "SD 2.1, v" else "eps")


@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize("name, form", in_every_form(*ZOO))
def test_x0_is_the_stock_pipelines_own_prediction(name, form, guidance, teachers, with_scheduler):
    """One Euler or DDIM step from the noisiest time to zero is the x0 prediction."""
    teacher, prompts = teachers(name, form), ZOO[name].prompts
    t, cond = torch.full((2,), teacher.denoiser.schedule.t_max), teacher.encode(prompts)
    if guidance != 1 and not ZOO[name].guided:
        with pytest.raises(FewstepError, match="no null condition"):
            teacher.denoiser.x0(noise_for(teacher), t, cond, guidance=guidance)
        with pytest.raises(FewstepError, match="has no guidance"):
            stock(teacher, prompts, guidance_scale=guidance)
        return
    scale = {"guidance_scale": guidance}
    if name == "FLUX.1-schnell":  # whose other scale has no effect
        scale = {"true_cfg_scale": guidance, "negative_prompt": [""] * 2}
    with_scheduler(teacher, floor_sampler("ddim", teacher.pipe, teacher.pipe.scheduler, 1)[0])
    expected = stock(teacher, prompts, num_inference_steps=1, **scale)
    with torch.no_grad():
        x = teacher.denoiser.schedule.begin(noise_for(teacher), t)
        own = teacher.denoiser.x0(x, t, cond, guidance=guidance)
    assert (own - expected).abs().max() < 1e-4 * expected.abs().max()
    if guidance == 1.0:
        with torch.no_grad():
            guided = teacher.denoiser.x0(x, t, cond, guidance=5.0) if ZOO[name].guided else own + 1
        assert (own - guided).abs().max() > 1e-3 * expected.abs().max()  # or the scale would prove nothing


# A pipeline's own scheduler, where it is deterministic and walks its own grid in our sampler too.
OWN = ("SD 1.5", "SD 2.1, v", "SDXL", "SANA", "PixArt-alpha", "PixArt-Sigma", "DiT", "HiDream")
RUNS = [(n, s) for n in ZOO for s in FLOOR if s in ("ddim", "dpm++") or n in TWO_SHIFTS]
RUNS = [(n, s) for n, s in RUNS if n not in (*NEWER, "HiDream") or s == "ddim"] + [(n, "own") for n in OWN]
RUNS += [("HiDream", "euler"), ("HiDream", "unipc")]


@pytest.mark.parametrize("name, solver, form", in_every_form(*RUNS))
def test_our_sampler_reproduces_stock_sampling_with_the_same_scheduler(
    name, solver, form, teachers, with_scheduler
):
    teacher, prompts = teachers(name, form), ZOO[name].prompts
    noise, before, cond = noise_for(teacher), teacher.pipe.scheduler, teacher.encode(prompts)
    scheduler, call = deepcopy(before), {"num_inference_steps": 3}
    if solver != "own":
        scheduler, call = floor_sampler(solver, teacher.pipe, before, 3)
    guidance = 2.0 if ZOO[name].guided and name != "FLUX.1-schnell" else 1.0
    own = scheduler_sample(teacher.denoiser, deepcopy(scheduler), noise, cond, 3, guidance=guidance)
    if (name in HANDED and solver == "ddim") or "sigmas" in call:
        own = ddim(teacher.denoiser, noise, cond, 3, guidance=guidance)
    expected = stock(with_scheduler(teacher, scheduler), prompts, guidance_scale=guidance, **call)
    torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-4 * max(1.0, expected.abs().max().item()))
    if (
        solver == "euler"
    ):  # the floor's Euler is our own first-order solver: no step is wasted at the clean end
        ours = ddim(teacher.denoiser, noise, cond, 3, guidance=guidance)
        torch.testing.assert_close(ours, own, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "kind, form", [("exponential", "square"), ("exponential", "wide"), ("linear", "tall")]
)
def test_the_fixed_shift_is_that_of_the_stock_call(kind, form, teachers, with_scheduler):
    """Flux's own scheduler gets it anew in each call, from the number of tokens."""
    teacher, options = teachers("FLUX.1-dev", form), {"use_dynamic_shifting": True, "time_shift_type": kind}
    with_scheduler(teacher, FlowMatchEulerDiscreteScheduler(**options))
    expected = stock(teacher, PROMPTS, num_inference_steps=3, guidance_scale=2.0)
    fix_shift(teacher.pipe, teacher.resolution)
    schedule, view = schedule_of(teacher.pipe.scheduler), copy(teacher.denoiser)
    assert schedule.shift != 1.0
    view.schedule = schedule
    own = ddim(view, noise_for(teacher), teacher.encode(PROMPTS), 3, guidance=2.0)
    torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "name, solver",
    [
        *(("FLUX.1-dev", "heun"), ("HiDream", "heun"), ("HiDream", "dpm++")),
        *((n, s) for n in RAGGED for s in ("heun", "unipc")),
    ],
)
def test_a_solver_that_takes_no_grid_is_refused(name, solver, teachers):
    pipe = teachers(name).pipe
    with pytest.raises(FewstepError, match=rf"solver {re.escape(solver)}: .* takes no sigmas and no shift"):
        floor_sampler(solver, pipe, pipe.scheduler, 3)


@pytest.mark.parametrize("name, form", in_every_form(*NEWER))
def test_every_step_of_a_guided_stock_call_is_ours(name, form, teachers, with_scheduler, tmp_path):
    """With the scheduler of its files: its prediction at each step, and where our own steps with it end."""
    teacher, prompts, seen, grid = teachers(name, form), ZOO[name].prompts, [], np.linspace(1, 1 / 4, 4)
    kind = type(teacher.pipe.scheduler)
    published = kind.from_pretrained(teacher.source, subfolder="scheduler")
    step, cond, x = kind.step, teacher.encode(prompts), noise_for(teacher)
    with_scheduler(teacher, published)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, "step", lambda self, *a, **k: seen.append(a) or step(self, *a, **k))
        expected = stock(teacher, prompts, num_inference_steps=4, guidance_scale=4.0)
    if teacher.singly:  # a call for each row
        seen = [(torch.cat([o, p]), t, torch.cat([x, y])) for (o, t, x), (p, _, y) in zip(seen[:4], seen[4:])]
    fix_shift(teacher.pipe, teacher.resolution)
    scheduler, moved = for_steps(teacher.pipe.scheduler, 4), 0.0
    scheduler.set_timesteps(sigmas=grid)
    assert len(seen) == 4 and scheduler.timesteps.tolist() == pytest.approx([float(t) for _, t, _ in seen])
    for (theirs, t, held), time in zip(seen, scheduler.timesteps):
        given = (teacher.unpack(held), torch.full((2,), float(t) / 1000), cond)
        with torch.no_grad():
            ours = teacher.denoiser.predict(*given, guidance=4.0)
            moved = max(moved, (ours - teacher.denoiser.predict(*given)).abs().max().item())
        torch.testing.assert_close(ours, teacher.unpack(theirs), rtol=1e-4, atol=1e-5)
        with torch.no_grad():
            own = teacher.denoiser.predict(x, given[1], cond, guidance=torch.tensor([4.0, 4.0]))
        x = scheduler.step(own, time, x, return_dict=False)[0]
    torch.testing.assert_close(x, expected, rtol=1e-4, atol=1e-4)
    assert moved > 1e-2


@pytest.mark.parametrize(
    "name, told, own",
    [
        (
            "Qwen-Image",
            {"true_cfg_scale": 3.0, "negative_prompt": [" ", " "]},
            4.0,
        ),  # blank, as its card has it
        ("Qwen-Image-2.1", {"true_cfg_scale": 3.0, "negative_prompt": [" ", " "]}, 1.0),
        ("Z-Image", {"guidance_scale": 2.0}, 6.0),
        ("Chroma", {"guidance_scale": 3.0}, 5.0),
        ("Lumina 2", {"guidance_scale": 3.0}, 4.0),
        ("HiDream", {"guidance_scale": 3.0}, 5.0),
    ],
)
def test_a_stock_call_is_told_guidance_in_its_own_words(name, told, own, teachers):
    pipe = teachers(name).pipe
    assert guided(pipe, 3.0, 2) == told and own_guidance(pipe) == own


def test_norms_are_kept_above_guidance_1_alone_and_sample_by_sample():
    """At 1 and below the stock pipelines do not guide, and nothing is rescaled."""
    u, c = torch.randn(2, 3, 5, 8, generator=torch.Generator().manual_seed(0))
    scales = torch.tensor([0.5, 1.0, 4.0])
    plain = u + scales[:, None, None] * (c - u)
    together = keeping_norm(u, c, scales)
    torch.testing.assert_close(together[:2], plain[:2])
    torch.testing.assert_close(together[2].norm(dim=-1), c[2].norm(dim=-1))
    assert torch.nn.functional.cosine_similarity(together[2], plain[2], dim=-1).min() > 1 - 1e-5
    for i, scale in enumerate(scales.tolist()):
        torch.testing.assert_close(keeping_norm(u[i], c[i], scale), together[i])


@pytest.mark.parametrize("name", RAGGED)
def test_a_text_is_read_as_it_is_alone_whatever_the_padding(name, teachers):
    """Garbage in the padding changes nothing; without the mask, or with another, everything changes."""
    teacher = teachers(name)
    cond = teacher.encode(ZOO[name].prompts)
    x, t = noise_for(teacher), torch.full((2,), 0.5)
    embeds, read = cond["embeds"], cond["mask"].bool()
    dirty = torch.where(read.view(*read.shape, *[1] * (embeds.ndim - 2)), embeds, 7.0)
    shorter, ends = cond["mask"].clone(), cond["lengths"].clone()
    shorter[0, int(ends[0]) - 1] = 0
    ends[0] -= 1
    with torch.no_grad():
        both = teacher.denoiser.predict(x, t, cond)
        alone = teacher.denoiser.predict(x[:1], t[:1], teacher.encode(ZOO[name].prompts[:1]))
        same = teacher.denoiser.predict(x, t, Cond({**cond.tensors, "embeds": dirty}))
        other = teacher.denoiser.predict(x, t, Cond({**cond.tensors, "mask": shorter, "lengths": ends}))
    torch.testing.assert_close(both[:1], alone, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(both, same, rtol=1e-4, atol=1e-5)
    assert (both - other)[0].abs().max() > 1e-4


def test_padding_is_masked_and_masks_are_as_in_the_stock_call(teachers):
    """Lumina sees none of it; Chroma all of it, with less weight, which its stock call does too."""
    for name, seen in (("Lumina 2", False), ("Chroma", True)):
        teacher = teachers(name)
        cond, x, t = teacher.encode(PROMPTS), noise_for(teacher), torch.full((2,), 0.5)
        assert cond["mask"].shape == cond["embeds"].shape[:2] == (2, 512 if seen else 256)
        dirty = torch.where(cond["mask"].bool()[..., None], cond["embeds"], 7.0)
        with torch.no_grad():
            plain = teacher.denoiser.predict(x, t, cond)
            other = teacher.denoiser.predict(x, t, Cond({**cond.tensors, "embeds": dirty}))
        assert ((plain - other).abs().max() > 1e-4) == seen
    ones = teachers("Chroma").encode(["a"])["mask"].sum()
    assert ones == len(teachers("Chroma").pipe.tokenizer("a")["input_ids"]) + 1  # the first of the padding


def test_the_null_of_lumina_has_no_system_prompt(teachers):
    lumina, chroma = teachers("Lumina 2"), teachers("Chroma")
    assert lumina.denoiser.null["mask"].sum() < 5 < 100 < lumina.encode(["a"])["mask"].sum()
    torch.testing.assert_close(chroma.denoiser.null["embeds"], chroma.encode([""])["embeds"])


def test_luminas_shift_by_size_is_that_of_its_stock_call(teachers, with_scheduler):
    """Which takes the number of channels, 4, for that of tokens, 16."""
    teacher = load_teacher(teachers("Lumina 2").source, resolution=64)
    with_scheduler(teacher, FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True))
    expected = stock(teacher, PROMPTS, num_inference_steps=3, guidance_scale=2.0)
    fix_shift(teacher.pipe, teacher.resolution)
    view = copy(teacher.denoiser)
    view.schedule = schedule_of(teacher.pipe.scheduler)
    assert view.schedule.shift == pytest.approx(math.exp(0.5 + 0.65 * (4 - 256) / (4096 - 256)))
    own = ddim(view, noise_for(teacher), teacher.encode(PROMPTS), 3, guidance=2.0)
    torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [*TWO_SHIFTS, "FLUX.1-dev", "HiDream"])
def test_a_stock_flow_pipeline_walks_exactly_the_sigmas_of_the_searched_floor(
    name, teachers, with_scheduler, tmp_path
):
    teacher = teachers(name)
    noise, before = noise_for(teacher), teacher.pipe.scheduler
    record = calibrate(teacher, PROMPTS, [3], guidance=2.0, num=2, reference_steps=6)
    write_floor(tmp_path, before, record)
    scheduler, call = floor_sampler(str(tmp_path), teacher.pipe, before, 3)
    entry = record["schedules"]["3"]
    sigmas = entry["times"]
    assert entry["order"] == 1 and call == {"sigmas": sigmas} and sigmas[0] == 1.0
    assert set(entry["error"]) == {"even", "searched", "power"}
    made = stock(with_scheduler(teacher, scheduler), PROMPTS, guidance_scale=2.0, **call)
    assert scheduler.sigmas.tolist() == pytest.approx([*sigmas, 0.0])
    own = sample(teacher.denoiser, noise, teacher.encode(PROMPTS), sigmas, order=1, guidance=2.0)[2]
    torch.testing.assert_close(made, own, rtol=1e-4, atol=1e-4)
    with pytest.raises(FewstepError, match=r"--solver dpm\+\+: no stock scheduler"):
        calibrate(teacher, PROMPTS, [3], guidance=2.0, solver="dpm++")
    with pytest.raises(
        FewstepError, match=f"--families karras,ays: a {ZOO[name].pipeline_class} has none of these"
    ):
        calibrate(teacher, PROMPTS, [3], guidance=2.0, families=["karras", "ays"])
    with pytest.raises(FewstepError, match=r"--free-u: a \w+ has no skip connections"):
        calibrate(teacher, PROMPTS, [3], guidance=2.0, freed=True)
    with pytest.raises(FewstepError, match=f"no table for {ZOO[name].pipeline_class}"):
        floor_sampler("ays", teacher.pipe, before, 4)


@pytest.mark.parametrize("name", ["DiT", "UNet2D"])
def test_a_pipeline_that_takes_no_times_has_no_searched_floor(name, teachers, tmp_path, capsys):
    assert (
        main(
            ["floor", teachers(name).source, "--steps", "2", "--device", "cpu", "--out", str(tmp_path / "f")]
        )
        == 2
    )
    said = capsys.readouterr().err
    assert f"the stock call of a {ZOO[name].pipeline_class} takes no times of our own" in said
    assert not (tmp_path / "f").exists()


@pytest.mark.parametrize("name", [name for name in ZOO if ZOO[name].guided])
def test_padding_of_the_prompt_changes_nothing(name, teachers):
    """Conditions are cut to the tokenizer's limit; the stock call pads further and masks."""
    teacher = teachers(name)
    cond, null = teacher.encode(ZOO[name].prompts), teacher.denoiser.null
    if teacher.edits:  # whose rows bring their own
        null = unconditional(null, cond, 2)
        cond = Cond({k: v for k, v in cond.tensors.items() if not k.startswith("null_")})
    assert len(cond) == 2 and len(null) == 1 + teacher.edits
    assert {k: v.shape[1:] for k, v in cond.tensors.items()} == {
        k: v.shape[1:] for k, v in null.tensors.items()
    }
    if "mask" not in cond.tensors or name in FIXED or teacher.singly:  # which cuts nothing
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
    teacher = teachers("SANA")
    default = inspect.signature(type(teacher.pipe).__call__).parameters["complex_human_instruction"].default
    _, _, embeds, mask = teacher.pipe.encode_prompt(["a"], True, complex_human_instruction=default)
    torch.testing.assert_close(teacher.denoiser.null["embeds"], embeds)
    assert torch.equal(teacher.denoiser.null["mask"], mask)


def test_labels_are_numbers_or_the_pipelines_names(teachers, monkeypatch):
    dit, unet = teachers("DiT"), teachers("UNet2D by class")
    monkeypatch.setattr(dit.pipe, "labels", {"goldfish": 1})
    assert dit.encode(["goldfish", "999"])["label"].tolist() == [1, 999] and dit.null()["label"].tolist() == [
        1000
    ]
    for teacher, label, last in ((dit, "1000", 999), (dit, "cat", 999), (unet, "10", 9), (unet, "-1", 9)):
        with pytest.raises(FewstepError, match=f"class label '{label}': expected a number from 0 to {last}"):
            teacher.encode([label])
    assert teachers("UNet2D").encode(["anything"]).tensors == {}


def test_packing_is_the_stock_pipelines(teachers):
    latents, pipe = noise_for(teachers("FLUX.1-dev")), teachers("FLUX.1-dev").pipe
    for one in (pipe, teachers("Qwen-Image").pipe):
        assert torch.equal(pack(latents), one._pack_latents(latents, 2, 4, 16, 16))
    assert torch.equal(unpack(pack(latents), 16, 16), latents)


@pytest.mark.parametrize("name", ONE_SIZE)
def test_a_size_that_the_stock_pipeline_cannot_make_is_refused(name, teachers):
    side = teachers(name).shape.height
    for size in (4 * side, [side, 4 * side], [4 * side, side]):
        said = re.escape(f"teacher.resolution: {size}: a ")
        with pytest.raises(
            FewstepError, match=rf"{said}\w+ makes images of {side} pixels only; leave it null"
        ):
            load_teacher(teachers(name).source, resolution=size)


def test_an_image_that_packs_into_no_tokens_is_refused(teachers):
    for size in (34, [32, 34], [34, 32]):
        said = re.escape(f"teacher.resolution: {size}: expected a multiple of 4")
        with pytest.raises(FewstepError, match=said):
            load_teacher(teachers("FLUX.1-dev").source, resolution=size)


@pytest.mark.parametrize("name, form", in_every_form(*ZOO))
def test_images_go_to_scaled_latents_and_back(name, form, teachers):
    teacher = teachers(name, form)
    shape, g = (2, *teacher.shape, 3), torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, shape, generator=g, dtype=torch.uint8)
    images[0, 0, 0] = torch.tensor([0, 128, 255])
    latents = teacher.latents(images, torch.Generator().manual_seed(0))
    assert latents.shape == (2, *teacher.latent_shape)
    if teacher.autoencoder is None:
        assert (
            latents.min() == -1 and latents.max() == 1 and (teacher.decode(latents) == images.numpy()).all()
        )
        return
    vae, factor = teacher.pipe.vae, teacher.pipe.vae.config.get("scaling_factor", 1.0)
    shift = vae.config.get("shift_factor") or 0.0
    pixels = images.permute(0, 3, 1, 2) / 127.5 - 1
    films = teacher.films
    if teacher.alpha:  # opaque
        pixels = torch.cat([pixels, torch.ones_like(pixels[:, :1])], 1)
    if films:  # a VAE of films, whose published statistics are the only scale
        pixels, latents = pixels[:, :, None], latents[:, :, None]
        shift = torch.tensor([-0.7571, 0.1075, 1.5508, 0.2503])[:, None, None, None]
        factor = 1 / torch.tensor([2.8184, 1.2196, 0.5, 1.916])[:, None, None, None]
    with torch.no_grad():
        code = vae.encode(pixels)
        raw = (
            code.latent
            if hasattr(code, "latent")
            else code.latent_dist.sample(torch.Generator().manual_seed(0))
        )
        if name == "EDM2":  # its published statistics, seen at half of unit spread
            shift = torch.tensor([5.81, 3.25, 0.12, -2.15])[:, None, None]
            factor = 0.5 / torch.tensor([4.17, 4.62, 3.71, 3.28])[:, None, None]
        if name in STACKED:  # whose scale is of four latents side by side, and stands among the VAE's weights
            raw, bn = teacher.pipe._patchify_latents(raw), vae.bn
            shift, factor = (
                bn.running_mean[:, None, None],
                1 / (bn.running_var + bn.eps).sqrt()[:, None, None],
            )
        torch.testing.assert_close(latents, (raw - shift) * factor)
        raw = latents / factor + shift
        raw = teacher.pipe._unpatchify_latents(raw) if name in STACKED else raw
        decoded = vae.decode(raw, return_dict=False)[0]
    if films:
        decoded, latents = decoded[:, :, 0], latents[:, :, 0]
    if teacher.alpha:  # over white
        cover = decoded[:, 3:] / 2 + 0.5
        assert cover.std() > 0.01
        decoded = decoded[:, :3] * cover + 1 - cover
    assert teacher.decode(latents).shape == shape
    expected = ((decoded / 2 + 0.5).clamp(0, 1) * 255).round().permute(0, 2, 3, 1)
    assert (torch.tensor(teacher.decode(latents)).float() - expected).abs().max() <= 1


# ------------------------------------------------------------------------------------------------------ roles, taps
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_lora_adapts_attention_and_feed_forward_of_every_block(name, teachers):
    net = teachers(name).net
    role = build_role("student", net, RoleConfig(rank=2))
    layers = set(lora_targets(net, role.config.targets))
    for index in range(2):
        block = "layers" if name in ("Z-Image", "Lumina 2") else "transformer_blocks"
        block = "double_stream_blocks" if name == "HiDream" else block
        inside = {n.split(f"{block}.{index}.")[1] for n in layers if f"{block}.{index}." in n}
        forward = ("ff.", "feed_forward.", "img_mlp.", "block.ff_i.shared")
        assert any(n.endswith("to_q") for n in inside) and any(n.startswith(forward) for n in inside)
    assert not [n for n in layers if "proj_out" in n or "embed" in n]  # narrower than a usual rank


def test_train_mode_drops_no_labels(teachers):
    """Checkpointing needs train mode, in which DiT would swap every tenth label for the null one."""
    teacher = load_teacher(teachers("DiT").source)
    x, label = torch.randn(1, *teacher.latent_shape).expand(64, -1, -1, -1), teacher.encode(["3"]).expand(64)
    teacher.net.train()
    with torch.no_grad():
        made = teacher.denoiser.predict(x, torch.full((64,), 500.0), label)
    torch.testing.assert_close(made, made[:1].expand_as(made), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in ZOO if ZOO[name].adapts])
def test_shells_and_checkpointing_give_the_plain_gradient(name, teachers):
    x, gradients = noise_for(teachers(name)), []
    for checkpointing in (False, True):
        teacher = load_teacher(teachers(name).source, resolution=ZOO[name].resolution)
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
        denoiser.x0(x, t, teacher.encode(ZOO[name].prompts)).square().mean().backward()
        gradients.append({n: w.grad for n, w in role.weights.items()})
        assert all(p.grad is None for p in teacher.net.parameters())
    silent = [n for n, g in gradients[0].items() if g is None]
    if name in QWENS and name != RAGGED[-1]:  # of its last block's text nothing is made
        assert silent and all(re.search(r"blocks\.1\..*(add_q|to_add_out|txt_mlp)", n) for n in silent)
    else:
        assert not silent
    for name_, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name_], gradient, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ZOO)
def test_heads_on_blocks_pass_gradient_to_the_image(name, teachers):
    teacher, taps = teachers(name), ZOO[name].taps
    judge = Discriminator(teacher.denoiser, taps, teacher.latent_shape)
    x = noise_for(teacher).requires_grad_()
    t = torch.full((2,), 0.5 * teacher.denoiser.schedule.t_max)
    logits = judge.logits(teacher.denoiser, x, t, teacher.encode(ZOO[name].prompts))
    side = {"SANA": 1, "HiDream": 16, RAGGED[-1]: 1, **dict.fromkeys(STACKED, 1)}.get(name, 2)
    tokens = (teacher.latent_shape[1] // side) ** 2
    assert logits.shape == (2, len(taps) * tokens if name in TRANSFORMERS else 1)
    logits.sum().backward()
    assert x.grad.abs().sum() > 0


@pytest.mark.parametrize(
    "name, tap",
    [
        *(("FLUX.1-dev", "single_transformer_blocks.0"), ("Chroma", "single_transformer_blocks.0")),
        *((n, ZOO[n].taps[-1]) for n in ("Qwen-Image-Edit", "Z-Image", "Lumina 2", "FLUX.2-klein", "Krea-2")),
        ("HiDream", "single_stream_blocks.1"),
    ],
)
def test_heads_read_of_all_tokens_those_that_become_the_image(name, tap, teachers):
    """What follows the last block works on each token by itself, and on the image's alone."""
    teacher = teachers(name)
    given = noise_for(teacher), torch.full((2,), 0.5), teacher.encode(ZOO[name].prompts)
    held = []

    def hold(_module, _inputs, output):
        tokens = (output[1] if isinstance(output, tuple) else output).detach().requires_grad_()
        held.append(tokens)
        return (output[0], tokens) if isinstance(output, tuple) else tokens

    handle = teacher.net.get_submodule(tap).register_forward_hook(hold)
    try:
        teacher.denoiser.predict(*given).square().sum().backward()
    finally:
        handle.remove()
    tokens, shown = held[0], held[0].grad.abs().sum(-1) > 0
    (features,) = tap_features(teacher.denoiser, [tap], *given)
    assert not shown.all() or name == "FLUX.1-dev"  # whose block gives them apart
    assert torch.equal(features, tokens[shown].view(features.shape))


# ---------------------------------------------------------------------------------------------------------- export
def student_of(teacher, times, noise="fresh", kind="lora"):
    role = build_role("student", teacher.net, RoleConfig(kind=kind, rank=4, alpha=2))
    g = torch.Generator().manual_seed(1)
    for weight in role.weights.values():
        weight.data = weight.data + 0.05 * torch.randn(weight.shape, generator=g)
    return role, Student(teacher.denoiser.with_net(role.module), times, noise)


FEW = (
    (1, "fresh"),
    (4, "fresh"),
    (2, "ddim"),
    (2, "fixed"),
)  # every number and every noise, not their product
STUDENTS = [
    pytest.param(n, k, s, marks=() if (k, s) in FEW else pytest.mark.long)
    for n in (*TWO_SHIFTS, "FLUX.1-dev")
    for k in (1, 2, 4)
    for s in ("fresh", "ddim", "fixed")
]
STUDENTS += [
    (n, *case) for n in (*NEWER, "HiDream") if n != "FLUX.2-dev" for case in ((4, "fresh"), (2, "ddim"))
]
STUDENTS += [
    pytest.param(n, 2, "fixed", marks=() if n in ("Qwen-Image", "FLUX.2-klein") else pytest.mark.long)
    for n in (*NEWER, "HiDream")
    if n != "FLUX.2-dev"
]


@pytest.mark.parametrize("name, steps, noise", STUDENTS)
def test_stock_diffusers_samples_a_flow_student(name, steps, noise, teachers, tmp_path):
    teacher, prompts = teachers(name), list(ZOO[name].prompts)
    times = even_times(teacher.denoiser.schedule, steps)
    role, student = student_of(teacher, times, noise)
    own = trainer_sample(student, teacher, prompts)
    untrained = trainer_sample(Student(teacher.denoiser, times, noise), teacher, prompts)
    assert (own - untrained).abs().max() > 1e-2  # otherwise the comparison would prove nothing
    export_student(
        tmp_path / "e",
        teacher,
        student,
        {"student": role.final_weights()},
        [role.config],
        about={"method": "x"},
    )
    assert (tmp_path / "e" / "pytorch_lora_weights.safetensors").is_file()
    assert verify(tmp_path / "e", own, teacher, prompts, 1e-4, "float32") < 1e-4
    pipe, record = load_exported(tmp_path / "e")
    assert record["timesteps"] == pytest.approx(times)


@pytest.mark.parametrize("noise", ["fresh", "ddim"])
@pytest.mark.parametrize(
    "times, by_number",
    [
        ([1.0], True),
        ([1.0, 0.783], True),  # SANA-Sprint's two steps
        ([1.0, 0.75, 0.5, 0.25], True),
        ([1.0, 0.9, 0.75, 0.5], True),  # even before a shift
        ([1.0, 0.9, 0.5, 0.1], False),
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


@pytest.mark.parametrize("noise", ["fresh", "ddim"])
@pytest.mark.parametrize("name", [name for name in ZOO if name not in FLOWS])
def test_stock_diffusers_samples_a_student_of_a_table(name, noise, teachers, tmp_path):
    """As a LoRA where diffusers has a loader for it, else merged into a pipeline."""
    teacher, prompts = teachers(name), list(ZOO[name].prompts)
    kind = "lora" if ZOO[name].adapts else "full"
    times = [80.0, 2.5] if name in EDMS else [999, 499]
    role, student = student_of(teacher, times, noise, kind)
    own = trainer_sample(student, teacher, prompts)
    export_student(
        tmp_path / "e",
        teacher,
        student,
        {"student": role.final_weights()},
        [role.config],
        about={"method": "x"},
    )
    lora = (tmp_path / "e" / "pytorch_lora_weights.safetensors").is_file()
    assert lora == name.startswith("SD") != (tmp_path / "e" / "pipeline" / "model_index.json").is_file()
    scale = 1.0 if name in IN_PIXELS else own.abs().max().item()
    assert verify(tmp_path / "e", own, teacher, prompts, 1e-4 * scale, "float32") < 1e-4 * scale


@pytest.mark.parametrize("name", ["DiT", "UNet2D", "UNet2D by class", "FLUX.1-dev", "EDM"])
def test_the_model_cards_snippet_runs_as_it_stands(name, teachers, tmp_path, monkeypatch):
    teacher, prompts = teachers(name), list(ZOO[name].prompts)
    times = [1.0, 0.5] if name in FLOWS else [80.0, 2.5] if name in EDMS else [999, 499]
    role, student = student_of(teacher, times)
    about = {"method": "x", "prompt": prompts[0]}
    export_student(
        tmp_path / "e", teacher, student, {"student": role.final_weights()}, [role.config], about=about
    )
    monkeypatch.chdir(tmp_path / "e")
    code = (tmp_path / "e" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    exec(compile(code, "README.md", "exec"), {})
    assert (tmp_path / "e" / "image.png").is_file()


@pytest.mark.parametrize("name", ["DiT", "UNet2D"])
def test_what_a_pipeline_cannot_be_told_is_refused_before_training(name, teachers):
    teacher = teachers(name)
    role, student = student_of(teacher, [999, 700])
    with pytest.raises(RecipeError, match=r"makes steps on an even grid only \(its call has no timesteps\)"):
        check_exportable(student, [role.config], teacher)
    role, student = student_of(teacher, [999, 499], "fixed")
    with pytest.raises(RecipeError, match=r"method.noise: fixed: .* has no callback"):
        check_exportable(student, [role.config], teacher)


def test_the_names_of_dits_classes_are_exported(teachers, tmp_path, monkeypatch):
    teacher = teachers("DiT")
    monkeypatch.setattr(teacher.pipe, "labels", {"goldfish": 1, "Carassius auratus": 1, "tench": 0})
    role, student = student_of(teacher, [999])
    weights = {"student": role.final_weights()}
    export_student(tmp_path / "e", teacher, student, weights, [role.config], about={"method": "x"})
    assert load_exported(tmp_path / "e")[0].get_label_ids(["Carassius auratus", "tench"]) == [1, 0]


@pytest.mark.parametrize("name", [*TWO_SHIFTS, "FLUX.1-dev", *NEWER, "HiDream", *IN_PIXELS, "EDM"])
def test_a_sample_is_the_same_in_any_batch(name, teachers, tmp_path):
    """Some pipelines keep their generator from the scheduler; fresh noise would depend on the batch."""
    teacher, prompts = teachers(name), list(ZOO[name].prompts)
    times = [1.0, 0.5] if name in FLOWS else [80.0, 2.5] if name in EDMS else [999, 499]
    role, student = student_of(teacher, times)
    export_student(
        tmp_path / "e",
        teacher,
        student,
        {"student": role.final_weights()},
        [role.config],
        about={"method": "x"},
    )
    pipe, record = load_exported(tmp_path / "e")
    both = generate(pipe, prompts, record["call"], quiet=True)[0]
    single = generate(pipe, prompts, record["call"], batch_size=1, quiet=True)[0]
    assert abs(both.astype(int) - single.astype(int)).max() <= 1
    assert (both[0] != both[1]).any()


def test_a_shift_that_depends_on_the_size_is_refused():
    with pytest.raises(FewstepError, match="use_dynamic_shifting"):
        schedule_of(FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True))
    assert isinstance(schedule_of(DDIMScheduler()), VP)


@pytest.mark.parametrize(
    "name, library, old",
    [
        ("Qwen-Image", "diffusers", "0.34.0"),
        ("Qwen-Image-2.1", "diffusers", "0.40.0"),
        ("Z-Image", "transformers", "4.50.3"),
        ("Chroma", "diffusers", "0.33.1"),
        ("Lumina 2", "diffusers", "0.32.2"),
        ("HiDream", "diffusers", "0.33.1"),
    ],
)
def test_a_library_without_the_class_is_refused_by_version(name, library, old, teachers, monkeypatch):
    source, version = teachers(name).source, importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda of: old if of == library else version(of))
    with pytest.raises(
        FewstepError, match=rf"is a {ZOO[name].pipeline_class}, .* {old} is too old; .*-U {library}"
    ):
        load_teacher(source)


def test_modular_pipelines_and_networks_of_two_are_refused_by_name_with_the_reason(tmp_path):
    """As FLUX.3 and Ideogram 4 are published."""
    modular, second = tmp_path / "flux3", tmp_path / "ideogram"
    modular.mkdir()
    second.mkdir()
    (modular / "modular_model_index.json").write_text('{"_class_name": "Flux3ModularPipeline"}')
    (second / "model_index.json").write_text('{"_class_name": "Ideogram4Pipeline"}')
    for folder, why in (
        (
            modular,
            r"is a modular pipeline \(Flux3ModularPipeline\): .* no one stock call .* with model_index\.json",
        ),
        (second, r"is an Ideogram4Pipeline, which is no teacher: .* a second network"),
    ):
        for ask in (pipeline_class_of, load_teacher):
            with pytest.raises(FewstepError, match=f"^teacher.path: {folder} {why}") as said:
                ask(str(folder))
            assert "\n" not in str(said.value)


def test_a_class_without_an_adapter_says_what_to_do_and_takes_one_of_your_own(
    teachers, tmp_path, monkeypatch
):
    index = tmp_path / "model_index.json"
    index.write_text('{"_class_name": "KandinskyPipeline"}')
    with pytest.raises(
        FewstepError, match=r"is a KandinskyPipeline; .* from_pipe, .* @fewstep.teachers.register"
    ):
        pipeline_class_of(str(tmp_path))
    monkeypatch.setattr("fewstep.teachers.load.REGISTERED", {})

    @register
    class Mine(StableDiffusion):
        pipeline_class = "StableDiffusionPipeline"

    assert isinstance(load_teacher(teachers("SD 1.5").source), Mine)


# ------------------------------------------------------------------------------------------------------------ built in
def test_a_teacher_that_a_wheel_leaves_out_is_refused_and_then_found_in_a_checkout(tmp_path, monkeypatch):
    monkeypatch.setitem(BUILTIN, "builtin:emoji-ar", tmp_path / "assets" / "emoji-ar")
    monkeypatch.delenv("FEWSTEP_TEACHERS", raising=False)
    with pytest.raises(
        FewstepError, match=rf"^teacher.path: builtin:emoji-ar is not in {tmp_path}/assets; .*-e"
    ):
        resolve("builtin:emoji-ar")
    monkeypatch.setenv("FEWSTEP_TEACHERS", str(tmp_path / "nowhere"))
    with pytest.raises(FewstepError, match=rf"is not in {tmp_path}/nowhere; .* set FEWSTEP_TEACHERS to"):
        resolve("builtin:emoji-ar")
    monkeypatch.setenv("FEWSTEP_TEACHERS", str(ASSETS))
    assert resolve("builtin:emoji-ar") == str(ASSETS / "emoji-ar")


def test_a_teacher_that_is_installed_is_not_looked_for_elsewhere(tmp_path, monkeypatch):
    monkeypatch.setenv("FEWSTEP_TEACHERS", str(tmp_path))
    shutil.copytree(ASSETS / "emoji-ar", tmp_path / "emoji-ar")
    assert resolve("builtin:emoji-ar") == str(ASSETS / "emoji-ar")
