"""Everything that can be wrong with the images: one message, an exit code, before the network runs."""

import json
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from fewstep import cli
from fewstep.errors import FewstepError
from fewstep.evaluation import images
from fewstep.evaluation.evaluate import evaluate_images
from fewstep.evaluation.features import stream_moments
from fewstep.evaluation.images import open_images
from fewstep.evaluation.statistics import Statistics

CALLS = []


def pool_function(pixels):
    CALLS.append(len(pixels))
    x = pixels.permute(0, 3, 1, 2).float() / 255
    return torch.nn.functional.adaptive_avg_pool2d(x, 2).flatten(1)


def nan_function(pixels):
    return pixels.flatten(1).float()[:, :3] * float("nan")


@pytest.fixture
def sets(tmp_path, pictures):
    """Two good folders of 20 images of 16 x 16."""
    for name, part in (("real", pictures[:20]), ("fake", pictures[20:40])):
        (tmp_path / name).mkdir()
        for i, picture in enumerate(part):
            Image.fromarray(picture).save(tmp_path / name / f"{i:03d}.png")
    return tmp_path


def fid(sets, *words, extractor="pool_function", real="real", fake="fake"):
    CALLS.clear()
    arguments = ["eval", "fid", sets / real, sets / fake, "--extractor", f"{__name__}:{extractor}", *words]
    return cli.main([str(word) for word in arguments])


def probes():
    """The extractor is asked once for its dimension, with two images; anything more was expensive work."""
    return [n for n in CALLS if n != 2]


def empty(sets):
    for file in (sets / "fake").iterdir():
        file.unlink()


def corrupt(sets):
    (sets / "fake" / "003.png").write_bytes(b"not an image")


def mixed(sets):
    Image.new("RGB", (20, 20)).save(sets / "fake" / "003.png")
    (sets / "p.yaml").write_text("{about: a, samples: null, reference: r, image_size: 16}")


def twice(sets):
    Image.new("RGB", (16, 16)).save(sets / "fake" / "003.jpg")


def other_statistics(sets):
    origin = {"extractor": "inception-2015", "weights_sha256": "0", "resize": "r"}
    Statistics.from_features(torch.randn(50, 12), origin).save(sets / "fake.npz")


def leaving(sets):
    with zipfile.ZipFile(sets / "fake.npz", "w") as archive:
        archive.writestr("../../evil.npy", b"x")
        archive.writestr("images.npy", b"x")


@pytest.mark.parametrize(
    "spoil, words, options, messages",
    [
        (empty, (), {}, ["has no images", ".png"]),
        (corrupt, (), {}, ["1 of 20 images cannot be read", "003.png", "--skip-bad"]),
        (mixed, ("--protocol", "{folder}/p.yaml"), {}, ["has images of 20 x 20", "16 x 16"]),
        (twice, (), {}, ["003.jpg and 003.png", "one image of a name"]),
        (None, (), {"fake": "real"}, ["REAL and FAKE are both"]),
        (None, (), {"fake": "../" + "{name}" + "/real"}, ["REAL and FAKE are both"]),
        (None, ("--num", "21"), {}, ["20 images", "21 are asked for"]),
        (
            other_statistics,
            (),
            {"fake": "fake.npz"},
            ["cannot be compared", "inception-2015", "pool_function"],
        ),
        (leaving, (), {"fake": "fake.npz"}, ["'../../evil.npy' leaves the archive"]),
        (None, (), {"fake": "nowhere"}, ["does not exist"]),
    ],
)
def test_bad_sets_end_with_two_before_the_network_runs(sets, capsys, spoil, words, options, messages):
    if spoil:
        spoil(sets)
    options = {key: value.format(name=sets.name) for key, value in options.items()}
    words = [word.format(folder=sets) for word in words]
    assert fid(sets, *words, **options) == 2
    error = capsys.readouterr().err
    assert error.startswith("fewstep: ") and all(message in error for message in messages), error
    assert not probes()


def test_features_that_are_not_finite_end_with_three(sets, capsys):
    assert fid(sets, extractor="nan_function") == 3
    assert "not finite" in capsys.readouterr().err


