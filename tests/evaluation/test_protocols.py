"""Protocols as data, Inception by hash, and the rule that only these together print FID."""

import numpy as np
import pytest
import torch

from fewstep.cli import main
from fewstep.errors import FewstepError
from fewstep.evaluation import protocols
from fewstep.evaluation.evaluate import evaluate_images, how_to_get_fid, to_markdown
from fewstep.evaluation.protocols import Protocol
from fewstep.evaluation.statistics import Statistics
from fewstep.vision import inception
from fewstep.vision.extractor import file_sha256
from fewstep.vision.extractors import Inception2015, get_extractor
from fewstep.vision.preprocess import torch_bilinear

ISSUED = {
    "cifar10-edm",
    "coco2014-30k",
    "emoji",
    "folder-clean",
    "folder-legacy",
    "folder-tf1",
    "imagenet256-adm",
    "imagenet64-edm",
    "mjhq30k",
    "sdxl-coco10k",
    "sdxl-coco10k-patch",
}


@pytest.fixture(scope="module")
def random_weights(tmp_path_factory):
    """A state dict with random weights under the published names."""
    torch.manual_seed(0)
    network = inception.Inception()
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
    path = tmp_path_factory.mktemp("weights") / inception.FILES[0]
    torch.save(network.state_dict(), path)
    return path


@pytest.fixture
def trusted(random_weights, monkeypatch):
    """The same, believed to be the published file."""
    monkeypatch.setattr(inception, "SHA256_PREFIX", file_sha256(random_weights)[:8])
    monkeypatch.setenv(inception.VARIABLE, str(random_weights))
    return random_weights


def pictures_of(size, n=6, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, size, size, 3), dtype=np.uint8)


def stand_in(images):
    """A cheap network for protocols."""
    return images.float().mean((1, 2)) / 255 + images.float().std((1, 2)) / 100


STAND_IN = f"{__name__}:stand_in"


# Protocols


def test_all_protocols_load():
    assert set(protocols.names()) == ISSUED
    loaded = {name: protocols.load(name) for name in ISSUED}
    assert loaded["coco2014-30k"].resize == ("lanczos", 256) and loaded["coco2014-30k"].samples == 30000
    assert loaded["mjhq30k"].approximate and loaded["emoji"].extractor == "effnet-lite0@96"
    for protocol in loaded.values():
        from fewstep.evaluation.measures import MEASURES

        assert set(protocol.metrics) <= set(MEASURES)


@pytest.mark.parametrize(
    "text, message",
    [
        ("about: x\nsamples: 10\nreference: y\ncrops: center", "unknown fields crops"),
        ("about: x\nsamples: 10", "reference are missing"),
        (
            "about: x\nsamples: 10\nreference: y\ncrop: middle",
            r"crop is 'middle', expected none, center or patch",
        ),
        ("about: x\nsamples: 1\nreference: y", "samples is 1"),
        ("about: x\nsamples: null\nreference: y\nresize: [nearest, 64]", "resize is"),
        ("about: x\nsamples: null\nreference: y\nextractor_resize: best", "extractor_resize is 'best'"),
        ("- a list", "expected a mapping"),
    ],
)
def test_bad_protocol_files_are_refused(tmp_path, text, message):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(FewstepError, match=message):
        protocols.load(str(tmp_path / "mine.yaml"))


def test_unknown_protocol_names_the_nearest():
    with pytest.raises(FewstepError, match="nearest is coco2014-30k"):
        protocols.load("coco2014-3k")


def test_crop_and_resize_belong_to_the_identity():
    protocol = Protocol("mine", "x", None, "y", crop="center", resize=("lanczos", 8))
    extractor = protocol.get_extractor(STAND_IN)
    assert extractor.resize == "center-crop, pil-lanczos-8, undeclared"
    seen = []
    extractor.extractor.function = lambda images: seen.append(images.shape) or stand_in(images)
    try:
        extractor(torch.from_numpy(pictures_of(16))[:, :10])
    finally:
        extractor.extractor.function = stand_in
    assert seen == [(6, 8, 8, 3)]


