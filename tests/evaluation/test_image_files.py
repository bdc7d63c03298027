"""Image files in folders and archives, decoded by worker processes: the same images, the same features, in order."""

import os
import pickle
import weakref
import zipfile
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from fewstep.errors import FewstepError
from fewstep.evaluation import files as F
from fewstep.evaluation import protocols
from fewstep.evaluation.features import extract, stream_moments
from fewstep.evaluation.images import FirstImages, open_images
from fewstep.vision.extractors import get_extractor
from fewstep.vision.preprocess import Chain, center_crop, pil_resize


@pytest.fixture
def folder(tmp_path, pictures):
    """150 files of three sizes."""
    path = tmp_path / "images"
    path.mkdir()
    for i in range(150):
        Image.fromarray(pictures[i % 120][: 16 - i % 3]).save(path / f"{i:03d}.png")
    return path


def squares(images):
    return pil_resize(center_crop(images), 8, "lanczos")


def where(item):
    return item, os.getpid(), torch.get_num_threads()


def test_workers_give_what_this_process_gives(folder, pool):
    alone, helped = open_images(folder, workers=0), open_images(folder, workers=2)
    for prepare in (Chain(), squares):
        batches = [list(source.prepared(16, prepare)) for source in (alone, helped)]
        assert len(batches[0]) == len(batches[1]) and all(map(torch.equal, *batches))
    assert [len(batch) for batch in helped.prepared(64, squares)] == [64, 64, 22]  # sizes are one by now
    assert torch.equal(extract(alone, pool), extract(helped, pool))
    for part in (lambda source: source.shard(1, 2), lambda source: FirstImages(source, 100)):
        one, two = (stream_moments(part(source), pool) for source in (alone, helped))
        assert one.n == two.n and torch.equal(one.scatter, two.scatter)


def test_workers_do_not_change_how_a_network_rounds(folder):
    """Their tensors must have the memory format of this process's."""
    extractor = protocols.Protocol("x", "x", None, "y", crop="center").get_extractor("effnet-lite0@32")
    one, two = (extract(open_images(folder, workers=n), extractor) for n in (0, 2))
    assert torch.equal(one, two)


def test_work_is_done_elsewhere_in_order_and_not_too_far_ahead():
    asked = []

    class Items(list):
        def __iter__(self):
            for item in super().__iter__():
                asked.append(item)
                yield item

    results = F.ahead(where, Items(range(40)), 2)
    first = next(results)
    assert len(asked) <= 4 * 2 + 1  # bounded memory, however many images
    rest = list(results)
    assert [item for item, _, _ in (first, *rest)] == list(range(40))
    assert os.getpid() not in {pid for _, pid, _ in rest} and {threads for *_, threads in rest} == {1}
    assert {pid for _, pid, _ in F.ahead(where, [1, 2], 0)} == {os.getpid()}
    next(stopped := F.ahead(where, list(range(40)), 2))
    stopped.close()  # returns at once, and leaves no process behind


def test_cores_are_shared_between_processes(monkeypatch):
    monkeypatch.setattr(F.os, "sched_getaffinity", lambda _: set(range(6)), raising=False)
    assert F.default_workers() == 5
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert F.default_workers() == 1
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert F.default_workers() == 0


def test_every_preparation_can_be_sent_to_a_process():
    """Where processes do not fork, what they are to do is pickled, without the network."""
    effnet = get_extractor("effnet-lite0@64")
    chained = protocols.Protocol("x", "x", None, "y", crop="center", resize=("lanczos", 8))
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 20, 30, 3)).astype(np.uint8))
    for extractor in (effnet, chained.get_extractor("effnet-lite0@64")):
        data = pickle.dumps(partial(F._prepared, prepare=extractor.prepare))
        assert len(data) < 2000
        assert torch.equal(pickle.loads(data).keywords["prepare"](images), extractor.prepare(images))
        assert torch.equal(extractor(images), extractor.features(extractor.prepare(images)))


@pytest.mark.parametrize("workers", [0, 2])
def test_damage_that_the_check_cannot_see_is_one_error(folder, workers, pool):
    source = open_images(folder, workers=workers)
    data = (folder / "070.png").read_bytes()
    (folder / "070.png").write_bytes(data[:60] + b"\0\0\0" + data[63:])
    with pytest.raises(FewstepError, match=r"070\.png cannot be decoded"):
        extract(source, pool)