def test_some_corrupt_files_may_be_skipped_and_are_listed(sets, capsys):
    corrupt(sets)
    (sets / "fake" / "007.png").write_bytes(b"")
    assert fid(sets, "--skip-bad", 1) == 2 and "2 of 20" in capsys.readouterr().err
    assert fid(sets, "--skip-bad", 2, "--out", sets / "r.json") == 0
    result = json.loads((sets / "r.json").read_text())
    assert result["fake"]["n"] == 18 and any("003.png, 007.png" in warning for warning in result["warnings"])
    words = ["eval", "stats", sets / "fake", "-o", sets / "s.npz", "--skip-bad", 2]
    words += ["--extractor", f"{__name__}:pool_function"]
    assert cli.main([str(word) for word in words]) == 0
    assert "cannot be read and were left out: 003.png, 007.png" in capsys.readouterr().out
    assert Statistics.load(sets / "s.npz").meta["skipped"] == ["003.png", "007.png"]
    for file in (sets / "fake").iterdir():
        file.write_bytes(b"")
    assert fid(sets, "--skip-bad", 100) == 2  # nothing would be left


def undeclared(sets):
    np.savez(sets / "fake.npz", mu=np.zeros(12), sigma=np.eye(12))


def lying(sets):
    origin = {
        "extractor": f"{__name__}:pool_function",
        "weights_sha256": "undeclared",
        "resize": "undeclared",
    }
    np.savez(
        sets / "fake.npz", mu=np.zeros(11), sigma=np.eye(11), meta=np.array(json.dumps({**origin, "dim": 12}))
    )


@pytest.mark.parametrize(
    "spoil, words, messages",
    [
        (None, ("--weights", "w.pth"), ["--weights w.pth: ", "pool_function has its own"]),
        (None, ("--declared",), ["--declared: no side is a statistics file that names no extractor"]),
        (None, ("--skip-bad", "-1"), ["--skip-bad: -1: expected 0 or more"]),
        (None, ("--out", "{folder}/real"), ["--out", "ends in .json"]),
        (None, ("--out", "/proc/x.json"), ["--out /proc/x.json cannot be written"]),
        (undeclared, (), ["cannot be compared", "unknown", "--declared"]),
        (lying, (), ["it says that dim is 12, but mu has 11 entries"]),
    ],
)
def test_what_can_be_known_before_the_first_image_is(sets, capsys, spoil, words, messages):
    if spoil:
        spoil(sets)
    fake = "fake.npz" if spoil else "fake"
    assert fid(sets, *(word.format(folder=sets) for word in words), fake=fake) in (2, 4)
    error = capsys.readouterr().err
    assert all(message in error for message in messages), error
    assert not probes()


def test_weights_beside_any_network_of_another_kind_are_refused(sets, capsys, pool):
    words = ["eval", "fid", str(sets / "real"), str(sets / "fake"), "--weights", "w.pth"]
    (sets / "p.yaml").write_text("{about: a, samples: null, reference: r, extractor: effnet-lite0}")
    for more in ([], ["--extractor", "effnet-lite0@64"], ["--protocol", f"{sets}/p.yaml"],
                 ["--protocol", "folder-clean", "--extractor", "effnet-lite0"]):  # fmt: skip
        assert cli.main([*words, *more]) == 2 and "has its own" in capsys.readouterr().err
    # Under a protocol too, Inception with a resize of its own reads the file that it is given.
    assert cli.main([*words, "--protocol", "folder-clean", "--extractor", "inception-2015@tf1-bilinear"]) == 2
    assert "w.pth" in (error := capsys.readouterr().err) and "has its own" not in error
    with pytest.raises(FewstepError, match="has its own"):
        evaluate_images(np.zeros((4, 8, 8, 3), np.uint8), sets / "real", extractor=pool, weights="w.pth")


