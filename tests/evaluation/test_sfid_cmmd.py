"""sFID as ADM's evaluator has it and CMMD as its authors have it, by hand, from images and from statistics."""

import json
import math
import re

import numpy as np
import pytest
import torch
from PIL import Image

from fewstep.cli import main
from fewstep.errors import FewstepError
from fewstep.evaluation import metrics as M
from fewstep.evaluation import protocols
from fewstep.evaluation.evaluate import evaluate_images
from fewstep.evaluation.statistics import Statistics
from fewstep.vision import clip as clip_module
from fewstep.vision import inception
from fewstep.vision.clip import Clip
from fewstep.vision.extractor import file_sha256, identity
from fewstep.vision.extractors import Inception2015, get_extractor


@pytest.fixture
def weights(script, tmp_path_factory, monkeypatch):
    """A random state dict, believed to be the published file."""
    file = tmp_path_factory.getbasetemp() / "random" / inception.FILES[0]
    if not file.is_file():
        file.parent.mkdir(exist_ok=True)
        script.random_weights(file)
    monkeypatch.setattr(inception, "SHA256_PREFIX", file_sha256(file)[:8])
    monkeypatch.setenv(inception.VARIABLE, str(file))
    return file


def pictures_of(size, n=6, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, size, size, 3), dtype=np.uint8)


def spatial_by_hand(extractor, images):
    """`mixed_6/conv[..., :7]` in TensorFlow's order, looked up one by one in the output of that block."""
    seen = []
    hook = extractor.network.Mixed_6d.register_forward_hook(lambda _m, _i, output: seen.append(output))
    extractor(torch.from_numpy(images))
    hook.remove()
    features = np.empty((len(images), 2023))
    for row in range(17):
        for column in range(17):
            for channel in range(7):  # the 1x1 branch comes first in the block
                place = (row * 17 + column) * 7 + channel
                features[:, place] = seen[0][:, channel, row, column]
    return features


def frechet_by_numpy(x, y):
    """Of features (N, 2023), with few images: by the singular values of the crossed features."""
    a, b = ((z - z.mean(0)) / (len(z) - 1) ** 0.5 for z in (x, y))
    root = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    return ((x.mean(0) - y.mean(0)) ** 2).sum() + (a**2).sum() + (b**2).sum() - 2 * root


def test_spatial_features_are_those_of_the_evaluator_of_adm(weights):
    extractor = Inception2015("tf1-bilinear")
    images = pictures_of(40, 2)
    found, expected = extractor.spatial(torch.from_numpy(images)), spatial_by_hand(extractor, images)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert found.shape == (2, 2023) == (2, extractor.spatial.dim) and found.min() == 0  # after the ReLU
    assert extractor.spatial.name == "inception-2015:mixed_6" and extractor.spatial.resize == extractor.resize


def test_spatial_features_are_of_what_the_protocol_crops(weights):
    wide = torch.from_numpy(pictures_of(48, 2))[:, 6:42]
    extractor = protocols.Protocol("mine", "x", None, "y", crop="center").get_extractor("inception-2015")
    expected = Inception2015().spatial(wide[:, :, 6:42])
    torch.testing.assert_close(extractor.spatial(wide), expected, rtol=1e-5, atol=1e-5)
    assert extractor.spatial.resize.startswith("center-crop, ")


def test_spatial_features_equal_those_of_torch_fidelity(weights):
    oracle = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    theirs = oracle.FeatureExtractorInceptionV3("x", ["2048"], feature_extractor_weights_path=str(weights))
    seen = []
    theirs.Mixed_6d.branch1x1.register_forward_hook(lambda _m, _i, output: seen.append(output))
    images = torch.from_numpy(pictures_of(40, 2))
    theirs(images.permute(0, 3, 1, 2))
    expected = seen[0][:, :7].permute(0, 2, 3, 1).flatten(1)
    torch.testing.assert_close(Inception2015("tf1-bilinear").spatial(images), expected, rtol=1e-4, atol=1e-4)


def test_sfid_from_images_statistics_and_references_of_adm(weights, tmp_path, capsys):
    real, fake = pictures_of(256, 3), pictures_of(256, 4, 1) // 2
    extractor = protocols.load("imagenet256-adm").get_extractor()
    x, y = (spatial_by_hand(extractor, images) for images in (real, fake))
    expected = frechet_by_numpy(x, y)
    for name, images in (("real", real), ("fake", fake)):
        np.savez(tmp_path / f"{name}.npz", arr_0=images)
    words = ["--protocol", "imagenet256-adm", "--device", "cpu"]
    stats, out = tmp_path / "stats.npz", tmp_path / "out.json"
    assert main(["eval", "stats", str(tmp_path / "real.npz"), "-o", str(stats), *words]) == 0
    # ADM's references say nothing of their origin.
    mu, sigma = Statistics.load(stats).spatial
    np.savez(tmp_path / "adm.npz", mu=np.zeros(2048), sigma=np.eye(2048), mu_s=mu, sigma_s=sigma)
    for side, more in (("real.npz", []), ("stats.npz", []), ("adm.npz", ["--declared"])):
        files = [str(tmp_path / side), str(tmp_path / "fake.npz")]
        # Enough images for precision and recall are not the matter here.
        result = evaluate_images(*files, protocol="imagenet256-adm", metrics=("sfd",), declared=bool(more))
        ((label, entry),) = result["metrics"].items()
        assert label == "sFID-4(imagenet256-adm, which wants 50k)"
        assert entry["value"] == pytest.approx(expected, rel=1e-5) and entry["error"] > 0
    # Statistics without that part cannot give it, which is said.
    np.savez(tmp_path / "plain.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    result = evaluate_images(
        tmp_path / "plain.npz", fake, protocol="imagenet256-adm", metrics=("fd", "sfd"), declared=True
    )
    reason = "without sfd: it needs images, or statistics with mu_s and sigma_s, and those of real lack them"
    assert len(result["metrics"]) == 1 and reason in result["warnings"]
    words = [*words[2:], "--weights", str(weights), "--extractor", "inception-2015", "--sfd"]
    assert main(["eval", "fid", *files[1:], str(tmp_path / "real.npz"), *words, "--out", str(out)]) == 0
    assert "sFD(inception-2015)" in json.loads(out.read_text())["metrics"]


