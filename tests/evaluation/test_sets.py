"""What a set of images is, and what goes with which prompt: the same for folders, links and archives."""

import json
import os
import shutil
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from fewstep import cli
from fewstep.data.image_sets import folder_set, natural
from fewstep.data.images import load_images
from fewstep.errors import FewstepError
from fewstep.evaluation.images import open_images
from fewstep.vision import scores

CAPTIONS = [f"thing {i}" for i in range(12)]


def pool_function(images):
    return torch.nn.functional.adaptive_avg_pool2d(images.permute(0, 3, 1, 2).float() / 255, 2).flatten(1)


class Brightness(scores.Scorer):
    """Depends on the pair: how bright an image is, times the number of its caption."""

    label, name, weights_sha256 = "CLIP score", "tiny", "0" * 64

    def score(self, prepared, captions):
        return prepared.float().mean((1, 2, 3)) * torch.tensor([1.0 + int(c.split()[-1]) for c in captions])


@pytest.fixture(autouse=True)
def tiny_scorer(monkeypatch):
    monkeypatch.setattr("fewstep.evaluation.evaluate.get_scorer", lambda *_: Brightness())


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(CAPTIONS) + "\n")
    return path


def fill(folder, pictures, name="{}.png"):
    for i, picture in enumerate(pictures):
        file = folder / name.format(i)
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(file)
    return folder


def zipped(folder, file, top=""):
    """In an order of its own."""
    with zipfile.ZipFile(file, "w") as archive:
        for path in sorted(folder.rglob("*"), key=lambda p: str(p)[::-1]):
            if path.is_file():
                archive.write(path, top + path.relative_to(folder).as_posix())
    return file


