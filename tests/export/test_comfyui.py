"""Files for ComfyUI hold the names that it accepts, for every family, and its settings are those that were trained."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import diffusers
import pytest
import torch
from safetensors.torch import load_file
from zoo import ZOO

from fewstep.cost.skeleton import PUBLISHED
from fewstep.diffusion.schedules import Flow
from fewstep.diffusion.student import Student
from fewstep.diffusion.times import even_times
from fewstep.errors import RecipeError
from fewstep.export import check_exportable, export_student, load_exported, stock_sample
from fewstep.export.comfyui import lines, settings
from fewstep.export.target import Edition
from fewstep.export.weights import kohya_name
from fewstep.export.write import target_of
from fewstep.recipe import RoleConfig
from fewstep.teachers import adapters
from fewstep.training.roles import build_role, lora_targets

GOLDEN = json.loads((Path(__file__).parent / "comfyui_names.json").read_text())
FAMILIES = {  # the published configuration, and what stands in for it
    "sd15": ("stable-diffusion-v1-5--stable-diffusion-v1-5", "unet", "SD 1.5"),
    "sdxl": ("stabilityai--stable-diffusion-xl-base-1.0", "unet", "SDXL"),
    "sd3": ("stabilityai--stable-diffusion-3-medium-diffusers", "transformer", "SD 3"),
    "sd35": ("stabilityai--stable-diffusion-3.5-medium", "transformer", "SD 3"),
    "flux1": ("black-forest-labs--FLUX.1-dev", "transformer", "FLUX.1-dev"),
    "qwen_image": ("Qwen--Qwen-Image", "transformer", "Qwen-Image"),
    "qwen_image21": ("Qwen--Qwen-Image-2.1", "transformer", "Qwen-Image-2.1"),
    "flux2": ("black-forest-labs--FLUX.2-klein-base-4B", "transformer", "FLUX.2-klein"),
    "krea2": ("krea--Krea-2-Raw", "transformer", "Krea-2"),
    "hidream": ("HiDream-ai--HiDream-I1-Full", "transformer", "HiDream"),
    "chroma": ("lodestones--Chroma1-HD", "transformer", "Chroma"),
    "z_image": ("Tongyi-MAI--Z-Image", "transformer", "Z-Image"),
}
# Layers that it has no names for; none is adapted unless a recipe asks for it.
UNREAD = {
    "chroma": ("distilled_guidance_layer",),
    "flux2": ("time_guidance_embed", "double_stream_modulation", "single_stream_modulation"),
}
SAME = {"chroma": "flux1", "sd35": "sd3"}  # of one class there
TITLE = "my run/1"  # no name of a file
SAFE = "my_run_1"


def accepted(family):
    """Every name that ComfyUI reads, each layer's own."""
    for row in GOLDEN["families"][SAME.get(family, family)]:
        for i in range(*row.get("i", [0, 1])):
            yield from (name.replace("{i}", str(i)) for name in row["names"])


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_of_the_published_network_has_a_name_that_is_read(family):
    folder, network, _ = FAMILIES[family]
    index = json.loads((PUBLISHED / folder / "model_index.json").read_text())
    if (cls := getattr(diffusers, index[network][1], None)) is None:
        pytest.skip("an older diffusers")
    with torch.device("meta"):
        net = cls.from_config(cls.load_config(PUBLISHED / folder, subfolder=network))
    names, adapter = set(accepted(family)), adapters()[index["_class_name"]]
    layers = [n for n, m in net.named_modules() if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))]
    assert len(layers) > 100 and set(lora_targets(net, None)) <= set(layers)
    layers = [n for n in layers if not n.startswith(UNREAD.get(family, ()))]
    assert set(lora_targets(net, None)) <= set(layers)
    made = {kohya_name(adapter, layer) for layer in layers}
    assert len(made) == len(layers) and made <= names
    if network == "transformer":  # which reads the file for diffusers as well
        assert {f"transformer.{layer}" for layer in layers} <= names
    else:
        assert not {f"unet.{layer}" for layer in lora_targets(net, ["to_q"])} & names


def student_of(teacher, times, config, noise="fresh"):
    role = build_role("student", teacher.net, config)
    g = torch.Generator().manual_seed(1)
    for weight in role.weights.values():
        weight.data = weight.data + 0.05 * torch.randn(weight.shape, generator=g)
    return role, Student(teacher.denoiser.with_net(role.module), times, noise)


