"""Images that are no squares: which side comes first, in conditions, latents, crops, calls and records."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from test_teachers import FLOWS, SHOWN, student_of
from zoo import ONE_SIZE, ZOO

from fewstep.data.images import CaptionedImages
from fewstep.data.left_out import BadRecord
from fewstep.diffusion.discriminator import ConvHead, Discriminator, tap_features
from fewstep.diffusion.times import even_times
from fewstep.errors import FewstepError
from fewstep.export import export_student, trainer_sample, verify
from fewstep.report.grid import cells, image_grid
from fewstep.shape import Shape
from fewstep.teachers import load_teacher
from fewstep.teachers.pipelines import check_size, size_options

MANY = [name for name in ZOO if name not in ONE_SIZE]
FORMS = [pytest.param(n, "wide", marks=() if n in SHOWN else pytest.mark.long) for n in MANY] + [
    pytest.param(n, "tall", marks=pytest.mark.long) for n in MANY
]


def test_a_shape_is_height_and_width_and_a_square_one_number():
    assert Shape.of(64) == Shape.of([64, 64]) == (64, 64) and Shape.of(64).said == 64
    wide = Shape.of([32, 48])
    assert (wide.height, wide.width) == (32, 48) and wide.said == [32, 48] and str(wide) == "32x48"
    assert wide.over(8) == (4, 6) and wide.area == 32 * 48


@pytest.mark.parametrize("form", ["wide", "tall"])
def test_latents_conditions_and_calls_have_height_first(form, teachers):
    xl, alpha = teachers("SDXL", form), teachers("PixArt-alpha", form)
    height, width = xl.shape
    assert (height < width) == (form == "wide") and xl.resolution == [height, width]
    factor = 2 ** (len(xl.pipe.vae.config.block_out_channels) - 1)
    assert xl.latent_shape == (4, height // factor, width // factor)
    for ids in (xl.encode(["a", "b"])["time_ids"], xl.denoiser.null["time_ids"], xl.blank(1)["time_ids"]):
        assert ids[-1].tolist() == [height, width, 0, 0, height, width]
    cond, (height, width) = alpha.encode(["a"]), alpha.shape
    if alpha.net.use_additional_conditions:
        assert cond["resolution"].tolist() == [[height, width]]
        assert cond["aspect_ratio"].item() == pytest.approx(height / width)
    assert size_options(alpha.pipe, alpha.shape) == {
        "height": height,
        "width": width,
        "use_resolution_binning": False,
    }


def test_pixarts_conditions_of_size_are_those_of_its_call(teachers, monkeypatch):
    """The tiny one has none; a network that has them is told height, width and their quotient."""
    alpha = teachers("PixArt-alpha", "wide")
    monkeypatch.setattr(alpha.net, "use_additional_conditions", True)
    cond = alpha.encode(["a", "b"])
    assert cond["resolution"].tolist() == [list(alpha.shape)] * 2
    assert cond["aspect_ratio"].flatten().tolist() == pytest.approx([2 / 3] * 2)


def test_a_file_of_another_form_is_cropped_and_never_enlarged(tmp_path):
    """A picture of five stripes, 40 high and 100 wide: of each form its middle."""
    stripes = np.repeat(np.arange(5, dtype=np.uint8) * 50, 20)[None, :, None].repeat(40, 0).repeat(3, 2)
    Image.fromarray(stripes).save(tmp_path / "a.png")
    images = CaptionedImages(["a"], [tmp_path / "a.png"])
    wide, tall = images.load(0, [16, 32]), images.load(0, [32, 16])
    assert wide.shape == (16, 32, 3) and tall.shape == (32, 16, 3)
    assert abs(int(wide[8, 16, 0]) - 100) < 2 and abs(tall[:, :, 0].astype(int) - 100).max() < 3
    assert wide[8, 0, 0] < 60 < 140 < wide[8, -1, 0]
    assert images.load(0, [40, 100]).tolist() == stripes.tolist()
    for size, below in (
        ([41, 41], "41;"),
        ([20, 101], "101 wide and 20 high"),
        ([41, 20], "20 wide and 41 high"),
    ):
        with pytest.raises(BadRecord, match=f"100x40 pixels, below {below}"):
            images.load(0, size)
    upscaled = CaptionedImages(["a"], [tmp_path / "a.png"], upscale=True)
    assert upscaled.load(0, [20, 120]).shape == (20, 120, 3)


@pytest.mark.parametrize("name, form", FORMS)
def test_a_student_of_another_form_leaves_with_its_size(name, form, teachers, tmp_path):
    teacher, prompts = teachers(name, form), list(ZOO[name].prompts)
    times = even_times(teacher.denoiser.schedule, 2) if name in FLOWS else [999, 499]
    role, student = student_of(teacher, times, "ddim", "lora")
    own = trainer_sample(student, teacher, prompts)
    assert own.shape == (2, *teacher.latent_shape) and own.shape[2] != own.shape[3]
    weights, about = {"student": role.final_weights()}, {"method": "x"}
    export_student(tmp_path / "e", teacher, student, weights, [role.config], about=about)
    scale = max(1.0, own.abs().max().item())
    assert verify(tmp_path / "e", own, teacher, prompts, 1e-4 * scale, "float32") < 1e-4 * scale
    record = json.loads((tmp_path / "e" / "fewstep.json").read_text())
    height, width = teacher.shape
    assert record["resolution"] == [height, width]
    assert (record["call"]["height"], record["call"]["width"]) == (height, width)
    assert f"height={height}, width={width}" in (tmp_path / "e" / "README.md").read_text()


def test_the_cards_program_makes_an_image_of_the_trained_form(teachers, tmp_path, monkeypatch):
    teacher = teachers("SDXL", "wide")
    role, student = student_of(teacher, [999, 499])
    weights, about = {"student": role.final_weights()}, {"method": "x", "prompt": "a"}
    export_student(tmp_path / "e", teacher, student, weights, [role.config], about=about)
    monkeypatch.chdir(tmp_path / "e")
    code = (tmp_path / "e" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    exec(compile(code, "README.md", "exec"), {})
    assert Image.open("image.png").size == (teacher.shape.width, teacher.shape.height)


def test_sizes_that_a_pipeline_cannot_have_are_refused_side_by_side(teachers):
    pipe = teachers("SDXL").pipe
    check_size(pipe, [64, 96])
    for size in ([64, 63], [63, 64]):
        with pytest.raises(FewstepError, match=rf"--size \[{size[0]}, {size[1]}\]: expected a multiple of 8"):
            check_size(pipe, size)


def test_a_network_whose_own_images_are_no_squares(teachers, tmp_path):
    """Its configuration says height and width of latents, as a recipe says them of pixels."""
    import shutil

    folder = tmp_path / "t"
    shutil.copytree(teachers("UNet2D").source, folder)
    config = json.loads((folder / "unet" / "config.json").read_text())
    config["sample_size"] = [16, 24]
    (folder / "unet" / "config.json").write_text(json.dumps(config))
    teacher = load_teacher(str(folder))
    assert teacher.shape == (16, 24) and teacher.latent_shape == (3, 16, 24)
    own = teacher.pipe(batch_size=1, num_inference_steps=1, output_type="np").images
    assert own.shape == (1, 16, 24, 3)


@pytest.mark.parametrize("scale", [1, 2])
def test_a_report_finds_the_images_of_a_grid_that_are_no_squares(scale):
    shade = np.arange(5, dtype=np.uint8)[:, None, None, None] * 40
    grid = image_grid(np.broadcast_to(shade, (5, 16, 24, 3)).copy(), 3, scale=scale)
    found = cells(grid.size, 3, Shape(16 * scale, 24 * scale))
    assert len(found) == 6 and not cells(grid.size, 3, Shape(24 * scale, 16 * scale))
    for i, (left, top, right, bottom) in enumerate(found[:5]):
        tile = np.asarray(grid.crop((left, top, right, bottom)))
        assert tile.shape == (16 * scale, 24 * scale, 3) and (tile == 40 * i).all()


def test_an_area_decides_the_shift_and_not_a_side(teachers):
    """Flux's shift is of the number of tokens, 96 of them here and 64 of the square."""
    square, wide, tall = (teachers("FLUX.1-dev", form) for form in ("square", "wide", "tall"))
    shifts = [teacher.denoiser.schedule.shift for teacher in (square, wide, tall)]
    expected = [math.exp(0.5 + 0.65 * (n - 256) / (4096 - 256)) for n in (64, 96, 96)]
    assert shifts == pytest.approx(expected)


