"""Images of several shapes, measured: which a sample has, what draws it, and what it is compared with."""

import argparse
import json
import weakref
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from fewstep.cli.commands import sizes
from fewstep.data.buckets import Turns
from fewstep.data.images import CaptionedImages, load_images
from fewstep.diffusion.rng import Rng
from fewstep.errors import FewstepError, RecipeError
from fewstep.evaluation import of_run, real, sampling, while_training, yardstick
from fewstep.evaluation.evaluate import evaluate_images
from fewstep.evaluation.features import extract
from fewstep.evaluation.images import ArrayImages, FirstImages, open_images
from fewstep.evaluation.mixture import Mixture, counted, mixture_of
from fewstep.evaluation.models import open_model, record_at
from fewstep.evaluation.of_spec import _cell, _save_grid, _tile, sized
from fewstep.evaluation.prompts import read_prompts
from fewstep.evaluation.real import RealImages, check_enough, check_real, real_images
from fewstep.evaluation.sampling import Job, draw, read_manifest, sample_folder
from fewstep.evaluation.spec import Entry, Spec, load_spec
from fewstep.evaluation.while_training import CHUNK, TrainingDistance
from fewstep.recipe import DataConfig, EvalConfig, SampleConfig, ShapeConfig
from fewstep.shape import Shape

SIZES = [32, [16, 32], [32, 16]]
MIX = Mixture.of(SIZES, [2.0, 1.0, 1.0])
SQUARE, WIDE, TALL = MIX.shapes


def recipe_of(sizes=SIZES, shares=(None, None, None), needs=("images",), **options):
    shapes = [ShapeConfig(size, share) for size, share in zip(sizes, shares)]
    return SimpleNamespace(
        evaluation=EvalConfig(**{"num": 5, **options}),
        data=DataConfig("builtin:emoji", "builtin:emoji", shapes=shapes),
        method=None,
        method_class=SimpleNamespace(needs=lambda _: needs),
    )


# ------------------------------------------------------------------------------------------------- which shape it is
def test_the_shape_of_a_sample_is_its_prompts_and_comes_with_its_share():
    job = Job(1, seed=3, per_prompt=2, mixture=MIX)
    found = [job.shape(i) for i in range(4000)]
    assert found[::2] == found[1::2] == [MIX.at(3, k) for k in range(2000)]
    turns = Turns(3, [0.5, 0.25, 0.25])
    assert found[::2] == [MIX.shapes[turns[k][0]] for k in range(2000)]
    for shape, share in zip(MIX.shapes, (0.5, 0.25, 0.25)):
        assert abs(found.count(shape) / 4000 - share) < 4 * (share * (1 - share) / 2000) ** 0.5
    assert [MIX.at(4, k) for k in range(2000)] != found[::2]
    assert Job(1, size=[16, 32]).shape(7) == WIDE and Job(1).shape(0) is None
    assert "mixture" not in Job(1).plain() and json.loads(json.dumps(job.plain()))["mixture"] == MIX.plain()


@pytest.mark.parametrize(
    "sizes, shares",
    [
        ([], None),
        ([32, 32], None),
        ([32, [16, 0]], None),
        ([32, 16], [1]),
        ([32, 16], [1, 0]),
        ([32, "a"], None),
        ([32, 16.5], None),
        ([32, None], None),
        ([32, [16]], None),
        ([32, [16, 16, 16]], None),
        ([32, 16], [True, 1]),
        ([32, 16], 3),
        (32, None),
    ],
)
def test_shapes_that_say_nothing_are_refused(sizes, shares):
    with pytest.raises(FewstepError, match=r"expected sizes in pixels, each another, and a share"):
        Mixture.of(sizes, shares)
    if sizes:
        with pytest.raises(FewstepError, match=r"expected sizes in pixels, each another, and a share"):
            Mixture.recorded({"shapes": sizes, "shares": shares})  # of a damaged export


