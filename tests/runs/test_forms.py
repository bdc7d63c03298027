"""Whole runs whose images are no squares, or of several shapes."""

import json
import signal
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from processes import command
from processes import run as run_processes
from processes import train as train_alone
from safetensors.torch import load_file
from test_distributed import differences, state
from test_end_to_end import tiny

from fewstep import recipe as recipes
from fewstep.cli import main
from fewstep.cost import plan
from fewstep.cost.bench import bench
from fewstep.diffusion.times import even_times
from fewstep.errors import RecipeError
from fewstep.evaluation.mixture import Mixture
from fewstep.evaluation.of_run import CEILING
from fewstep.process import Process
from fewstep.runs.checks import check_class, check_data
from fewstep.runs.library import load_recipe
from fewstep.runs.session import Session, cache, execute, resume
from fewstep.runs.shapes import buckets_of, check_shapes
from fewstep.runs.smoke import smoke


def test_a_resolution_is_a_number_or_two_and_nothing_else(tiny_sdxl, tmp_path):
    recipe = tiny("sdxl_dmd2_4step", tiny_sdxl, tmp_path, "--teacher.resolution", "[16, 32]")
    assert recipe.teacher.resolution == (16, 32)
    assert recipes.from_dict(recipes.to_dict(recipe)) == recipe
    for wrong in ("[16]", "[16, 32, 16]", "wide", "[16, 0]", "16.5"):
        with pytest.raises(RecipeError, match=r"^teacher.resolution: "):
            recipes.override(recipe, ["--teacher.resolution", wrong])


@pytest.mark.slow
def test_a_run_of_wide_images_is_wide_to_its_report(tiny_sdxl, tmp_path):
    """Latents of the data, grids, measured images and the export: 16 high and 32 wide."""
    words = ("--teacher.resolution", "[16, 32]", "--evaluation.num", "4", "--evaluation.teacher_steps", "2")
    words += ("--evaluation.extractor", "effnet-lite0@32", "--evaluation.floor_steps", "[2]")
    folder = execute(tiny("sdxl_dmd2_4step", tiny_sdxl, tmp_path, *words, "--train.steps", "2"))
    assert Image.open(folder / "samples" / "step_000002.png").size == (2 * 34 + 2, 16 + 4)
    report = (folder / "report.html").read_text()
    assert 'class="compare"' in report and 'class="cards"' in report  # cut into their images
    drawn = sorted((folder / "eval" / "samples").rglob("*.png"))
    assert len(drawn) >= 12 and {Image.open(path).size for path in drawn} == {(32, 16)}
    assert {Image.open(path).size for path in (folder / "eval" / "ceiling").glob("*.png")} == {(32, 16)}
    record = json.loads((folder / "export" / "fewstep.json").read_text())
    assert record["resolution"] == [16, 32] and record["call"]["width"] == 32


@pytest.mark.slow
def test_a_size_on_the_command_line_is_height_and_width(tiny_sdxl, tmp_path, capsys):
    (tmp_path / "p.txt").write_text("a cat\n")
    out = tmp_path / "out"
    words = ["eval", "generate", str(tiny_sdxl), "--prompts", str(tmp_path / "p.txt"), "--steps", "1"]
    assert main([*words, "--size", "16x32", "--out", str(out), "--speed-runs", "0", "--device", "cpu"]) == 0
    assert Image.open(next(out.rglob("000000.png"))).size == (32, 16)
    assert main([*words, "--size", "16x32", "--out", str(out), "--speed-runs", "0", "--device", "cpu"]) == 0
    assert main([*words, "--size", "16x", "--out", str(out)]) == 2
    assert "--size: 16x: expected at least 1, a whole number, or HEIGHTxWIDTH" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------ several shapes
SHAPES = "[{size: 32}, {size: [16, 32]}, {size: [32, 16]}]"


