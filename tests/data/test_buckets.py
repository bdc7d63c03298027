"""Images of several shapes: which image belongs to which, and which shape an iteration has."""

import io
import json
import tarfile
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from fewstep import recipe as recipes
from fewstep.cli import main
from fewstep.data import buckets
from fewstep.data.batches import Batches
from fewstep.data.buckets import BLOCK, Bucket, Part, Turns, homes_of, nearest, shares_of, split
from fewstep.data.cache import encode_images, images_folder, sizes_of
from fewstep.data.images import CaptionedImages, load_images
from fewstep.data.left_out import LeftOut
from fewstep.data.live import LiveImages
from fewstep.data.shards import Member
from fewstep.diffusion.cond import Cond, drop_rows, unconditional
from fewstep.diffusion.rng import Rng
from fewstep.errors import RecipeError
from fewstep.pictures import _told_behind, read_picture, size_of
from fewstep.process import Process
from fewstep.recipe import ShapeConfig
from fewstep.runs.library import load_recipe
from fewstep.runs.shapes import parts_of
from fewstep.shape import Shape

WIDE, TALL, SQUARE = Shape(16, 32), Shape(32, 16), Shape(32, 32)
SHAPES = [SQUARE, WIDE, TALL]


@pytest.mark.parametrize(
    "size, expected",
    [
        ((100, 100), SQUARE),
        ((100, 141), SQUARE),  # nearer to 1 than to 2, by their quotient
        ((100, 142), WIDE),
        ((142, 100), TALL),
        ((141, 100), SQUARE),
        ((10, 999), WIDE),
        ((999, 10), TALL),
    ],
)
def test_an_image_belongs_to_the_shape_of_the_nearest_proportions(size, expected):
    for order in (SHAPES, SHAPES[::-1]):
        assert order[nearest(Shape(*size), order)] == expected