def test_a_recipe_is_measured_with_the_shares_of_its_iterations():
    images = CaptionedImages(list("abcdef"), np.zeros((3, 40, 40, 3), np.uint8))
    assert mixture_of(recipe_of([32, 16], (None, None)), images).shares == (3.0, 0.0)
    assert mixture_of(recipe_of(shares=(5, 1, 2)), images).shares == (5.0, 1.0, 2.0)
    assert mixture_of(recipe_of(needs=()), images).shares == (1.0, 1.0, 1.0)
    assert mixture_of(recipe_of(), None).shares == (1.0, 1.0, 1.0)
    assert mixture_of(recipe_of([], ()), images) is None


# --------------------------------------------------------------------------------------------------------- drawing
@pytest.fixture
def prompts(tmp_path):
    (tmp_path / "p.txt").write_text("".join(f"thing {i}\n" for i in range(9)))
    return read_prompts(tmp_path / "p.txt")


@pytest.mark.parametrize("name", ["SDXL", "FLUX.1-dev"])
def test_each_sample_is_what_the_stock_call_makes_of_its_shape(name, teachers, prompts, tmp_path):
    """Flux's times are shifted by the number of tokens of each shape, SDXL is told the size."""
    source = str(teachers(name).source)
    mixture = Mixture.of([32, [32, 48]])
    job = Job(2, guidance=1.0, mixture=mixture)
    sample_folder(open_model(source), prompts, job, tmp_path / "a", batch_size=2, speed_runs=0)
    drawn = open_images(tmp_path / "a")
    assert {Shape(*size) for size in drawn.sizes} == {*mixture.shapes}
    shifts = set()
    for i, text in enumerate(prompts.texts):
        shape = mixture.at(0, i)
        alone = open_model(source, size=shape.said)
        one = Job(2, guidance=1.0, size=shape.said)
        call = alone.prepare(2, "own", 1.0) | {"height": shape.height, "width": shape.width}
        expected = draw(alone, [text], [i], one, call)[0].astype(int)
        (found,) = FirstImages(drawn, 1, after=i).batches(1)
        assert abs(found[0].numpy().astype(int) - expected).max() <= 1
        shifts.add(alone.scheduler.config.get("shift"))
    assert len(shifts) == (2 if name.startswith("FLUX") else 1)