def several(recipe_name, teacher, folder, *words, shapes=SHAPES):
    """As :func:`tiny`, with pictures that belong to a square, to a wide and to a tall shape."""
    recipe = tiny(recipe_name, teacher, folder, "--data.shapes", shapes, *words)
    for i, size in enumerate([(40, 36), (90, 40), (36, 80), (70, 36), (40, 40)]):
        Image.new("RGB", size, (40 * i, 99, 250 - 40 * i)).save(folder / "images" / f"{i}.png")
    return recipe


@pytest.mark.parametrize(
    "shapes, said",
    [
        ("[{size: 32}]", r"\[32\]: expected at least two, each another"),
        ("[{size: 32}, {size: [32, 32]}]", r"\[32, 32\]: expected at least two, each another"),
        ("[{size: 32, share: 1}, {size: 16}]", r"\[32, 16\]: expected a share for each of them, or for none"),
        ("[{size: 32}, {size: [16, 0]}]", r"size: \(16, 0\): expected at least 1"),
        ("[{size: 32}, {size: 16, share: 0}]", r"share: 0.*: expected a positive number"),
        ("[{size: 32}, {size: 16, shares: 0}]", r"1.shares: unknown field; did you mean share"),
        ("[{size: 32}, {share: 1}]", r"1.size: missing"),
        (
            "[{size: 32}, {size: [16]}]",
            r"\[.*\]: element 1: input should be a valid integer; element 1.1: field",
        ),
        ("[[32, 16], [16, 32]]", r""),
    ],
)
def test_shapes_that_say_nothing_are_refused(shapes, said, tiny_sdxl, tmp_path):
    recipe = tiny("sdxl_dmd2_4step", tiny_sdxl, tmp_path)
    with pytest.raises(RecipeError, match=rf"^data\.shapes[:.] ?{said}"):
        recipes.override(recipe, ["--data.shapes", shapes])


def test_the_hash_of_a_recipe_knows_only_shapes_that_are_given(tiny_sdxl, tmp_path):
    recipe = tiny("sdxl_dmd2_4step", tiny_sdxl, tmp_path)
    found = {recipes.digest(recipes.override(recipe, ["--data.shapes", given])) for given in ("[]", SHAPES)}
    assert len(found) == 2 and recipes.digest(recipe) in found


def test_what_has_one_shape_only_is_refused_before_anything_is_loaded(teachers, tiny_sd15, tmp_path):
    def refused(recipe, why):
        with pytest.raises(
            RecipeError, match=rf"^data.shapes: \[32, \[16, 32\], \[32, 16\]\]: {why}; leave it out"
        ):
            check_class(recipe)

    refused(
        several("sd15_dmd_1step", tiny_sd15, tmp_path), "pairs of the teacher are of teacher.resolution alone"
    )
    edit = several("qwen_edit_dmd2_4step", teachers("Qwen-Image-Edit").source, tmp_path)
    refused(edit, "a QwenImageEditPlusPipeline edits images, whose results have teacher.resolution")
    tokens = recipes.override(load_recipe("emoji_ar_dd2_1step"), ["--data.shapes", SHAPES])
    refused(tokens, "an autoregressive teacher's map of tokens has one size")


@pytest.mark.parametrize(
    "name, shapes, said",
    [
        ("SDXL", "[{size: 32}, {size: [17, 32]}]", r"\[17, 32\]: expected a multiple of 2 for this pipeline"),
        (
            "SDXL",
            "[{size: 64}, {size: [16, 32]}]",
            r"\[64, \[16, 32\]\]: expected teacher.resolution among them, 32",
        ),
        (
            "UNet2D",
            "[{size: 16}, {size: [16, 32]}]",
            r"\[16, 32\]: a DDPMPipeline makes images of 16 pixels only; leave it",
        ),
    ],
)
def test_shapes_that_a_teacher_does_not_make_are_refused(name, shapes, said, teachers, tiny_sdxl, tmp_path):
    recipe = several("sdxl_dmd2_4step", tiny_sdxl, tmp_path, shapes=shapes)
    with pytest.raises(RecipeError, match=rf"^data.shapes: {said}"):
        check_shapes(recipe, teachers(name))