def test_labels():
    coco, patch, mjhq = (protocols.load(n) for n in ("coco2014-30k", "sdxl-coco10k-patch", "mjhq30k"))
    net = "inception-2015"
    assert coco.label("FD", net, 30000) == "FID(coco2014-30k)"
    assert coco.label("FD_inf", net, 30000) == "FID_inf(coco2014-30k)"
    assert coco.label("FD", net, 5000) == "FID-5k(coco2014-30k, which wants 30k)"
    assert coco.label("FD", "effnet-lite0", 30000) == "FD(effnet-lite0, coco2014-30k)"
    assert patch.label("FD", net, 10000) == "patch-FID(sdxl-coco10k-patch)"
    assert patch.label("CLIP score", "clip", 10000, whole=True) == "CLIP score(clip, sdxl-coco10k-patch)"
    assert mjhq.label("FD", net, 30000) == "FID(mjhq30k, approximate)"
    assert protocols.load("emoji").label("FD", "effnet-lite0@96", 1906) == "FD(effnet-lite0@96, emoji)"


def test_other_image_sizes_are_refused_before_the_network():
    with pytest.raises(
        FewstepError, match=r"array has images of 16 x 16, but .* imagenet64-edm wants 64 x 64"
    ):
        evaluate_images(pictures_of(64), pictures_of(16), protocol="imagenet64-edm", extractor=STAND_IN)


@pytest.mark.parametrize("images, told", [(6, False), (7, True)])
def test_more_images_than_a_protocol_wants_are_told(images, told):
    protocol = protocols.Protocol("mine", "x", 6, "y", crop="center")
    sides = pictures_of(16), pictures_of(16, seed=1)
    fake = np.concatenate(sides)[:images]
    result = evaluate_images(sides[0], fake, protocol=protocol, extractor=STAND_IN, metrics=["fd"])
    assert ("the protocol mine wants 6 images: use --num 6" in result["warnings"]) == told


def test_another_network_under_a_protocol_prints_no_fid():
    result = evaluate_images(
        pictures_of(64),
        pictures_of(64, seed=1),
        protocol="imagenet64-edm",
        extractor=STAND_IN,
        metrics=["fd"],
    )
    assert list(result["metrics"]) == [f"FD-6({STAND_IN}, imagenet64-edm, which wants 50k)"]
    assert "FID" not in to_markdown(result) and result["protocol"]["name"] == "imagenet64-edm"


def test_foreign_statistics_must_be_declared_and_say_so(tmp_path):
    real = stand_in(torch.from_numpy(pictures_of(64, 20))).double()
    np.savez(tmp_path / "edm.npz", mu=real.mean(0).numpy(), sigma=torch.cov(real.T).numpy())
    options = {"protocol": "imagenet64-edm", "extractor": STAND_IN, "metrics": ["fd"]}
    with pytest.raises(FewstepError, match="unknown"):
        evaluate_images(tmp_path / "edm.npz", pictures_of(64), **options)
    result = evaluate_images(tmp_path / "edm.npz", pictures_of(64), declared=True, **options)
    assert any("declared, not verified" in warning for warning in result["warnings"])
    np.savez(tmp_path / "other.npz", mu=np.zeros(7), sigma=np.eye(7))
    with pytest.raises(FewstepError, match="dim"):
        evaluate_images(tmp_path / "other.npz", pictures_of(64), declared=True, **options)
    Statistics.from_features(real, {"extractor": "other"}).save(tmp_path / "known.npz")
    with pytest.raises(FewstepError, match="extractor"):  # a declaration does not overrule what a file says
        evaluate_images(tmp_path / "known.npz", pictures_of(64), declared=True, **options)


