"""The natural call of a stock pipeline is the trained one: the times that its network is given, for every family."""

import inspect
import json
import math
import re
import shutil
from itertools import pairwise

import diffusers
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from zoo import REFERENCES, ZOO

from fewstep.diffusion.schedules import VP, Flow
from fewstep.diffusion.student import Student
from fewstep.diffusion.times import even_times
from fewstep.export import export_student, student_scheduler
from fewstep.export.verify import trainer_sample, verify
from fewstep.methods.dmd2 import DMD2
from fewstep.pictures import read_picture
from fewstep.process import Process
from fewstep.recipe import DataConfig, Recipe, RoleConfig, TeacherConfig, TrainConfig
from fewstep.runs.build import build
from fewstep.teachers.pipelines import takes
from fewstep.training.roles import build_role

FLOWS = {
    "SD 3": 1000.0,
    "SANA": 1.0,
    "FLUX.1-dev": 1.0,
    "FLUX.1-schnell": 1.0,
    "Qwen-Image": 1.0,
    "Qwen-Image-Edit": 1.0,
    "Chroma": 1.0,
    "Lumina 2": -1.0,
    "Krea-2": 1.0,
    "HiDream": 1000.0,
    "Qwen-Image-2.1": 1.0,
    "FLUX.2-dev": 1.0,
    "FLUX.2-klein": 1.0,
    "Z-Image": -1.0,  # from 1 down to 0, and so from 0 up
}  # what the network is given at t = 1
REVERSED = ("ZImageTransformer2DModel", "Lumina2Transformer2DModel")
TABLES = {1: [999], 2: [999, 499], 4: [999, 749, 499, 249], 3: [999, 666, 333]}
ODD = {2: [999, 100], 3: [999, 800, 100]}  # no grid of a stock scheduler
ODD_FLOW = {2: [0.9, 0.5], 3: [0.95, 0.9, 0.1]}


@pytest.fixture
def given(monkeypatch):
    """Times, of the first sample, that the networks of a class are called at, in their own unit; a function of it."""

    def watch(net):
        times, forward = [], type(net).forward
        names = inspect.signature(forward)

        def watched(self, *args, **options):
            given = names.bind(self, *args, **options).arguments
            time = (
                torch.as_tensor(next(given[n] for n in ("timestep", "timesteps", "t") if n in given))
                .flatten()[0]
                .item()
            )
            times.append(time - 1 if type(net).__name__ in REVERSED else time)
            return forward(self, *args, **options)

        monkeypatch.setattr(type(net), "forward", watched)
        return times

    return watch


def exported(teacher, times, noise, folder, kind="lora", **about):
    role = build_role("student", teacher.net, RoleConfig(kind=kind, rank=2))
    student = Student(teacher.denoiser.with_net(role.module), times, noise)
    about = {"method": "x", **about}
    export_student(folder, teacher, student, {"student": role.final_weights()}, [role.config], about=about)


def run_card(folder, monkeypatch, code=None):
    """The snippet of the card, or one like it, where its reader would run it; its names."""
    monkeypatch.chdir(folder)
    shutil.copy(
        REFERENCES / "square.png", folder / "reference.png"
    )  # which an editing student's reader brings
    names = {}
    exec(code or (folder / "README.md").read_text().split("```python\n")[1].split("```")[0], names)
    assert (folder / "image.png").is_file()
    return names


EDMS = ("EDM", "EDM2")
# Handed a grid as Flux is, so that two cases tell.
FLUX2 = ("FLUX.2-dev", "FLUX.2-klein")
HANDED = (
    "Qwen-Image",
    "Qwen-Image-Edit",
    "Z-Image",
    "Krea-2",
    *FLUX2,
    "Chroma",
    "Lumina 2",
    "Qwen-Image-2.1",
)
CALLS = [(n, k, s) for n in ZOO if n not in HANDED for k in (1, 2, 4) for s in ("fresh", "ddim")]
CALLS += [(n, *case) for n in HANDED for case in ((4, "fresh"), (1, "ddim"))]