def test_a_folder_of_several_shapes_goes_on_as_it_began(tiny_sdxl, prompts, tmp_path):
    model, job = open_model(str(tiny_sdxl)), Job(1, guidance=1.0, mixture=MIX)
    for folder in ("a", "b"):
        sample_folder(model, prompts, job, tmp_path / folder, batch_size=2, speed_runs=1)
        if folder == "b":
            for i in (0, 3, 8):
                (tmp_path / "b" / f"{i:06d}.png").unlink()
            sample_folder(model, prompts, job, tmp_path / folder, batch_size=2, speed_runs=0)
    for i in range(9):
        name = f"{i:06d}.png"
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert read_manifest(tmp_path / "a")["run"]["mixture"] == MIX.plain()
    with pytest.raises(FewstepError, match="holds the images of another run"):
        sample_folder(model, prompts, replace(job, mixture=Mixture.of(SIZES)), tmp_path / "a")
    with pytest.raises(FewstepError, match=r"--size \[17, 32\]: expected a multiple of 8"):
        sample_folder(model, prompts, replace(job, mixture=Mixture.of([32, [17, 32]])), tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_speed_is_measured_in_the_shape_of_the_first_sample(tiny_sdxl, prompts, tmp_path, monkeypatch):
    """As the note of a table says."""
    monkeypatch.setattr(sampling, "measure_speed", lambda drawn, *_: {"drawn": drawn().shape})
    model, seeds = open_model(str(tiny_sdxl)), {MIX.at(seed, 0): seed for seed in range(20)}
    for shape, seed in seeds.items():
        job = Job(1, seed=seed, mixture=MIX)
        sample_folder(model, prompts, job, tmp_path / str(shape), num=2, speed_runs=1)
        assert read_manifest(tmp_path / str(shape))["speed"]["drawn"] == [1, *shape, 3]
    assert {*seeds} == {*MIX.shapes}


def test_a_model_of_another_shape_has_the_fixed_noise_of_this_one(tiny_sdxl):
    call = {"num_inference_steps": 1, "height": 32, "width": 32}
    model = open_model(str(tiny_sdxl))
    model.record = {"call": call, "latent_shape": [4, 16, 16], "noise": "fixed"}
    assert model.at(WIDE).record["latent_shape"] == [4, 8, 16] and model.record["latent_shape"] == [4, 16, 16]


def test_fixed_noise_has_the_latents_of_each_shape():
    call = {"height": 32, "width": 32}
    plain = record_at({"call": call, "latent_shape": [4, 16, 16]}, WIDE)
    assert plain["latent_shape"] == [4, 8, 16] and plain["call"] is call
    packed = {"call": call, "latent_shape": [64, 16], "given_shape": [16, 8, 8]}
    found = record_at(packed, Shape(32, 48))
    assert found["latent_shape"] == [96, 16] and found["given_shape"] == [16, 8, 12]
    assert record_at({"call": {}, "latent_shape": [4, 16, 16]}, WIDE)["latent_shape"] == [4, 16, 16]


def test_an_option_of_sizes_has_their_shares():
    assert sizes("32:2,16x32:0.5") == {"sizes": [32, [16, 32]], "shares": [2.0, 0.5]}
    assert sizes("32,16x32") == {"sizes": [32, [16, 32]]} and sizes("16x32") == [16, 32]
    with pytest.raises(argparse.ArgumentTypeError, match="expected a share behind each size, or behind none"):
        sizes("32:2,16x32")


def test_mixtures_that_draw_the_same_are_equal(tmp_path):
    """Of shares in proportion, such as of two students of twice as many images; not of others, nor in another order."""
    mixture = Mixture.of(SIZES, [10.0, 8.0, 6.0])
    assert mixture == Mixture.of(SIZES, [5.0, 4.0, 3.0]) and hash(mixture) == hash(
        Mixture.of(SIZES, [5, 4, 3])
    )
    assert mixture != Mixture.of(SIZES, [5.0, 4.0, 4.0]) and mixture != Mixture.of(
        SIZES[::-1], [6.0, 8.0, 10.0]
    )
    assert mixture.plain()["shares"] == [10.0, 8.0, 6.0]


# ------------------------------------------------------------------------------------------------------ a table's rows
def test_a_file_of_a_table_says_shapes_or_a_size(tmp_path, prompts):
    text = f"prompts: {tmp_path / 'p.txt'}\nmodels: [{{name: a, pipeline: b}}]\n"
    shapes = "shapes: [{size: 32, share: 3}, {size: [16, 32], share: 1}]\n"
    (tmp_path / "s.yaml").write_text(text + shapes)
    assert load_spec(tmp_path / "s.yaml").mixture == Mixture.of([32, [16, 32]], [3, 1])
    for more, said in (
        (shapes + "size: 32\n", r"size is 32 beside shapes, expected one of them"),
        ("shapes: [32, 16]\n", r"shapes is \[32, 16\], expected mappings of size and share"),
        ("shapes: [{size: 32.5}, {size: 16}]\n", r"expected sizes in pixels, each another"),
        ("shapes: [{size: 32, shares: 1}]\n", r"expected mappings of size and share"),
        ("shapes: [{size: 32, share: 1}, {size: 16}]\n", r"a share above 0 for each or for none"),
    ):
        (tmp_path / "s.yaml").write_text(text + more)
        with pytest.raises(FewstepError, match=said):
            load_spec(tmp_path / "s.yaml")


def test_rows_have_the_shapes_that_students_were_trained_in(tmp_path):
    def student(name, **more):
        record = {"kind": "lora", "num_steps": 1, "call": {"height": 32, "width": 32}, **more}
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "fewstep.json").write_text(json.dumps(record))
        return Entry(name, "nothing", lora=str(tmp_path / name))

    several = student("a", **MIX.plain())
    assert sized(Spec("p", (several, student("b", **MIX.plain())))).mixture == MIX
    assert sized(Spec("p", (student("c", shapes=SIZES),))).mixture == Mixture.of(
        SIZES
    )  # of before shares were kept
    assert sized(Spec("p", (several,), size=16)).mixture is None
    with pytest.raises(
        FewstepError, match=r"students of different sizes in pixels \(a 32x32 0.5, .*, d 32\)"
    ):
        sized(Spec("p", (several, student("d"))))


