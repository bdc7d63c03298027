"""Pixels of files that evaluators read unlike each other: by the rule of the tool that a protocol is named after."""

import json
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from fewstep.cli import main
from fewstep.errors import FewstepError
from fewstep.evaluation import protocols
from fewstep.evaluation.evaluate import evaluate_images
from fewstep.evaluation.features import extract
from fewstep.evaluation.files import check_file, read_image
from fewstep.evaluation.images import FirstImages, open_images
from fewstep.evaluation.reading import BY_ONE, KINDS, ORIENTATION, READINGS
from fewstep.evaluation.statistics import Statistics
from fewstep.vision.extractor import identity

# What of each kind a viewer shows otherwise than clean-fid, pytorch-fid and torch-fidelity read it.
UNLIKE = {"alpha", "grey with alpha", "palette with transparency", "16-bit grey", "EXIF orientation"}
TOOLS = ("clean-fid", "pytorch-fid", "torch-fidelity")


def by_pillow(folder):
    """The rule of all three tools, which is one line in each of them."""
    return [np.asarray(Image.open(file).convert("RGB")) for file in sorted(folder.iterdir())]


def pixels_of(source):
    return [image.numpy() for batch in source.batches(4) for image in batch]


def same(a, b):
    return all(x.shape == y.shape and (x == y).all() for x, y in zip(a, b, strict=True))


@pytest.fixture
def make(script, tmp_path):
    return lambda kind, name="set", seed=0: script.files_of(kind, tmp_path / name, 4, seed)


def test_every_kind_is_tried(script):
    assert set(script.KINDS) >= UNLIKE and len(script.KINDS) == 11


@pytest.mark.parametrize("tool", TOOLS)
def test_files_are_read_as_the_tool_reads_them(script, make, tool):
    for kind in script.KINDS:
        folder = make(kind, tool)
        source = open_images(folder, workers=0)
        expected = by_pillow(folder)
        assert same(pixels_of(source.read_as(tool)), expected), kind
        assert same(pixels_of(source), expected) == (kind not in UNLIKE), kind


def test_a_viewer_shows_files_upright_over_white_and_scaled(make):
    (alpha, *_), (grey, *_) = (pixels_of(open_images(make(k), workers=0)) for k in ("alpha", "16-bit grey"))
    file = sorted(make("alpha", "again").iterdir())[0]
    colour, cover = np.asarray(Image.open(file)).astype(float)[..., :3], np.asarray(Image.open(file))[..., 3:]
    over_white = colour * (cover / 255) + 255 * (1 - cover / 255)
    assert np.abs(alpha - over_white).max() <= 1
    stored = np.asarray(Image.open(sorted(make("16-bit grey", "again").iterdir())[0]))
    assert np.array_equal(grey[..., 1], (stored / 257).round()) and grey.max() < 255
    for image in pixels_of(open_images(make("EXIF orientation"), workers=0))[3:]:
        assert image.shape == (76, 60, 3)  # stored lying


def test_parts_and_archives_are_read_in_the_same_way(make, tmp_path):
    folder = make("alpha")
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for file in folder.iterdir():
            archive.write(file, file.name)
    expected = by_pillow(folder)
    for source in (open_images(folder, workers=0), open_images(tmp_path / "set.zip", workers=1)):
        read = source.read_as("clean-fid")
        assert same(pixels_of(read), expected)
        assert same(pixels_of(FirstImages(source, 3).read_as("clean-fid")), expected[:3])
        for part in (FirstImages(read, 3), FirstImages(source, 3).read_as("clean-fid"), read.shard(0, 2)):
            prepared = [image.numpy() for batch in part.prepared(2, torch.clone) for image in batch]
            assert same(prepared, expected[: len(part)])
        assert same(pixels_of(read.shard(0, 2)), expected)  # one block, the first process's
        assert not same(pixels_of(source), expected)  # which is as it was


