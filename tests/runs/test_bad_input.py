"""Bad input: exit code 2, one message that names the fault, nothing trained and nothing written."""

import dataclasses
import json
import shutil
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from fewstep import recipe as recipes
from fewstep.cli import main
from fewstep.data.images import load_images
from fewstep.errors import FewstepError
from fewstep.files import Need, check_room
from fewstep.methods.disback import DisBack
from fewstep.methods.dmd import DMD
from fewstep.methods.dmd2 import DMD2
from fewstep.methods.phased_dmd import PhasedDMD
from fewstep.methods.sid import SiD
from fewstep.recipe import DataConfig, Recipe, RoleConfig, SampleConfig, TeacherConfig, TrainConfig
from fewstep.runs import checks, session
from fewstep.runs.checks import check_data
from fewstep.runs.disk import doubt, to_encode
from fewstep.runs.session import run
from fewstep.teachers import load_teacher
from fewstep.training.trainer import Trainer


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for i, colour in enumerate(["red", "green", "blue"]):
        Image.effect_noise((32, 32), 50 + i).convert("RGB").save(folder / f"{colour}.png")
        (folder / f"{colour}.txt").write_text(f"a {colour} square")
    return folder


@pytest.fixture
def recipe(tmp_path, tiny_sdxl, images):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("red apple\nblue bird\n\na dog\n")
    role = RoleConfig(rank=2)
    return Recipe(
        output=str(tmp_path / "run"),
        teacher=TeacherConfig(path=str(tiny_sdxl), pipeline_class="StableDiffusionXLPipeline"),
        method=DMD2.Config(num_steps=1, start=399),
        data=DataConfig(prompts=str(prompts), images=str(images)),
        train=TrainConfig(steps=1, sample_every=0, checkpoint_every=0, device="cpu"),
        roles={"student": role, "critic": role},
        samples=SampleConfig(count=1, teacher_steps=0),
    )


@pytest.fixture
def refused(recipe, capsys, monkeypatch, tmp_path):
    """Asserts that a run is refused with this text, before training, and leaves no trace."""

    def train(self):
        raise AssertionError("training started")

    monkeypatch.setattr(Trainer, "train", train)

    def check(text, *words, recipe=recipe):
        before = sorted(tmp_path.rglob("*"))
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            run(recipe, list(words))
        error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("fewstep: ")]
        assert stop.value.code == 2
        assert len(error) == 1 and text in error[0], error
        assert sorted(tmp_path.rglob("*")) == before
        return error[0]

    return check


def test_the_recipe_itself_is_good(recipe, monkeypatch):
    # Else every refusal below might be for another reason.
    reached = []
    monkeypatch.setattr(Trainer, "train", lambda self: reached.append(self) or exit(99))
    with pytest.raises(SystemExit) as stop:
        run(recipe, [])
    assert stop.value.code == 99 and reached


# ---------------------------------------------------------------------------------------------------------- recipe
@pytest.mark.parametrize(
    "text, words",
    [
        ("train.stpes: unknown field; did you mean steps?", ["--train.stpes", "3"]),
        ("train.steps: 'many'", ["--train.steps", "many"]),
        ("samples.distance: 1 with data.images", ["--samples.distance", "1"]),
        ("train.batch_size: 0", ["--train.batch_size", "0"]),
        ("--train.steps: needs a value", ["--train.steps"]),
    ],
)
def test_unknown_fields_and_wrong_types(refused, text, words):
    refused(text, *words)


def test_the_command_line_refuses_in_the_same_way(recipe, tmp_path, capsys):
    plain = recipes.to_dict(recipe)
    plain["train"]["stpes"] = plain["train"].pop("steps")
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(plain))  # JSON is YAML
    assert main(["train", str(path)]) == 2
    assert "train.stpes: unknown field; did you mean steps?" in capsys.readouterr().err
    assert main(["train", "no_such_recipe"]) == 2
    assert "fewstep recipes" in capsys.readouterr().err
    assert main(["resume", str(tmp_path / "images")]) == 2
    assert "is no run" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "text, words",
    [
        ("start 998 with 4 steps", ["--method.num_steps", "4", "--method.start", "998"]),
        ("[1999]", ["--method.start", "1999"]),
        ("[999, 0]", ["--method.times", "[999, 0]"]),
        ("[249, 499]", ["--method.times", "[249, 499]"]),
        ("method.times", ["--method.times", "[499.5]"]),
        ("with 3 steps", ["--method.num_steps", "3", "--method.start", "null"]),
    ],
)
def test_impossible_timesteps(refused, text, words):
    refused(text, *words)