def written(teacher, folder, config, times, kohya=True, noise="fresh"):
    role, student = student_of(teacher, times, config, noise)
    about = {"method": "x", "title": TITLE}
    weights = {"student": role.final_weights()}
    export_student(folder, teacher, student, weights, [role.config], about=about, kohya=kohya)
    return json.loads((folder / "fewstep.json").read_text()), (folder / "README.md").read_text()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_written_file_holds_accepted_names_and_the_same_update(family, teachers, tmp_path):
    teacher = teachers(FAMILIES[family][2])
    times = even_times(teacher.denoiser.schedule, 2)
    record, card = written(teacher, tmp_path / "e", RoleConfig(rank=4, alpha=2), times)
    held = load_file(tmp_path / "e" / "kohya" / f"{SAFE}.safetensors")
    main = load_file(tmp_path / "e" / "pytorch_lora_weights.safetensors")
    assert record["comfyui"]["files"] == {f"kohya/{SAFE}.safetensors": f"{SAFE}.safetensors"}
    assert f"`kohya/{SAFE}.safetensors` as `{SAFE}.safetensors`" in card
    layers = {name.rpartition(".lora_A")[0].partition(".")[2] for name in main if ".lora_A." in name}
    assert len(held) == 3 * len(layers)

    def shape(name):  # whatever the size of the network
        return re.sub(r"\d+", "#", name)

    known = {shape(name) for name in accepted(family)}
    suffixes = {suffix for pair in GOLDEN["suffixes"] for suffix in pair} | {".alpha"}
    for name in held:
        layer, dot, suffix = name.partition(".")
        assert shape(layer) in known and dot + suffix in suffixes
    prefix = teacher.comfyui
    for layer in layers:
        down, up, alpha = (
            held[f"{prefix}{layer.replace('.', '_')}.{end}"]
            for end in ("lora_down.weight", "lora_up.weight", "alpha")
        )
        a, b = (main[f"{teacher.network}.{layer}.lora_{side}.weight"] for side in "AB")
        scale = alpha.item() / len(down)  # ComfyUI's rule
        torch.testing.assert_close(scale * up.flatten(1) @ down.flatten(1), b.flatten(1) @ a.flatten(1))


@pytest.mark.parametrize("name", ["SD 1.5", "SDXL", "FLUX.1-dev"])
def test_stock_diffusers_reads_the_names_of_attention_back(name, teachers, tmp_path):
    """Of Flux attention alone, and nothing of SD 3: its own reader has no rule for more of such names."""
    teacher = teachers(name)
    times = even_times(teacher.denoiser.schedule, 1)
    written(teacher, tmp_path / "e", RoleConfig(rank=4, alpha=2, targets=["to_q", "to_v"]), times)
    pipe, record = load_exported(tmp_path / "e")
    plain = stock_sample(pipe, record, teacher, list(ZOO[name].prompts))
    pipe.unload_lora_weights()
    base = stock_sample(pipe, record, teacher, list(ZOO[name].prompts))
    pipe.load_lora_weights(tmp_path / "e" / "kohya", weight_name=f"{SAFE}.safetensors")
    again = stock_sample(pipe, record, teacher, list(ZOO[name].prompts))
    assert (again - plain).abs().max() < 1e-4 < (base - plain).abs().max()


def test_a_file_that_is_read_as_it_is_needs_no_other(teachers, tmp_path):
    for name, source in (("SD 3", "pytorch_lora_weights"), ("SDXL", f"kohya/{SAFE}")):
        teacher = teachers(name)
        times = even_times(teacher.denoiser.schedule, 2)
        folder = tmp_path / name
        record, card = written(teacher, folder, RoleConfig(rank=2), times, kohya=False)
        assert record["comfyui"]["files"] == {f"{source}.safetensors": f"{SAFE}.safetensors"}
        there = (folder / f"{source}.safetensors").is_file()
        assert there == record["comfyui"]["read"] == ("--kohya" not in card) == (name == "SD 3")


@pytest.mark.parametrize("name", ["SANA", "PixArt-alpha", "DiT", "UNet2D"])
def test_names_for_a_network_that_it_does_not_know_are_refused_by_name(name, teachers):
    teacher = teachers(name)
    student = Student(teacher.denoiser, even_times(teacher.denoiser.schedule, 1))
    check_exportable(student, [RoleConfig(rank=2)], teacher)
    with pytest.raises(
        RecipeError, match=r"export\.kohya: true: .*(SanaPipeline|whole pipeline).*set it false"
    ):
        check_exportable(student, [RoleConfig(rank=2)], teacher, kohya=True)


def test_names_of_an_adapter_are_refused_for_a_whole_student(teachers):
    teacher = teachers("SDXL")
    student = Student(teacher.denoiser, [999])
    check_exportable(student, [RoleConfig(rank=2)], teacher, kohya=True)
    with pytest.raises(RecipeError, match=r"export\.kohya: true: this student leaves as a whole pipeline"):
        check_exportable(student, [RoleConfig(kind="full")], teacher, kohya=True)