XMP = '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="{}"/></x:xmpmeta>'


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_orientation_is_seen_wherever_a_file_says_it(tmp_path, orientation):
    exif, xmp, raw = Image.Exif(), PngInfo(), PngInfo()
    exif[ORIENTATION] = orientation
    xmp.add_itxt("XML:com.adobe.xmp", XMP.format(orientation))
    raw.add_text("Raw profile type exif", f"\nexif\n{len(exif.tobytes()):8}\n{exif.tobytes().hex()}")
    for name, options in {
        "a.png": {"exif": exif},
        "a.jpg": {"exif": exif},
        "xmp.png": {"pnginfo": xmp},
        "raw.png": {"pnginfo": raw},
    }.items():
        Image.new("RGB", (6, 4)).save(tmp_path / name, **options)
        assert ("turned" in check_file(tmp_path / name)[1]) == (orientation > 1), name
        assert read_image(tmp_path / name).shape == ((6, 4, 3) if orientation > 4 else (4, 6, 3)), name


def test_a_part_of_a_set_is_told_of_and_known_by_its_own_files(make, tmp_path):
    folder = make("alpha")
    for i in range(2):
        Image.new("RGB", (9, 9)).save(folder / f"z{i}.png")
    source = open_images(folder, workers=0)
    plain, first = FirstImages(source, 2, after=4).read_as("clean-fid"), FirstImages(source, 3)
    assert plain.remarks == []
    assert first.read_as("clean-fid").remarks[0].startswith("3 images of ")
    assert first.sha256 != first.read_as("clean-fid").sha256


def test_two_sizes_are_several(make):
    folder = make("JPEG")
    Image.new("RGB", (9, 9)).save(folder / "z.png")
    (said,) = open_images(folder, workers=0).read_as("torch-fidelity").remarks
    assert said == f"{folder} has images of 2 sizes: torch-fidelity {BY_ONE}"


def test_what_is_read_otherwise_than_shown_is_said_by_the_name_of_the_tool(script, make, pool):
    def told(kind, protocol):
        sets = make(kind, protocol), make(kind, f"{protocol}-b", 1)
        warnings = evaluate_images(*sets, extractor="effnet-lite0@32", protocol=protocol, metrics=("fd",))
        return [w for w in warnings["warnings"] if "protocol" not in w and "images for" not in w], sets

    found, (a, b) = told("alpha", "folder-clean")
    rest = "have an alpha channel: clean-fid drops it and sees the colours beneath, and so it was read here"
    assert found == [f"4 images of {a} {rest}", f"4 images of {b} {rest}"]
    found, (a, _) = told("16-bit grey", "folder-legacy")
    assert (
        found[0] == f"4 images of {a} have 16-bit grey: pytorch-fid clips it at 255, and so it was read here"
    )
    found, (a, _) = told("EXIF orientation", "folder-tf1")
    assert "torch-fidelity does not turn them" in found[0]
    for protocol, tool in (("folder-legacy", "pytorch-fid"), ("folder-tf1", "torch-fidelity")):
        found, (a, _) = told("mixed sizes", protocol)
        assert found[0] == f"{a} has images of 4 sizes: {tool} takes them with a batch size of 1 only"
    for kind in ("JPEG", "palette", "CMYK", "grey", "1-bit", "mixed sizes"):
        assert told(kind, "folder-clean")[0] == []


def test_what_a_tool_refuses_is_said(make):
    """EDM and DiT's packing script take plain arrays: what they would do to other files is not done."""
    source = open_images(make("palette"), workers=0)
    (edm,) = source.read_as("edm").remarks
    assert "EDM's fid.py takes its indices for grey, which was not done here" in edm
    (adm,) = open_images(make("grey"), workers=0).read_as("adm").remarks
    assert "4 images" in adm and "refuses it, which was not done here; save 8-bit RGB" in adm
    both = open_images(make("grey with alpha"), workers=0).read_as("adm").remarks
    assert [line.split(" have ")[1].partition(":")[0] for line in both] == [KINDS["alpha"], KINDS["grey"]]
    for kind in ("alpha", "16-bit grey", "CMYK", "1-bit"):
        for tool in ("edm", "adm"):
            assert "refuses" in open_images(make(kind, tool), workers=0).read_as(tool).remarks[-1]
    assert open_images(make("JPEG"), workers=0).read_as("adm").remarks == []
    assert all(set(r.same) | set(r.other) <= set(KINDS) for r in READINGS.values())