def test_adm_references_hold_images_for_precision_and_recall(tmp_path):
    """FID from the moments, of many images; precision and recall from the few images in the same file."""
    many, few = pictures_of(16, 60), pictures_of(16, 12, seed=2)
    real = stand_in(torch.from_numpy(many)).double()
    moments = {"mu": real.mean(0).numpy(), "sigma": torch.cov(real.T).numpy()}
    spatial = {"mu_s": np.zeros(3), "sigma_s": np.eye(3)}
    np.savez(tmp_path / "adm.npz", **moments, **spatial, arr_0=few)
    fake = pictures_of(16, 20, seed=3)
    options = {"extractor": STAND_IN, "metrics": ["fd", "prdc"]}
    result = evaluate_images(tmp_path / "adm.npz", fake, declared=True, **options)
    metrics = {name.partition("(")[0]: m for name, m in result["metrics"].items()}
    whole = evaluate_images(many, fake, **options)["metrics"]
    some = evaluate_images(few, fake, **options)["metrics"]
    assert metrics["FD"]["value"] == pytest.approx(whole[f"FD({STAND_IN})"]["value"], rel=1e-9)
    assert (metrics["FD"]["n_real"], metrics["recall"]["n_real"]) == (0, 12)
    for name in ("precision", "recall", "density", "coverage"):
        assert metrics[name]["value"] == some[f"{name}({STAND_IN})"]["value"]


def test_pickles_are_not_read(tmp_path):
    (tmp_path / "stats.pkl").write_bytes(b"x")
    with pytest.raises(FewstepError, match="pickled files can run code"):
        evaluate_images(tmp_path / "stats.pkl", pictures_of(16), extractor=STAND_IN)


# Inception


def test_inception_has_the_published_tensors(random_weights):
    state = torch.load(random_weights, weights_only=True)
    assert len(state) == 566
    assert state["Conv2d_1a_3x3.conv.weight"].shape == (32, 3, 3, 3)
    assert state["Mixed_6c.branch7x7dbl_3.bn.running_mean"].shape == (160,)
    assert state["Mixed_7c.branch_pool.conv.weight"].shape == (192, 2048, 1, 1)
    assert state["fc.weight"].shape == (1008, 2048)


def test_inception_without_weights_says_where_it_looked(monkeypatch, tmp_path):
    monkeypatch.delenv(inception.VARIABLE, raising=False)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(FewstepError, match="6726825d") as error:
        evaluate_images(pictures_of(16), pictures_of(16), protocol="folder-clean")
    assert str(tmp_path) in str(error.value) and "--weights" in str(error.value)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / inception.FILES[1]).write_bytes(b"")
    assert inception.find_weights().name == inception.FILES[1]


def test_other_weights_are_refused(random_weights):
    with pytest.raises(FewstepError, match="no number made with them is a FID"):
        Inception2015(weights=random_weights)


def test_torchscript_is_recognised_and_not_run(random_weights, tmp_path):
    """StyleGAN and clean-fid publish the network as an archive with code: the message names the file to get."""
    network = inception.Inception()
    network.load_state_dict(torch.load(random_weights, weights_only=True))
    archive = tmp_path / "inception-2015-12-05.pt"
    torch.jit.save(torch.jit.trace(network.Mixed_7c.branch_pool, torch.zeros(1, 2048, 8, 8)), archive)
    assert inception.is_torchscript(archive) and not inception.is_torchscript(random_weights)
    (tmp_path / "empty.pt").write_bytes(b"")
    assert not inception.is_torchscript(tmp_path / "empty.pt")
    with pytest.raises(FewstepError) as error:
        evaluate_images(pictures_of(16), pictures_of(16), protocol="folder-clean", weights=str(archive))
    text = str(error.value)
    assert "TorchScript archive, whose code is not run" in text and inception.URL in text
    assert text.count("\n") == 0 and inception.URL.endswith(inception.FILES[0])


