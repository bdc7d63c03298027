"""What the evaluation of a run asks of its student, teacher and floor, and of which real images."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from fewstep.data.images import CaptionedImages, load_images
from fewstep.errors import RecipeError
from fewstep.evaluation import of_run
from fewstep.evaluation.gallery import for_terminal, results_table
from fewstep.export.target import describe
from fewstep.recipe import DataConfig, EvalConfig, TeacherConfig

PROMPTS = ["a", "b", "c"]


def recipe_of(column=None, **options):
    return SimpleNamespace(
        evaluation=EvalConfig(**{"num": 5, **options}),
        data=DataConfig("builtin:emoji", "builtin:emoji", column=column),
        teacher=TeacherConfig(path="builtin:nothing"),
    )


def images_of(captions, files, size=8):
    """Each of one grey: the number of its file times ten."""
    greys = np.arange(files, dtype=np.uint8)[:, None, None, None] * 10
    return CaptionedImages(captions, np.broadcast_to(greys, (files, size, size, 3)).copy())


class Copies:
    """A teacher whose latents are the images."""

    resolution, device, autoencoder = 8, "cpu", "vae"

    def latents(self, pixels, _generator):
        return pixels

    def decode(self, latents):
        return latents.numpy()


def test_prompts_come_in_turn_and_from_the_column_that_is_asked_for(tmp_path):
    asked = [line["prompt"] for line in of_run._asked(recipe_of(), PROMPTS, None)]
    assert len(asked) == 5 and sorted(asked[:3]) == PROMPTS and asked[3:] == asked[:2]
    (tmp_path / "p.csv").write_text("text,mine\nx,1\ny,2\nz,3\n")
    table = recipe_of("mine", num=3, prompts=str(tmp_path / "p.csv"))
    assert sorted(line["prompt"] for line in of_run._asked(table, PROMPTS, None)) == ["1", "2", "3"]


def test_named_images_have_a_caption_that_no_other_has():
    """Two captions of each file, as of the emoji: the index is the file's."""
    images = images_of(["one", "many", "two", "three", "many", "four"], 3)
    named = [line for line in of_run._asked(recipe_of(named=9), PROMPTS, images) if "real" in line]
    assert {line["prompt"]: line["real"] for line in named} == {"one": 0, "two": 2, "three": 0, "four": 2}
    alone = images_of(["one", "many", "many"], 3)  # there is nobody to take it for
    assert not any("real" in line for line in of_run._asked(recipe_of(named=9), PROMPTS, alone))


def test_the_search_has_other_noise_than_the_rows_and_no_named_prompt(monkeypatch):
    seen = {}
    monkeypatch.setattr(of_run, "calibrate", lambda *args, **options: seen.update(options, args=args))
    asked = [{"prompt": "a"}, {"prompt": "b", "real": 1}]
    of_run._search(recipe_of(seed=7, floor_steps=[2, 40], num=500, teacher_guidance=3.0), None, asked)
    assert seen["args"][1:] == (["a"], [2, 40]) and seen["seed"] == 8 and seen["guidance"] == 3.0
    assert seen["num"] == 64 and seen["reference_steps"] == 80


def test_images_through_the_vae_are_any_and_then_those_that_are_named(tmp_path):
    images = images_of(list("uvwxyz"), 6)
    asked = [{"prompt": "a"}] * 7 + [{"prompt": "n", "real": i} for i in (4, 2)]
    of_run._reconstruct(Copies(), images, asked, 0, tmp_path)
    greys = [np.asarray(Image.open(tmp_path / f"{i:06d}.png")).max() for i in range(9)]
    assert sorted(greys[:6]) == [0, 10, 20, 30, 40, 50] and greys[6] == greys[0] and greys[7:] == [40, 20]


@pytest.mark.parametrize("size", [8, 16])
def test_real_images_have_the_size_of_the_samples(size):
    images = images_of(PROMPTS, 3, size)
    used, real = of_run.real_images(images, 8, recipe_of().data)
    (batch,) = real.batches(9)
    assert used is images and batch.shape == (3, 8, 8, 3) and batch[2].unique().tolist() == [20]


def pictures(folder, *sizes):
    """Files of these (height, width), each of one grey: its number times ten; None is no picture."""
    for i, size in enumerate(sizes):
        path = folder / f"{i}.png"
        path.with_suffix(".txt").write_text(f"caption {i}")
        path.write_bytes(b"none") if size is None else Image.new("RGB", size[::-1], (10 * i,) * 3).save(path)
    return load_images(str(folder), max_bad=0.5)