# ------------------------------------------------------------------------------------------------------------ data
def test_missing_and_empty_prompts(refused, tmp_path):
    refused("data.prompts", "--prompts", str(tmp_path / "nowhere.txt"))
    empty = tmp_path / "empty.txt"
    empty.write_text("\n  \n")
    refused("holds no prompt", "--prompts", str(empty))
    empty.write_bytes(b"\xff\xfe\x00r\x00e\x00d")
    refused("no UTF-8", "--prompts", str(empty))


def test_missing_pairs_are_named_with_a_command_that_exists(refused, recipe):
    """Not with the name of whatever folder the run goes to."""
    for output, name in (("elsewhere", "RECIPE"), ("sd15_dmd_1step", "sd15_dmd_1step")):
        recipe.output = str(Path(recipe.output).parent / output)
        recipe.method = DMD.Config(start=399)
        refused(f"fewstep pairs {name} --out nowhere", "--data.pairs", "nowhere", recipe=recipe)


def test_missing_and_empty_image_folders(refused, tmp_path):
    refused("data.images", "--images", str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    refused("holds no image", "--images", str(tmp_path / "empty"))
    refused("needs real images", "--images", "null")


def test_a_corrupt_image_is_named(refused, images):
    whole = (images / "red.png").read_bytes()
    (images / "red.png").write_bytes(whole[: len(whole) // 2])
    (images / "blue.png").write_text("this is text")
    error = refused("2 of 3 files cannot be read")
    assert "red.png" in error and "blue.png" in error and "green.png" not in error


def test_a_missing_caption_is_named(refused, images):
    (images / "red.txt").unlink()
    refused("red.png")
    rows = [{"file_name": f"{c}.png", "text": c} for c in ("red", "green")]
    (images / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    refused("blue.png")
    (images / "metadata.jsonl").write_text('{"file": "red.png"}')
    refused("metadata.jsonl")


def test_unusual_images_are_read(images):
    Image.new("RGBA", (20, 40), (255, 0, 0, 0)).save(images / "red.png")  # transparent becomes white
    Image.new("I;16", (40, 20), 65535).save(images / "green.png")
    Image.new("P", (16, 16)).save(images / "blue.png")
    found = load_images(str(images))
    assert found.captions == ["a blue square", "a green square", "a red square"]
    pixels = [found.load(i, 8) for i in range(3)]
    assert all(p.shape == (8, 8, 3) for p in pixels)
    assert pixels[1].min() == 255 and pixels[2].min() == 255


# --------------------------------------------------------------------------------------------------------- teacher
def test_images_that_are_passed_over_are_told(recipe, images, capsys):
    check_data(recipe)
    assert "passed over" not in capsys.readouterr().err
    (images / ".ipynb_checkpoints").mkdir()
    some = next(images.glob("*.png"))
    shutil.copy(some, images / ".ipynb_checkpoints" / some.name)
    check_data(recipe)
    told = f"fewstep: note: data.images: {images}: passed over 1 in .ipynb_checkpoints/\n"
    assert told in capsys.readouterr().err


def test_a_teacher_that_is_no_pipeline(refused, tmp_path):
    refused("model_index.json", "--teacher", str(tmp_path))
    refused("does not exist", "--teacher", str(tmp_path / "nowhere"))
    refused("is unknown; built in", "--teacher", "builtin:nothing")
    refused("teacher.path", "--teacher", "nobody/nothing")  # a hub id that cannot be had offline


def test_a_pipeline_of_a_class_without_adapter(refused, tmp_path):
    folder = tmp_path / "other"
    folder.mkdir()
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "KandinskyPipeline"}))
    assert "StableDiffusionXLPipeline" in refused("KandinskyPipeline", "--teacher", str(folder))
    (folder / "model_index.json").write_text("{")
    refused("cannot read the pipeline", "--teacher", str(folder))


def test_a_pipeline_without_its_weights(refused, tmp_path, tiny_sdxl):
    folder = shutil.copytree(tiny_sdxl, tmp_path / "copy")
    next((folder / "unet").glob("*.safetensors")).unlink()
    refused("unet has no weights", "--teacher", str(folder))


@pytest.mark.parametrize("part, file", [("unet", "diffusion_pytorch_model"), ("text_encoder", "model")])
def test_weights_that_the_library_would_make_up(refused, tmp_path, tiny_sdxl, part, file):
    path = shutil.copytree(tiny_sdxl, tmp_path / "copy") / part / f"{file}.safetensors"
    weights = load_file(path)
    name = next(name for name in sorted(weights) if name.endswith("weight"))
    del weights[name]
    save_file(weights, path, metadata={"format": "pt"})
    assert name.rpartition("layers.")[2] in refused(
        "weights are missing", "--teacher", str(tmp_path / "copy")
    )


def test_a_pipeline_of_another_class_than_the_recipe_was_written_for(refused, tiny_sd15):
    refused("was written for a StableDiffusionXLPipeline", "--teacher", str(tiny_sd15))


def test_a_resolution_the_pipeline_cannot_have(refused):
    refused("teacher.resolution: 33", "--teacher.resolution", "33")


def test_a_rank_larger_than_a_layer(refused):
    refused("roles.student.rank: 64 is larger than layer", "--student.rank", "64")


def test_targets_and_taps_that_are_not_there(refused):
    refused("roles.critic.targets", "--critic.targets", "[to_z]")
    refused("method.taps: 'middle'", "--method.taps", "[middle]")


# ------------------------------------------------------------------------------------------------ output and device
def test_the_output_folder_of_another_run(refused, tmp_path, recipe):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "recipe.yaml").write_text("mine")
    assert "fewstep resume" in refused("holds a run already")
    (folder / "recipe.yaml").rename(folder / "thesis.tex")
    refused("is not empty")
    refused("is a file", "--output", str(folder / "thesis.tex"))
    assert (folder / "thesis.tex").read_text() == "mine"
    refused(
        "thesis.tex is a file", recipe=dataclasses.replace(recipe, output=str(folder / "thesis.tex" / "run"))
    )


