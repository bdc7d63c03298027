"""A student that switches its adapters leaves a user's own as they are, in every step."""

from contextlib import contextmanager

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from routing import Encoded

from fewstep.diffusion.student import Student
from fewstep.export import export_student, load_exported, stock_call
from fewstep.export.load import use_adapter
from fewstep.methods.router import RoutedStudent, Router
from fewstep.recipe import RoleConfig
from fewstep.training.roles import build_role

STEPS = ["a", "a", "b", "b"]


@pytest.fixture(scope="module")
def switched(sdxl, tmp_path_factory):
    """An export of two experts, of other sizes than 1, and a style to go with it."""
    folder = tmp_path_factory.mktemp("switched")
    roles = [build_role(name, sdxl.net, RoleConfig(rank=2, alpha=4)) for name in "ab"]
    for k, role in enumerate(roles):
        for weight in role.weights.values():
            weight.data += 0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(k))
    nets = {role.name: sdxl.denoiser.with_net(role.module) for role in roles}
    student = Student([nets[name] for name in STEPS], [999, 749, 499, 249], roles=STEPS)
    weights = {role.name: role.final_weights() for role in roles}
    about = {"method": "x", "prompt": "a cat"}
    configs = [role.config for role in roles]
    export_student(folder / "e", sdxl, student, weights, configs, about=about, kohya=True)
    pipe = StableDiffusionXLPipeline.from_pretrained(sdxl.source)
    pipe.unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v"]), "style")
    style = get_peft_model_state_dict(pipe.unet, adapter_name="style")
    style = {name: value + 0.3 for name, value in style.items()}
    StableDiffusionXLPipeline.save_lora_weights(folder / "style", unet_lora_layers=style)
    return folder


@contextmanager
def watched(pipe):
    """(adapters that act, weight of the style) at every call of the network; and its answers."""
    seen, layer = (
        [],
        next(m for m in pipe.unet.modules() if isinstance(m, BaseTunerLayer) and "style" in m.scaling),
    )

    def note(_net, _args, out):
        weight = layer.scaling["style"] / (layer.lora_alpha["style"] / layer.r["style"])
        seen.append((sorted(layer.active_adapters), round(weight, 3)))

    hook = pipe.unet.register_forward_hook(note)
    yield seen
    hook.remove()


def names_of(folder, monkeypatch, more=""):
    """Of the card's program, up to its call, with a line of the user behind the student's adapters."""
    monkeypatch.chdir(folder / "e")
    code = (folder / "e" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    names = {}
    exec(code.replace("\nexperts = ", f"\n{more}\nexperts = "), names)
    return names


def call(pipe, switch):
    g = torch.Generator().manual_seed(0)
    options = {"num_inference_steps": 4, "guidance_scale": 0.0, "height": 32, "width": 32, "generator": g}
    return pipe("a cat", output_type="latent", callback_on_step_end=switch, **options).images


LOAD = "pipe.load_lora_weights('../style', adapter_name='style')"


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_style_acts_in_every_step_of_experts_with_its_weight(when, switched, monkeypatch):
    names = names_of(switched, monkeypatch, LOAD if when == "before" else "")
    pipe = names["pipe"]
    if when == "after":
        exec(LOAD, names)
    pipe.set_adapters(["a", "style"], [1.0, 0.6])
    names["use"](0)
    with watched(pipe) as seen:
        styled = call(pipe, names["switch"])
    assert seen == [([name, "style"], 0.6) for name in STEPS]
    pipe.set_adapters(["a", "style"], [1.0, 0.0])
    plain = call(pipe, names["switch"])
    pipe.delete_adapters("style")
    alone = call(pipe, names["switch"])
    assert torch.equal(plain, alone) and (styled - alone).abs().max() > 1e-2


def test_fewstep_itself_leaves_a_style_alone(switched):
    pipe, record = load_exported(switched / "e")
    pipe.load_lora_weights(switched / "style", adapter_name="style")
    pipe.set_adapters(["a", "style"], [1.0, 0.3])
    options = stock_call(pipe, record, [])
    with watched(pipe) as seen:
        call(pipe, options["callback_on_step_end"])
    assert seen == [([name, "style"], 0.3) for name in STEPS]
    use_adapter(pipe, ["a", "b"], 1)
    assert sorted(pipe.get_active_adapters()) == ["b", "style"]


def test_a_style_stays_beside_the_student_of_a_prompts_part(sdxl, switched, tmp_path, monkeypatch):
    roles = [build_role(name, sdxl.net, RoleConfig(rank=2, alpha=4)) for name in "ab"]
    parts = [Student(sdxl.denoiser.with_net(r.module), [999], roles=[r.name]) for r in roles]
    cond = sdxl.encode(["a cat", "red apple", "blue square", "a dog"])
    router = Router(2)
    router.fit(Encoded(cond))
    folder = tmp_path / "e"
    weights = {role.name: role.final_weights() for role in roles}
    configs = [role.config for role in roles]
    about = {"method": "x", "prompt": "a cat"}
    export_student(folder, sdxl, RoutedStudent(parts, router), weights, configs, about=about)
    monkeypatch.chdir(folder)
    code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    head, found, rest = code.partition("\nothers = ")
    style = f"pipe.load_lora_weights({str(switched / 'style')!r}, adapter_name='style')"
    names = {}
    exec(f"{head}\n{style}\npipe.set_adapters(['part_1', 'style'], [1.0, 0.6]){found}{rest}", names)
    pipe, part = names["pipe"], f"part_{router(sdxl.encode(['a cat'])).item() + 1}"
    assert sorted(pipe.get_active_adapters()) == [part, "style"]
    layer = next(m for m in pipe.unet.modules() if isinstance(m, BaseTunerLayer) and "style" in m.scaling)
    assert layer.scaling["style"] == pytest.approx(0.6)
    loaded, _ = load_exported(folder)
    loaded.load_lora_weights(switched / "style", adapter_name="style")
    loaded.set_adapters(["part_1", "part_2", "style"], [1.0, 1.0, 0.6])
    loaded(["a cat"], num_inference_steps=1, height=32, width=32)
    assert sorted(loaded.get_active_adapters()) == [part, "style"]


def test_files_of_experts_have_names_of_their_own(switched):
    names = {path.name for path in (switched / "e").rglob("kohya/*")}
    assert names == {"student_a.safetensors", "student_b.safetensors"}
