"""Shared by the tests of the evaluator: a private cache, and a tiny extractor of known features."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import launch

from fewstep.vision.extractor import Extractor


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


@pytest.fixture(scope="session")
def script():
    """`eval/check_evaluator.py` as a module."""
    file = Path(__file__).parent.parent.parent / "eval" / "check_evaluator.py"
    spec = importlib.util.spec_from_file_location("check_evaluator", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class PoolExtractor(Extractor):
    """Mean colours of a 4 x 4 grid: 48 features in 0..1. Counts its calls."""

    name, dim, weights_sha256, resize = "pool", 48, "0" * 64, "area-4"

    def __init__(self):
        self.calls = 0

    def features(self, prepared):
        self.calls += 1
        x = prepared.permute(0, 3, 1, 2).float() / 255
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


# `accelerate launch --cpu` starts one process whatever it is told; with --multi_gpu it starts as many as asked for,
# and the device is ours to choose.
LAUNCHERS = {
    "torchrun": "torch.distributed.run --nproc_per_node 2 --rdzv_backend c10d --rdzv_endpoint localhost:0 -m",
    "accelerate": "accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 "
    "--mixed_precision no --dynamo_backend no --main_process_port 0 -m",
}


@pytest.fixture
def launch_two(tmp_path):
    """What `fewstep` with some arguments prints as two processes of a launcher; they must succeed."""

    def launched(launcher, words):
        said = tmp_path / "said.txt"
        said.unlink(missing_ok=True)
        code = launch([*LAUNCHERS[launcher].split(), "fewstep", *words], said).wait()
        said = said.read_text()
        assert code == 0, said[-3000:]
        return said

    return launched