def test_every_protocol_of_a_tool_reads_as_that_tool():
    wanted = {
        "cifar10-edm": "edm",
        "coco2014-30k": "clean-fid",
        "emoji": "shown",
        "folder-clean": "clean-fid",
        "folder-legacy": "pytorch-fid",
        "folder-tf1": "torch-fidelity",
        "imagenet256-adm": "adm",
        "imagenet64-edm": "edm",
        "mjhq30k": "pytorch-fid",
        "sdxl-coco10k": "clean-fid",
        "sdxl-coco10k-patch": "clean-fid",
    }
    assert {name: protocols.load(name).reads_as for name in protocols.names()} == wanted


def test_features_of_one_reading_are_not_taken_for_those_of_another(make, pool):
    source = open_images(make("alpha"), workers=0)
    first = extract(source, pool, cached=True)
    other = extract(source.read_as("clean-fid"), pool, cached=True)
    assert not torch.allclose(first, other)
    assert torch.equal(extract(source.read_as("pytorch-fid"), pool, cached=True), other)
    assert pool.calls == 2  # clean-fid and pytorch-fid share theirs
    plain = open_images(make("JPEG"), workers=0)
    assert plain.sha256 == plain.read_as("clean-fid").sha256


def test_statistics_of_another_reading_are_refused(make, pool, tmp_path):
    real, fake = (open_images(make("alpha", name, i), workers=0) for i, name in enumerate("ab"))
    asked = {"extractor": pool, "metrics": ("fd",)}
    tool = real.read_as("clean-fid")
    stats = Statistics.from_features(extract(tool, pool), {**identity(pool), **tool.origin})
    stats.save(tmp_path / "stats.npz")
    with pytest.raises(FewstepError, match=r"way of 'clean-fid', expected 'shown': .*no --protocol"):
        evaluate_images(tmp_path / "stats.npz", fake, **asked)
    protocol = protocols.Protocol("mine", "x", None, "y", reads_as="pytorch-fid")
    value, expected = (
        next(iter(evaluate_images(side, fake, protocol=protocol, **asked)["metrics"].values()))["value"]
        for side in (tmp_path / "stats.npz", real)
    )
    assert value == pytest.approx(expected, rel=1e-9)
    shown = Statistics.from_features(extract(real, pool), {**identity(pool), **real.origin})
    with pytest.raises(FewstepError, match=r"'shown', expected 'pytorch-fid': .*--protocol mine"):
        evaluate_images(shown, fake, protocol=protocol, **asked)
    plain = open_images(make("JPEG"), workers=0)
    assert "reads_as" not in plain.origin  # read in one way only, so they fit any protocol


def test_the_command_line_reads_as_the_protocol_says(make, tmp_path, capsys):
    """Statistics and distance by one protocol are those of the images as its tool sees them."""
    folder, other = make("alpha"), make("alpha", "other", 1)
    flat = tmp_path / "flat"
    flat.mkdir()
    for i, image in enumerate(by_pillow(folder)):
        Image.fromarray(image).save(flat / f"{i}.png")
    words = ["--extractor", "effnet-lite0@32", "--device", "cpu", "--protocol", "folder-clean"]
    for name, images in (("alpha", folder), ("flat", flat)):
        assert main(["eval", "stats", str(images), "-o", str(tmp_path / f"{name}.npz"), *words]) == 0
    out = capsys.readouterr().out
    assert out.count("clean-fid drops it") == 1
    values = []
    for name in ("alpha", "flat"):
        result = tmp_path / f"{name}.json"
        stats = str(tmp_path / f"{name}.npz")
        assert main(["eval", "fid", stats, str(other), *words, "--out", str(result)]) == 0
        values.append([m["value"] for m in json.loads(result.read_text())["metrics"].values()])
    assert values[0] == pytest.approx(values[1], rel=1e-9)