# ------------------------------------------------------------------------------------- one teacher for several shapes
@pytest.mark.parametrize("name, form", FORMS)
def test_a_view_of_another_shape_is_the_teacher_that_is_loaded_for_it(name, form, teachers):
    """What it predicts with guidance, what it samples with its own shift, and what it decodes, bit for bit."""
    square, loaded, prompts = teachers(name), teachers(name, form), ZOO[name].prompts
    view = square.at(loaded.shape)
    assert view.shape == loaded.shape and view.latent_shape == loaded.latent_shape and view.net is square.net
    assert square.at(square.shape) is square and square.shape.height == square.shape.width
    noise = torch.randn(2, *view.latent_shape, generator=torch.Generator().manual_seed(0))
    assert view.unpack(view.pack(noise)).equal(noise)
    cond, own = view.sized(square.encode(prompts)), loaded.encode(prompts)
    assert cond.tensors.keys() == own.tensors.keys()
    assert all(cond[key].equal(own[key]) for key in cond.tensors)
    t = torch.full((2,), 0.7 * view.denoiser.schedule.t_max)
    with torch.no_grad():
        for guidance in (1.0, 3.0, 0.0):
            made = view.denoiser.x0(noise, t, cond, guidance=guidance)
            assert made.equal(loaded.denoiser.x0(noise, t, own, guidance=guidance))
            # A critic and a student are views of the teacher of teacher.resolution, and see the same.
            assert made.equal(square.denoiser.x0(noise, t, cond, guidance=guidance))
    assert view.sample(noise, cond, 3, 2.0).equal(loaded.sample(noise, own, 3, 2.0))
    solve, other = (one.pair_maker("euler", 2, 2.0)[1] for one in (view, loaded))
    assert solve(noise, cond).equal(other(noise, own))
    assert (view.decode(noise) == loaded.decode(noise)).all()


