"""Sets of images and prompts: shards, tables, folders; what is of no use is left out, counted, named and capped."""

import io
import json
import os
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from fewstep.cli.main import main
from fewstep.data import images as of_images
from fewstep.data import shards
from fewstep.data.cache import encode_images
from fewstep.data.images import load_images
from fewstep.data.prompts import load_prompts
from fewstep.errors import FewstepError, RecipeError
from fewstep.files import ReadError
from fewstep.runs.inputs import _of_images
from fewstep.teachers import load_teacher

NUM = 12


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))


def picture(i: int, size: int = 32) -> bytes:
    """Of the one colour (20 i, 0, 0)."""
    buffer = io.BytesIO()
    Image.new("RGB", (size, size + 4), (20 * i, 0, 0)).save(buffer, "png")
    return buffer.getvalue()


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    about = tarfile.TarInfo(name)
    about.size = len(content)
    tar.addfile(about, io.BytesIO(content))


def write_folder(folder, content):
    for i, data in enumerate(content):
        (folder / f"{i:03d}.png").write_bytes(data)
    rows = [{"file_name": f"{i:03d}.png", "text": f"thing {i}"} for i in range(len(content))]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_shards(folder, content, each=5):
    for begin in range(0, len(content), each):
        with tarfile.open(folder / f"s-{begin // each:03d}.tar", "w") as tar:
            for i in range(begin, min(begin + each, len(content))):
                add(tar, f"{i:03d}.png", content[i])
                as_json = json.dumps({"caption": f"thing {i}", "width": 32}).encode()
                add(
                    tar,
                    f"{i:03d}.json" if i % 2 else f"{i:03d}.txt",
                    as_json if i % 2 else f"thing {i}".encode(),
                )


def write_parquet(folder, content, each=5):
    datasets = pytest.importorskip("datasets")
    for begin in range(0, len(content), each):
        part = range(begin, min(begin + each, len(content)))
        rows = datasets.Dataset.from_dict(
            {"image": [content[i] for i in part], "text": [f"thing {i}" for i in part]}
        )
        rows.to_parquet(str(folder / f"p-{begin:03d}.parquet"))


def write_saved(folder, content):
    datasets = pytest.importorskip("datasets")
    cells = [{"bytes": data, "path": None} for data in content]
    rows = {"image": cells, "text": [f"thing {i}" for i in range(len(content))]}
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(folder))


SETS = {"folder": write_folder, "shards": write_shards, "parquet": write_parquet, "saved": write_saved}


@pytest.fixture(params=SETS)
def write(request, tmp_path):
    """Writes a set of these contents, and gives its folder."""

    def of(content=None, name="set"):
        (tmp_path / name).mkdir()
        SETS[request.param](tmp_path / name, content or [picture(i) for i in range(NUM)])
        return tmp_path / name

    return of