def test_no_distance_is_lost_for_what_cannot_be_had_beside_it(sets, capsys):
    """Named as a warning; alone it is an error, and the network has seen nothing."""
    for i in range(5, 20):
        (sets / "fake" / f"{i:03d}.png").unlink()
    words = ("--kid", "--prdc", "--is", "--fd-inf", "--patch-fd", "--vendi", "--out", sets / "r.json")
    assert fid(sets, *words) == 0
    result = json.loads((sets / "r.json").read_text())
    assert {label.partition("(")[0] for label in result["metrics"]} == {"FD", "KID", "Vendi"}
    said = {w.partition(":")[0]: w for w in result["warnings"] if w.startswith("without ")}
    assert set(said) == {f"without {name}" for name in ("prdc", "is", "fd_inf", "patch-fd")}
    assert "at least 6 images, and fake has 5" in said["without prdc"]
    assert "classifier" in said["without is"] and "224 x 224" in said["without patch-fd"]
    CALLS.clear()
    for name, reason in (
        ("prdc", "at least 6"),
        ("is", "classifier"),
        ("fd_inf", "at least 8"),
        ("patch-fd", "224"),
    ):
        with pytest.raises(FewstepError, match=f"{name}: it .*{reason}"):
            evaluate_images(
                sets / "real", sets / "fake", extractor=f"{__name__}:pool_function", metrics=(name,)
            )
    assert not probes()


def test_a_device_that_is_not_here_is_one_line_in_a_script_too(sets, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: None)
    for name in ("cuda", "gpu"):
        with pytest.raises(FewstepError, match=f"device: .*{name}"):
            evaluate_images(sets / "real", sets / "fake", device=name)


def test_messages_advise_only_what_there_is(sets, capsys):
    """Of images that belong to prompts by their order none may be left out; buffers are no names."""
    corrupt(sets)
    (sets / "p.txt").write_text("\n".join("abcdefghijklmnopqrst"))
    for words in (
        ["scores", "--prompts", sets / "p.txt", "--scorer", "clip:x"],
        ["diversity", "--per-prompt", 2],
    ):
        assert cli.main(["eval", *map(str, [words[0], sets / "fake", *words[1:]])]) == 2
        error = capsys.readouterr().err
        assert (
            "003.png: no image of a known format" in error
            and "--skip-bad" not in error
            and "BytesIO" not in error
        )
    with zipfile.ZipFile(sets / "a.zip", "w") as archive:
        archive.writestr("a.png", b"x")
    assert fid(sets, fake="a.zip") == 2 and "BytesIO" not in (error := capsys.readouterr().err)
    assert "--skip-bad" in error


def test_a_specification_and_options_that_it_holds_too_are_refused(sets, capsys):
    (sets / "spec.yaml").write_text("{prompts: p.txt, models: {name: a, pipeline: builtin:nothing}}")
    for words in (
        ["--num", "4"],
        ["--steps", "1,2,4,8"],
        ["--real", "x"],
        ["--scorer", "clip:x"],
        ["--teacher", "x"],
        ["--base-lora", "x"],
        ["--variant", "fp16"],
        ["--config", "x"],
    ):
        assert cli.main(["eval", "run", str(sets / "spec.yaml"), "--out", str(sets / "out"), *words]) == 2
        assert f"{words[0]} beside {sets}/spec.yaml" in capsys.readouterr().err


