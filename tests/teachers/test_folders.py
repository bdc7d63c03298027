"""Folders of teachers as people have them: each that cannot be loaded ends in one line, whose advice is good."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from processes import without_fewstep
from safetensors.torch import load_file, save_file

from fewstep import recipe as recipes
from fewstep.cli import main
from fewstep.cli.main import _typed
from fewstep.errors import FewstepError
from fewstep.evaluation.spec import load_spec
from fewstep.files import all_at_home
from fewstep.runs.checks import check_class
from fewstep.runs.library import load_recipe
from fewstep.teachers import load_teacher


@pytest.fixture
def folder(tmp_path, tiny_sdxl):
    return shutil.copytree(tiny_sdxl, tmp_path / "teacher")


@pytest.fixture
def refused(tally):
    """The one line in which a teacher is refused, by its loader and before anything of it is loaded."""

    def check(source, *words):
        tally("inputs tried", 1)
        plain = load_recipe("sdxl_sid_4step")
        with pytest.raises(FewstepError) as error:
            load_teacher(str(source))
        message = str(error.value)
        with pytest.raises(FewstepError) as early:
            check_class(
                recipes.override(plain, ["--teacher", str(source), "--teacher.pipeline_class", "null"])
            )
        assert str(early.value) == message
        assert "\n" not in message and message.startswith("teacher.path: "), message
        assert all(word in message for word in words), message
        tally("refused with a clear error", 1)
        return message

    return check


def follow(message, cwd):
    """Runs the command that a message advises."""
    command = re.search(r'python -c "[^"]+"', message)[0]
    script = cwd / "advised.py"
    script.write_text(shlex.split(command)[-1])
    without_fewstep(script, cwd)
    return cwd / "NEW"


def as_variant(path):
    path.rename(path.with_name(path.name.replace(".safetensors", ".fp16.safetensors")))


def as_bin(path):
    names = {"model": "pytorch_model"}
    torch.save(load_file(path), path.with_name(names.get(path.stem, path.stem) + ".bin"))
    path.unlink()


@pytest.mark.parametrize("parts", ["**", "unet"])
def test_weights_of_a_variant_are_asked_for_by_its_name(folder, refused, tally, parts):
    whole = load_teacher(str(folder)).net.state_dict()
    for path in list(folder.glob(f"{parts}/*.safetensors")):
        as_variant(path)
    refused(folder, "as variant fp16 only; set teacher.variant fp16")
    found = load_teacher(str(folder), variant="fp16")
    assert all(torch.equal(value, whole[name]) for name, value in found.net.state_dict().items())
    assert found.origin.record()["teacher_weights"] == {"variant": "fp16"}
    tally("inputs tried", 1)
    with pytest.raises(FewstepError, match=r"^teacher.variant: bf16: no weights of .* expected fp16$"):
        load_teacher(str(folder), variant="bf16")
    tally("refused with a clear error", 1)


@pytest.mark.parametrize("parts", ["**", "unet"])
def test_pickled_weights_and_the_command_that_mends_them(folder, refused, tmp_path, parts):
    for path in list(folder.glob(f"{parts}/*.safetensors")):
        as_bin(path)
    message = refused(folder, ".bin files")
    if parts == "**":  # diffusers takes one form of file for all parts
        assert load_teacher(str(follow(message, tmp_path))).latent_shape == (4, 16, 16)


def test_a_variant_beside_the_weights_is_taken_where_it_is_named(folder):
    for path in list((folder / "unet").glob("*.safetensors")):
        half = {name: value * 0.5 for name, value in load_file(path).items()}
        save_file(
            half, path.with_name(path.name.replace(".safetensors", ".fp16.safetensors")), {"format": "pt"}
        )
    plain, half = (load_teacher(str(folder), variant=v).net.conv_in.weight for v in (None, "fp16"))
    assert torch.equal(half, plain * 0.5)
    with pytest.raises(FewstepError, match=r"expected fp16 or null$"):
        load_teacher(str(folder), variant="bf16")


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder_2", "tokenizer", "scheduler"])
@pytest.mark.parametrize("empty", [False, True])
def test_a_part_that_is_listed_and_missing(folder, refused, part, empty):
    shutil.rmtree(folder / part)
    if empty:
        (folder / part).mkdir()
    refused(folder, f"lists {part} (", str(folder / part), "put it there")


@pytest.mark.parametrize(
    "name, part, kind",
    [
        ("FLUX.2-dev", "tokenizer", "PixtralProcessor"),
        ("Qwen-Image-Edit", "processor", "Qwen2VLProcessor"),
        ("Qwen-Image-2.1", "processor", "Qwen3VLProcessor"),
    ],
)
def test_published_processors_want_torchvision_and_say_so(
    name, part, kind, teachers, refused, tmp_path, monkeypatch
):
    folder = shutil.copytree(teachers(name).source, tmp_path / "own")
    index = json.loads((folder / "model_index.json").read_text())
    assert index[part][1].endswith("Processor")  # as the published one
    (folder / "model_index.json").write_text(json.dumps({**index, part: ["transformers", kind]}))
    monkeypatch.setattr("transformers.utils.is_torchvision_available", lambda: False)
    refused(folder, f"a {kind}, needs torchvision: pip install torchvision")


def test_the_third_encoder_of_stable_diffusion_3(tmp_path, teachers, refused, capsys):
    folder = shutil.copytree(teachers("SD 3").source, tmp_path / "sd3")
    path = folder / "model_index.json"
    index = json.loads(path.read_text())
    encoder = {"text_encoder_3": ["transformers", "T5EncoderModel"]}
    tokenizer = {"tokenizer_3": ["transformers", "T5TokenizerFast"]}
    image = {"feature_extractor": ["transformers", "CLIPImageProcessor"]}
    path.write_text(json.dumps({**index, **encoder, **tokenizer, **image}))
    for _ in range(2):
        teacher = load_teacher(str(folder))
    assert teacher.encoders == ("text_encoder", "text_encoder_2") and teacher.pipe.tokenizer_3 is None
    said = (
        f"teacher.path: {folder} lists text_encoder_3, tokenizer_3, and has no such folder: it runs without"
    )
    assert capsys.readouterr().err.count(said) == 1
    # A tokenizer alone is missing by mistake.
    (folder / "text_encoder_3").mkdir()
    (folder / "text_encoder_3" / "model.safetensors").write_bytes(b"")
    refused(folder, "lists tokenizer_3 (T5TokenizerFast)", "put it there")


def test_pickled_single_files_and_the_command_that_reads_them_without_code(tmp_path, folder, refused):
    path = tmp_path / "sdxl.ckpt"
    weights = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    torch.save({"state_dict": {**weights, "same": weights["conv_in.bias"]}, "epoch": 3}, path)
    message = refused(path, "pickled", "weights_only=True")
    follow(message, tmp_path)
    found = load_file(tmp_path / "sdxl.safetensors")
    assert found.keys() == {*weights, "same"} and torch.equal(found["same"], weights["conv_in.bias"])
    (tmp_path / "models").mkdir()
    shutil.move(path, tmp_path / "models" / path.name)
    refused(tmp_path / "models", "is a folder of single files", "weights_only=True")


def test_single_files_that_are_no_model(tmp_path, folder, refused):
    path = tmp_path / "unet.safetensors"
    shutil.copy(folder / "unet" / "diffusion_pytorch_model.safetensors", path)
    refused(path, "is no whole model that is known", "give teacher.config")
    save_file({"unet.a.lora_A.weight": torch.ones(1)}, path)
    refused(path, "a LoRA goes to teacher.loras")
    path.write_bytes(b"{")
    refused(path, "is damaged")
    (tmp_path / "models").mkdir()
    shutil.move(path, tmp_path / "models" / path.name)
    refused(
        tmp_path / "models",
        "is a folder of single files",
        f"name the file: {tmp_path / 'models' / path.name}",
    )
    (tmp_path / "flux.gguf").write_bytes(b"GGUF")
    refused(tmp_path / "flux.gguf", "quantised")


def test_a_folder_beside_the_right_one(tmp_path, folder, refused):
    refused(folder / "unet", "no model_index.json", f"there is one in {folder}")
    refused(tmp_path, f"there is one in {folder}")
    export = tmp_path / "export"
    export.mkdir()
    for name in ("fewstep.json", "pytorch_lora_weights.safetensors"):
        (export / name).write_text("{}")
    assert "single file" not in refused(export, "no model_index.json")


@pytest.mark.parametrize(
    "file",
    ["unet/config.json", "unet/diffusion_pytorch_model.safetensors", "scheduler/scheduler_config.json"],
)
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe", None])
def test_damaged_files(folder, tally, file, content):
    path = folder / file
    path.write_bytes(path.read_bytes()[:100] if content is None else content)
    tally("inputs tried", 1)
    with pytest.raises(FewstepError) as error:
        load_teacher(str(folder))
    assert "\n" not in str(error.value) and str(folder) in str(error.value)
    tally("refused with a clear error", 1)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b'{"_class_name": 3}', b"\xff", b'{"unet": ["a"]}']
)
def test_a_damaged_index(folder, tally, content):
    (folder / "model_index.json").write_bytes(content)
    tally("inputs tried", 1)
    with pytest.raises(FewstepError) as error:
        load_teacher(str(folder))
    assert "\n" not in str(error.value)
    tally("refused with a clear error", 1)


# ------------------------------------------------------------------------------------------------------------- at home
PATHS = [
    "teacher.path",
    "data.prompts",
    "data.images",
    "data.pairs",
    "samples.vae",
    "evaluation.prompts",
    "output",
]
PATHS += ["roles.student.start_from", "evaluation.extractor"]


@pytest.mark.parametrize("name", PATHS)
def test_a_shell_is_not_needed_for_a_path_at_home(monkeypatch, tmp_path, name):
    monkeypatch.setenv("HOME", str(tmp_path))
    made = recipes.to_dict(recipes.override(load_recipe("sdxl_sid_4step"), [f"--{name}=~/a/b"]))
    value = made
    for part in name.split("."):
        value = value[part]
    assert value == str(tmp_path / "a" / "b")
    given = recipes.to_dict(recipes.override(load_recipe("sdxl_sid_4step"), [f"--{name}=a~/b"]))
    for part in name.split("."):
        given = given[part]
    assert given == "a~/b"


def test_a_path_at_home_behind_its_kind(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    made = recipes.override(load_recipe("sdxl_hyper_sd"), ["--method.reward=imagereward:~/r"])
    assert made.method.reward == f"imagereward:{tmp_path / 'r'}"


def test_a_teacher_and_options_of_commands_at_home(monkeypatch, tmp_path, folder, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_teacher("~/teacher").latent_shape == (4, 16, 16)
    (tmp_path / "p.txt").write_text("a cat\n")
    words = [
        "--prompts=~/p.txt",
        "--out=~/made",
        "--speed-runs=0",
        "--solver=ddim",
        "--steps=1",
        "--device=cpu",
    ]
    assert main(["eval", "generate", "~/teacher", *words]) == 0
    assert (tmp_path / "made" / "1-step" / "000000.png").is_file() and not Path("~").exists()
    spec = tmp_path / "spec.yaml"
    (tmp_path / "floor").mkdir()
    (tmp_path / "floor" / "floor.json").write_text("{}")
    spec.write_text(
        "prompts: ~/p.txt\nscorers: clip:~/c\nresults: {old: ~/r.json}\n"
        "models: [{name: a, pipeline: ~/teacher, solver: [own, ~/floor]}]\n"
    )
    loaded = load_spec(spec)
    assert loaded.prompts == str(tmp_path / "p.txt") and loaded.models[0].pipeline == str(folder)
    assert loaded.models[0].solver == ("own", str(tmp_path / "floor"))
    assert loaded.scorers == (f"clip:{tmp_path / 'c'}",) and loaded.results == {
        "old": str(tmp_path / "r.json")
    }
    capsys.readouterr()
    assert main(["eval", "scores", "~/made/1-step", "--prompts=~/p.txt", "--scorer=clip:~/c"]) == 2
    assert str(tmp_path / "c") in capsys.readouterr().err


def test_a_command_is_written_down_without_the_home_of_anyone(monkeypatch, tmp_path):
    home = tmp_path / "some one"
    monkeypatch.setenv("HOME", str(home))
    words = [f"{home}/a b", f"--out={home}/x y.json", "--scorer", f"clip:{home}/c", str(home), "~/kept"]
    typed = _typed([*words, f"{home}s/b"])
    assert typed.startswith("fewstep ~/'a b' '--out=~/x y.json' --scorer 'clip:~/c' '~' ~/kept ")
    assert typed.count(str(home)) == typed.count(f"{home}s/b") == 1
    shell = [str(home) + word[1:] if word.startswith("~/") else word for word in shlex.split(typed)]
    given = [word.replace("=~/", f"={home}/") for word in shell[1:]]  # what argparse makes two words of
    assert all_at_home(given) == [*words[:-1], f"{home}/kept", f"{home}s/b"]


def test_a_card_tells_nobody_where_a_teacher_lay(monkeypatch, tmp_path, folder):
    from fewstep.export import model_card
    from fewstep.teachers.base import Teacher

    monkeypatch.chdir(tmp_path)
    for source in ("teacher", "./teacher", str(folder)):
        place = Teacher.place.fget(type("Teacher", (), {"source": source}))
        assert place == str(folder)
    record = {
        "kind": "lora", "num_steps": 1, "call": {"num_inference_steps": 1}, "scheduler": "LCMScheduler", "fewstep": "1",
        "method": "sid", "timesteps": [799], "latent_shape": [4, 8, 8], "pipeline_class": "StableDiffusionXLPipeline",
    }  # fmt: skip
    card = model_card({**record, "teacher": str(folder)})
    assert str(tmp_path) not in card and "base_model" not in card and "student of `teacher`" in card
    card = model_card({**record, "teacher": "stabilityai/sdxl"})
    assert 'base_model: "stabilityai/sdxl"' in card and "from_pretrained('stabilityai/sdxl')" in card


def test_a_folder_has_configurations_of_its_own(folder):
    with pytest.raises(
        FewstepError, match=r"^teacher\.config: other: .* is a folder, with configurations of its own"
    ):
        load_teacher(str(folder), config="other")
    recipe = recipes.override(
        load_recipe("sdxl_dmd2_4step"), ["--teacher", str(folder), "--teacher.config", "other"]
    )
    with pytest.raises(FewstepError, match=r"^teacher\.config: "):
        check_class(recipe)