def test_a_protocol_of_one_size_refuses_several_before_anything_is_drawn(
    prompts, pool, tmp_path, monkeypatch
):
    one = SimpleNamespace(name="one", image_size=32, clip=None, get_extractor=lambda *_: pool)
    monkeypatch.setattr(yardstick.protocols, "load", lambda _: one)
    spec = Spec(str(tmp_path / "p.txt"), (Entry("a", "b"),), shapes=tuple(MIX.items()), protocol="one")
    with pytest.raises(
        FewstepError, match=r"has images of 16 x 32, 32 x 16, but the protocol one wants 32 x 32"
    ):
        yardstick.Yardstick(spec, prompts, "cpu")


def test_grids_show_each_image_in_its_own_proportions(tmp_path):
    spec = Spec("p", (Entry("a", "b"),), shapes=tuple(Mixture.of([[600, 300], [100, 200]]).items()))
    assert _tile(spec) == (256, 200) and _cell(spec) == {"cell": [256, 200]}
    (tmp_path / "images").mkdir()
    for i, size in enumerate([(300, 600), (200, 100)]):
        Image.new("RGB", size, (0, 0, 0)).save(tmp_path / "images" / f"{i}.png")
    asked = SimpleNamespace(spec=spec, cut=2, captions=["a", "b"])
    _save_grid(tmp_path / "grid.png", open_images(tmp_path / "images"), asked)
    grid = np.asarray(Image.open(tmp_path / "grid.png").convert("L"))
    black = [(grid[:, x : x + 200] < 128) for x in (6, 212)]
    rows, columns = zip(*[np.nonzero(one) for one in black])
    assert [(np.ptp(a) + 1, np.ptp(b) + 1) for a, b in zip(rows, columns)] == [(256, 128), (100, 200)]
    assert columns[0].min() == 36 and rows[1].min() - rows[0].min() == 78  # in the middle of their cells


# ----------------------------------------------------------------------------------------------------- real images
def pictures(folder, *sizes, max_bad=0.5):
    """Files of these (height, width), each of one grey: its number times five; None is no picture."""
    folder.mkdir(exist_ok=True)
    for i, size in enumerate(sizes):
        path = folder / f"{i:03d}.png"
        path.with_suffix(".txt").write_text(f"caption {i}")
        path.write_bytes(b"none") if size is None else Image.new("RGB", size[::-1], (5 * i,) * 3).save(path)
    return load_images(str(folder), max_bad=max_bad)


FORMS = [(40, 40), (16, 32), (36, 16), (20, 40), (33, 40), (15, 30), (32, 16), None, (64, 64)]