def test_a_data_free_run_without_images_to_measure_by_is_refused_at_its_start(tiny_sdxl, tmp_path):
    words = ("--teacher.resolution", "[8, 32]", "--method.gan_weight", "0", "--evaluation.num")
    shapes = "[{size: 32}, {size: [16, 32]}, {size: [8, 32]}]"
    recipe = several("sdxl_dmd2_4step", tiny_sdxl, tmp_path, *words, "4", shapes=shapes)
    with pytest.raises(RecipeError, match=r"^data.shapes: \[8, 32\]: none of the 5 images .* to compare"):
        Session(recipe, *check_data(recipe), Process())
    recipe = several("sdxl_dmd2_4step", tiny_sdxl, tmp_path, *words, "0", shapes=shapes)
    Session(recipe, *check_data(recipe), Process())
    words = ("--method.gan_weight", "0", "--samples.count", "1", "--evaluation.num")
    for num, size in (("4", "64"), ("4", "32"), ("0", "64")):
        recipe = tiny("sdxl_dmd2_4step", tiny_sdxl, tmp_path, *words, num, "--teacher.resolution", size)
        if (num, size) == ("4", "64"):
            with pytest.raises(
                RecipeError, match=r"5 of 5 files cannot be read: 0.png \(40x36 pixels, below 64"
            ):
                Session(recipe, *check_data(recipe), Process())
        else:
            Session(recipe, *check_data(recipe), Process())


def test_shown_samples_are_told_the_shape_that_they_have(tiny_sdxl, tmp_path):
    recipe = several("sdxl_dmd2_4step", tiny_sdxl, tmp_path, "--samples.count", "4", "--evaluation.num", "0")
    groups = Session(recipe, *check_data(recipe), Process()).preview.groups
    assert [group.teacher.shape for group in groups] == [(32, 32), (16, 32), (32, 16)]
    for group in groups:
        assert group.cond["time_ids"][:, :2].tolist() == [list(group.teacher.shape)] * len(group.cond)


def test_a_run_on_too_few_images_to_compare_with_is_refused_at_its_start(tiny_sdxl, tmp_path):
    """Not after its training, where the evaluation reads them."""
    for num, size in (("4", "32"), ("0", "32"), ("4", "16")):
        words = ("--data.max_bad", "1.0", "--samples.count", "1", "--evaluation.num", num)
        recipe = tiny("sdxl_dmd2_4step", tiny_sdxl, tmp_path, *words, "--teacher.resolution", size)
        for i in range(1, 5):
            Image.new("RGB", (20, 40)).save(tmp_path / "images" / f"{i}.png")
        if (num, size) == ("4", "32"):
            with pytest.raises(RecipeError, match=r"1 of 5 images can be used at 32x32 pixels, to compare"):
                Session(recipe, *check_data(recipe), Process())
        else:
            Session(recipe, *check_data(recipe), Process())


DATA_FREE = ("--method.gan_weight", "0", "--images", "null")