# -------------------------------------------------------------------------------------------------------- settings
def simple(table, steps):
    """Its scheduler of that name: entries of a model's rising table of sigmas."""
    return [table[-(1 + int(k * len(table) / steps))] for k in range(steps)]


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize(
    "name", ["SDXL", "SD 3", "HiDream", "FLUX.1-dev", "FLUX.2-klein", "Chroma", "Qwen-Image"]
)
def test_the_settings_call_the_network_where_it_was_trained(name, steps, teachers, tmp_path):
    teacher, flow = teachers(name), name != "SDXL"
    start = None if flow or 1000 % steps == 0 else 998
    times = even_times(teacher.denoiser.schedule, steps, start)
    record, card = written(teacher, tmp_path / "e", RoleConfig(rank=2), times)
    told = record["comfyui"]
    assert (told["sampler"], told["scheduler"], told["steps"], told["cfg"]) == ("lcm", "simple", steps, 1.0)
    assert f"steps {steps}, cfg 1.0, sampler_name `lcm`, scheduler `simple`" in card
    if not flow:
        assert simple(range(1000), steps) == pytest.approx(times, abs=1)
        return
    if name.startswith(("FLUX", "Chroma")):
        mu = float(re.search(r"max_shift and base_shift both (-?[\d.]+)", card)[1])
        shift = torch.tensor(mu).exp().item()
    else:
        node = "AuraFlow" if name == "Qwen-Image" else "SD3"
        shift = float(re.search(rf"ModelSampling{node} before it: shift ([\d.]+)\.", card)[1])
    table = [shift * u / (1 + (shift - 1) * u) for u in (k / 1000 for k in range(1, 1001))]
    assert simple(table, steps) == pytest.approx(times, abs=2e-3)


@pytest.mark.parametrize("times, noise", [([399], "fresh"), ([999, 100], "fresh"), ([999, 499], "fixed")])
def test_what_it_has_no_setting_for_is_said(times, noise, teachers, tmp_path):
    record, card = written(teachers("SDXL"), tmp_path / "e", RoleConfig(rank=2), times, noise=noise)
    assert "sampler" not in record["comfyui"]
    assert "None of its samplers and schedulers calls this student as it was trained." in card


def test_a_straight_student_has_the_straight_sampler(teachers, tmp_path):
    record, _ = written(teachers("SDXL"), tmp_path / "e", RoleConfig(rank=2), [999, 499], noise="ddim")
    assert record["comfyui"]["sampler"] == "euler"


@pytest.mark.parametrize(
    "name, node",
    [
        *((n, "ModelSamplingFlux") for n in ("FluxPipeline", "Krea2Pipeline", "QwenImage21Pipeline")),
        *((n, "ModelSamplingAuraFlow") for n in ("QwenImagePipeline", "ZImagePipeline")),
        *((n, "ModelSamplingSD3") for n in ("StableDiffusion3Pipeline", "HiDreamImagePipeline")),
    ],
)
def test_the_shift_is_told_to_the_node_of_its_family(name, node):
    (told,) = [line for line in lines(record_with(name, 3.0)) if "ModelSampling" in line]
    assert f"{node} before it" in told
    assert ("both 1.0986" in told) if node == "ModelSamplingFlux" else ("shift 3." in told)


def record_with(name, shift):
    told = {
        "files": {"a": "b"},
        "read": True,
        "sampler": "euler",
        "scheduler": "simple",
        "steps": 4,
        "cfg": 1.0,
    }
    return {"pipeline_class": name, "kind": "lora", "comfyui": {**told, "shift": shift}}


PLAIN = Flow(1.0)


class OfSteps(Flow):
    """A flow of another shift at each number of steps."""

    def for_steps(self, steps):
        return Flow(2.0)


def test_samplers_and_times_that_it_has():
    def told(noise="ddim", eta=1.0, schedule=PLAIN, by=PLAIN):
        times = [by.shifted(u) for u in (1.0, 0.75, 0.5, 0.25)]
        student = SimpleNamespace(schedule=schedule, num_steps=4, times=times, noise=noise, eta=eta)
        found = settings(SimpleNamespace(comfyui="x"), student)
        return found.get("sampler"), found.get("shift")

    assert [told(noise)[0] for noise in ("fresh", "ddim", "fixed")] == ["lcm", "euler", None]
    assert [told("tcd", eta)[0] for eta in (0.0, 1.0, 0.3)] == ["euler", "lcm", None]
    assert told(schedule=OfSteps(1.0), by=Flow(2.0))[1] == 2.0 and told(schedule=OfSteps(1.0))[1] == 1.0
    assert told(by=Flow(3.0)) == (None, None)


@pytest.mark.parametrize("name, count", [("Qwen-Image", 1), ("FLUX.2-klein", 0), ("Z-Image", 0)])
def test_whole_networks_that_it_keeps_otherwise_are_no_files_of_its(name, count, teachers):
    teacher, full = teachers(name), RoleConfig(kind="full")
    student = Student(teacher.denoiser, even_times(teacher.denoiser.schedule, 1, 1.0))
    assert len(target_of(teacher, student, [full]).files(Edition({}))) == count


def test_what_is_read_as_it_is_and_what_under_its_own_names(teachers):
    for name, kohya, read in (("SDXL", False, False), ("SDXL", True, True), ("Qwen-Image", False, True)):
        teacher = teachers(name)
        student = Student(
            teacher.denoiser, even_times(teacher.denoiser.schedule, 1, teacher.denoiser.schedule.t_max)
        )
        target = target_of(teacher, student, [RoleConfig(rank=2)])
        assert target.comfyui(Edition({}, kohya=kohya))["comfyui"]["read"] is read