@pytest.mark.parametrize("name, steps, noise", CALLS)
def test_the_card_and_the_natural_call_give_the_trained_times(
    name, steps, noise, teachers, tmp_path, given, monkeypatch
):
    teacher, table = teachers(name), isinstance(teachers(name).denoiser.schedule, VP)
    times = TABLES[steps] if table else even_times(teacher.denoiser.schedule, steps)
    kind = "lora" if ZOO[name].adapts else "full"
    exported(teacher, times, noise, tmp_path / "e", kind, prompt=ZOO[name].prompts[0] or "x")
    expected = pytest.approx([t * FLOWS.get(name, 1.0) for t in times], rel=1e-5)
    seen = given(teacher.net)
    pipe = run_card(tmp_path / "e", monkeypatch)["pipe"]
    assert seen == expected
    seen.clear()  # nothing but the number of steps, as the README has it
    card = (tmp_path / "e" / "README.md").read_text()
    assert f"`num_inference_steps={steps}` alone" in card
    prompt = {"prompt": "a cat"} if "prompt" in inspect.signature(pipe.__call__).parameters else {}
    prompt = {"class_labels": [7]} if name == "DiT" else {"prompt": "7"} if name in EDMS else prompt
    size = {"max_sequence_length": 60} if name.startswith("PixArt") or name == "SANA" else {}
    size |= (
        {"height": teacher.resolution, "width": teacher.resolution}
        if prompt and takes(pipe, "height")
        else {}
    )
    size |= {"use_resolution_binning": False} if name.startswith("PixArt") or name == "SANA" else {}
    guidance = (
        {"guidance_scale": 0.0 if name == "Krea-2" else 1.0}
        if "guidance_scale" in inspect.signature(pipe.__call__).parameters
        else {}
    )
    prompt |= {"image": read_picture(REFERENCES / "wide.png")} if teacher.edits else {}
    pipe(**prompt, **size, **guidance, num_inference_steps=steps)
    assert seen == expected


OLDER = (
    "SD 2.1, v",
    "SD 3",
    "FLUX.1-dev",
    "FLUX.1-schnell",
    "Qwen-Image-Edit",
    "PixArt-alpha",
    "UNet2D by class",
)


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.long if n in OLDER else ()) for n in ZOO])
def test_a_full_student_is_a_pipeline_of_its_own_whose_card_runs(
    name, teachers, tmp_path, given, monkeypatch
):
    teacher, table = teachers(name), isinstance(teachers(name).denoiser.schedule, VP)
    times = TABLES[2] if table else even_times(teacher.denoiser.schedule, 2)
    exported(teacher, times, "ddim", tmp_path / "e", "full", prompt=ZOO[name].prompts[0] or "x")
    seen = given(teacher.net)
    run_card(tmp_path / "e", monkeypatch)
    assert seen == pytest.approx([t * FLOWS.get(name, 1.0) for t in times], rel=1e-5)
    assert (tmp_path / "e" / "pipeline" / "model_index.json").is_file()


@pytest.mark.parametrize("steps", [2, 3])
@pytest.mark.parametrize(
    "name",
    ["SD 1.5", "SDXL", *(n for n in FLOWS if n not in HANDED or n in ("Qwen-Image", "FLUX.2-klein"))],
)
def test_times_that_no_grid_has_stand_in_the_call_and_the_card_says_so(
    name, steps, teachers, tmp_path, given, monkeypatch
):
    teacher = teachers(name)
    times = (ODD_FLOW if name in FLOWS else ODD)[steps]
    exported(teacher, times, "fresh", tmp_path / "e")
    card, option = (tmp_path / "e" / "README.md").read_text(), "sigmas" if name in FLOWS else "timesteps"
    assert f"has to be told them as `{option}=`" in card and "alone" not in card
    seen = given(teacher.net)
    run_card(tmp_path / "e", monkeypatch)
    assert seen == pytest.approx([t * FLOWS.get(name, 1.0) for t in times], rel=1e-5)


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_a_student_is_called_where_the_published_scheduler_would_call_it(steps, teachers, given, monkeypatch):
    """Whose shift is by the number of steps too, the student's own: with the LoRA loaded nothing has to be set."""
    teacher = teachers("FLUX.2-klein")
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(teacher.source, subfolder="scheduler")
    assert scheduler.config.use_dynamic_shifting
    monkeypatch.setattr(teacher.pipe, "scheduler", scheduler)
    seen, size = given(teacher.net), {"height": teacher.resolution, "width": teacher.resolution}
    teacher.pipe(prompt="a cat", num_inference_steps=steps, guidance_scale=1.0, output_type="latent", **size)
    assert seen == pytest.approx(even_times(teacher.denoiser.schedule, steps), rel=1e-5)