def test_what_training_leaves_out_is_not_measured_either_and_names_go_on_naming_their_image(tmp_path):
    images = pictures(tmp_path, (8, 8), None, (8, 9), (4, 9), (9, 9))
    used, real = of_run.real_images(images, 8, recipe_of().data)
    (batch,) = real.batches(9)
    assert batch[:, 0, 0, 0].tolist() == [0, 20, 40] and len(used) == 3
    named = [line for line in of_run._asked(recipe_of(named=9), PROMPTS, used) if "real" in line]
    greys = {line["prompt"]: batch[line["real"]].max().item() for line in named}
    assert greys == {f"caption {i}": 10 * i for i in (0, 2, 4)}
    with pytest.raises(RecipeError, match=r"2 of 5 files cannot be read: .*raise data.max_bad"):
        of_run.real_images(replace(images, max_bad=0.2), 8, recipe_of().data)


def test_a_run_that_is_evaluated_again_replaces_what_an_older_student_drew(tmp_path, monkeypatch):
    seen = {}

    def run_spec(spec, out, **options):
        seen.update(options, spec=spec, out=out)
        return {"rows": []}

    monkeypatch.setattr(of_run, "run_spec", run_spec)
    images = images_of(["one", "two", "three"], 3)
    recipe = recipe_of(named=2, seed=3, teacher_steps=4, teacher_guidance=2.0, floor_steps=[2])
    of_run.evaluate_run(recipe, tmp_path / "run", Copies(), PROMPTS, images)
    spec = seen["spec"]
    assert seen["replace"] is True and seen["out"] == tmp_path / "run" / "eval"
    assert (spec.seed, spec.size, spec.batch_size, spec.title) == (3, 8, 32, "run") and len(spec.real) == 3
    rows = [(m.name, m.kind, m.steps, m.guidance) for m in spec.models if m.pipeline]
    assert rows == [("teacher", "teacher", (4,), (2.0,)), ("floor", "floor", (2,), (2.0,))]
    assert [m.kind for m in spec.models] == ["teacher", "reference", "floor"]  # there is no export
    lines = [json.loads(line) for line in Path(spec.prompts).read_text().splitlines()]
    assert sum("real" in line for line in lines) == 2 and len(lines) == 7
    assert torch.equal(next(iter(spec.real.batches(3))), torch.from_numpy(images.files))


def test_the_card_of_the_export_says_what_was_measured(tmp_path, monkeypatch):
    folder, metrics = tmp_path / "run" / "export", {"KID(x)": {"value": 0.125, "error": 0.01}}
    row = {"name": "student", "kind": "student", "steps": 1, "metrics": metrics}
    monkeypatch.setattr(
        of_run, "run_spec", lambda *a, **k: {"rows": [row], "images": 2, "notes": ["so many"]}
    )
    record = {
        "kind": "full", "num_steps": 1, "call": {}, "fewstep": "1", "method": "dd1", "student": "VAR", "teacher": "t",
        "pipeline_class": "VARPipeline",
    }  # fmt: skip
    describe(folder, record)
    of_run.evaluate_run(recipe_of(), tmp_path / "run", Copies(), PROMPTS, images_of(["one"], 1))
    card = (folder / "README.md").read_text()
    assert "0.125 ± 0.01" in card and "- so many" in card and '"value": 0.125' in card.partition("\n# ")[0]
    for later, told in (({}, True), ({"trained_steps": 7}, False), ({"dtype": "float16"}, False), ({}, True)):
        describe(folder, {**record, **later})  # exported again
        of_run.tell_measured_again(tmp_path / "run")
        assert ((folder / "README.md").read_text() == card) is told
    (tmp_path / "run" / "eval" / "table.json").unlink()
    describe(folder, record)
    of_run.tell_measured_again(tmp_path / "run")
    assert "## Measured" not in (folder / "README.md").read_text()


@pytest.mark.parametrize("name", ["emoji_dmd2_1step", "emoji_ar_dd1_2step"])
def test_the_table_at_the_end_of_a_run_fits_a_terminal(name):
    rows = json.loads((Path(of_run.__file__).parents[2] / "eval" / "results" / f"{name}.json").read_text())[
        "rows"
    ]
    whole = results_table(rows)
    assert max(map(len, whole.splitlines())) > 80
    for most in (80, 100, 1000):
        said = for_terminal(rows, most)
        assert max(map(len, said.splitlines())) <= most
        cells = {cell.strip() for line in whole.splitlines()[2:] for cell in line.split("|")}
        assert all(f"| {cell} " in said for cell in cells if cell)
    assert said.count("\n\n") == 1 and "(" not in said.partition("\n\n")[2].splitlines()[0]