def test_a_zip_archive_is_read_like_the_folder(folder, tmp_path, pool):
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for file in sorted(folder.iterdir(), reverse=True):
            archive.write(file, f"images/{file.name}")
        archive.writestr("__MACOSX/images/._000.png", b"no image")
        archive.writestr("images/readme.txt", b"x")
    for workers in (0, 2):
        zipped, plain = (open_images(p, workers=workers) for p in (tmp_path / "images.zip", folder))
        assert len(zipped) == 150 and zipped.sizes == plain.sizes and zipped.sha256 == plain.sha256
        assert torch.equal(extract(zipped, pool), extract(plain, pool))


def test_an_archive_that_was_written_again_is_read_anew(folder, tmp_path):
    def write(first):
        with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
            for i, file in enumerate(sorted(folder.iterdir())[first : first + 20]):
                archive.write(file, f"{i}.png")

    for first in (0, 30):
        write(first)
        read = [F.read_image(file) for file in open_images(tmp_path / "a.zip", workers=0).files]
        assert all(
            np.array_equal(image, F.read_image(folder / f"{first + i:03d}.png"))
            for i, image in enumerate(read)
        )


def test_no_process_moves_in_the_archive_of_another(folder, tmp_path, monkeypatch):
    """A handle that was opened before a fork has one position in the file for both."""
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.write(folder / "000.png", "0.png")
    member = open_images(tmp_path / "a.zip", workers=0).files[0]
    opened = F._opened.cache_info().misses
    member.read_bytes()
    assert F._opened.cache_info().misses == opened
    monkeypatch.setattr(F.os, "getpid", lambda: -1)  # as in a process that was forked
    member.read_bytes()
    assert F._opened.cache_info().misses == opened + 1


def test_bad_archives(folder, tmp_path):
    def write(**members):
        with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
            for name, data in members.items():
                archive.writestr(name.replace("__", "."), data)

    good = (folder / "000.png").read_bytes()
    write(a__txt=b"x")
    with pytest.raises(FewstepError, match="has no images"):
        open_images(tmp_path / "a.zip")
    write(a__png=good, b__png=b"x")
    with pytest.raises(FewstepError, match=r"1 of 2 images cannot be read.*\n  b\.png"):
        open_images(tmp_path / "a.zip")
    assert open_images(tmp_path / "a.zip", skip_bad=1).skipped == ("b.png",)
    for name in ("../evil__png", "a\\..\\..\\evil__png", "\\evil__png", "C:evil__png"):
        write(**{name: good})
        with pytest.raises(FewstepError, match="leaves the archive"):
            open_images(tmp_path / "a.zip")
    (tmp_path / "a.zip").write_bytes(b"no archive")
    with pytest.raises(FewstepError, match="no readable zip"):
        open_images(tmp_path / "a.zip")


def test_subfolders_are_entered_and_images_beside_them_refused(folder, tmp_path, pictures):
    (tmp_path / "classes" / "b").mkdir(parents=True)
    folder.rename(tmp_path / "classes" / "a")
    Image.fromarray(pictures[0]).save(
        tmp_path / "classes" / "b" / "000.png"
    )  # a name may come again elsewhere
    source = open_images(tmp_path / "classes")
    assert len(source) == 151 and [f.parent.name for f in source.files] == ["a"] * 150 + ["b"]
    Image.fromarray(pictures[0]).save(tmp_path / "classes" / "top.png")
    with pytest.raises(
        FewstepError, match=r"1 images, such as top\.png, lie beside folders of images, such as a"
    ):
        open_images(tmp_path / "classes")


@pytest.mark.parametrize("workers", [0, 1])
def test_streaming_keeps_no_batch_in_memory(folder, pool, workers, monkeypatch):
    """Whatever the number of images: when one batch is looked at, those before it are gone."""
    monkeypatch.setattr("fewstep.evaluation.features.BATCH", 10)
    alive, most = weakref.WeakSet(), []
    inner = pool.features

    def watched(prepared):
        alive.add(prepared)
        most.append(len(alive))
        return inner(prepared)

    pool.features, pool.prepare = watched, squares
    assert stream_moments(open_images(folder, workers=workers), pool).n == 150
    assert len(most) == 15 and max(most) <= 2