def test_other_networks_have_neither_which_is_said_before_they_run():
    images = pictures_of(32, 3)
    for metric, reason in (
        ("sfd", "sfd: it needs spatial features, which .* has not: use inception-2015"),
        ("cmmd", "cmmd: it needs the features of a CLIP, which .* has not: use clip:PATH"),
    ):
        asked = {"extractor": "effnet-lite0@32"}
        with pytest.raises(FewstepError, match=reason):
            evaluate_images(images, images, metrics=(metric,), **asked)
        result = evaluate_images(images, images, metrics=("fd", metric), **asked)
        assert len(result["metrics"]) == 1
        assert any(re.match(f"without {reason}", warning) for warning in result["warnings"])
    adm = protocols.load("imagenet256-adm")
    assert "sfd" in adm.metrics_of(None) and adm.metrics_of("effnet-lite0") == ("fd", "prdc")


def cmmd_by_hand(x, y):
    """The estimator with every pair, Gaussian kernel of sigma 10, times 1000; one pair at a time."""
    x, y = (z / np.linalg.norm(z, axis=1, keepdims=True) for z in (x, y))

    def mean(a, b):
        return np.mean([math.exp(-((u - v) ** 2).sum() / (2 * 10**2)) for u in a for v in b])

    return 1000 * (mean(x, x) + mean(y, y) - 2 * mean(x, y))


def test_cmmd_of_two_points_has_a_closed_form():
    """Orthogonal unit vectors are sqrt(2) apart."""
    x, y = torch.tensor([[3.0, 0.0]]).repeat(4, 1), torch.tensor([[0.0, 0.5]]).repeat(7, 1)
    value, error = M.cmmd(x, y)
    assert value == pytest.approx(1000 * (2 - 2 * math.exp(-2 / 200)), rel=1e-12) and error < 1e-9
    opposite, _ = M.cmmd(x, -x)
    assert opposite == pytest.approx(1000 * (2 - 2 * math.exp(-4 / 200)), rel=1e-12)
    assert M.cmmd(x, x)[0] == 0
    with pytest.raises(ValueError, match="at least 2 images"):
        M.cmmd(x[:1], y)


def test_cmmd_and_its_jackknife_error_equal_brute_force(monkeypatch):
    monkeypatch.setattr(M, "BLOCK", 3)  # several blocks of rows, the last one short
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(7, 5)), rng.normal(size=(8, 5)) + 0.7
    value, error = M.cmmd(torch.from_numpy(x), torch.from_numpy(y))
    assert value == pytest.approx(cmmd_by_hand(x, y), rel=1e-9) and value > 1
    without_x = np.array([cmmd_by_hand(np.delete(x, i, 0), y) for i in range(7)])
    without_y = np.array([cmmd_by_hand(x, np.delete(y, i, 0)) for i in range(8)])
    assert error == pytest.approx((6 * without_x.var() + 7 * without_y.var()) ** 0.5, rel=1e-9)


def test_cmmd_sees_images_as_its_authors_do(clip_folder):
    """The middle square with odd margins rounded down, Pillow's bicubic, CLIP's features."""
    rng = np.random.default_rng(0)
    real, fake = (rng.integers(0, 256, (n, 45, 60, 3), dtype=np.uint8) for n in (5, 6))
    model = Clip(str(clip_folder)).model

    def features(images):
        made = []
        for image in images:
            square = Image.fromarray(image).crop((7, 0, 52, 45)).resize((32, 32), Image.Resampling.BICUBIC)
            x = (np.asarray(square) / 255 - clip_module.MEAN) / clip_module.STD
            with torch.no_grad():
                out = model.get_image_features(torch.from_numpy(x).float().permute(2, 0, 1)[None])
            made.append(clip_module.pooled(out)[0].numpy())
        return np.stack(made)

    protocol = protocols.Protocol("mine", "x", None, "y", crop="center", resize=("lanczos", 8))
    for asked in ({}, {"protocol": protocol}):  # whose crops are not CMMD's
        result = evaluate_images(real, fake, extractor=f"clip:{clip_folder}", metrics=("cmmd",), **asked)[
            "metrics"
        ]
        ((label, entry),) = result.items()
        assert label.startswith("CMMD(clip:tiny-clip")
        assert entry["value"] == pytest.approx(cmmd_by_hand(features(real), features(fake)), rel=1e-4)
        assert entry["error"] > 0 and entry["n_real"] == 5


def test_cmmd_is_of_images_and_of_no_statistics(clip_folder):
    images = pictures_of(32, 5)
    clip = get_extractor(f"clip:{clip_folder}")
    stats = Statistics.from_features(clip(torch.from_numpy(images)), identity(clip))
    found = evaluate_images(stats, pictures_of(32, 5, 1), extractor=clip, metrics=("fd", "cmmd"))
    assert list(found["metrics"]) == ["FD(clip:tiny-clip)"]
    assert "without cmmd: it needs images where statistics were given" in found["warnings"]
