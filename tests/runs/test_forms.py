"""Whole runs whose images are no squares, or of several shapes."""

import json

import pytest
from PIL import Image
from test_end_to_end import tiny

from fewstep import recipe as recipes
from fewstep.cli import main
from fewstep.errors import RecipeError
from fewstep.runs.session import execute


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