def greys(source):
    return [(one.shape[0], one.shape[1], int(one[0, 0, 0]) // 5) for b in source.batches(3) for one in b]


def test_samples_of_several_shapes_are_compared_with_the_images_of_all_of_them(tmp_path):
    """Cropped to their shapes, which follow each other; one is too small and one is none."""
    images = pictures(tmp_path / "i", *FORMS)
    mixture = mixture_of(recipe_of(), images)
    assert mixture.shares == (4.0, 3.0, 2.0)  # what has no size counts with the first
    used, source = real_images(images, 32, DataConfig("p", "i"), mixture)
    assert greys(source) == [
        *((32, 32, i) for i in (0, 4, 8)),
        *((16, 32, i) for i in (1, 3)),
        *((32, 16, i) for i in (2, 6)),
    ]
    assert used.captions == [f"caption {i}" for i in (0, 4, 8, 1, 3, 2, 6)] and not source.remarks
    assert source.sizes == {(32, 32), (16, 32), (32, 16)} and len(source) == 7
    assert [len(batch) for batch in source.batches(2)] == [2, 1, 2, 2]
    with pytest.raises(RecipeError, match=r"2 of 9 files cannot be read: .*raise data.max_bad"):
        real_images(replace(images, max_bad=0.2), 32, DataConfig("p", "i"), mixture)
    odd = Mixture.of([*SIZES, [2, 64]])
    with pytest.raises(
        RecipeError, match=r"^data.shapes: \[2, 64\]: none of the 9 images .* and can be used"
    ):
        real_images(images, 32, DataConfig("p", "i"), odd)


def test_the_reference_is_mixed_as_the_samples_are(tmp_path):
    """Of given shares: none is taken twice, and which are left is of the seed alone."""
    images = pictures(tmp_path / "i", *[(40, 40)] * 6, *[(16, 32)] * 4, (32, 16), (64, 32))
    data, mixture = DataConfig("p", "i"), Mixture.of(SIZES, [2.0, 2.0, 1.0])
    used, source = real_images(images, 32, data, mixture, seed=1)
    found = greys(source)
    assert [found.count(one) for one in found] == [1] * 10
    assert [sum(one[:2] == shape for one in found) for shape in mixture.shapes] == [4, 4, 2]
    assert used.captions == [f"caption {i}" for *_, i in found]
    said = (
        "of 12 images of i the reference holds 4 of 32x32, 4 of 16x32, 2 of 32x16, as many as the shares say"
    )
    assert source.remarks == [said]
    assert greys(real_images(images, 32, data, mixture, seed=1)[1]) == found
    assert len({tuple(greys(real_images(images, 32, data, mixture, seed=s)[1])) for s in range(5)}) > 1


def test_the_reference_is_filled_of_those_that_can_be_used(tmp_path):
    images = pictures(tmp_path / "i", *[(32, 32)] * 4, *[(16, 32)] * 4)
    for i in (5, 7):
        path = tmp_path / "i" / f"{i:03d}.png"
        path.write_bytes(path.read_bytes()[:-30])  # its header is whole
    mixture = Mixture.of([32, [16, 32]], [1.0, 1.5])
    found = greys(real_images(images, 32, DataConfig("p", "i"), mixture)[1])
    assert found[1:] == [(16, 32, 4), (16, 32, 6)] and found[0][:2] == (32, 32)


def test_the_hash_of_the_reference_is_of_its_pixels_and_their_shapes(tmp_path):
    def hashed(name, sizes, asked):
        images = pictures(tmp_path / name, *sizes)
        return real_images(images, 32, DataConfig("p", "i"), Mixture.of(asked))[1].sha256

    wide, tall = (16, 32), (32, 16)
    first = hashed("a", [wide, tall], [wide, tall])
    assert first == hashed("b", [wide, tall], [wide, tall])
    assert first != hashed("c", [tall, wide], [tall, wide])  # the same bytes in the same order
    Image.new("RGB", tall[::-1], (6, 5, 5)).save(tmp_path / "a" / "001.png")
    images = load_images(str(tmp_path / "a"))
    assert first != real_images(images, 32, DataConfig("p", "i"), Mixture.of([wide, tall]))[1].sha256


def test_features_of_mixed_images_are_of_each_at_its_own_shape(tmp_path, pool):
    """In a folder they come in any order; batches of the network are as of equal ones."""
    rng = np.random.default_rng(0)
    made = [rng.integers(0, 256, (*MIX.at(1, i), 3), dtype=np.uint8) for i in range(40)]
    for i, image in enumerate(made):
        Image.fromarray(image).save(tmp_path / f"{i:02d}.png")
    found = extract(open_images(tmp_path), pool)
    alone = torch.cat([extract(ArrayImages(image[None]), pool) for image in made])
    assert len({image.shape for image in made}) == 3 and (found - alone).abs().max() < 1e-6
    result = evaluate_images(
        open_images(tmp_path), open_images(tmp_path), extractor=pool, metrics=("fd", "kid")
    )
    assert abs(result["metrics"]["FD(pool)"]["value"]) < 1e-6


def test_real_images_are_read_in_a_stream(tmp_path, pool, monkeypatch):
    """However many there are as many are held: what is alive at once does not grow, and each is read three times at
    most, to be looked at, for its features, and to know equal ones."""
    loads, alive, most = [], weakref.WeakSet(), []

    class Held:
        """Of arrays, which are equal to nothing."""

    def counting(self, record, size):
        shape = Shape.of(size)
        image = np.full((*shape, 3), record % 251, np.uint8)
        token = Held()
        weakref.finalize(image, alive.discard, token)
        kept[id(token)] = token
        weakref.finalize(image, kept.pop, id(token))
        alive.add(token)
        loads.append(record)
        most.append(len(alive))
        return image

    kept = {}
    monkeypatch.setattr(CaptionedImages, "load", counting)
    peaks = []
    for count in (200, 800):
        loads.clear(), most.clear(), alive.clear()
        captions = [f"{i}" for i in range(count)]
        images = CaptionedImages(captions, np.zeros((count, 8, 8, 3), np.uint8))
        _, source = real_images(images, 16, DataConfig("p", "i"))
        assert isinstance(source, RealImages) and len(source) == count
        fake = ArrayImages(np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3), dtype=np.uint8))
        asked = {"prompted": list(range(8)), "metrics": ("fd", "kid", "retrieval")}
        evaluate_images(source, fake, extractor=pool, **asked)
        peaks.append(max(most))
        assert len(loads) == 3 * count
    assert peaks[1] <= peaks[0] + 8 and peaks[1] <= 3 * real.BLOCK