@pytest.mark.parametrize("size", [32, 64])
def test_a_shift_by_resolution_is_that_of_the_trained_one(size, teachers, tmp_path, given):
    """Whatever the size of the image that is asked for later, the trained times are met."""
    from diffusers import FluxPipeline

    from fewstep.teachers import load_teacher

    source = teachers("FLUX.1-dev").source
    teacher = load_teacher(source, resolution=size)
    mu = 0.5 + (1.15 - 0.5) * ((size // 4) ** 2 - 256) / (4096 - 256)
    shift = math.exp(mu)
    assert teacher.denoiser.schedule.shift == pytest.approx(shift)
    times = [shift * u / (1 + (shift - 1) * u) for u in (1.0, 0.75, 0.5, 0.25)]
    exported(teacher, even_times(teacher.denoiser.schedule, 4), "fresh", tmp_path / "e", kind="full")
    pipe = FluxPipeline.from_pretrained(tmp_path / "e" / "pipeline")
    seen = given(teacher.net)
    for asked in (32, 64):
        seen.clear()
        pipe("a cat", num_inference_steps=4, height=asked, width=asked, output_type="latent")
        assert seen == pytest.approx(times, rel=1e-5)


@pytest.mark.parametrize("noise", ["fresh", "ddim"])
@pytest.mark.parametrize("handed", [False, True])
@pytest.mark.parametrize("shift", [0.5, 1.0, 1.58, 3.0, 6.93])
@pytest.mark.parametrize("steps", range(1, 9))
def test_every_even_grid_before_a_shift_is_a_schedulers_own(steps, shift, handed, noise):
    times = even_times(Flow(shift), steps)
    options = {"handed": handed}
    scheduler, call = student_scheduler(FlowMatchEulerDiscreteScheduler(shift=shift), times, noise, **options)
    assert call == {"num_inference_steps": steps, "guidance_scale": 0.0}
    if handed:
        scheduler.set_timesteps(sigmas=[1 - k / steps for k in range(steps)])
    else:
        scheduler.set_timesteps(steps)
    assert scheduler.sigmas.tolist() == pytest.approx([*times, 0.0], abs=1e-6)


@pytest.mark.parametrize("noise", ["fresh", "ddim"])
@pytest.mark.parametrize("name", ["SDXL", "SD 3", "FLUX.1-dev"])
def test_more_steps_than_were_trained_are_where_the_card_says(
    name, noise, teachers, tmp_path, given, monkeypatch
):
    teacher, flow = teachers(name), name in FLOWS
    times = even_times(teacher.denoiser.schedule, 4) if flow else TABLES[4]
    exported(teacher, times, noise, tmp_path / "e")
    card = (tmp_path / "e" / "README.md").read_text()
    said = re.search(r"`num_inference_steps=8` calls it(?: then)? at \[(.*?)\]", card)[1]
    said = [float(t) for t in said.split(", ")]
    assert len(said) == 8 and said[0] == times[0] and all(a > b for a, b in pairwise(said))
    if name == "FLUX.1-dev":  # its teacher's own
        assert said == pytest.approx(even_times(teacher.denoiser.schedule, 8), abs=1e-4)
    pipe = run_card(tmp_path / "e", monkeypatch)["pipe"]
    size = {"height": teacher.resolution, "width": teacher.resolution, "output_type": "latent"}
    if refused := re.search(
        r"refuses, unless it is loaded by `(\w+)\.from_pretrained\(\.\.\., (\w+)=(\d)\)`", card
    ):
        assert name == "SDXL" and noise == "fresh"
        with pytest.raises(ValueError, match="original_steps"):
            pipe("a cat", num_inference_steps=8, guidance_scale=1.0, **size)
        cls, option, value = refused.groups()
        options = {"subfolder": "scheduler", option: int(value)}
        pipe.scheduler = getattr(diffusers, cls).from_pretrained(tmp_path / "e", **options)
    seen = given(teacher.net)
    pipe("a cat", num_inference_steps=8, guidance_scale=1.0, **size)
    assert seen == pytest.approx([t * FLOWS.get(name, 1.0) for t in said], abs=1e-4 * FLOWS.get(name, 1.0))


def test_a_student_of_several_numbers_of_steps_has_the_call_of_each(teachers, tmp_path, given, monkeypatch):
    """One scheduler has them all where it can: a table's, and a flow's whose pipeline hands it an even grid."""
    for name, alone in (("SDXL", True), ("FLUX.1-dev", True), ("SD 3", False)):
        teacher, flow = teachers(name), name in FLOWS
        grids = [even_times(teacher.denoiser.schedule, n) if flow else TABLES[n] for n in (4, 2, 1)]
        role = build_role("student", teacher.net, RoleConfig(rank=2))
        student = Student(teacher.denoiser.with_net(role.module), grids[0], "fresh", also=grids[1:])
        weights = {"student": role.final_weights()}
        export_student(tmp_path / name, teacher, student, weights, [role.config], about={"method": "x"})
        card = (tmp_path / name / "README.md").read_text()
        pipe = run_card(tmp_path / name, monkeypatch)["pipe"]
        calls = re.findall(r"trained for too: `pipe\(\.\.\., (.*?)\)`\.", card)
        assert len(calls) == 2 and all(("sigmas" not in call) == alone for call in calls)
        seen = given(teacher.net)
        for call, times in zip(calls, grids[1:]):
            seen.clear()
            eval(f"pipe('a cat', {call})", {"pipe": pipe})
            assert seen == pytest.approx([t * FLOWS.get(name, 1.0) for t in times], rel=1e-5)


def test_a_flux_student_is_told_the_scale_that_its_teacher_is(teachers, tmp_path):
    """Student and critic begin as the guided model, and the exported call has its scale."""
    teacher, cond = teachers("FLUX.1-dev"), teachers("FLUX.1-dev").encode(["a cat", "a dog"])
    recipe = Recipe(
        output="none",
        teacher=TeacherConfig(path=teacher.source),
        method=DMD2.Config(num_steps=2, guidance_scale=3.5, gan_weight=0.0),
        data=DataConfig(prompts="none"),
        train=TrainConfig(steps=1, device="cpu"),
        roles=dict.fromkeys(("student", "critic"), RoleConfig(rank=2)),
    )
    roles, method = build(recipe, teacher, Process())
    x, t = torch.randn(2, *teacher.latent_shape, generator=torch.Generator().manual_seed(0)), torch.ones(2)
    with torch.no_grad():
        guided = teacher.denoiser.predict(x, t, cond, guidance=3.5)
        assert (guided - teacher.denoiser.predict(x, t, cond)).abs().max() > 1e-4
        for denoiser in (method.student.denoiser, method.critic):
            assert torch.equal(denoiser.predict(x, t, cond), guided)
    weights = {"student": roles["student"].final_weights()}
    about = {"method": "dmd2", "guidance_scale": 3.5, "prompt": "a cat"}
    folder = export_student(
        tmp_path / "e", teacher, method.student, weights, [recipe.role("student")], about=about
    )
    call = json.loads((folder / "fewstep.json").read_text())["call"]
    assert call.items() >= {"num_inference_steps": 2, "guidance_scale": 3.5}.items()
    assert "guidance_scale=3.5" in (folder / "README.md").read_text()
    own = trainer_sample(method.student, teacher, ["a cat"])
    assert verify(folder, own, teacher, ["a cat"], 1e-4, "float32") < 1e-4
