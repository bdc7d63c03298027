"""Shared by the tests of the evaluator: a private cache, and a tiny extractor of known features."""

import numpy as np
import pytest
import torch


@pytest.fixture(autouse=True)
def private_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))


@pytest.fixture(autouse=True, scope="module")  # a package would keep it beyond its own tests
def one_thread():
    """Small tensors gain nothing from threads, which cost much on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class PoolExtractor:
    """Mean colours of a 4 x 4 grid: 48 features in 0..1. Counts its calls."""

    name, dim, weights_sha256, resize = "pool", 48, "0" * 64, "area-4"

    def __init__(self):
        self.calls = 0

    def __call__(self, images):
        self.calls += 1
        x = images.permute(0, 3, 1, 2).float() / 255
        return torch.nn.functional.adaptive_avg_pool2d(x, 4).flatten(1)


@pytest.fixture
def pool():
    return PoolExtractor()


@pytest.fixture
def pictures():
    """120 random images (120, 16, 16, 3) with smooth structure, all different."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (120, 4, 4, 3))
    return coarse.repeat(4, 1).repeat(4, 2).astype(np.uint8)