def test_images_that_are_too_small_to_compare_with_are_refused_by_their_headers(tmp_path, monkeypatch):
    images = pictures(tmp_path / "a", *[(8, 8)] * 4)
    with pytest.raises(
        RecipeError, match=r"4 of 4 files cannot be read: 000.png \(8x8 pixels, below 16; data.up"
    ):
        check_real(images, 16, None)
    with pytest.raises(
        RecipeError, match=r"0 of 4 images can be used at 16x16 pixels, .* expected at least 2"
    ):
        check_real(pictures(tmp_path / "a", *[(8, 8)] * 4, max_bad=1.0), 16, None)
    check_real(replace(images, upscale=True), 16, None)
    check_real(
        pictures(tmp_path / "f", (32, 32), (16, 32), (32, 16), max_bad=0.0), 32, MIX
    )  # each by its own shape
    check_real(pictures(tmp_path / "b", (8, 8), (16, 16), (20, 20)), 16, None)
    with pytest.raises(RecipeError, match=r"1 of 3 images can be used"):
        check_real(pictures(tmp_path / "c", (8, 8), (16, 16), (8, 20), max_bad=1.0), 16, None)
    with pytest.raises(RecipeError, match=r"1 of 2 images can be used"):
        check_real(pictures(tmp_path / "e", None, (16, 16), max_bad=1.0), 16, None)
    mixed = pictures(tmp_path / "d", (32, 32), (15, 32), (32, 15), (40, 40), max_bad=1.0)
    with pytest.raises(
        RecipeError, match=r"^data.shapes: \[16, 32\]: none of the 4 images .* and can be used"
    ):
        check_real(mixed, 32, MIX)
    assert mixed.left_out.reasons.keys() == {1, 2}