@pytest.mark.slow
@pytest.mark.parametrize("words", [(), DATA_FREE], ids=["images", "data-free"])
def test_a_run_of_several_shapes_goes_on_exactly(words, tiny_sdxl, tmp_path):
    """Pieces of any length, against one piece: everything that a checkpoint holds."""
    words = (*words, "--train.sample_every", "0", "--train.checkpoint_every", "0", "--train.steps", "7")
    made, seen = {}, set()
    for folder, stops in (("once", [7]), ("pieces", [1, 4, 7])):
        (tmp_path / folder).mkdir()
        recipe = several("sdxl_dmd2_4step", tiny_sdxl, tmp_path / folder, "--student.ema", "0.5", *words)
        for stop in stops:
            session = Session(recipe, *check_data(recipe), Process())
            trainer = session.trainer
            trainer.restore()
            while trainer.progress.iteration < stop:
                batch = trainer.data.batch(trainer.progress.iteration, 0)
                height, width = (2 * side for side in batch.shape[2:])
                for cond in (batch.cond, batch.real_cond or batch.cond):
                    assert cond["time_ids"].tolist() == [[height, width, 0, 0, height, width]] * 2
                seen.add(batch.shape[2:])
                trainer.iterate()
            trainer.save()
        last = Path(recipe.output) / "checkpoints" / "step_00000007" / "state.safetensors"
        made[folder] = load_file(last)
    once, pieces = made["once"], made["pieces"]
    assert once.keys() == pieces.keys() and not [key for key in once if not once[key].equal(pieces[key])]
    assert seen == {(16, 16), (8, 16), (16, 8)}


@pytest.mark.slow
def test_a_killed_run_of_several_shapes_ends_as_an_undisturbed_one(tiny_sdxl, tmp_path):
    words = ("--train.steps", "12", "--train.checkpoint_every", "3", "--samples.teacher_steps", "0")
    words += ("--train.sample_every", "0", "--train.keep", "50", "--evaluation.num", "0")
    ends = []
    for folder in ("straight", "killed"):
        (tmp_path / folder).mkdir()
        recipe = several("sdxl_dmd2_4step", tiny_sdxl, tmp_path / folder, *words)
        run = Path(recipe.output)
        if folder == "straight":
            execute(recipe)
        else:
            path = tmp_path / "recipe.yaml"
            path.write_text(recipes.dump(recipe))
            child, deadline = command(["train", path], said=tmp_path / "said.txt"), time.time() + 120
            while (
                not list(run.glob("checkpoints/step_*[0-9]"))
                and time.time() < deadline
                and child.poll() is None
            ):
                time.sleep(0.02)
            child.send_signal(signal.SIGKILL)
            child.wait()
            assert max(int(p.name[5:]) for p in run.glob("checkpoints/step_*[0-9]")) < 12
            resume(run)
        ends.append(load_file(run / "checkpoints" / "step_00000012" / "state.safetensors"))
    assert ends[0].keys() == ends[1].keys()
    assert not [name for name in ends[0] if not ends[0][name].equal(ends[1][name])]


@pytest.mark.slow
def test_two_processes_train_several_shapes_as_one_does(tiny_sdxl, tmp_path):
    """Each iteration has one shape, whoever computes which of its micro-batches."""
    words = (
        "--train.batch_size",
        "1",
        "--method.num_steps",
        "2",
        "--method.critic_steps",
        "1",
        "--train.steps",
        "4",
    )
    words += ("--train.checkpoint_every", "4", "--train.sample_every", "0", "--samples.count", "1")
    words += ("--evaluation.num", "0", "--train.device", "cpu")
    made = {}
    for name, accumulate in (("one", 4), ("two", 2)):
        (tmp_path / name).mkdir()
        recipe = several(
            "sdxl_dmd2_4step", tiny_sdxl, tmp_path / name, *words, "--train.accumulate", str(accumulate)
        )
        path = tmp_path / f"{name}.yaml"
        path.write_text(recipes.dump(recipe))
        if name == "one":
            train_alone(recipe)
        else:
            run_processes(2, [("train", str(path))], tmp_path)
        made[name] = state(Path(recipe.output), 4)
    found = differences(made["one"], made["two"])
    assert found["weight"] < 1e-4
    moved = [n for n in made["one"] if n.startswith("student/weight") and "lora_A" not in n]
    assert max(made["one"][n].abs().max() for n in moved) > 5e-4