def numbers(tmp_path, *words):
    out = tmp_path / "result.json"
    assert cli.main(["eval", *map(str, words), "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    return {label: m["value"] for label, m in result["metrics"].items()}, result["warnings"]


def test_natural_order():
    names = [
        "2.png",
        "10.png",
        "1.png",
        "01.png",
        "1-2.png",
        "a.png",
        "a2.jpg",
        "a10.jpg",
        "A.png",
        f"{'9' * 5000}.png",
    ]
    assert sorted(names, key=natural) == [
        "01.png", "1.png", "1-2.png", "2.png", "10.png", f"{'9' * 5000}.png", "A.png", "a.png", "a2.jpg", "a10.jpg",
    ]  # fmt: skip
    folders = ["10/0.png", "2/10.png", "2/9.png", "2-b/1.png"]
    assert sorted(folders, key=natural) == ["2/9.png", "2/10.png", "2-b/1.png", "10/0.png"]
    padded = [f"{i:06d}.png" for i in range(1100)]
    assert sorted(padded, key=natural) == sorted(padded)


def renamed(folder, pictures):
    """Folders and archives that hold the same images in the same natural order."""
    yield fill(folder / "padded", pictures, "{:05d}.png")
    yield fill(folder / "words", pictures, "sample {} of 12.png")
    yield fill(folder / "classes", pictures, "class {}/0.png")
    yield zipped(folder / "plain", folder / "plain.zip")
    yield zipped(folder / "plain", folder / "nested.zip", "images/")
    yield zipped(folder / "classes", folder / "classes.zip")
    for name, target in (("link", "plain"), ("to_classes", "classes")):
        (folder / name).symlink_to(folder / target)
        yield folder / name
    (folder / "of_links").mkdir()
    for i in range(12):  # the folders are links
        (folder / "of_links" / f"c{i}").symlink_to(folder / "classes" / f"class {i}")
    yield folder / "of_links"
    (folder / "file_links").mkdir()
    for i in range(12):
        (folder / "file_links" / f"{i}.png").symlink_to(folder / "plain" / f"{i}.png")
    yield folder / "file_links"
    np.savez(folder / "array.npz", images=pictures)
    yield folder / "array.npz"


def test_scores_and_diversity_do_not_depend_on_names_archives_and_links(tmp_path, pictures, prompts):
    pictures = pictures[:12]
    plain = fill(tmp_path / "sets" / "plain", pictures)
    measures = [
        lambda fake: ("scores", fake, "--prompts", prompts, "--scorer", "clip:tiny"),
        lambda fake: ("diversity", fake, "--per-prompt", 3, "--extractor", f"{__name__}:pool_function"),
    ]
    by_hand = np.mean([p.mean() * (i + 1) for i, p in enumerate(pictures)])
    sets = list(renamed(tmp_path / "sets", pictures))
    assert len(sets) == 11
    for words in measures:
        expected, _ = numbers(tmp_path, *words(plain))
        if "CLIP score(tiny)" in expected:
            assert expected["CLIP score(tiny)"] == pytest.approx(by_hand, rel=1e-6)
        for fake in sets:
            found, warnings = numbers(tmp_path, *words(fake))
            assert found == expected and warnings == [], fake
    # The order matters: images that are shifted by one have other numbers.
    other, _ = numbers(tmp_path, *measures[0](fill(tmp_path / "shifted", np.roll(pictures, 1, 0))))
    assert other["CLIP score(tiny)"] != pytest.approx(by_hand, rel=1e-3)


@pytest.mark.parametrize("images, words", [(11, []), (13, []), (12, ["--per-prompt", 2]), (24, [])])
def test_images_and_prompts_are_as_many_or_the_first_of_both(
    tmp_path, pictures, prompts, capsys, images, words
):
    fake = fill(tmp_path / "fake", pictures[:images])
    command = ["eval", "scores", fake, "--prompts", prompts, "--scorer", "clip:tiny", *words]
    assert cli.main([*map(str, command)]) == 2
    error = capsys.readouterr().err
    wanted = 24 if words else 12
    assert f"{images} images for 12 prompts" in error and f"expected {wanted}" in error
    assert "shifts all behind it" in error and f"--num {min(images, wanted)}" in error
    first = min(images, wanted)
    assert cli.main([*map(str, command), "--num", str(first)]) == 0
    assert f"| {first} " in capsys.readouterr().out
    assert cli.main([*map(str, command), "--num", str(first + 1)]) == 2
    assert str(first + 1) in capsys.readouterr().err


def test_what_is_passed_over_is_counted_and_said(tmp_path, pictures, prompts):
    fake = fill(tmp_path / "fake", pictures[:12], "class {}/0.png")
    expected, _ = numbers(tmp_path, "scores", fake, "--prompts", prompts, "--scorer", "clip:tiny")
    for name in (
        ".ipynb_checkpoints/0.png",
        "class 3/.ipynb_checkpoints/0-checkpoint.png",
        "__MACOSX/class 1/._0.png",
    ):
        fill(fake, pictures[:1], name)
    fill(fake, pictures[:1], "class 1/.part-x-1-0.png")
    for i in range(2):
        Image.fromarray(pictures[i]).save(fake / f"class {i}" / "1.gif")
    (fake / "class 1" / "notes.txt").write_text("x")
    (fake / "zz").symlink_to(fake / "class 3")  # what was entered already
    (fake / "class 5" / "round").symlink_to(fake)
    words = [
        "2 of the format .gif, which is not read",
        "1 hidden",
        "1 in .ipynb_checkpoints/",
        "1 in __MACOSX/",
    ]
    words += ["1 in class 3/.ipynb_checkpoints/", "class 5/round/, entered already", "zz/, entered already"]
    found, warnings = numbers(tmp_path, "scores", fake, "--prompts", prompts, "--scorer", "clip:tiny")
    assert found == expected and len(warnings) == 1
    assert warnings[0].startswith(f"{fake}: passed over ") and all(word in warnings[0] for word in words)
    (fake / "zz").unlink()
    (fake / "class 5" / "round").unlink()
    again, others = numbers(
        tmp_path, "scores", zipped(fake, tmp_path / "a.zip"), "--prompts", prompts, "--scorer", "clip:x"
    )
    assert again == expected and all(word in others[0] for word in words[:5])
    real = fill(tmp_path / "real", pictures[12:40])
    extractor = ("--extractor", f"{__name__}:pool_function")
    for more in ([], ["--num", 6]):
        _, warnings = numbers(tmp_path, "fid", real, fake, *extractor, *more)
        assert sum("passed over" in warning for warning in warnings) == 1
    np.savez(tmp_path / "two.npz", images=pictures[:12], arr_0=pictures[12:24])
    _, warnings = numbers(tmp_path, "fid", real, tmp_path / "two.npz", *extractor)
    assert any("two.npz: passed over the array arr_0" in warning for warning in warnings)


def test_statistics_say_what_was_passed_over(tmp_path, pictures, capsys):
    fake = fill(tmp_path / "fake", pictures[:12])
    fill(fake, pictures[:2], ".ipynb_checkpoints/{}.png")
    words = ["eval", "stats", fake, "-o", tmp_path / "s.npz", "--extractor", f"{__name__}:pool_function"]
    assert cli.main([*map(str, words)]) == 0
    assert "12 images" in (text := capsys.readouterr().out) and "passed over 2 in .ipynb_checkpoints/" in text
    with np.load(tmp_path / "s.npz") as file:
        assert json.loads(str(file["meta"]))["passed_over"] == ["2 in .ipynb_checkpoints/"]


def test_every_format_that_is_read_is_part_of_the_set(tmp_path, pictures):
    from fewstep.data.image_sets import EXTENSIONS

    for i, suffix in enumerate(EXTENSIONS):
        Image.fromarray(pictures[i]).save(tmp_path / f"{i}{suffix}", {".jfif": "JPEG"}.get(suffix))
    source = open_images(tmp_path)
    assert len(source) == len(EXTENSIONS) >= 10 and ".tif" in EXTENSIONS
    lossless = [
        i for i, suffix in enumerate(EXTENSIONS) if suffix in (".png", ".bmp", ".tif", ".tiff", ".ppm")
    ]
    seen = torch.cat(list(source.batches(99))).numpy()
    assert all(np.array_equal(seen[i], pictures[i]) for i in lossless)
    Image.fromarray(pictures[0, ..., 0].astype(np.float32)).save(tmp_path / "99.tif")
    with pytest.raises(FewstepError, match=r"99\.tif: its pixels are floating-point numbers"):
        open_images(tmp_path)


def test_sets_that_could_be_several_are_refused_with_the_names(tmp_path, pictures):
    fake = fill(tmp_path / "fake", pictures[:6], "c{}/0.png")
    fill(fake, pictures[:2], "stray {}.png")
    for source in (fake, zipped(fake, tmp_path / "mixed.zip")):
        with pytest.raises(
            FewstepError, match=r"2 images, such as stray 0\.png, lie beside folders of images, such as c0"
        ):
            open_images(source)
    runs = tmp_path / "runs"
    for steps in (1, 4):
        fill(runs / f"{steps}-steps", pictures[:6], "{:06d}.png")
        (runs / f"{steps}-steps" / "manifest.json").write_text(
            '{"schema": 1, "run": {}, "num": 6, "about": {}}'
        )
    for source in (runs, zipped(runs, tmp_path / "runs.zip")):
        with pytest.raises(
            FewstepError, match=r"1-steps holds the images of one run .* others lie in 4-steps"
        ):
            open_images(source)
    shutil.rmtree(runs / "1-steps")
    assert len(open_images(runs)) == 6
    fill(runs / "mine", pictures[:1])
    with pytest.raises(FewstepError, match=r"4-steps holds the images of one run .* others lie in mine"):
        open_images(runs)
    (runs / "4-steps" / "manifest.json").write_text('{"name": "of somebody else"}')
    assert len(open_images(runs)) == 7


def test_a_folder_that_cannot_be_read_is_named(tmp_path, pictures, monkeypatch):
    fake, scan = fill(tmp_path / "fake", pictures[:3], "c{}/0.png"), os.scandir

    def denied(path):
        if str(path).endswith("c1"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(FewstepError, match="c1 cannot be read: Permission denied"):
        open_images(fake)


def test_a_broken_link_is_an_image_that_cannot_be_read(tmp_path, pictures):
    fake = fill(tmp_path / "fake", pictures[:3])
    (fake / "1.png").unlink()
    (fake / "1.png").symlink_to(tmp_path / "gone.png")
    with pytest.raises(
        FewstepError, match=r"1 of 3 images cannot be read(.|\n)*1\.png: .*No such file"
    ) as error:
        open_images(fake)
    assert "--skip-bad" not in str(error.value)
    with pytest.raises(FewstepError, match="--skip-bad"):
        open_images(fake, skip_bad=0)
    (fake / "1.png").unlink()
    (fake / "1.png").symlink_to(fake / "1.png")
    with pytest.raises(FewstepError, match=r"1\.png"):
        open_images(fake)


def test_training_images_are_found_by_the_same_rule(tmp_path, pictures):
    """Hidden copies have no caption and would be trained twice; links are followed."""
    folder = fill(tmp_path / "disk", pictures[:3], "{}.tif")
    for i in range(3):
        (folder / f"{i}.txt").write_text(f"thing {i}")
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "linked").symlink_to(folder)
    fill(folder, pictures[:2], ".ipynb_checkpoints/{}.png")
    found = load_images(str(tmp_path / "images"))
    assert found.captions == ["thing 0", "thing 1", "thing 2"]
    assert found.passed_over == ("2 in linked/.ipynb_checkpoints/",)


def test_training_images_are_upright_and_over_white(tmp_path):
    image, exif = Image.new("RGB", (8, 8), "black"), Image.Exif()
    image.paste("white", (0, 0, 8, 4))
    exif[0x0112] = 3  # upside down
    image.save(tmp_path / "0.png", exif=exif)
    palette = Image.fromarray(np.eye(8, dtype=np.uint8), "P")
    palette.putpalette([0, 0, 0, 40, 50, 60])
    palette.save(tmp_path / "1.png", transparency=0)
    for i in range(2):
        (tmp_path / f"{i}.txt").write_text("x")
    turned, clear = (load_images(str(tmp_path)).load(i, 8) for i in range(2))
    assert turned[:4].max() == 0 and turned[4:].min() == 255 and clear[0, 1].min() == 255


def test_a_folder_has_its_own_name_and_not_that_of_a_link_before_it(tmp_path, pictures):
    fill(tmp_path / "b", pictures[:1])
    (tmp_path / "a").symlink_to(tmp_path / "b")
    found = folder_set(tmp_path)
    assert found.names == ["b/0.png"] and found.passed_over == ("a/, entered already",)


def test_images_beside_folders_of_images_are_found_in_any_folder(tmp_path, pictures):
    for name in ("a/{}.png", "b/{}.png", "b/c/{}.png"):
        fill(tmp_path, pictures[:1], name)
    with pytest.raises(FewstepError, match=r"such as b/0\.png, lie beside folders of images, such as b/c"):
        folder_set(tmp_path)


# ----------------------------------------------------------------------------------------- folders that were generated
@pytest.fixture
def generated(tiny_sd15, tmp_path, prompts):
    words = ["eval", "generate", tiny_sd15, "--steps", 1, "--prompts", prompts, "--out", tmp_path / "made"]
    assert cli.main([*map(str, words), "--speed-runs", "0", "--device", "cpu", "--solver", "lcm"]) == 0
    return tmp_path / "made" / "1-step"


def test_a_generated_folder_must_be_whole_and_of_these_prompts(generated, tmp_path, prompts, capsys):
    words = ["eval", "scores", generated, "--prompts", prompts, "--scorer", "clip:tiny"]
    diversity = [
        "eval",
        "diversity",
        generated,
        "--per-prompt",
        3,
        "--extractor",
        f"{__name__}:pool_function",
    ]
    fid = ["eval", "fid", tmp_path / "real", generated, "--extractor", f"{__name__}:pool_function"]
    fill(tmp_path / "real", np.random.default_rng(0).integers(0, 256, (9, 16, 16, 3)).astype(np.uint8))

    def run(words, *more):
        return cli.main([*map(str, (*words, *more))]), capsys.readouterr().err

    assert run(words)[0] == run(fid)[0] == 0
    code, error = run(diversity)
    assert code == 2 and "per_prompt" in error
    prompts.write_text(prompts.read_text().replace("thing 7", "thing 8"))
    code, error = run(words)
    assert code == 2 and "made from other prompts" in error
    prompts.write_text("\n".join(CAPTIONS) + "\n")
    (generated / "000005.png").unlink()
    for command in (words, fid):
        code, error = run(command)
        assert code == 2 and "1 of 12 images are missing or unreadable, such as 000005.png" in error
    assert run(words, "--num", 5)[0] == run(fid, "--num", 5)[0] == 0
    code, error = run(words, "--num", 6)
    assert code == 2 and "000005.png" in error
