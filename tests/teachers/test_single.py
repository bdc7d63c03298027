"""Whole models in one file, in the layout of their authors: the same teacher as the folder it was made of."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from originals import sd3_checkpoint, sd_checkpoint
from safetensors.torch import load_file, save_file

from fewstep import recipe as recipes
from fewstep.cost.skeleton import skeleton_teacher
from fewstep.data.cache import identity
from fewstep.errors import FewstepError
from fewstep.runs.checks import check_class
from fewstep.runs.library import load_recipe
from fewstep.teachers import load_teacher, pipeline_class_of
from fewstep.teachers.origin import Origin
from fewstep.teachers.single import header, plan_of, publisher, recorded

WRITERS = {
    "SD 1.5": sd_checkpoint,
    "SDXL": lambda pipe: sd_checkpoint(pipe, encoder=False),
    "SD 3": sd3_checkpoint,
}
BORROWED = {
    "SD 1.5": [],
    "SDXL": ["text_encoder", "text_encoder_2"],
    "SD 3": ["text_encoder", "text_encoder_2", "vae"],
}


@pytest.fixture(scope="module")
def files(tmp_path_factory, teachers):
    """Kind -> its file, and the folder of its configurations, with the weights of no more than it borrows."""
    made = {}

    def get(name):
        if name not in made:
            base, place = teachers(name), tmp_path_factory.mktemp("single")
            save_file(WRITERS[name](base.pipe), place / "model.safetensors")
            shutil.copytree(base.source, place / "config")
            for path in (place / "config").rglob("*.safetensors"):
                if path.parent.name not in BORROWED[name]:
                    path.unlink()
            made[name] = (str(place / "model.safetensors"), str(place / "config"))
        return made[name]

    return get


@pytest.mark.parametrize("name", WRITERS)
def test_the_teacher_of_a_file_is_that_of_the_folder(teachers, files, name):
    (file, config), base = files(name), teachers(name)
    found = load_teacher(file, config=config)
    assert type(found) is type(base) and found.resolution == base.resolution
    for part, module in base.pipe.components.items():
        own = getattr(found.pipe, part)
        if isinstance(module, torch.nn.Module):
            state = own.state_dict()
            assert state.keys() == module.state_dict().keys()
            assert all(torch.equal(state[key], value) for key, value in module.state_dict().items()), part
    cond, expected = found.encode(["red apple"]), base.encode(["red apple"])
    assert all(torch.equal(cond[key], value) for key, value in expected.tensors.items())
    record = recorded(found.origin)
    assert record["teacher"] == file and record["teacher_weights"] == {"config": config}
    assert sorted(record.get("teacher_parts", {})) == BORROWED[name]
    assert skeleton_teacher(file, config=config).latent_shape == base.latent_shape


def test_a_file_is_known_by_its_keys_and_configured_from_the_hubs_cache(files, monkeypatch, tmp_path):
    from huggingface_hub import constants

    (file, config), name = files("SD 1.5"), "stable-diffusion-v1-5/stable-diffusion-v1-5"
    assert publisher(header(Path(file)), Path(file)) == name
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    recipe = recipes.override(load_recipe("sd15_sid_1step"), ["--teacher", file])
    for attempt in (check_class, lambda _: load_teacher(file)):
        with pytest.raises(FewstepError) as error:
            attempt(recipe)
        message = str(error.value)
        assert message.startswith("teacher.config: missing: ") and "\n" not in message and name in message
        assert "give teacher.config the folder" in message
    repository = tmp_path / f"models--{name.replace('/', '--')}"
    shutil.copytree(config, repository / "snapshots" / "1")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("1")
    check_class(recipe)
    assert recorded(load_teacher(file).origin)["teacher_weights"] == {"config": name}


@pytest.mark.parametrize(
    "kind, keys, name",
    [
        ("FluxPipeline", ["guidance_in.in_layer.bias"], "black-forest-labs/FLUX.1-dev"),
        ("FluxPipeline", [], "black-forest-labs/FLUX.1-schnell"),
    ],
)
def test_a_file_of_the_network_of_flux_alone(teachers, tmp_path, kind, keys, name):
    """diffusers converts it at its published size only, so that no tiny one can be loaded."""
    made = {"double_blocks.0.img_attn.norm.key_norm.scale": torch.ones(1), "img_in.weight": torch.ones(1, 64)}
    file = tmp_path / "flux.safetensors"
    save_file({**made, **{key: torch.ones(1) for key in keys}}, file)
    assert publisher(header(file), file) == name
    origin = Origin.of(str(file), config=teachers("FLUX.1-dev").source)
    assert pipeline_class_of(origin) == kind
    assert plan_of(origin).borrowed == {
        "text_encoder": "CLIPTextModel",
        "text_encoder_2": "T5EncoderModel",
        "vae": "AutoencoderKL",
    }


def test_what_a_file_and_its_configuration_lack(files, teachers, tmp_path):
    def refused(file, config, *words, **more):
        with pytest.raises(FewstepError) as error:
            load_teacher(str(file), config=str(config), **more)
        message = str(error.value)
        assert "\n" not in message and all(word in message for word in words), message

    file, config = files("SD 1.5")
    refused(file, tmp_path / "none", "teacher.config: ", "does not exist")
    refused(file, config, "teacher.variant: fp16", "set it null", variant="fp16")
    weights = load_file(file)
    lost = next(key for key in weights if "output_blocks" in key)
    save_file({key: value for key, value in weights.items() if key != lost}, tmp_path / "torn.safetensors")
    refused(tmp_path / "torn.safetensors", config, "lacks weights of a StableDiffusionPipeline")
    alone = {key: value for key, value in weights.items() if not key.startswith("first_stage_model.")}
    save_file(alone, tmp_path / "alone.safetensors")
    refused(
        tmp_path / "alone.safetensors", config, "vae (AutoencoderKL) is not in", "has no safetensors files"
    )
    refused(files("SDXL")[0], config, "text_encoder (CLIPTextModel) is not in", "has no safetensors files")
    bare = shutil.copytree(config, tmp_path / "bare")
    shutil.rmtree(bare / "tokenizer")
    refused(file, bare, "tokenizer (CLIPTokenizer)", "put it there")
    refused(file, teachers("SANA").source, "diffusers reads no SanaPipeline from a single file")


def test_a_changed_file_or_configuration_is_another_teacher(files, tmp_path):
    place = Path(shutil.copytree(Path(files("SD 1.5")[0]).parent, tmp_path / "a"))
    file, config = place / "model.safetensors", place / "config"
    before = identity(load_teacher(str(file), config=str(config)))
    index = config / "scheduler" / "scheduler_config.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "beta_end": 0.013}))
    other = identity(load_teacher(str(file), config=str(config)))
    file.write_bytes(file.read_bytes())
    assert (
        len({str(one) for one in (before, other, identity(load_teacher(str(file), config=str(config))))}) == 3
    )
