"""A teacher is its base with LoRAs merged: what the stock pipeline is with those adapters active."""

import shutil

import pytest
import torch
from loras import write_lora
from safetensors.torch import load_file, save_file
from zoo import ZOO

from fewstep import recipe as recipes
from fewstep.data.cache import identity
from fewstep.data.pairs import made_by
from fewstep.errors import FewstepError, RecipeError
from fewstep.runs import inputs
from fewstep.runs.checks import check_class
from fewstep.runs.library import load_recipe
from fewstep.teachers import load_pipeline, load_teacher

ATTENTION = ["to_q", "to_v"]
TARGETS = {
    "SDXL": {"unet": ATTENTION, "text_encoder_2": ["q_proj"]},
    "SD 3": {"transformer": ATTENTION, "text_encoder": ["q_proj"]},
    "HiDream": {"transformer": ATTENTION},
    "FLUX.1-dev": {"transformer": ATTENTION, "text_encoder": ["v_proj"]},
}
WEIGHTS = (0.8, -0.5)


@pytest.fixture(scope="module")
def files(tmp_path_factory, teachers):
    """Kind -> two LoRA files of it, the second of the network alone."""
    made = {}

    def get(name):
        if name not in made:
            targets, place = TARGETS[name], tmp_path_factory.mktemp("lora")
            both = [targets, dict([next(iter(targets.items()))])]
            made[name] = [
                str(write_lora(place / str(k), load_pipeline(teachers(name).source), part, seed=k))
                for k, part in enumerate(both)
            ]
        return made[name]

    return get


def config(files, weights=WEIGHTS):
    return [{"path": path, "weight": weight} for path, weight in zip(files, weights)]