def test_too_few_images_to_compare_with_are_refused_before_training_on_them(tmp_path):
    """As few headers are read as it takes; what is left out already does not count."""
    alone = pictures(tmp_path / "a", (32, 32), (8, 32), None)
    with pytest.raises(RecipeError, match=r"1 of 3 images can be used at 16x16 pixels, to compare samples"):
        check_enough(alone, 16)
    check_enough(replace(alone, upscale=True), 16)
    images = pictures(tmp_path / "b", (32, 32), (16, 16), (16, 16))
    (tmp_path / "b" / "002.png").unlink()
    check_enough(images, 16)
    images.left_out.reasons[0] = "000.png", "cannot be decoded"
    Image.new("RGB", (8, 8)).save(tmp_path / "b" / "002.png")
    with pytest.raises(RecipeError, match=r"1 of 3 images can be used"):
        check_enough(images, 16)
    check_enough(CaptionedImages(["a", "b"], np.zeros((2, 8, 8, 3), dtype=np.uint8)), 16)


def test_named_prompts_stand_where_samples_have_the_shape_of_their_image(tmp_path):
    forms = [(32, 32)] * 8 + [(16, 32)] * 6 + [(32, 16)] * 6
    images = pictures(tmp_path / "i", *forms)
    recipe = recipe_of(named=9, seed=2)
    mixture = mixture_of(recipe, images)
    used, source = real_images(images, 32, recipe.data, mixture, 2)
    lines = of_run._asked(recipe, ["a", "b"], used, mixture, source.shapes)
    assert len(lines) == 14 and [("real" in line) for line in lines] == [False] * 5 + [True] * 9
    for i, line in enumerate(lines[5:], 5):
        assert source.shapes[line["real"]] == mixture.at(2, i)
        assert used.captions[line["real"]] == line["prompt"]
    assert len({line["real"] for line in lines[5:]}) == 9
    few = of_run._asked(recipe_of(named=99, seed=2), ["a"], used, mixture, source.shapes)
    assert 5 + 2 < len(few) < 5 + 20 and len({line.get("real") for line in few[5:]}) == len(few) - 5


class Copies:
    """A teacher of any shape whose latents are the images."""

    resolution = 32

    def at(self, shape):
        def latents(pixels, _generator):
            assert pixels.shape[1:3] == shape
            return pixels

        return SimpleNamespace(resolution=shape.said, latents=latents, decode=lambda latents: latents.numpy())


def test_images_through_the_vae_have_the_shapes_of_the_samples(tmp_path):
    images = pictures(tmp_path / "i", *[(32, 32)] * 4 + [(16, 32)] * 2 + [(32, 16)] * 2)
    recipe = recipe_of(num=12, named=4)
    mixture = mixture_of(recipe, images)
    used, source = real_images(images, 32, recipe.data, mixture)
    asked = of_run._asked(recipe, ["a"], used, mixture, source.shapes)
    of_run._reconstruct(Copies(), used, asked, 0, tmp_path / "ceiling", mixture, source.shapes)
    made = greys(open_images(tmp_path / "ceiling"))
    assert [Shape(*one[:2]) for one in made] == [mixture.at(0, i) for i in range(len(asked))]
    expected = greys(source)
    assert {*made} <= {*expected}
    for line, one in zip(asked[12:], made[12:]):
        assert one == expected[line["real"]]


def test_a_run_without_an_export_is_measured_in_its_shapes_too(tmp_path, monkeypatch):
    """As ``fewstep floor`` measures what a student will have to beat."""
    seen = []
    monkeypatch.setattr(of_run, "run_spec", lambda spec, *_, **__: (seen.append(spec), {"rows": []})[1])
    images = pictures(tmp_path / "i", *[(32, 32)] * 4 + [(16, 32)] * 2 + [(32, 16)] * 2)
    recipe = recipe_of(shares=(1, 1, 2), seed=5, teacher_steps=0, floor_steps=[2], floor_solvers=["dpm++"])
    recipe.teacher = SimpleNamespace(path="builtin:nothing", weights=dict)
    teacher = SimpleNamespace(resolution=32, device="cpu")
    of_run.evaluate_run(recipe, tmp_path / "run", teacher, ["a"], images)
    (spec,) = seen
    assert spec.mixture == Mixture.of(SIZES, [1, 1, 2]) and spec.size is None and spec.seed == 5
    assert len(spec.real) == 4  # one, one and two of the three shapes
    of_run.evaluate_run(replace_data(recipe), tmp_path / "run", teacher, ["a"], images)
    assert seen[1].mixture is None and seen[1].size == 32


