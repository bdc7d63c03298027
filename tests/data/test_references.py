"""Prompts that edit images: how they are read, what they are told apart by, and what is refused."""

import copy
import csv
import json
import shutil

import pytest
import torch
from PIL import Image
from zoo import EDITS, REFERENCES, ZOO

from fewstep.cli import main
from fewstep.data.cache import encode_prompts, prompts_folder
from fewstep.data.images import load_images
from fewstep.data.pairs import make_pairs
from fewstep.data.prompts import load_prompts
from fewstep.diffusion.cond import Cond, drop_rows, unconditional
from fewstep.errors import FewstepError, RecipeError
from fewstep.evaluation.models import open_model
from fewstep.evaluation.of_run import _asked
from fewstep.evaluation.prompts import read_prompts
from fewstep.evaluation.sampling import Job, sample_folder
from fewstep.files import ReadError
from fewstep.methods.dmd2 import DMD2
from fewstep.recipe import DataConfig, EvalConfig, Recipe, SampleConfig, TeacherConfig, TrainConfig
from fewstep.runs.checks import check_class, check_data
from fewstep.runs.inputs import inputs_of
from fewstep.teachers.generate import call_pipeline
from fewstep.teachers.qwen_image_edit import QwenImageEdit
from fewstep.teachers.references import Edit, check_references

ROWS = [("make it red", ["wide.png", "square.png"]), ("a dog", ["other.png", "red.png"])]


@pytest.fixture
def folder(tmp_path):
    shutil.copytree(REFERENCES, tmp_path / "images")
    return tmp_path / "images"


def table(folder, rows, suffix=".jsonl"):
    path = folder / f"edits{suffix}"
    if suffix == ".jsonl":
        path.write_text(
            "".join(json.dumps({"prompt": text, "reference": files}) + "\n" for text, files in rows)
        )
    elif suffix == ".csv":
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([("prompt", "reference"), *((t, json.dumps(f)) for t, f in rows)])
    else:
        arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")

        columns = {"prompt": [t for t, _ in rows], "reference": [f for _, f in rows]}
        parquet.write_table(arrow.table(columns), path)
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_a_table_gives_instructions_with_their_images_in_order(suffix, folder):
    path = table(folder, ROWS, suffix)
    for read in (load_prompts(str(path)), read_prompts(path).texts):
        assert [str(edit) for edit in read] == ["make it red", "a dog"]
        assert [[p.name for p in edit.references] for edit in read] == [files for _, files in ROWS]
        assert read[0].sizes == ((24, 16), (16, 16)) and "edits" in read[1].place
        assert [image.size for image in read[1].images()] == [(48, 32), (20, 20)]
    one = load_prompts(str(table(folder, [("make it red", "wide.png")])))
    assert one[0].references == (folder / "wide.png",)


def test_captions_of_a_folder_may_edit_too(folder):
    rows = [
        {"file_name": a, "text": "x", "reference": b}
        for a, b in (("wide.png", "red.png"), ("other.png", "square.png"))
    ]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for extra in ("red.png", "square.png"):
        shutil.move(folder / extra, folder.parent / extra)
    for row in rows:
        row["reference"] = "../" + row["reference"]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = load_images(str(folder))
    assert {p.name: c.references[0].name for p, c in zip(found.files, found.captions)} == {
        "wide.png": "red.png",
        "other.png": "square.png",
    }


@pytest.mark.parametrize(
    "rows, said",
    [
        ([("a", "wide.png"), ("b", "none.png")], r"edits.jsonl, line 2: reference none.png is no file"),
        ([("a", "wide.png"), ("b", "text.png")], r"edits.jsonl, line 2: reference text.png cannot be read"),
        ([("a", "wide.png"), ("b", None)], r"edits.jsonl, line 2: reference is null; expected the name"),
        ([("a", "wide.png"), ("b", [])], r"edits.jsonl, line 2: reference is \[\]"),
        ([("a", ["wide.png", 3])], r'edits.jsonl, line 1: reference is \["wide.png", 3\]'),
    ],
)
def test_references_that_are_not_there_are_named_with_their_line(rows, said, folder):
    (folder / "text.png").write_text("no image")
    with pytest.raises(RecipeError, match=said):
        load_prompts(str(table(folder, rows)))


@pytest.mark.parametrize(
    "rows, said",
    [
        (
            [("a", ["wide.png"]), ("b", ["wide.png", "red.png"])],
            r"line 2: references of 24 x 16, 20 x 20 pixels, and",
        ),
        (
            [("a", ["wide.png"]), ("b", ["red.png"])],
            r"line 2: references of 20 x 20 pixels, and .*line 1: 24 x 16;",
        ),
        (
            [("a", ["wide.png", "red.png"]), ("b", ["red.png", "wide.png"])],
            r"line 2: .*in one order of proportions",
        ),
    ],
)
def test_rows_of_other_shapes_than_the_first_are_refused(rows, said, folder):
    with pytest.raises(FewstepError, match=said):
        check_references(QwenImageEdit, load_prompts(str(table(folder, rows))))
    check_references(QwenImageEdit, EDITS)