def test_a_view_has_the_shift_of_its_shape_and_leaves_the_teachers_alone(teachers):
    for name in ("FLUX.1-dev", "Qwen-Image", "FLUX.2-klein"):
        square, wide = teachers(name), teachers(name, "wide")
        before = square.denoiser.schedule.shift, square.pipe.scheduler
        view = square.at(wide.shape)
        assert view.denoiser.schedule.shift == wide.denoiser.schedule.shift != before[0]
        assert view.denoiser.schedule.for_steps(2).shift == wide.denoiser.schedule.for_steps(2).shift
        assert (square.denoiser.schedule.shift, square.pipe.scheduler) == before
        assert view.pipe.scheduler.config.shift == wide.pipe.scheduler.config.shift
        assert square.pipe.scheduler.config.shift != view.pipe.scheduler.config.shift
        assert view.at(square.shape).denoiser.schedule.shift == before[0]


def test_an_unguided_sdxl_is_told_the_size_of_its_row(teachers):
    """The null row of the teacher says teacher.resolution: with it guidance in another shape would be another."""
    square, view = teachers("SDXL"), teachers("SDXL").at(teachers("SDXL", "wide").shape)
    noise = torch.randn(1, *view.latent_shape, generator=torch.Generator().manual_seed(0))
    t, cond = torch.full((1,), 500.0), view.sized(square.encode(["a cat"]))
    told = square.denoiser.null
    with torch.no_grad():
        made = square.denoiser.x0(noise, t, cond, guidance=0.0)
        as_null = square.denoiser.x0(noise, t, told)
        resized = square.denoiser.x0(noise, t, view.sized(told))
    assert made.equal(resized) and (made - as_null).abs().max() > 1e-4


@pytest.mark.parametrize("name", MANY)
def test_heads_judge_images_of_every_shape(name, teachers):
    """Made for the square, of whose map alone a head of convolutions need not pool; of tokens as many as an image has,
    which are those that a teacher loaded for the shape finds."""
    square, wide, taps = teachers(name), teachers(name, "wide"), ZOO[name].taps
    judge = Discriminator(square.denoiser, taps, square.latent_shape)
    counts, cond = [], square.encode(ZOO[name].prompts)
    for teacher in (square, wide):
        x = torch.randn(2, *teacher.latent_shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
        given = x, torch.full((2,), 0.5 * square.denoiser.schedule.t_max), teacher.sized(cond)
        logits = judge.logits(square.denoiser, *given)
        logits.sum().backward()
        assert logits.isfinite().all() and x.grad.abs().sum() > 0
        with torch.no_grad():
            found = [tap_features(one.denoiser, taps, *given) for one in (square, teacher)]
        assert all(ours.equal(theirs) for ours, theirs in zip(*found))
        counts.append(logits.shape[1])
    one_each = len(judge.heads) == counts[0] == counts[1]
    assert one_each or counts[1] * square.shape.area == counts[0] * wide.shape.area


def test_a_head_of_convolutions_pools_maps_of_another_shape():
    """Of its own map it is what it was: each layer once, in their order."""
    torch.manual_seed(0)
    head, (own, wide) = ConvHead(8, 8, 8), (torch.randn(2, 8, 8, 8), torch.randn(2, 8, 8, 12))
    with torch.no_grad():
        assert head(own).shape == head(wide).shape == (2, 1)
        torch.testing.assert_close(head(own), head.layers(own))
        halved, rest = head.layers[:3], head.layers[3:]
        assert halved(wide).shape[2:] == (4, 6)
        torch.testing.assert_close(head(wide), rest(torch.nn.functional.adaptive_avg_pool2d(halved(wide), 4)))
