"""One random Inception state dict through ours and the libraries of the field, where these are installed."""

import importlib.util
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent.parent / "eval" / "check_evaluator.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("check_evaluator", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("size", [(10, 80, 96), (6, 310, 330)])
def test_distances_agree_with_other_libraries(script, size):
    """To the 2e-5 that their square roots of singular matrices allow; resizes differ by far more."""
    found = list(script.agreement(*size))
    if not found:
        pytest.skip("none of clean-fid, torch-fidelity, torchmetrics, pytorch-fid is installed")
    for library, theirs, ours in found:
        assert ours == pytest.approx(theirs, rel=5e-5), library
    if len(found) == 4:
        values = [ours for _, _, ours in found]
        assert values[1] == values[2] and max(values) > 1.005 * min(values)


@pytest.mark.slow
def test_frechet_step_is_five_times_faster_than_the_matrix_square_root(script):
    pytest.importorskip("scipy")
    ((_, ours, seconds, theirs, their_seconds),) = script.frechet_speed(counts=(10_000,))
    assert ours == pytest.approx(theirs, rel=1e-9)
    assert their_seconds > 5 * seconds
