"""Moments in a stream, files and refusals."""

import json
import pickle

import numpy as np
import pytest
import torch

from fewstep.errors import FewstepError
from fewstep.evaluation.statistics import Moments, Statistics, check_comparable, table

META = {"extractor": "pool", "weights_sha256": "ab", "resize": "area-4"}


@pytest.fixture
def features():
    return torch.randn(50, 6, generator=torch.Generator().manual_seed(0)) * 3 + 100


def test_streamed_merged_and_removed_moments_equal_those_of_the_whole(features):
    x = features.double()
    total = Moments.of(x[:7]) + Moments.of(x[7:8]) + Moments.of(x[8:])
    torch.testing.assert_close(total.mean, x.mean(0), rtol=1e-13, atol=0)
    torch.testing.assert_close(total.covariance(), torch.cov(x.T), rtol=1e-11, atol=1e-11)
    rest = total - Moments.of(x[:20])
    torch.testing.assert_close(rest.mean, x[20:].mean(0), rtol=1e-13, atol=0)
    torch.testing.assert_close(rest.covariance(), torch.cov(x[20:].T), rtol=1e-10, atol=1e-10)
    assert (total.n, rest.n) == (50, 30)


def test_round_trip_and_files_that_other_tools_read(features, tmp_path):
    saved = Statistics.from_features(features, META)
    saved.save(tmp_path / "new" / "a.npz")
    loaded = Statistics.load(tmp_path / "new" / "a.npz")
    assert torch.equal(saved.mu, loaded.mu) and torch.equal(saved.sigma, loaded.sigma)
    assert loaded.n == 50 and loaded.meta == {**META, "dim": 6} == saved.meta
    with np.load(tmp_path / "new" / "a.npz", allow_pickle=False) as file:
        assert set(file) == {"mu", "sigma", "meta"} and file["sigma"].dtype == np.float64
        assert json.loads(str(file["meta"]))["n"] == 50
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["a.npz"]  # no temporary file is left


def test_one_image_has_no_covariance(features):
    with pytest.raises(FewstepError, match="at least 2 images, got 1"):
        Statistics.from_features(features[:1])


@pytest.mark.parametrize(
    "key, value", [("extractor", "other"), ("weights_sha256", "cd"), ("resize", "area-8")]
)
def test_unlike_statistics_are_refused_with_a_table(features, key, value):
    a, b = Statistics.from_features(features, META), Statistics.from_features(features, {**META, key: value})
    check_comparable(a, a)
    with pytest.raises(FewstepError) as error:
        check_comparable(a, b, names=("real", "fake"))
    lines = str(error.value).splitlines()
    row = next(line for line in lines if line.startswith("|") and key in line)
    assert META[key] in row and value in row
    assert not any(other in str(error.value) for other in META if other != key and other != "extractor")


def test_other_dimension_and_unknown_origin_are_refused(features):
    a = Statistics.from_features(features, META)
    with pytest.raises(FewstepError, match="dim"):
        check_comparable(a, Statistics.from_features(features[:, :4], META))
    with pytest.raises(FewstepError, match="unknown"):
        check_comparable(a, Statistics.from_features(features))


def write_npz(path, **arrays):
    np.savez(path, **arrays)
    return path


def test_bad_files_are_named(tmp_path):
    bad = {
        "no moments": write_npz(tmp_path / "images.npz", images=np.zeros(3)),
        "shape": write_npz(tmp_path / "shape.npz", mu=np.zeros(3), sigma=np.zeros((3, 2))),
        "nan": write_npz(tmp_path / "nan.npz", mu=np.full(3, np.nan), sigma=np.eye(3)),
        "pickled": write_npz(tmp_path / "object.npz", mu=np.array([{}], object), sigma=np.eye(1)),
        "meta": write_npz(tmp_path / "meta.npz", mu=np.zeros(3), sigma=np.eye(3), meta=np.array("no json")),
    }
    (tmp_path / "text.npz").write_text("hello")
    (tmp_path / "pickle.npz").write_bytes(pickle.dumps({"mu": 1}))
    paths = [*bad.values(), tmp_path / "text.npz", tmp_path / "pickle.npz", tmp_path / "missing.npz"]
    for path in paths:
        with pytest.raises(FewstepError, match=path.name):
            Statistics.load(path)


def test_table_is_aligned_markdown():
    assert table(("a", "value"), [("long", "1")]).splitlines() == [
        "| a    | value |",
        "| ---- | ----- |",
        "| long | 1     |",
    ]