def seen(teacher, prompts):
    """What prompts and noise become."""
    cond = teacher.encode(list(prompts)).to(teacher.device)
    noise = torch.randn(len(prompts), *teacher.latent_shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        x0 = teacher.denoiser.x0(
            noise, torch.full((len(prompts),), float(teacher.denoiser.schedule.t_max) / 2), cond
        )
    return torch.cat([value.float().flatten() for value in (*cond.tensors.values(), x0)])


@pytest.mark.parametrize("name", TARGETS)
def test_the_merged_teacher_is_the_stock_pipeline_with_its_adapters_active(teachers, files, name):
    base, kind = teachers(name), ZOO[name]
    merged = load_teacher(base.source, resolution=kind.resolution, loras=config(files(name)))
    assert not any(".lora_" in key for part in merged.pipe.components.values()
                   if isinstance(part, torch.nn.Module) for key in part.state_dict())  # fmt: skip
    pipe = load_pipeline(base.source)
    for k, path in enumerate(files(name)):
        pipe.load_lora_weights(
            path.rpartition("/")[0], weight_name=path.rpartition("/")[2], adapter_name=str(k)
        )
    pipe.set_adapters(["0", "1"], list(WEIGHTS))
    active = type(base)(pipe, base.source, kind.resolution)
    plain, own, theirs = (seen(teacher, kind.prompts) for teacher in (base, merged, active))
    torch.testing.assert_close(own, theirs, rtol=1e-4, atol=1e-4)
    assert (own - plain).abs().max() > 0.05
    condition = sum(v.numel() for v in base.encode(list(kind.prompts)).tensors.values())
    moved = (own - plain)[:condition].abs().max() > 1e-3
    assert moved == (len(TARGETS[name]) > 1)  # the text encoder's part too, where diffusers reads one
    assert merged.origin.record()["teacher_weights"] == {"loras": config(files(name))}


def test_what_depends_on_a_teacher_depends_on_its_loras(sdxl, files, tmp_path):
    loras = config(files("SDXL"))
    merged = load_teacher(sdxl.source, loras=loras)
    halved = load_teacher(sdxl.source, loras=config(files("SDXL"), (0.4, -0.5)))
    teachers = (sdxl, merged, halved)
    assert len({str(identity(teacher)) for teacher in teachers}) == 3
    assert len({str(made_by(teacher, 1.0)) for teacher in teachers}) == 3
    recipe = recipes.override(load_recipe("sdxl_sid_4step"), ["--teacher", sdxl.source])
    found = [inputs.inputs_of(recipe, teacher, ["a"], None) for teacher in teachers]
    assert "teacher.loras" not in found[0]
    assert found[1]["teacher.loras"] != found[2]["teacher.loras"]
    other = shutil.copy(loras[1]["path"], tmp_path / "other.safetensors")
    weights = load_file(other)
    next(iter(weights.values())).view(-1)[1] += 1e-3
    save_file(weights, other)
    changed = load_teacher(sdxl.source, loras=[loras[0], {**loras[1], "path": str(other)}])
    assert inputs.inputs_of(recipe, changed, ["a"], None)["teacher.loras"] != found[1]["teacher.loras"]


# ------------------------------------------------------------------------------------------------------------ refusals
def refused(source, *words, **weights):
    with pytest.raises(FewstepError) as error:
        load_teacher(str(source), **weights)
    message = str(error.value)
    assert message.startswith("teacher.loras: ") and "\n" not in message, message
    assert all(word in message for word in words), message
    return message


def test_a_lora_that_does_not_fit(sdxl, teachers, files, tmp_path):
    refused(sdxl.source, "none of its layers", files("SD 3")[1], loras=config(files("SD 3")[1:]))
    wide = {
        key: value.repeat(1, 2) if ".lora_A." in key else value
        for key, value in load_file(files("SDXL")[1]).items()
    }
    save_file(wide, tmp_path / "wide.safetensors")
    refused(sdxl.source, "does not fit", loras=[{"path": str(tmp_path / "wide.safetensors")}])
    (tmp_path / "broken.safetensors").write_bytes(b"{}")
    refused(sdxl.source, "does not fit", loras=[{"path": str(tmp_path / "broken.safetensors")}])


def test_a_lora_that_cannot_be_had(sdxl, teachers, files, tmp_path):
    plain = load_recipe("sdxl_sid_4step")

    def early(source, *words, path):
        recipe = recipes.override(
            plain,
            ["--teacher", source, "--teacher.pipeline_class=null", f"--teacher.loras=[{{path: '{path}'}}]"],
        )
        with pytest.raises(FewstepError) as error:
            check_class(recipe)
        assert str(error.value) == refused(source, *words, loras=[{"path": str(path)}])

    early(sdxl.source, "does not exist", path=tmp_path / "none.safetensors")
    early(teachers("PixArt-alpha").source, "PixArtAlphaPipeline", path=files("SDXL")[0])
    (tmp_path / "old.bin").write_bytes(b"")
    early(sdxl.source, "can run code", "python -c", path=tmp_path / "old.bin")
    early(sdxl.source, "found none", path=tmp_path)


def test_loras_on_the_command_line(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    plain = load_recipe("sdxl_sid_4step")
    made = recipes.override(plain, ["--teacher.loras=[{path: ~/a.safetensors, weight: 0.8}, {path: b}]"])
    assert recipes.to_dict(made)["teacher"]["loras"] == [
        {"path": str(tmp_path / "a.safetensors"), "weight": 0.8},
        {"path": "b", "weight": 1.0},
    ]
    assert recipes.digest(made) != recipes.digest(plain)
    for text, words in {
        "[{path: a, wieght: 1}]": "teacher.loras.0.wieght: unknown field; did you mean weight",
        "[{path: a, weight: 0}]": "teacher.loras: a: weight: 0.0: expected a number that is not 0",
        "[{weight: 1}]": "teacher.loras.0.path: missing",
        "a.safetensors": "teacher.loras: 'a.safetensors'",
    }.items():
        with pytest.raises(RecipeError, match=words):
            recipes.override(plain, [f"--teacher.loras={text}"])