def replace_data(recipe):
    """Of one shape."""
    return SimpleNamespace(**{**vars(recipe), "data": replace(recipe.data, shapes=[])})


# ------------------------------------------------------------------------------------------------- while it trains
def test_distances_while_training_are_drawn_in_all_shapes(teachers, tmp_path):
    pytest.importorskip("torchmetrics")
    teacher = teachers("SDXL")
    recipe = recipe_of(extractor="effnet-lite0@32")
    recipe.samples = SampleConfig(distance=21)
    prompts = [f"thing {i}" for i in range(4)]
    images = pictures(tmp_path / "i", *[(32, 32)] * 3 + [(16, 32)] * 2 + [(32, 16)] * 2)
    made = [TrainingDistance(recipe, teacher, prompts, one, MIX) for one in (images, None)]  # of two ranks
    told = [[(chunk.teacher.shape, len(chunk.cond)) for chunk in one.chunks] for one in made]
    assert told[0] == told[1] and sum(count for _, count in told[0]) == 21
    drawn = [MIX.at(recipe.samples.seed, i) for i in range(21)]
    for shape in MIX.shapes:
        counts = [count for one, count in told[0] if one == shape]
        assert sum(counts) == drawn.count(shape) and max(counts) <= CHUNK
    for chunk in made[0].chunks:
        assert chunk.cond["time_ids"][:, :2].tolist() == [list(chunk.teacher.shape)] * len(chunk.cond)
    shapes = []

    def sample(noise, cond, _):
        shapes.append((noise.shape, len(cond)))
        return noise

    student = SimpleNamespace(sample=sample)
    (first,), (again,) = (made[0].measure(student).values() for _ in range(2))
    assert first == again > 0 and made[1].measure(student) == {}
    latents = [(len(c.cond), *c.teacher.latent_shape) for c in made[0].chunks]
    assert shapes == [(size, size[0]) for size in latents] * 3
    alone = TrainingDistance(recipe, teacher, prompts, None)
    assert [(c.teacher.shape, len(c.cond)) for c in alone.chunks] == [(SQUARE, 8), (SQUARE, 8), (SQUARE, 5)]


def test_distances_while_training_ask_each_prompt_in_the_shape_of_its_place(teachers, tmp_path, monkeypatch):
    """And are to the reference that the evaluation has at the end."""
    pytest.importorskip("torchmetrics")
    teacher, asked, seen = teachers("SDXL"), [], []
    monkeypatch.setattr(type(teacher), "sized", lambda *_: None)
    monkeypatch.setattr(while_training, "frechet_metric", lambda *_: None)
    monkeypatch.setattr(while_training, "real_images", lambda *told: seen.append(told) or (None, None))
    recipe = recipe_of(extractor="effnet-lite0@32", seed=7)
    recipe.samples = SampleConfig(distance=9, seed=2)
    prompts, images = [f"thing {i}" for i in range(12)], pictures(tmp_path / "i", (32, 32))
    monkeypatch.setattr(
        teacher, "encode", lambda some: asked.append(some) or SimpleNamespace(to=lambda _: some)
    )
    TrainingDistance(recipe, teacher, prompts, images, MIX)
    order = Rng(2, "distance").permutation(12).tolist()
    drawn = [MIX.at(2, i) for i in range(9)]
    expected = [[prompts[order[i]] for i in range(9) if drawn[i] == shape] for shape in dict.fromkeys(drawn)]
    assert asked == expected and len(asked) > 1
    assert seen == [(images, teacher.resolution, recipe.data, MIX, 7)]


def test_counts_in_words():
    assert counted({"32x32": 3, "16x32": 1}) == "3 of 32x32, 1 of 16x32" and str(MIX).startswith(
        "32x32 0.5, 16x32"
    )