def test_a_distance_that_is_no_fid_says_how_to_get_one(monkeypatch, tmp_path, capsys, random_weights):
    monkeypatch.delenv(inception.VARIABLE, raising=False)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    for name in "ab":
        np.savez(tmp_path / f"{name}.npz", images=pictures_of(32, 8, ord(name)))
    words = ["eval", "fid", *(str(tmp_path / f"{name}.npz") for name in "ab"), "--device", "cpu"]
    assert main([*words, "--extractor", "effnet-lite0@32"]) == 0
    advice = capsys.readouterr().out.strip().splitlines()[-1]
    assert advice.startswith("FD(effnet-lite0@32) is not FID") and inception.URL in advice
    for part in ("95.6 MB", str(tmp_path / "checkpoints"), "--weights", "--protocol folder-clean"):
        assert part in advice
    # Following it gives one, and then nothing is said.
    monkeypatch.setattr(inception, "SHA256_PREFIX", file_sha256(random_weights)[:8])
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / inception.FILES[0]).symlink_to(random_weights)
    assert main([*words, "--extractor", "effnet-lite0@32"]) == 0
    assert f"you have its weights, {tmp_path}" in capsys.readouterr().out.strip().splitlines()[-1]
    assert main([*words, "--protocol", "folder-clean"]) == 0
    out = capsys.readouterr().out
    assert "FID(folder-clean)" in out and "is not FID" not in out
    assert how_to_get_fid({"metrics": {"patch-FD(x)": {}}}).startswith("patch-FD(x) is not FID")
    assert how_to_get_fid({"metrics": {"KID(x)": {}, "Vendi(x)": {}}}) is None


def test_inception_under_a_protocol_prints_fid(trusted):
    real, fake = pictures_of(20, 2), pictures_of(20, 2, seed=1)
    result = evaluate_images(real, fake, protocol="folder-legacy", metrics=["fd"])
    assert list(result["metrics"]) == ["FID(folder-legacy)"]
    assert result["extractor"]["resize"] == "torch-bilinear-299, (x-127.5)/127.5"
    assert get_extractor("inception-2015").resize == "pil-bicubic-float-299, (x-128)/128"


def test_inception_scales_its_input_and_pools_like_the_original(trusted):
    ones = torch.ones(1, 2, 6, 6)
    assert torch.equal(inception.average(ones), ones)  # padding is not counted at the border
    images = torch.from_numpy(pictures_of(40, 2))
    for scaling in (128.0, 127.5):
        extractor = Inception2015("torch-bilinear", f"{scaling:g}")
        network, extractor.network = extractor.network, torch.nn.Flatten()  # shows the input of the network
        expected = (torch_bilinear(images, 299) - scaling) / scaling
        assert torch.equal(extractor(images), expected.flatten(1))
    assert network.Mixed_7c.pool_by_maximum and not network.Mixed_7b.pool_by_maximum


def test_patches_are_cut_before_the_protocol_shrinks_the_image():
    large = pictures_of(256, 8)
    blurred = np.repeat(np.repeat(large[:, ::2, ::2], 2, 1), 2, 2)  # differs in detail alone
    protocol = Protocol("mine", "x", None, "y", extractor=STAND_IN, crop="center", resize=("bicubic", 8))
    result = evaluate_images(large, blurred, protocol=protocol, metrics=["patch-fd"])
    direct = evaluate_images(large, blurred, extractor=STAND_IN, metrics=["patch-fd"])
    values = [next(iter(r["metrics"].values()))["value"] for r in (result, direct)]
    assert values[0] == pytest.approx(values[1], rel=1e-9)


def test_inception_equals_torch_fidelity(trusted):
    oracle = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    theirs = oracle.FeatureExtractorInceptionV3("x", ["2048"], feature_extractor_weights_path=str(trusted))
    images = torch.from_numpy(pictures_of(40, 2))
    ours = Inception2015("tf1-bilinear")(images)
    torch.testing.assert_close(ours, theirs(images.permute(0, 3, 1, 2))[0], rtol=1e-4, atol=1e-5)