def recipe_for(teacher, path, **others):
    return Recipe(
        output="none",
        teacher=TeacherConfig(path=teacher.source),
        method=DMD2.Config(gan_weight=0.0),
        data=DataConfig(prompts=str(path)),
        train=TrainConfig(steps=2),
        **others,
    )


def test_a_recipe_and_its_teacher_have_to_agree_on_references(folder, teachers):
    """Before anything is loaded."""
    editing, drawing = teachers("Qwen-Image-Edit"), teachers("Qwen-Image")
    edits, words = table(folder, ROWS), folder / "words.txt"
    words.write_text("a cat\n")
    check_class(recipe := recipe_for(editing, edits), *check_data(recipe))
    for teacher, path, others, said in (
        (
            drawing,
            edits,
            {},
            "data.prompts: .*edits.jsonl, line 1: a QwenImagePipeline reads no reference image",
        ),
        (
            editing,
            words,
            {},
            "data.prompts: number 1, 'a cat', has no reference image, and a QwenImageEditPlus",
        ),
        (
            editing,
            edits,
            {"samples": SampleConfig(prompts=["a", "b"])},
            "samples.prompts: number 1, 'a', has no reference image",
        ),
        (
            editing,
            edits,
            {"samples": SampleConfig(prompts=str(words))},
            "samples.prompts: number 1, 'a cat', has no reference image",
        ),
        (
            drawing,
            words,
            {"samples": SampleConfig(prompts=str(folder / "gone.txt"))},
            "samples.prompts: .*gone.txt is no file",
        ),
        (
            editing,
            edits,
            {"evaluation": EvalConfig(prompts=str(words))},
            "evaluation.prompts: number 1, 'a cat'",
        ),
    ):
        recipe = recipe_for(teacher, path, **others)
        with pytest.raises(RecipeError, match=said):
            check_class(recipe, *check_data(recipe))


def test_what_reads_no_references_never_drops_them_silently(teachers, tmp_path):
    drawing, editing = teachers("Qwen-Image"), teachers("Qwen-Image-Edit")
    with pytest.raises(FewstepError, match="the first edit: a QwenImagePipeline reads no reference"):
        encode_prompts(drawing, EDITS)
    with pytest.raises(FewstepError, match="the first edit: a QwenImagePipeline reads no reference"):
        call_pipeline(drawing.pipe, EDITS, torch.Generator())
    with pytest.raises(FewstepError, match="'a cat' has no reference image"):
        call_pipeline(editing.pipe, ["a cat"], torch.Generator())
    with pytest.raises(FewstepError, match="pairs keep no references"):
        make_pairs(tmp_path / "pairs", editing, list(EDITS), num=2)


# ------------------------------------------------------------------------------------------------------- identity
def test_of_the_same_words_with_another_image_it_is_another_prompt(folder, teachers):
    same, other = Edit("a", [folder / "wide.png"]), Edit("a", [folder / "other.png"])
    assert same == Edit("a", [REFERENCES / "wide.png"]) and same not in ("a", other) and same != "a"
    assert len({same, other, "a"}) == 3 and copy.deepcopy(same) == same
    swapped = [Edit("a", [folder / "wide.png", folder / "red.png"][::step]) for step in (1, -1)]
    teacher = teachers("Qwen-Image-Edit")
    for one, two in ((same, other), swapped):
        assert prompts_folder(teacher, [one]) != prompts_folder(teacher, [two])
    assert prompts_folder(teacher, [same]) == prompts_folder(teacher, [Edit("a", [REFERENCES / "wide.png"])])


def test_a_changed_image_is_other_data_and_is_not_read_as_the_old_one(folder, teachers):
    path, teacher = table(folder, ROWS), teachers("Qwen-Image-Edit")
    recipe, before = recipe_for(teacher, path), load_prompts(str(path))
    shas, hashes = read_prompts(path).sha256, inputs_of(recipe, teacher, before, None)["data.prompts"]
    Image.new("RGB", (16, 16), "blue").save(folder / "square.png")
    after = load_prompts(str(path))
    assert read_prompts(path).sha256 != shas
    assert inputs_of(recipe, teacher, after, None)["data.prompts"] != hashes
    assert prompts_folder(teacher, before) != prompts_folder(teacher, after)
    with pytest.raises(ReadError, match=r"edits.jsonl, line 1: .*square.png is gone or has changed"):
        teacher.encode(before)