def test_no_disk_space(refused, monkeypatch):
    small_disk(monkeypatch, 1 << 20)
    refused("0.00 GB free")


def small_disk(monkeypatch, free):
    """A disk with so many bytes free, on which everything is."""
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(100 << 30, 0, free))


@pytest.fixture
def wanted(recipe, monkeypatch, tmp_path):
    """What is to be encoded of a recipe in an empty cache."""
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))

    def of(*words):
        changed = recipes.override(recipe, words)
        teacher = load_teacher(changed.teacher.path, **changed.teacher.options())
        return to_encode(changed, teacher, *check_data(changed))

    return of


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_will_be_encoded_is_known_to_the_byte(wanted, recipe, tmp_path, dtype):
    words = [f"--teacher.dtype={dtype}"]
    needs = wanted(*words)
    assert [need.what for need in needs] == ["prompts", "captions", "images"] and all(n.size for n in needs)
    stores = session.cache(recipes.override(recipe, words))
    written = [
        sum(t.nbytes for f in s.folder.iterdir() for t in load_file(f).values()) for s in stores.values()
    ]
    assert [need.size for need in needs] == written
    assert {need.path for need in needs} == {store.folder for store in stores.values()}
    assert not any(need.size for need in wanted(*words))  # what is there needs no room


def test_caches_that_will_not_fit_are_refused_before_they_are_encoded(refused, wanted, monkeypatch, tmp_path):
    needs, seen = wanted(), []
    monkeypatch.setattr(checks, "check_room", lambda *args: seen.append(args) or check_room(*args))
    small_disk(monkeypatch, 0)
    refused("0.00 GB free")
    assert seen[0][0][1:] == needs
    whole = sum(need.size for need in seen[0][0])
    small_disk(monkeypatch, whole - 1)
    error = refused("GB needed for 2 checkpoints and the export (")
    assert all(f"{need.what} (" in error for need in needs) and "FEWSTEP_CACHE" in error
    assert not (tmp_path / "cache").exists()
    small_disk(monkeypatch, whole)
    check_room(*seen[0])