@pytest.mark.slow
def test_grids_have_the_shapes_in_turn_and_the_card_names_them(tiny_sdxl, tmp_path):
    words = ("--samples.count", "5", "--samples.columns", "3", "--train.steps", "2", "--evaluation.num", "0")
    recipe = several("sdxl_dmd2_4step", tiny_sdxl, tmp_path, *words)
    groups = Session(recipe, *check_data(recipe), Process()).preview.groups
    told = [group.cond["time_ids"][:, [0, 1, 4, 5]].tolist() for group in groups]
    assert told == [[[32, 32, 32, 32]] * 2, [[16, 32, 16, 32]] * 2, [[32, 16, 32, 16]]]
    folder = execute(recipe)
    for name in ("teacher", "step_000002"):
        grid = np.asarray(Image.open(folder / "samples" / f"{name}.png"))
        assert grid.shape == (2 * 34 + 2, 3 * 34 + 2, 3)
        cells = [grid[2 + 34 * (i // 3) :, 2 + 34 * (i % 3) :][:32, :32] for i in range(5)]
        white = [(cell == 255).all(-1) for cell in cells]
        assert not white[0][:8].all() and not white[3][:8].all()
        for wide in (white[1], white[4]):
            assert wide[:8].all() and wide[24:].all() and not wide[8:24].all()
        assert white[2][:, :8].all() and white[2][:, 24:].all() and not white[2][:, 8:24].all()
    assert Image.open(folder / "health" / "step_000002.png").size == (2 * 34 + 2, 3 * 34 + 2)
    record = json.loads((folder / "export" / "fewstep.json").read_text())
    assert record["shapes"] == [32, [16, 32], [32, 16]] and record["resolution"] == 32
    card = (folder / "export" / "README.md").read_text()
    assert "height=32, width=32" in card.partition("```python")[2].partition("```")[0]
    assert (
        "Trained at 32 x 32, 16 x 32 and 32 x 16 pixels; `height=` and `width=` of the call choose." in card
    )


@pytest.mark.slow
def test_a_run_of_several_shapes_is_measured_in_all_of_them(tiny_sdxl, tmp_path, capsys):
    """Every row has the same shapes, the export too where it is measured alone, and so have the real images."""
    words = (
        "--train.steps",
        "2",
        "--evaluation.num",
        "12",
        "--evaluation.named",
        "3",
        "--samples.distance",
        "3",
    )
    words += ("--evaluation.teacher_steps", "1", "--evaluation.floor_steps", "[2]")
    words += ("--evaluation.extractor", "effnet-lite0@32", "--train.sample_every", "2")
    recipe = several("sdxl_dmd2_4step", tiny_sdxl, tmp_path, *words)
    images = tmp_path / "images"
    for i in range(5):
        Image.new("RGB", [(32, 32), (32, 16), (16, 32)][i % 3], (60 * i, 40, 10)).save(images / f"{i}.png")
    folder = execute(recipe)
    table = json.loads((folder / "eval" / "table.json").read_text())
    mixture = Mixture.recorded(json.loads((folder / "export" / "fewstep.json").read_text()))
    assert mixture.plain() == {"shapes": [32, [16, 32], [32, 16]], "shares": [2.0, 2.0, 1.0]}
    num = table["images"]
    expected = [mixture.at(recipe.evaluation.seed, i) for i in range(num)]
    counts = {str(shape): expected.count(shape) for shape in {*expected}}
    assert num > 12 and {row["name"] for row in table["rows"]} >= {"teacher", "student", "floor", CEILING}
    for row in table["rows"]:
        assert row["shapes"] == counts
        place = folder / "eval" / (row.get("samples") or "ceiling")
        made = [Image.open(place / f"{i:06d}.png").size[::-1] for i in range(num)]
        assert made == expected
    assert table["real"]["n"] == 5 and "cell" not in table
    assert f"{counts['32x32']} of 32x32" in (folder / "eval" / "table.md").read_text()
    card = (folder / "export" / "README.md").read_text()
    assert "Each prompt has one of several shapes, the same in every row" in card
    assert "samples/FD(effnet-lite0@32)" in (folder / "metrics.jsonl").read_text()
    (tmp_path / "p.txt").write_text("".join(f"thing {i}\n" for i in range(6)))
    words = ["--prompts", str(tmp_path / "p.txt"), "--speed-runs", "0", "--device", "cpu", "--out"]
    student = ["eval", "generate", str(tiny_sdxl), "--lora", str(folder), "--steps", "4", *words]
    capsys.readouterr()
    assert main([*student, str(tmp_path / "many")]) == 0
    assert main([*student, str(tmp_path / "one"), "--size", "32"]) == 0
    shares = ["--size", "32:2,16x32:2,32x16:1"]
    teacher = ["eval", "generate", str(tiny_sdxl), "--steps", "1", *words, str(tmp_path / "teacher"), *shares]
    assert main(teacher) == 0
    for name, shapes in (
        ("many", [mixture.at(0, i) for i in range(6)]),
        ("one", [(32, 32)] * 6),
        ("teacher", [mixture.at(0, i) for i in range(6)]),
    ):
        made = sorted((tmp_path / name).rglob("0*.png"))
        assert [Image.open(path).size[::-1] for path in made] == shapes


@pytest.mark.slow
def test_a_plan_counts_the_largest_shape(tiny_sdxl, tmp_path):
    words = ("--train.batch_size", "2")
    mixed = several("sdxl_dmd2_4step", tiny_sdxl, tmp_path, *words, shapes="[{size: 32}, {size: [48, 32]}]")
    alone = [
        tiny("sdxl_dmd2_4step", tiny_sdxl, tmp_path, *words, "--teacher.resolution", size)
        for size in ("[48, 32]", "32")
    ]
    totals = [plan(recipe).total() for recipe in (mixed, *alone)]
    assert totals[0] == totals[1] > totals[2]


def test_iterations_have_the_shares_that_are_given_or_those_of_the_images(teachers, tiny_sdxl, tmp_path):
    given = "[{size: 32, share: 5}, {size: [16, 32], share: 1}, {size: [32, 16], share: 0.5}]"
    for shapes, expected in ((SHAPES, [2, 2, 1]), (given, [5, 1, 0.5])):
        recipe = several("sdxl_dmd2_4step", tiny_sdxl, tmp_path, shapes=shapes)
        found = buckets_of(recipe, teachers("SDXL"), cache(recipe))
        assert [bucket.share for bucket in found] == expected
        assert [bucket.latent_shape[1:] for bucket in found] == [(16, 16), (8, 16), (16, 8)]
    free = recipes.override(recipe, ["--data.shapes", SHAPES])
    assert [bucket.share for bucket in buckets_of(free, teachers("SDXL"), {})] == [1, 1, 1]


def test_images_of_every_shape_are_cached_apart_and_found_again(tiny_sdxl, tmp_path):
    recipe = several("sdxl_dmd2_4step", tiny_sdxl, tmp_path)
    stores = cache(recipe)
    assert {name: len(store) for name, store in stores.items()} == {
        "conditions": 5,
        "captions": 5,
        "images 32x32": 2,
        "images 16x32": 2,
        "images 32x16": 1,
    }
    rows = stores["images 16x32"].rows(torch.arange(2))
    assert rows["latents"].shape == (2, 4, 8, 16)
    assert {name: store.folder for name, store in cache(recipe).items()} == {
        name: store.folder for name, store in stores.items()
    }


def test_the_teachers_row_has_the_shift_of_each_shape_and_the_student_one_list_of_times(teachers, tmp_path):
    square, wide = teachers("FLUX.1-dev"), teachers("FLUX.1-dev", "wide")
    words = ("--teacher.resolution", "32", "--samples.count", "2", *DATA_FREE)
    shapes = "[{size: 32}, {size: [32, 48]}]"
    recipe = several("flux_dmd2_4step", square.source, tmp_path, *words, shapes=shapes)
    session = Session(recipe, *check_data(recipe), Process())
    times = session.method.student.times
    assert times == even_times(square.denoiser.schedule, 4) != even_times(wide.denoiser.schedule, 4)
    for group, loaded in zip(session.preview.groups, (square, wide)):
        noise = torch.randn(1, *loaded.latent_shape, generator=torch.Generator().manual_seed(0))
        made = session.preview._teach(group, noise, group.cond)
        guidance, steps = session.preview.guidance, recipe.samples.teacher_steps
        assert made.equal(loaded.sample(noise, group.cond, steps, guidance))


LARGE = "[{size: 1024, share: 2}, {size: [832, 1216], share: 1}, {size: [1216, 832], share: 1}]"


def smoked(name, tmp_path, shapes=LARGE, *words):
    """As ``--smoke`` makes it of a recipe at the size of its teacher."""
    words = ("--data.shapes", shapes, "--output", str(tmp_path / "out"), *words)
    recipe = recipes.override(load_recipe(name), words)
    return smoke(recipe, {"output"})


def said(recipe):
    return [one.size for one in recipe.data.shapes]


def test_a_smoke_run_keeps_shapes_in_the_proportions_of_its_stand_in(tiny_sdxl, tmp_path, capsys):
    recipe = smoked("sdxl_dmd2_4step", tmp_path)
    assert said(recipe) == [32, (26, 38), (38, 26)]
    assert [one.share for one in recipe.data.shapes] == [2, 1, 1] and recipe.teacher.resolution == 32
    sizes = [Image.open(path).size for path in sorted(Path(recipe.data.images).glob("*.png"))]
    assert len(sizes) == 8 and sizes[:4] == [(32, 32), (38, 26), (26, 38), (32, 32)]
    wide = smoked("sdxl_dmd2_4step", tmp_path, LARGE, "--teacher.resolution", "[832, 1216]")
    assert wide.teacher.resolution == (24, 40) and said(wide)[:2] == [32, (24, 40)]
    assert not capsys.readouterr().err.count("data.shapes")
    few = smoked("sdxl_dmd2_4step", tmp_path, "[{size: 1024}, {size: [1016, 1032]}, {size: [512, 1024]}]")
    assert said(few) == [32, (16, 32)]
    assert "--smoke: data.shapes: 32x32, 16x32 here, for others are as small" in capsys.readouterr().err
    assert smoked("sdxl_dmd2_4step", tmp_path, "[{size: 1024}, {size: [1016, 1032]}]").data.shapes == []
    coarse = smoked("sana_scm_2step", tmp_path)
    assert said(coarse) == [96, (64, 128), (128, 64)] and coarse.teacher.resolution == 96
    given = several("sdxl_dmd2_4step", tiny_sdxl, tmp_path)
    assert len(smoke(given, {"teacher.path", "output"}).data.shapes) == 3


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "sdxl_dmd2_4step",
        *(pytest.param(n, marks=pytest.mark.long) for n in ("sana_scm_2step", "flux_dmd2_4step")),
    ],
)
def test_a_smoke_run_of_several_shapes_comes_to_its_end(name, tmp_path):
    recipe = smoked(name, tmp_path)
    folder = execute(recipe)
    record = json.loads((folder / "export" / "fewstep.json").read_text())
    assert len(record["shapes"]) == 3 and record["shares"] == [2.0, 1.0, 1.0]


def test_a_recipe_with_frozen_options_of_no_use_fails_alike_wherever_it_begins(
    tiny_sdxl, tmp_path, monkeypatch
):
    """Training, its cache and its bench say the same, before any data are read."""
    monkeypatch.setattr("fewstep.runs.session.check_data", lambda _: pytest.fail("data were read"))
    monkeypatch.setattr("fewstep.cost.bench.check_data", lambda _: pytest.fail("data were read"))
    for words, said in (
        (("--teacher.offload", "true", "--teacher.compile", "true"), "teacher.compile: true: torch.compile"),
        (
            ("--teacher.quantization", "int8", "--student.kind", "full"),
            "roles.student.kind: full: trains a copy",
        ),
    ):
        recipe = tiny("sdxl_dmd2_4step", tiny_sdxl, tmp_path, *words)
        begins = (execute, cache, bench, partial(bench, random_weights=True))
        told = set()
        for begin in begins:
            with pytest.raises(RecipeError, match=said) as error:
                begin(recipe)
            told.add(str(error.value))
        assert len(told) == 1


@pytest.mark.slow
def test_a_bench_of_random_weights_measures_each_shape(tiny_sdxl, tmp_path):
    words = ("--train.batch_size", "1", "--train.accumulate", "1")
    recipe = several("sdxl_dmd2_4step", tiny_sdxl, tmp_path, *words, shapes="[{size: 32}, {size: [64, 32]}]")
    found = bench(recipe, iterations=5, random_weights=True)
    assert found["resolution"] == 32 and [*found["shapes"]] == ["32x32", "64x32"]
    small, large = found["shapes"].values()
    assert small["tflop_per_iteration"] == found["tflop_per_iteration"] < large["tflop_per_iteration"]
    assert large["seconds_per_iteration"] > 0 and large["images_per_second"] > 0
    plain = bench(tiny("sdxl_dmd2_4step", tiny_sdxl, tmp_path, *words), iterations=5, random_weights=True)
    assert "shapes" not in plain and plain["resolution"] == 32
    with pytest.raises(RecipeError, match=r"^data.shapes: \[17, 32\]: expected a multiple of 2"):
        shapes = "[{size: 32}, {size: [17, 32]}]"
        bench(several("sdxl_dmd2_4step", tiny_sdxl, tmp_path, *words, shapes=shapes), random_weights=True)


METHODS = [  # a recipe of each method that trains without pairs
    "sdxl_sid_4step",
    "sdxl_sim_1step",
    "sdxl_phased_dmd_4step",
    "sdxl_hyper_sd",
    "sdxl_disback_1step",
    "sd15_swiftbrush_1step",
    "sd15_multi_student_1step_dm",
    "sd3_ladd_4step",
    "sd3_sana_sprint",
    "sd3_scm_1step",
    "emoji_fdistill_1step",
    "emoji_diff_instruct_1step",
]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n == "sdxl_sid_4step" else pytest.mark.long) for n in METHODS]
)
def test_every_method_trains_in_several_shapes(name, teachers, tmp_path):
    """An iteration of each shape: losses are numbers, and students make samples of that shape."""
    kind = {"sd3": "SD 3", "sd15": "SD 1.5"}.get(name.partition("_")[0], "SDXL")
    teacher = teachers(kind)
    side = teacher.shape.height
    shapes = f"[{{size: {side}}}, {{size: [{side // 2}, {side}]}}, {{size: [{side}, {side // 2}]}}]"
    words = ("--teacher.pipeline_class", "null", "--samples.count", "1", "--train.steps", "2000")
    words += ("--method.synthetic", "false") if name == "sd3_ladd_4step" else ()  # of images, not of pairs
    recipe = several(name, teacher.source, tmp_path, *words, shapes=shapes)
    recipe = replace(recipe, method=recipe.method.smoke())  # whose blocks a tiny network has
    names = recipe.method_class.networks_for(recipe.method)
    recipe = replace(recipe, roles={n: replace(recipe.role(n), rank=4) for n in names})
    session = Session(recipe, *check_data(recipe), Process())
    trainer, seen = session.trainer, {}
    for iteration in range(40):
        shape = trainer.data.batch(iteration, 0).shape
        if shape not in seen:
            trainer.progress.iteration = iteration
            trainer.iterate()
            seen[shape] = {key: float(value) for key, value in trainer.window.means().items()}
    assert len(seen) == 3 and all(np.isfinite([*numbers.values()]).all() for numbers in seen.values())