# ------------------------------------------------------------------------------------------------ the two branches
def test_the_unconditional_branch_has_what_rows_bring_and_the_null_one_does_not_know():
    """An image beside the text is in both branches, as a ControlNet's is."""
    null = Cond({"embeds": torch.zeros(1, 4, 2), "mask": torch.zeros(1, 4, dtype=torch.long)})
    control = torch.arange(3.0)[:, None].expand(3, 5)
    cond = Cond(
        {"embeds": torch.ones(3, 4, 2), "mask": torch.ones(3, 4, dtype=torch.long), "control": control}
    )
    found = unconditional(null, cond, 3)
    assert found["embeds"].sum() == 0 and found["mask"].sum() == 0 and torch.equal(found["control"], control)
    own = torch.arange(3.0)[:, None, None].expand(3, 2, 2)
    found = unconditional(Cond({}), Cond({**cond.tensors, "null_embeds": own}), 3)
    assert torch.equal(found["embeds"][:, :2], own) and found["embeds"][:, 2:].sum() == 0
    assert set(found.tensors) == {"embeds", "mask", "control"}
    some = drop_rows(Cond({**cond.tensors, "null_embeds": own}), Cond({}), torch.tensor([False, True, False]))
    assert some["embeds"].sum((1, 2)).tolist() == [8, 4, 8] and torch.equal(some["null_embeds"], own)


@torch.no_grad()
def test_each_row_is_guided_by_its_own_images(teachers):
    teacher = teachers("Qwen-Image-Edit")
    both, x = teacher.encode(EDITS), torch.randn(2, *teacher.latent_shape)
    t = torch.full((2,), 0.5)
    guided = teacher.denoiser.predict(x, t, both, guidance=3.0)
    for i in range(2):
        alone = teacher.denoiser.predict(x[i : i + 1], t[:1], both.rows(slice(i, i + 1)), guidance=3.0)
        torch.testing.assert_close(guided[i : i + 1], alone, rtol=1e-4, atol=1e-5)
    mixed = Cond({**both.tensors, "null_embeds": both["null_embeds"].flip(0)})
    assert (teacher.denoiser.predict(x, t, mixed, guidance=3.0) - guided).abs().max() > 1e-4


def test_a_text_of_too_many_tokens_is_refused_with_its_place(teachers):
    long = Edit("x" * 600, EDITS[0].references, "edits.jsonl, line 7")
    with pytest.raises(
        FewstepError, match=r"edits.jsonl, line 7: 'xxx.*' has more than 512 tokens; shorten it"
    ):
        teachers("Qwen-Image-Edit").encode([long])


def test_the_plan_knows_the_shapes_of_a_square_reference(teachers):
    teacher = teachers("Qwen-Image-Edit")
    blank, row = teacher.blank(2), teacher.encode([Edit("a", [REFERENCES / "square.png"])])
    assert (
        set(blank.tensors) == set(row.tensors) and blank["reference"].shape[1:] == row["reference"].shape[1:]
    )
    assert torch.equal(blank["shapes"][:1], row["shapes"]) and ZOO["Qwen-Image-Edit"].prompts == EDITS


# ------------------------------------------------------------------------------------------------- images from edits
def test_generated_images_are_made_with_their_references(folder, teachers, tmp_path):
    """One at a time, whatever the batch; of another image the folder is refused."""
    path, source = table(folder, ROWS), teachers("Qwen-Image-Edit").source
    model, job = open_model(source), Job(steps=2, guidance=2.0, size=128)

    def made(out, batch_size=2):
        sample_folder(model, read_prompts(path), job, out, batch_size=batch_size, speed_runs=0)
        return [(out / f"{i:06d}.png").read_bytes() for i in range(2)]

    before = made(tmp_path / "a")
    assert made(tmp_path / "b", batch_size=1) == before
    Image.new("RGB", (20, 20), "blue").save(folder / "red.png")
    with pytest.raises(FewstepError, match="prompts_sha256"):
        made(tmp_path / "a")
    after = made(tmp_path / "c")
    assert after[0] == before[0] and after[1] != before[1]


def test_prompts_of_a_run_are_measured_with_their_references(folder, teachers, tmp_path):
    path = table(folder, ROWS)
    recipe = recipe_for(teachers("Qwen-Image-Edit"), path, evaluation=EvalConfig(num=2))
    rows = _asked(recipe, load_prompts(str(path)), None)
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert set(read_prompts(tmp_path / "prompts.jsonl").texts) == set(load_prompts(str(path)))


def test_a_command_names_a_reference_that_is_not_there(tmp_path, capsys):
    words = ["sample", str(tmp_path), "--prompt", "a", "--reference", str(tmp_path / "none.png")]
    assert main(words) == 2
    assert "none.png is no file" in capsys.readouterr().err
