"""A student of a single file with LoRAs merged into it: its run, its export, and what it is measured against."""

import argparse
import json
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from loras import write_lora
from originals import sd_checkpoint
from PIL import Image
from safetensors.torch import load_file, save_file

from fewstep import recipe as recipes
from fewstep.cli import main
from fewstep.cli.commands import weights_of
from fewstep.errors import RecipeError
from fewstep.evaluation import of_spec
from fewstep.evaluation.models import open_model
from fewstep.evaluation.of_run import _entries
from fewstep.export import load_exported, stock_sample
from fewstep.process import Process
from fewstep.runs.checks import check_data
from fewstep.runs.library import load_recipe
from fewstep.runs.session import Session, execute
from fewstep.teachers import load_teacher
from fewstep.teachers.generate import call_pipeline

PROMPTS = ["red apple", "a cat"]


@pytest.fixture(scope="module")
def run(tmp_path_factory, sdxl):
    """A run of one step on SDXL's network and VAE in a file, with text encoders of a folder, and two LoRAs."""
    folder = tmp_path_factory.mktemp("merged")
    save_file(sd_checkpoint(sdxl.pipe, encoder=False), folder / "base.safetensors")
    shutil.copytree(sdxl.source, folder / "config")
    loras = []
    for name, weight, targets in (
        ("style", 0.8, {"unet": ["to_q", "to_v"]}),
        ("words", -0.5, {"unet": ["to_k"], "text_encoder": ["q_proj"]}),
    ):
        pipe = DiffusionPipeline.from_pretrained(sdxl.source)
        file = write_lora(folder / name, pipe, targets).rename(folder / f"{name}.safetensors")
        loras.append({"path": str(file), "weight": weight})
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    words = {
        "output": folder / "run", "teacher": folder / "base.safetensors", "teacher.config": folder / "config",
        "teacher.loras": json.dumps(loras), "teacher.dtype": "float32", "teacher.autocast": "null",
        "teacher.resolution": "null", "prompts": folder / "prompts.txt", "images": "null", "train.steps": 1,
        "train.batch_size": 2, "train.accumulate": 1, "train.sample_every": 0, "train.checkpoint_every": 1,
        "train.device": "cpu", "samples.count": 1, "samples.teacher_steps": 0, "student.rank": 2,
        "critic.rank": 2, "student.lr": 1e-3, "method.critic_steps": 1, "export.dtype": "float32",
    }  # fmt: skip
    execute(
        recipes.override(
            load_recipe("sdxl_sid_4step"), [f"--{name}={value}" for name, value in words.items()]
        )
    )
    return folder


@pytest.fixture(scope="module")
def teacher(run):
    recipe = recipes.load(run / "run" / "recipe.yaml")
    return load_teacher(recipe.teacher.path, **recipe.teacher.options())


def test_the_export_says_on_what_it_stands_and_its_card_loads_it(run, teacher, monkeypatch):
    export = run / "run" / "export"
    pipe, record = load_exported(export)
    loras = [{"path": str(run / "style.safetensors"), "weight": 0.8}]
    loras += [{"path": str(run / "words.safetensors"), "weight": -0.5}]
    made_of = {"config": str(run / "config"), "loras": loras}
    assert record["teacher"] == str(run / "base.safetensors") and record["teacher_weights"] == made_of
    places = json.loads((run / "run" / "inputs.json").read_text())["places"]
    assert places == {"teacher": record["teacher"], "teacher_weights": made_of}
    card = (export / "README.md").read_text()
    assert "`base.safetensors` with `style.safetensors` at 0.8 and `words.safetensors` at -0.5 merged" in card
    assert "`style.safetensors` at strength 0.8" in card and str(run) not in card
    code = card.split("```python\n")[1].split("```")[0]
    assert "fewstep." not in code.replace("fewstep.json", "")
    monkeypatch.chdir(export)
    names: dict = {}
    exec(code, names)
    Path("image.png").unlink()
    own = stock_sample(pipe, record, teacher, PROMPTS)
    torch.testing.assert_close(
        stock_sample(names["pipe"], record, teacher, PROMPTS), own, rtol=1e-4, atol=1e-4
    )
    # With one of another weight it is another student.
    other = [{**loras[0], "weight": 1.0}, loras[1]]
    copy = shutil.copytree(export, run / "copy")
    (copy / "fewstep.json").write_text(json.dumps({**record, "teacher_weights": {**made_of, "loras": other}}))
    assert (stock_sample(load_exported(copy)[0], record, teacher, PROMPTS) - own).abs().max() > 1e-3