def test_what_goes_to_another_disk_is_not_added(monkeypatch, tmp_path):
    needs = [Need("a", "output", tmp_path / "a", 6), Need("b", "FEWSTEP_CACHE", Path("/proc/b"), 7)]
    small_disk(monkeypatch, 7)
    check_room(needs, "go")
    small_disk(monkeypatch, 6)
    with pytest.raises(FewstepError, match=r"^FEWSTEP_CACHE: /proc/b: .* needed for b "):
        check_room(needs, "go")


@pytest.mark.parametrize("command", [["cache"], ["pairs", "--num=3", "--out=pairs"]])
def test_commands_that_encode_look_at_the_disk_first(recipe, wanted, monkeypatch, tmp_path, capsys, command):
    path = tmp_path / "recipe.yaml"
    path.write_text(recipes.dump(recipe))
    monkeypatch.chdir(tmp_path)
    small_disk(monkeypatch, 100)
    assert main([command[0], str(path), *command[1:]]) == 2
    assert "0.00 GB free, about" in capsys.readouterr().err
    assert not (tmp_path / "cache").exists() and not (tmp_path / "pairs").exists()


def test_a_plan_says_that_caches_will_not_fit(monkeypatch):
    cache = {"prompts": {"bytes": 5 * 10**9}, "images": {"bytes": None}}
    small_disk(monkeypatch, 5 * 10**9)
    assert doubt(cache) is None
    small_disk(monkeypatch, 5 * 10**9 - 1)
    assert "5.00 GB on disk" in doubt(cache)


def test_features_and_numbers_of_the_log_that_are_not_there(refused):
    measured = ("--evaluation.num", "2", "--evaluation.extractor")
    refused("evaluation.extractor: unknown extractor 'foo': expected effnet-lite0, ", *measured, "foo")
    refused("evaluation.extractor: ", *measured, "clip:/tmp/none")
    refused("evaluation.extractor: ", "--samples.distance", "2", *measured[2:], "effnet-lite0@9")
    refused("train.best: nothing: expected a number of the log, whose names begin", "--train.best", "nothing")
    refused("method.guidance_scale: -3.0", "--method.guidance_scale", "-3")


def test_a_recipe_that_is_nearly_named(capsys):
    assert main(["train", "sdxl_dmd2_4steps"]) == 2
    said = capsys.readouterr().err
    assert "did you mean sdxl_dmd2_4step" in said and "fewstep recipes" in said and len(said) < 300
    assert main(["train", "qqq"]) == 2
    assert "recipe 'qqq' is neither a file nor a recipe. `fewstep recipes`" in capsys.readouterr().err


def test_cuda_where_there_is_none(refused, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: None)
    refused("train.device: cuda: this torch sees no accelerator", "--train.device", "cuda")


def test_a_run_that_ends_before_its_stages_do(refused, recipe):
    roles = recipe.roles | {"node": recipe.roles["critic"]}
    disback = replace(recipe, method=DisBack.Config(nodes=2, record_steps=3, start=399), roles=roles)
    refused("train.steps: 6: disback would end before its phase generator", "--steps", "6", recipe=disback)
    sida = replace(recipe, method=SiD.Config(gan_weight=1e-4, gan_schedule=(8, 20)))
    refused(
        "before its phase generator trains student; expected more steps, e.g. 16", "--steps", "8", recipe=sida
    )
    phased = replace(recipe, method=PhasedDMD.Config(start=799))
    refused("before its phase generator_1 trains student_1; expected more steps, e.g. 2", recipe=phased)
