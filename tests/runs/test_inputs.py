"""A run goes on with what it began with: other content of a file of the same name is noticed, and a move is none."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from fewstep import recipe as recipes
from fewstep.cli import main
from fewstep.data.images import CaptionedImages
from fewstep.errors import RecipeError
from fewstep.files import sketch
from fewstep.methods.dmd import DMD
from fewstep.methods.dmd2 import DMD2
from fewstep.process import Process
from fewstep.recipe import (
    DataConfig,
    EvalConfig,
    Recipe,
    RoleConfig,
    SampleConfig,
    TeacherConfig,
    TrainConfig,
)
from fewstep.runs import inputs
from fewstep.runs.checks import check_data
from fewstep.runs.session import Session, execute, resume
from fewstep.teachers import fingerprint, load_teacher


@pytest.fixture(scope="module")
def begun(tmp_path_factory, tiny_sdxl):
    """A run of two steps with its prompts, images and teacher in its own folder."""
    folder = tmp_path_factory.mktemp("begun")
    shutil.copytree(tiny_sdxl, folder / "teacher")
    (folder / "prompts.txt").write_text("red apple\nblue bird\n")
    (folder / "images").mkdir()
    for name in ("a", "b"):
        Image.effect_noise((32, 32), 60).convert("RGB").save(folder / "images" / f"{name}.png")
        (folder / "images" / f"{name}.txt").write_text(f"the {name}")
    role = RoleConfig(rank=2)
    execute(
        Recipe(
            output=str(folder / "run"),
            teacher=TeacherConfig(path=str(folder / "teacher")),
            method=DMD2.Config(num_steps=1, start=399, taps=["mid_block"]),
            data=DataConfig(prompts=str(folder / "prompts.txt"), images=str(folder / "images")),
            train=TrainConfig(steps=1, sample_every=0, checkpoint_every=1, device="cpu"),
            roles={"student": role, "critic": role},
            samples=SampleConfig(count=1, teacher_steps=0),
        )
    )
    return folder


@pytest.fixture
def place(begun, tmp_path):
    """A copy of it elsewhere: where things lie does not matter."""
    folder = shutil.copytree(begun, tmp_path / "moved")
    recipe = folder / "run" / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace(str(begun), str(folder)))
    return folder


def session(folder, meant=()):
    recipe = recipes.load(folder / "run" / "recipe.yaml")
    return Session(recipe, *check_data(recipe), Process(), begun=True, meant=meant)


def other_prompts(folder):
    (folder / "prompts.txt").write_text("red apple\nblue bard\n")


def other_order(folder):
    (folder / "prompts.txt").write_text("blue bird\nred apple\n")


def other_caption(folder):
    (folder / "images" / "a.txt").write_text("the A")


def other_image(folder):
    path = folder / "images" / "a.png"
    data = bytearray(path.read_bytes())
    Image.effect_noise((32, 32), 61).convert("RGB").save(path)
    assert path.read_bytes() != data


def other_weights(folder, part="unet", name="diffusion_pytorch_model"):
    path = folder / "teacher" / part / f"{name}.safetensors"
    times, weights = path.stat(), load_file(path)
    key = max(weights, key=lambda k: weights[k].numel())
    weights[key] = weights[key] * 1.001
    save_file(weights, path, metadata={"format": "pt"})
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # as a copy that keeps times


def other_vae(folder):
    other_weights(folder, "vae")


def other_encoder(folder):
    other_weights(folder, "text_encoder_2", "model")


def other_scheduler(folder):
    path = folder / "teacher" / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "beta_end": 0.013}))


CHANGES = {
    "data.prompts": [other_prompts, other_order],
    "data.images": [other_caption, other_image],
    "teacher.path": [other_weights, other_vae, other_encoder, other_scheduler],
}


@pytest.mark.parametrize("field, change", [(f, c) for f, cs in CHANGES.items() for c in cs])
def test_another_content_under_the_same_name_is_refused(place, tally, field, change):
    change(place)
    tally("inputs tried", 1)
    with pytest.raises(RecipeError) as error:
        session(place)
    message = str(error.value)
    assert message.startswith(f"{field}: {place}") and "\n" not in message
    assert f"fewstep resume {place / 'run'} --{field} {place}" in message
    tally("refused with a clear error", 1)
    session(place, {field})


def test_what_was_moved_touched_or_written_again_is_the_same(place):
    for path in place.rglob("*"):
        os.utime(path)
    weights = place / "teacher" / "unet" / "diffusion_pytorch_model.safetensors"
    save_file(
        dict(reversed(load_file(weights).items())), weights, metadata={"format": "pt", "by": "another writer"}
    )
    (place / "prompts.txt").write_bytes(b"\xef\xbb\xbfred apple\r\n\r\nblue bird")
    session(place)


def test_the_command_that_a_refusal_names_goes_on_and_is_remembered(place, capsys):
    other_prompts(place)
    assert main(["resume", str(place / "run"), "--train.steps", "2"]) == 2
    error = capsys.readouterr().err
    words = error.split("fewstep resume ")[1].split()
    assert main(["resume", *words, "--train.steps", "2"]) == 0
    resume(place / "run")  # now these are what it goes on with
    shutil.rmtree(place / "run" / "checkpoints")
    other_order(place)
    resume(place / "run")  # which begins again


def test_a_run_from_before_inputs_were_kept_goes_on(place):
    (place / "run" / inputs.FILE).unlink()
    other_prompts(place)
    session(place)
    (place / "run" / inputs.FILE).write_text("{")
    session(place)


def test_commands_that_read_a_run_notice_too(place, capsys):
    other_weights(place)
    assert main(["export", str(place / "run")]) == 2
    assert "teacher.path" in capsys.readouterr().err


def test_pairs_and_files_of_rewards_are_inputs(place, tmp_path, sdxl):
    from fewstep.data.pairs import make_pairs

    recipe = recipes.load(place / "run" / "recipe.yaml")
    recipe.method = DMD.Config()
    pairs = make_pairs(tmp_path / "pairs", sdxl, ["a", "b"], num=4, steps=1)
    recipe.data = DataConfig(prompts=recipe.data.prompts, pairs=str(pairs))
    teacher = load_teacher(recipe.teacher.path)

    def hashed():
        return inputs.inputs_of(recipe, teacher, ["a"], None)

    before = hashed()
    assert hashed() == before and "data.pairs" in before
    tensors = load_file(pairs / "000000000.safetensors")
    save_file({k: v + 1 for k, v in tensors.items()}, pairs / "000000000.safetensors")
    changed = hashed()
    assert [name for name in before if changed[name] != before[name]] == ["data.pairs"]
    weights = tmp_path / "reward" / "model.safetensors"
    weights.parent.mkdir()
    weights.write_bytes(b"one")
    recipe.method = recipes.from_dict(
        {
            **recipes.to_dict(recipe),
            "roles": {},
            "method": {"name": "hyper_sd", "reward": f"imagereward:{tmp_path / 'reward'}"},
        }
    ).method
    rewarded = hashed()["method.reward"]
    weights.write_bytes(b"two")
    assert hashed()["method.reward"] != rewarded


def test_a_sketch_sees_both_ends_the_middle_and_the_length(tmp_path):
    path, data = tmp_path / "f", bytes(200_000)
    path.write_bytes(data)
    first = sketch(path)
    seen = set()
    for place in (0, 105_000, 199_999):
        changed = bytearray(data)
        changed[place] = 1
        path.write_bytes(changed)
        seen.add(sketch(path))
    path.write_bytes(data + b"\0")
    seen.add(sketch(path))
    assert len(seen | {first}) == 5
    path.write_bytes(b"")
    sketch(path)


def test_a_tensor_is_told_by_its_numbers_and_shape():
    tensor = torch.arange(1000.0)
    other = tensor.clone()
    other[::15] += 1
    hashes = [fingerprint._of_tensor(t) for t in (tensor, other, tensor.reshape(10, 100), tensor.bfloat16())]
    assert len(set(hashes)) == 4
    assert fingerprint._of_tensor(tensor.clone()) == hashes[0]


def test_texts_are_told_apart_where_one_ends_and_the_next_begins():
    assert (
        fingerprint.hash_of(["ab", "c"]) != fingerprint.hash_of(["a", "bc"]) != fingerprint.hash_of(["abc"])
    )


def test_images_in_memory_are_told_by_their_pixels_and_captions():
    pixels = np.zeros((2, 4, 4, 3), np.uint8)
    other = pixels.copy()
    other[1, 2, 2, 0] = 1
    sets = [(["a", "b"], pixels), (["a", "b"], other), (["a", "c"], pixels)]
    assert len({inputs._of_images(CaptionedImages(captions, files)) for captions, files in sets}) == 3


def test_prompts_of_the_evaluation_are_an_input_where_it_is_made(place):
    recipe = recipes.load(place / "run" / "recipe.yaml")
    teacher = load_teacher(recipe.teacher.path)

    def hashed(text, num):
        (place / "measured.txt").write_text(text)
        recipe.evaluation = EvalConfig(num=num, prompts=str(place / "measured.txt"))
        return inputs.inputs_of(recipe, teacher, ["a"], None).get("evaluation.prompts")

    assert hashed("a\nb\n", 2) == hashed("a\nb", 4) != hashed("a\nc\n", 2)
    assert hashed("a\nb\n", 0) is None


def test_an_input_that_an_older_release_did_not_keep_is_taken_as_it_is(place):
    kept = json.loads((place / "run" / inputs.FILE).read_text())
    (place / "run" / inputs.FILE).write_text(json.dumps({"teacher.path": kept["teacher.path"]}))
    other_prompts(place)
    session(place)


@pytest.mark.parametrize(
    "option, fields",
    [
        ("data.column", ["data.prompts", "data.images", "evaluation.prompts"]),
        ("data.images", ["data.images"]),
        ("teacher.dtype", ["teacher.path"]),
        ("evaluation.prompts", ["evaluation.prompts"]),
        ("train.steps", []),
    ],
)
def test_who_names_an_option_means_what_it_decides(option, fields):
    known = ("teacher.path", "data.prompts", "data.images", "evaluation.prompts", "method.reward")
    assert [field for field in known if inputs._touches(option, field)] == [f for f in known if f in fields]
