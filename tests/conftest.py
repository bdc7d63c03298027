"""Options, a private cache, and tiny pipelines on disk that go through the loading code of the real ones."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub
# Tests compare runs bit for bit, some in child processes, and several workers share the cores: one thread each,
# before anything imports torch.
os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"

import pytest
import torch


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run tests that take more than ten seconds")
    parser.addoption("--weights", action="store_true", help="also run tests that need published weights")


def pytest_collection_modifyitems(config, items):
    reasons = {
        "slow": None if config.getoption("--slow") else "needs --slow",
        "weights": None if config.getoption("--weights") else "needs --weights",
        "gpu": None if torch.cuda.is_available() else "needs a CUDA device",
    }
    for item in items:
        for marker, reason in reasons.items():
            if reason and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session", autouse=True)
def session_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEWSTEP_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def _tiny(tmp_path_factory, pipeline_class, **options):
    from fewstep.teachers.tiny import write_tiny_pipeline

    return write_tiny_pipeline(pipeline_class, tmp_path_factory.mktemp("tiny"), **options)


@pytest.fixture(scope="session")
def tiny_sdxl(tmp_path_factory):
    return _tiny(tmp_path_factory, "StableDiffusionXLPipeline")


@pytest.fixture(scope="session")
def tiny_sdxl_v(tmp_path_factory):
    return _tiny(tmp_path_factory, "StableDiffusionXLPipeline", prediction_type="v_prediction")


@pytest.fixture(scope="session")
def tiny_sd15(tmp_path_factory):
    return _tiny(tmp_path_factory, "StableDiffusionPipeline")


@pytest.fixture(scope="session")
def sdxl(tiny_sdxl):
    """The tiny SDXL as a loaded teacher; it is frozen, so tests may share it."""
    from fewstep.teachers import load_teacher

    return load_teacher(str(tiny_sdxl))