@pytest.mark.parametrize("world", [2, 3])
def test_shards_have_the_moments_of_the_whole(sets, pool, pictures, world, monkeypatch):
    monkeypatch.setattr(images, "BLOCK", 7)
    for source in (open_images(sets / "real"), open_images(pictures), open_images(pictures[:2])):
        whole = stream_moments(source, pool)
        parts = [source.shard(rank, world) for rank in range(world)]
        assert sum(map(len, parts)) == len(source)
        moments = [stream_moments(part, pool) for part in parts]
        total = moments[0]
        for part in moments[1:]:
            total = total + part
        assert total.n == whole.n
        torch.testing.assert_close(total.mean, whole.mean, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(total.scatter, whole.scatter, rtol=1e-9, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_two_processes_write_the_statistics_of_one(sets, pictures, launch_two, launcher):
    """To 1e-9, under real launchers with gloo, from the command line, with a real network."""
    for i in range(20, 150):
        Image.fromarray(pictures[i % 120] // (1 + i // 120)).save(sets / "real" / f"{i:03d}.png")
    words = ["eval", "stats", str(sets / "real"), "--extractor", "effnet-lite0@64", "--device", "cpu", "-o"]
    assert cli.main([*words, str(sets / "one.npz")]) == 0
    assert "by 2 processes" in launch_two(launcher, [*words, str(sets / "two.npz")])
    one, two = (Statistics.load(sets / f"{name}.npz") for name in ("one", "two"))
    assert one.n == two.n == 150 and one.meta == two.meta
    assert (one.mu - two.mu).abs().max() < 1e-9 and (one.sigma - two.sigma).abs().max() < 1e-9


def test_features_of_parts_are_those_of_one_process(pictures, pool, monkeypatch):
    """Three processes, of which the last has no image; their parts come together in the order of the images."""
    from fewstep.evaluation import features as F

    many = open_images(pictures.repeat(2, 0)[:100])
    whole = F.extract(many, pool)
    parts = [F.extract(many.shard(rank, 3), pool) if rank < 2 else whole[:0] for rank in range(3)]
    assert [len(part) for part in parts] == [64, 36, 0]
    for rank in range(3):

        def everyones(own, world, rank=rank):
            if isinstance(own, bool):
                return [own] * world
            assert torch.equal(own, parts[rank])
            return parts

        monkeypatch.setattr(F, "_all_of", everyones)
        assert torch.equal(F.extract(many, pool, share=(rank, 3)), whole)
    monkeypatch.setattr(F, "_all_of", lambda own, world: [own, F.FeatureError("images 64 to 99")])
    with pytest.raises(F.FeatureError, match="images 64 to 99"):  # another process's error is this one's
        F.extract(many, pool, share=(0, 2))


def test_processes_wait_for_one_another_whatever_each_has_or_meets(pictures, pool, monkeypatch):
    """Whoever has features in its cache makes its part all the same where another has none; errors go to all."""
    from fewstep.evaluation import features as F

    many, told = open_images(pictures[:100]), []

    def everyones(own, world):
        told.append(own)
        if isinstance(own, bool):
            return [own, False]  # the other has no cache
        return [own, whole[64:]] if isinstance(own, torch.Tensor) else [own, own]

    whole = F.extract(many, pool, cached=True)
    monkeypatch.setattr(F, "_all_of", everyones)
    assert torch.equal(F.extract(many, pool, cached=True, share=(0, 2)), whole)
    assert told[0] is True and torch.equal(told[1], whole[:64])
    monkeypatch.setattr(pool, "features", lambda prepared: torch.full((len(prepared), pool.dim), torch.nan))
    with pytest.raises(F.FeatureError, match="images 0 to 63"):
        F.extract(many, pool, share=(0, 2))
    assert isinstance(told[-1], F.FeatureError)


@pytest.mark.slow
def test_two_processes_measure_what_one_measures(sets, pictures, launch_two, monkeypatch):
    """`eval fid` under a real launcher with gloo: the same numbers, one table, features kept once."""
    for name, step in (("real", 1), ("fake", 2)):
        for i in range(20, 150):
            Image.fromarray(pictures[i * step % 120] // (1 + i // 120)).save(sets / name / f"{i:03d}.png")
    words = ["eval", "fid", str(sets / "real"), str(sets / "fake"), "--extractor", "effnet-lite0@64"]
    words += ["--device", "cpu", "--kid", "--prdc", "--vendi", "--out"]
    assert cli.main([*words, str(sets / "one.json")]) == 0
    results = [json.loads((sets / "one.json").read_text())]
    for name in ("fresh", "kept"):  # without the cache of the first run, then with that of the second
        if name == "fresh":
            monkeypatch.setenv("FEWSTEP_CACHE", str(sets / "cache"))
        said = launch_two("torchrun", [*words, str(sets / f"{name}.json")])
        assert said.count("| FD(effnet-lite0@64)") == 1
        results.append(json.loads((sets / f"{name}.json").read_text()))
    assert len(list((sets / "cache" / "features").iterdir())) == 1
    assert len(results[0]["metrics"]) == 7
    assert results[0]["metrics"] == results[1]["metrics"] == results[2]["metrics"]