def test_a_run_goes_on_with_the_same_loras_only(run, tmp_path):
    folder = shutil.copytree(run, tmp_path / "moved")
    written = folder / "run" / "recipe.yaml"
    written.write_text(written.read_text().replace(str(run), str(folder)))

    def session(*words):
        recipe = recipes.override(recipes.load(written), words)
        return Session(recipe, *check_data(recipe), Process(), begun=True, meant=recipes.named(words))

    session()
    path = folder / "style.safetensors"
    weights = load_file(path)
    next(iter(weights.values())).view(-1)[1] += 1e-3
    save_file(weights, path)
    with pytest.raises(RecipeError) as error:
        session()
    message = str(error.value)
    assert message.startswith("teacher.loras: [") and "\n" not in message
    session(*shlex.split(message.partition("fewstep resume ")[2])[1:])


def _no_ceiling(_folder):
    raise AssertionError("there are no images to put through a VAE")


def test_rows_of_an_evaluation_stand_on_the_same_teacher(run, teacher):
    recipe = recipes.override(
        recipes.load(run / "run" / "recipe.yaml"),
        ["--evaluation.num=2", "--evaluation.floor_steps=[4]", "--evaluation.teacher_steps=2"],
    )
    entries = {entry.name: entry for entry in _entries(recipe, run / "run", teacher, None, [], _no_ceiling)}
    assert entries["teacher"].base == entries["floor"].base == teacher.origin
    own = open_model(entries["teacher"].base)
    assert torch.equal(own.pipe.unet.conv_in.weight, teacher.net.conv_in.weight)
    changed = own.pipe.unet.down_blocks[1].attentions[0].transformer_blocks[0].attn1.to_q.weight
    assert torch.equal(
        changed, teacher.net.down_blocks[1].attentions[0].transformer_blocks[0].attn1.to_q.weight
    )
    assert entries["student"].lora == str(run / "run" / "export")


def test_commands_measure_the_same_teacher(run, teacher, tmp_path, capsys):
    base, config = str(run / "base.safetensors"), str(run / "config")
    loras = [
        "--base-lora",
        f"{run / 'style.safetensors'}=0.8",
        "--base-lora",
        f"{run / 'words.safetensors'}=-0.5",
    ]
    words = ["--prompts", str(run / "prompts.txt"), "--num", "2"]
    made = [
        "eval",
        "generate",
        base,
        "--config",
        config,
        "--steps",
        "2",
        *words,
        "--speed-runs",
        "0",
        "--size",
        "32",
    ]
    assert main([*made, *loras, "--out", str(tmp_path / "one")]) == 0
    assert main([*made, "--out", str(tmp_path / "other")]) == 0
    generator = torch.Generator().manual_seed(0)
    size = {"height": 32, "width": 32}
    (own,) = call_pipeline(
        teacher.pipe, PROMPTS[:1], generator, num_inference_steps=2, output_type="np", **size
    ).images
    one, other = (
        np.asarray(Image.open(tmp_path / name / "2-steps" / "000000.png")) for name in ("one", "other")
    )
    assert np.abs(one - 255 * own).max() < 1 < np.abs(other - 255 * own).max()

    told = ["--teacher", base, "--config", config, *loras, "--student", str(run / "run"), "--steps", "1"]
    seen = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(of_spec, "run_spec", lambda spec, *_, **__: seen.update(spec=spec))
        assert main(["eval", "run", *told, *words, "--out", str(tmp_path / "table")]) == 0
    assert [model.base for model in seen["spec"].models] == [teacher.origin, teacher.origin]

    searched = ["--steps", "2", "--num", "2", "--reference-steps", "4", "--families", "even", "--size", "32"]
    searched += ["--prompts", str(run / "prompts.txt")]
    assert main(["floor", base, "--config", config, *loras, *searched, "--out", str(tmp_path / "floor")]) == 0
    record = json.loads((tmp_path / "floor" / "floor.json").read_text())
    assert record["teacher"] == base and record["teacher_weights"]["loras"][0]["weight"] == 0.8
    capsys.readouterr()
    assert main(["floor", "sdxl_sid_4step", *loras, "--steps", "2", "--out", str(tmp_path / "no")]) == 2
    assert "--base-lora" in (said := capsys.readouterr().err) and "teacher.loras" in said


def test_an_equals_sign_may_be_in_a_name(tmp_path):
    folder = tmp_path / "rank=8"
    folder.mkdir()
    args = argparse.Namespace(variant=None, config=None, base_lora=[str(folder), f"{folder}=0.5"])
    assert weights_of(args)["loras"] == ({"path": str(folder)}, {"path": str(folder), "weight": 0.5})
    args = argparse.Namespace(
        variant=None, config=None, base_lora=["a=b.safetensors", "c.safetensors=-2", "d"]
    )
    assert weights_of(args)["loras"] == (
        {"path": "a=b.safetensors"}, {"path": "c.safetensors", "weight": -2.0}, {"path": "d"},
    )  # fmt: skip