def reds(images, size=8):
    return [int(images.load(i, size)[0, 0, 0]) // 20 for i in range(len(images))]


def test_every_set_gives_its_records_in_their_order_and_again_from_the_cache(write, monkeypatch):
    folder = write()
    images = load_images(str(folder))
    assert images.captions == [f"thing {i}" for i in range(NUM)] and reds(images) == list(range(NUM))
    monkeypatch.setattr(shards, "_read", lambda *_: pytest.fail("read again"))
    again = load_images(str(folder))
    assert again.captions == images.captions and reds(again) == list(range(NUM))
    assert _of_images(again) == _of_images(images)


def test_prompts_are_the_texts_of_a_set(write):
    folder = write()
    if not (folder / "metadata.jsonl").exists():
        assert load_prompts(str(folder)) == [f"thing {i}" for i in range(NUM)]


def test_a_run_is_tied_to_what_a_set_holds_and_not_to_its_place(write):
    sets = [[picture(i) for i in range(NUM)]] * 2 + [[picture(i + (i == 7)) for i in range(NUM)]]
    one, same, other = (_of_images(load_images(str(write(s, str(i))))) for i, s in enumerate(sets))
    assert one == same != other


@pytest.fixture
def broken(write):
    """The fourth and the fifth cannot be used, one for its bytes, one for its size."""
    content = [picture(i) for i in range(NUM)]
    content[3], content[4] = b"no picture", picture(4, 16)
    return write(content)


def test_what_is_of_no_use_is_left_out_and_the_next_one_stands_in(broken, tmp_path, capsys, tiny_sd15):
    teacher = load_teacher(str(tiny_sd15), resolution=32)
    images = load_images(str(broken), max_bad=0.2)
    rows = encode_images(teacher, images, quiet=True).rows(torch.arange(NUM))
    expected = [0, 1, 2, 5, 5, *range(5, NUM)]
    assert rows["row"].tolist() == expected
    said = capsys.readouterr().err
    assert "32" in said and "below 32; data.upscale" in said
    kept = [json.loads(line) for line in next((tmp_path / "cache").glob("latents-*/left_out.jsonl")).open()]
    assert [row["record"] for row in kept] == [3, 4]
    again = load_images(str(broken), max_bad=0.2)
    assert encode_images(teacher, again, quiet=True).rows(torch.arange(NUM))["row"].tolist() == expected
    assert sorted(again.left_out.reasons) == [3, 4]


def test_more_than_may_be_is_refused_with_names(broken, tiny_sd15):
    with pytest.raises(
        RecipeError, match=r"1 of 12 files cannot be read: .*; remove or replace them.*allows 0 of 12"
    ):
        load_images(str(broken), max_bad=0.05)
    images = load_images(str(broken), max_bad=0.1)
    with pytest.raises(RecipeError, match=r"2 of 12 .*16x20 pixels, below 32"):
        encode_images(load_teacher(str(tiny_sd15), resolution=32), images, quiet=True)


def test_small_images_are_enlarged_where_it_is_said(write):
    folder = write()
    with pytest.raises(FewstepError, match="below 64"):
        load_images(str(folder)).load(0, 64)
    assert load_images(str(folder), upscale=True).load(0, 64).shape == (64, 64, 3)


def test_it_is_the_shorter_side_that_counts(tmp_path):
    write_shards(tmp_path, [picture(1)])  # 32 x 36
    images = load_images(str(tmp_path))
    assert images.load(0, 32).shape == (32, 32, 3)
    with pytest.raises(FewstepError, match="32x36 pixels, below 33"):
        images.load(0, 33)


def test_a_shard_of_the_same_size_that_was_written_anew_is_read_anew(tmp_path):
    shard = tmp_path / "s.tar"
    for second, text in enumerate((b"one", b"two")):
        with tarfile.open(shard, "w") as tar:
            add(tar, "0.png", picture(1)), add(tar, "0.txt", text)
        os.utime(shard, (second, second))
        assert load_images(str(tmp_path)).captions == [text.decode()]


def test_a_start_decodes_some_images_only(write, monkeypatch):
    folder, seen = write(), []
    monkeypatch.setattr(of_images, "LOOK", 3)
    monkeypatch.setattr(of_images, "fault", lambda item: seen.append(item))
    load_images(str(folder))
    assert len(seen) == 3


def test_a_record_of_the_set_that_is_gone_stops_the_run(write):
    folder = write()
    images = load_images(str(folder))
    for path in [*folder.rglob("*.tar"), *folder.rglob("*.png")]:
        path.unlink()
        with pytest.raises(ReadError, match=r"put it back"):
            [images.sound(i, 8) for i in range(NUM)]


def test_the_command_names_every_one_of_no_use(broken, write, capsys):
    assert main(["data", "check", str(broken), "--resolution", "32"]) == 2
    said = capsys.readouterr().out
    assert "12 images, 2 of no use" in said and "16x20 pixels, below 32" in said
    assert main(["data", "check", str(write(name="sound")), "--resolution", "32"]) == 0
    assert "12 images, 0 of no use" in capsys.readouterr().out


def test_a_shard_that_is_no_tar_or_lacks_captions_is_named(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"\x1f\x8b compressed" * 100)
    with pytest.raises(RecipeError, match=r"a\.tar cannot be read as a tar file .*unpack"):
        load_images(str(tmp_path))
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add(tar, "x/1.png", picture(1))
    with pytest.raises(RecipeError, match=r"a\.tar, x/1: no caption"):
        load_images(str(tmp_path))
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add(tar, "1.png", picture(1))
        add(tar, "1.json", b'{"alt": "a thing"}')
    with pytest.raises(RecipeError, match=r"data\.column"):
        load_images(str(tmp_path))
    assert load_images(str(tmp_path), "alt").captions == ["a thing"]


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_a_folder_of_tables_of_prompts(kind, tmp_path):
    datasets = pytest.importorskip("datasets")
    (folder := tmp_path / "set").mkdir()
    for part in (2, 10, 1):
        rows = datasets.Dataset.from_dict({"prompt": [f"{part} {i}" for i in range(3)], "id": list(range(3))})
        getattr(rows, f"to_{kind.removesuffix('l')}")(str(folder / f"part-{part}.{kind}"))
    assert load_prompts(str(folder)) == [f"{part} {i}" for part in (1, 2, 10) for i in range(3)]
    with pytest.raises(RecipeError, match=r"has the columns 'prompt', 'id', and no 'text'"):
        load_prompts(str(folder), column="text")


def test_a_damaged_set_is_refused(tmp_path):
    pytest.importorskip("datasets")
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(RecipeError, match=r"cannot be read: .*mend or remove"):
        load_prompts(str(tmp_path))


def test_a_set_without_its_library_is_refused_by_the_extra(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(RecipeError, match=r"pip install \"fewstep\[data\]\""):
        load_prompts(str(tmp_path))


def test_pictures_of_a_shard_are_found_by_their_number(tmp_path):
    write_shards(tmp_path, [picture(i) for i in range(NUM)])
    files = load_images(str(tmp_path)).files
    assert [files[i].name for i in (0, 4, 5, -1)] == ["000.png", "004.png", "005.png", "011.png"]
    assert files[-1].path.name == "s-002.tar" and [f.path.name for f in files[4:6]] == [
        "s-000.tar",
        "s-001.tar",
    ]
    assert np.array_equal(files.ends, [5, 10, 12])