def test_of_the_same_proportions_the_largest_that_the_image_covers():
    shapes = [Shape(64, 96), Shape(128, 192), Shape(32, 48)]
    assert [nearest(Shape(h, h * 3 // 2), shapes) for h in (20, 32, 64, 100, 128, 500)] == [2, 2, 0, 0, 1, 1]


def test_every_turn_is_drawn_with_its_share_and_counted_among_its_own():
    turns, shares, n = Turns(3, [1.0, 2.0, 5.0]), (1 / 8, 2 / 8, 5 / 8), 3 * BLOCK
    found = [turns[i] for i in range(n)]
    counts = [0, 0, 0]
    for turn, earlier in found:
        assert earlier == counts[turn]
        counts[turn] += 1
    for count, share in zip(counts, shares):
        assert abs(count / n - share) < 4 * (share * (1 - share) / n) ** 0.5
    again = Turns(3, [2.0, 4.0, 10.0])
    assert [again[i] for i in (2 * BLOCK + 7, 5, n - 1)] == [found[i] for i in (2 * BLOCK + 7, 5, n - 1)]
    for drawn in (buckets._drawn, buckets._before):
        drawn.cache_clear()  # as in another process
    assert [turns[i] for i in range(n)] == found
    first = Rng(3, "shapes", 0).choice(BLOCK, [0, 1, 2], [1 / 8, 2 / 8, 5 / 8])
    assert [turn for turn, _ in found[:BLOCK]] == first.tolist()
    other = Turns(4, [1.0, 2.0, 5.0])
    assert [other[i] for i in range(n)] != found
    assert [Turns(3, [4.0])[i] for i in (0, 5, 9999)] == [(0, 0), (0, 5), (0, 9999)]


def test_shares_are_those_given_or_as_the_images_are():
    assert shares_of([3.0, 1.0], [None, None]) == [3.0, 1.0]
    assert shares_of([None, None], [None, None]) == [1.0, 1.0]
    assert shares_of([None, None], [Rows(5), Rows(2)]) == [5.0, 2.0]
    assert shares_of([3.0, 1.0], [Rows(5), Rows(2)]) == [3.0, 1.0]


class Rows:
    """Numbers from ``first`` on, as latents of a shape and as conditions."""

    def __init__(self, n, first=0, **more):
        self.n, self.first, self.more = n, first, more

    def __len__(self):
        return self.n

    def rows(self, index):
        return {
            "latents": (self.first + index).float().view(-1, 1, 1, 1),
            "id": self.first + index,
            **self.more,
        }


def batches(seed=0, batch_size=2, per_iteration=3):
    """Images 0 to 4 are wide, 5 to 11 tall, and captions are numbered from 100 on."""

    def sized(shape):
        return lambda cond: Cond({**cond.tensors, "time_ids": torch.tensor([[*shape]]).expand(len(cond), -1)})

    def told(name, latents, of, shape, share):
        return Bucket((4, *shape), Part(latents, of), name, share, sized(shape))

    several = [
        told("images 2x4", Rows(5), torch.arange(5), (2, 4), 1.0),
        told("images 4x2", Rows(7, first=5), torch.arange(5, 12), (4, 2), 3.0),
    ]
    captions, prompts = Rows(12, first=100), Rows(40, first=1000)
    options = {"batch_size": batch_size, "per_iteration": per_iteration, "seed": seed}
    return Batches(prompts, (4, 3, 3), captions=captions, buckets=several, **options)


def test_an_iteration_has_one_shape_its_images_and_what_it_is_told():
    data, seen = batches(), {(2, 4): [], (4, 2): []}
    for iteration in range(60):
        parts = [data.batch(iteration, micro) for micro in range(3)]
        (shape,) = {part.shape for part in parts}
        assert shape[:2] == (2, 4)
        for part in parts:
            sides = shape[2:]
            for cond in (part.cond, part.real_cond, part.host["cond"], part.host["real_cond"]):
                assert cond["time_ids"].tolist() == [list(sides)] * 2
            real = part.real.flatten().long()
            assert part.real_cond["id"].tolist() == (real + 100).tolist()
            assert bool((real < 5).all()) == (sides == (2, 4)) and bool((real >= 5).all()) == (
                sides == (4, 2)
            )
            seen[sides] += real.tolist()
    for sides, (n, first) in {(2, 4): (5, 0), (4, 2): (7, 5)}.items():
        found = seen[sides]
        whole = len(found) // n * n  # every epoch of a shape has each of its images once
        assert whole > n
        for begin in range(0, whole, n):
            assert sorted(found[begin : begin + n]) == list(range(first, first + n))
    assert data.rows == {"prompts": 40, "images 2x4": 5, "images 4x2": 7}


def test_batches_are_a_function_of_their_number_alone():
    """In any order, and by any number of processes: rank r of w has micro-batch i w + r."""
    data, order = batches(), [(i, m) for i in range(12) for m in range(3)]
    plain = {key: data.batch(*key) for key in order}
    for key in reversed(order):
        one, other = batches().batch(*key), plain[key]
        assert one.shape == other.shape and one.real.equal(other.real) and one.index.equal(other.index)
        assert one.rng.normal(3).equal(other.rng.normal(3))


def test_one_shape_is_what_there_was_before_there_were_several():
    """Orders of images and prompts, so that runs from before go on with the bits they would have had."""
    prompts, latents = Rows(9), Rows(6)
    data = Batches(
        prompts, (4, 2, 2), latents=latents, captions=Rows(6), batch_size=2, per_iteration=1, seed=5
    )
    order = Rng(5, "images", 0).permutation(6)
    assert data.batch(1, 0).real.flatten().long().tolist() == order[2:4].tolist()
    assert data.rows == {"prompts": 9, "images": 6} and data.batch(0, 0).shape == (2, 4, 2, 2)


# ------------------------------------------------------------------------------------------------------- real images
@pytest.fixture
def pictures(tmp_path):
    """Six pictures, of which two are wide, one tall, one of those too small for its shape, and one no picture."""
    sizes = {"a": (40, 90), "b": (64, 64), "c": (90, 40), "d": (14, 28), "e": (50, 60), "f": (33, 66)}
    with (tmp_path / "metadata.jsonl").open("w") as table:
        for i, (name, (height, width)) in enumerate(sizes.items()):
            Image.new("RGB", (width, height), (40 * i, 0, 0)).save(tmp_path / f"{name}.png")
            table.write(json.dumps({"file_name": f"{name}.png", "text": f"caption {name}"}) + "\n")
    return tmp_path


def test_pictures_are_sorted_by_their_headers_which_are_read_once(pictures, monkeypatch):
    images = load_images(str(pictures), max_bad=0.5)
    assert sizes_of(images) == [(40, 90), (64, 64), (90, 40), (14, 28), (50, 60), (33, 66)]
    monkeypatch.setattr("fewstep.data.cache.size_at", None)  # is not asked again
    parts = split(images, sizes_of(images), SHAPES)
    assert [part.captions for part in parts] == [
        ["caption b", "caption e"],
        ["caption a", "caption d", "caption f"],
        ["caption c"],
    ]
    assert [part.of.tolist() for part in parts] == [[1, 4], [0, 3, 5], [2]]
    assert split(images, sizes_of(images), SHAPES) is parts
    others = split(images, sizes_of(images), SHAPES[::-1])
    assert [part.of.tolist() for part in others] == [[2], [0, 3, 5], [1, 4]]


def test_sizes_are_read_again_of_files_that_have_changed(pictures):
    assert sizes_of(load_images(str(pictures)))[1] == (64, 64)
    Image.new("RGB", (64, 128)).save(pictures / "b.png")
    assert sizes_of(load_images(str(pictures)))[1] == (128, 64)


def test_equal_images_of_two_batches_have_draws_of_their_own(tmp_path, teachers):
    for i in range(4):
        Image.new("RGB", (32, 32), (200, 90, 10)).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(f"{i}")
    store = encode_images(teachers("SDXL"), load_images(str(tmp_path)), batch_size=2, quiet=True)
    latents = store.rows(torch.arange(4))["latents"]
    assert not [(a, b) for a in range(4) for b in range(a) if latents[a].equal(latents[b])]


def test_a_node_with_a_disk_of_its_own_encodes_what_others_have_encoded_on_theirs(
    pictures, teachers, monkeypatch
):
    monkeypatch.setattr("fewstep.data.store.SHARD", 2)
    monkeypatch.setattr(Process, "barrier", lambda _: None)
    images = load_images(str(pictures), upscale=True)
    store = encode_images(teachers("SDXL"), images, quiet=True, process=Process(rank=1, world=2))
    assert len(store.files) == 3 and store.rows(torch.arange(6))["row"].tolist() == list(range(6))


def test_a_turned_photo_belongs_to_the_shape_that_it_shows(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (80, 40)).save(tmp_path / "a.jpg", exif=exif)
    (tmp_path / "a.txt").write_text("a")
    images = load_images(str(tmp_path))
    assert sizes_of(images) == [(80, 40)] and images.load(0, [32, 16]).shape == (32, 16, 3)


def png(size, behind=False):
    """Of a photo that is turned, as its header says or what follows its pixels."""
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6
    Image.new("RGB", size).save(file, "PNG", exif=exif)
    data = file.getvalue()
    begin = data.index(b"eXIf") - 4
    end = begin + 12 + int.from_bytes(data[begin : begin + 4], "big")
    return data[:begin] + data[end:-12] + data[begin:end] + data[-12:] if behind else data


def test_a_header_tells_the_size_and_no_pixel_is_decoded(monkeypatch):
    plain, turned, late = io.BytesIO(), io.BytesIO(png((80, 40))), io.BytesIO(png((80, 40), behind=True))
    Image.new("RGB", (80, 40)).save(plain, "PNG")
    assert read_picture(io.BytesIO(late.getvalue())).size == size_of(late) == (40, 80)
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", lambda _: pytest.fail("decoded"))
    assert size_of(plain) == (80, 40) and size_of(turned) == (40, 80)
    assert size_of(io.BytesIO(plain.getvalue()[:-30])) == (80, 40)
    with Image.open(plain) as image:
        here = image.fp.tell()
        assert not _told_behind(image.fp) and image.fp.tell() == here > 8  # from which pixels are read


def test_a_start_reads_sizes_of_shards_once_and_sorts_images_once(tmp_path, monkeypatch):
    """The index of a shard holds them: whoever starts again reads no picture but those that are looked at."""
    (tmp_path / "s").mkdir()
    with tarfile.open(tmp_path / "s" / "0.tar", "w") as tar:
        for i in range(90):
            file = io.BytesIO()
            Image.new("RGB", [(32, 32), (32, 16), (16, 32)][i % 3], (i, 0, 0)).save(file, "PNG")
            for name, data in ((f"{i:02d}.png", file.getvalue()), (f"{i:02d}.txt", b"text")):
                member = tarfile.TarInfo(name)
                member.size = len(data if i != 7 or name.endswith("txt") else b"none")
                tar.addfile(member, io.BytesIO(data if member.size == len(data) else b"none"))
    opened, shapes = [], [ShapeConfig(32), ShapeConfig([16, 32]), ShapeConfig([32, 16])]
    recipe, teacher = (
        SimpleNamespace(data=SimpleNamespace(shapes=shapes)),
        SimpleNamespace(at=lambda shape: shape),
    )
    open_member = Member.open
    monkeypatch.setattr(Member, "open", lambda self: (opened.append(self.name), open_member(self))[1])
    for _ in range(2):
        opened.clear()
        images = load_images(str(tmp_path / "s"), max_bad=0.5)
        looked = len(opened)
        found = [parts_of(recipe, teacher, images) for _ in range(3)]
        assert len(opened) == looked <= 64 and found[0][0][1] is found[2][0][1]
        assert [shape for shape, _ in found[0]] == SHAPES and [len(part) for _, part in found[0]] == [
            31,
            29,
            30,
        ]
        assert sizes_of(images)[7] is None and sizes_of(images)[8] == (32, 16)
        assert [int(found[0][2][1].load(k, (32, 16))[0, 0, 0]) for k in (0, 3)] == [2, 11]
        monkeypatch.setattr("fewstep.data.shards._read", lambda *_: pytest.fail("indexed again"))
        monkeypatch.setattr("fewstep.data.cache.size_at", None)


def test_a_shape_without_images_is_refused(pictures):
    images = load_images(str(pictures))
    with pytest.raises(
        RecipeError, match=r"^data.shapes: \[16, 160\]: none of the 6 images of .* is nearest"
    ):
        split(images, sizes_of(images), [*SHAPES, Shape(16, 160)])


def test_a_check_says_how_many_images_each_shape_has_before_anything_is_trained(pictures, tmp_path, capsys):
    (pictures / "g.png").write_bytes(b"none")
    with (pictures / "metadata.jsonl").open("a") as table:
        table.write(json.dumps({"file_name": "g.png", "text": "caption g"}) + "\n")
    words = ["data", "check", str(pictures)]
    assert main([*words, "--resolution", "32,16x32,32x16"]) == 2
    said = capsys.readouterr().out.splitlines()
    assert (
        "32x32: 3 images, 1 of no use: 1 cannot be decoded" in said
    )  # what has no size counts with the first
    assert "16x32: 3 images, 1 of no use: 1 too small" in said and "32x16: 1 images, 0 of no use" in said
    assert "d.png: 28x14 pixels, below 32 wide and 16 high; data.upscale would enlarge it" in said
    assert said[-1].endswith("7 images, 2 of no use: 1 cannot be decoded, 1 too small")
    (pictures / "g.png").unlink(), (pictures / "d.png").unlink()
    rows = (pictures / "metadata.jsonl").read_text().splitlines()
    (pictures / "metadata.jsonl").write_text(
        "".join(row + "\n" for row in rows if '"d' not in row and '"g' not in row)
    )
    assert main([*words, "--resolution", "32,16x32,32x16"]) == 0
    assert main([*words, "--resolution", "32,16x32,32x16,160x16"]) == 2
    said = capsys.readouterr().out.splitlines()
    assert "160x16: 0 images, 0 of no use" in said and said[-1].startswith(
        "fewstep: a run refuses shapes without"
    )
    for wrong in ("32,16x32,32", "32:1,16x32:nan", "32:0,16x32:1"):
        assert main([*words, "--resolution", wrong]) == 2
        found = capsys.readouterr()
        assert "expected sizes in pixels, each another, and a share above 0" in found.err and not found.out


def test_a_check_knows_the_shapes_of_a_recipe(pictures, tmp_path, capsys):
    recipe = load_recipe("sdxl_dmd2_4step")
    shapes = [ShapeConfig(32), ShapeConfig([16, 32]), ShapeConfig([32, 16])]
    path = tmp_path / "recipe.yaml"
    for data, code in (
        (replace(recipe.data, shapes=shapes), 2),
        (replace(recipe.data, shapes=shapes, upscale=True), 0),
    ):
        path.write_text(recipes.dump(replace(recipe, data=data)))
        assert main(["data", "check", str(pictures), "--recipe", str(path)]) == code
        assert "16x32: 3 images" in capsys.readouterr().out
    assert main(["data", "check", str(pictures), "--recipe", str(path), "--resolution", "32"]) == 2
    assert "--resolution beside --recipe" in capsys.readouterr().err
    path.write_text(recipes.dump(replace(recipe, teacher=replace(recipe.teacher, resolution=[16, 32]))))
    assert main(["data", "check", str(pictures), "--recipe", str(path)]) == 2  # d is too small
    assert "6 images, 1 of no use: 1 too small" in capsys.readouterr().out


def test_two_captions_of_a_file_stay_its_captions():
    files = np.zeros((3, 8, 8, 3), dtype=np.uint8)
    images = CaptionedImages(["a", "b", "c", "A", "B", "C"], files)
    part = images.part([2, 0])
    assert part.captions == ["c", "a", "C", "A"] and part.of.tolist() == [2, 0, 5, 3]
    assert len(part.files) == 2


def test_images_of_a_shape_are_encoded_in_it_and_replaced_by_others_of_it(pictures, teachers, capsys):
    """The small picture d is left out, and the next wide one, f, stands in for it, with its caption."""
    teacher = teachers("SDXL")
    images = load_images(str(pictures), max_bad=0.5)
    parts = split(images, sizes_of(images), SHAPES)
    for k, shape in enumerate(SHAPES):
        view = teacher.at(shape)
        store = Part(encode_images(view, parts[k], quiet=True), parts[k].of)
        rows = store.rows(torch.arange(len(store)))
        assert rows["latents"].shape == (len(store), *view.latent_shape)
        assert rows["row"].tolist() == [[1, 4], [0, 5, 5], [2]][k]
        live = Part(LiveImages(view, parts[k]), parts[k].of).rows(torch.arange(len(store)))
        assert live["row"].equal(rows["row"]) and live["latents"].shape == rows["latents"].shape
    assert "d.png is left out: 28x14 pixels, below 32 wide and 16 high" in capsys.readouterr().err


def test_the_cache_of_a_shape_is_of_its_images_alone(pictures, teachers):
    """Other shapes beside it may leave it others, though as many."""
    images, teacher = load_images(str(pictures)), teachers("SDXL").at(WIDE)
    one, other = images.part([0, 3]), images.part([0, 5])
    folders = {images_folder(teacher, part) for part in (images, one, other)}
    assert len(folders) == 3 and images_folder(teacher, images.part([0, 3])) in folders
    assert images_folder(teachers("SDXL").at(TALL), one) not in folders
    shard = [pictures / "a.png"]  # all lie in one file
    parts = [replace(images, places=shard).part(records) for records in ([0, 3], [0, 5])]
    assert images_folder(teacher, parts[0]) != images_folder(teacher, parts[1])


def test_a_part_may_lose_as_many_as_the_whole_set(pictures):
    images = load_images(str(pictures), max_bad=0.5)
    assert images.part([0, 3, 5]).left_out.total == 6


def test_what_is_left_out_of_all_shapes_counts_together(pictures, teachers):
    """One picture of each shape is none: two of six may be, and the third is too many, whoever finds it and when."""
    teacher, sizes = teachers("SDXL"), sizes_of(load_images(str(pictures), max_bad=1.0))
    for name in "abc":
        (pictures / f"{name}.png").write_bytes(b"none")

    def parts(max_bad):
        images = load_images(str(pictures), max_bad=1.0)
        images = replace(images, max_bad=max_bad, upscale=True)  # known by nobody yet
        return split(images, sizes, SHAPES)

    kept = parts(0.5)
    rows = [LiveImages(teacher.at(shape), part) for shape, part in zip(SHAPES, kept)]
    for one in rows[:2]:
        one.rows(torch.arange(len(one)))
    other = parts(0.34)  # goes on from what was written
    LiveImages(teacher.at(SHAPES[0]), other[0]), LiveImages(teacher.at(SHAPES[1]), other[1])
    tall = LiveImages(teacher.at(TALL), other[2])
    with pytest.raises(
        RecipeError, match=r"3 of 6 files cannot be read: b.png .*a.png .*c.png .*allows 2 of 6"
    ):
        tall.rows(torch.arange(1))
    with pytest.raises(RecipeError, match=r"2 of 6 files cannot be read: b.png"):
        few = parts(0.2)
        for shape, part in zip(SHAPES, few):
            LiveImages(teacher.at(shape), part)
    with pytest.raises(RecipeError, match=r"no image of it can be used"):
        LiveImages(teacher.at(TALL), kept[2]).rows(torch.arange(1))


def test_what_another_process_has_left_out_of_another_shape_counts_too(pictures, teachers):
    teacher, found = teachers("SDXL"), []
    for _ in range(2):  # each of its own
        images = replace(load_images(str(pictures)), max_bad=0.2)
        found.append(split(images, sizes_of(images), SHAPES))
        for shape, part in zip(SHAPES, found[-1]):
            LiveImages(teacher.at(shape), part)
    found[0][0].left_out.add(0, "b.png", "cut")
    with pytest.raises(RecipeError, match=r"2 of 6 files cannot be read: b.png \(cut\), c.png \(cut\)"):
        found[1][2].left_out.add(0, "c.png", "cut")


def test_a_line_that_was_cut_costs_nothing_but_its_record(tmp_path):
    path, rows = tmp_path / "left_out.jsonl", {3: ("d.png", "cut"), 5: ("f.png", "none")}
    one = LeftOut("images", 100, 0.5)
    one.keep(path)
    for record, (name, reason) in rows.items():
        one.add(record, name, reason)
    one.add(3, *rows[3])
    assert path.read_text().count("\n") == 2
    path.write_bytes(path.read_bytes()[:-20])  # a full disk
    other = LeftOut("images", 100, 0.5)
    other.reasons[9] = "j.png", "seen before it began"
    other.keep(path)
    assert other.reasons.keys() == {3, 9}
    other.add(7, "h.png", "none")
    last = LeftOut("images", 100, 0.5)
    last.keep(path)
    assert last.reasons == {3: rows[3], 7: ("h.png", "none"), 9: other.reasons[9]}
    path.write_bytes(b"\xff\xfe{\n[1]\n{}\n" + path.read_bytes())
    last.keep(path)
    assert last.reasons.keys() == {3, 7, 9}


def test_an_image_without_a_size_goes_to_the_first_shape():
    assert homes_of([None, Shape(9, 9), None, Shape(8, 16)], [TALL, WIDE, SQUARE]) == [0, 2, 0, 1]


def test_what_may_be_enlarged_is_cached_apart(pictures, teachers):
    images = load_images(str(pictures))
    assert images_folder(teachers("SDXL"), images) != images_folder(
        teachers("SDXL"), replace(images, upscale=True)
    )


# ----------------------------------------------------------------------------------------------- conditions of size
def test_the_null_condition_is_told_the_size_of_the_row():
    null = Cond({"embeds": torch.zeros(1, 3), "time_ids": torch.tensor([[32.0, 32.0]])})
    cond = Cond({"embeds": torch.ones(2, 3), "time_ids": torch.tensor([[16.0, 32.0]]).expand(2, -1)})
    found = unconditional(null, cond, 2)
    assert found["embeds"].sum() == 0 and found["time_ids"].tolist() == [[16, 32]] * 2
    dropped = drop_rows(cond, null, torch.tensor([True, False]))
    assert dropped["embeds"].sum(1).tolist() == [0, 3] and dropped["time_ids"].tolist() == [[16, 32]] * 2
