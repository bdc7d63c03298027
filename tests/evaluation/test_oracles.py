"""One random Inception state dict through ours and the libraries of the field, where these are installed."""

import pytest


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


# The square roots of singular matrices in these libraries take about fifteen seconds each.
@pytest.mark.slow
@pytest.mark.parametrize("kind", range(11))
def test_files_are_read_as_the_library_reads_them(script, kind):
    """A protocol named after a tool gives its number, also where a viewer would show something else."""
    found = list(script.reading(script.KINDS[kind]))
    if not found:
        pytest.skip("none of clean-fid, torch-fidelity, pytorch-fid is installed")
    for library, theirs, ours, shown, told in found:
        assert ours == pytest.approx(theirs, rel=1e-4), library
        assert (shown == pytest.approx(theirs, rel=1e-4)) or told, library


def test_frechet_step_is_five_times_faster_than_the_matrix_square_root(script):
    pytest.importorskip("scipy")
    ((_, ours, seconds, theirs, their_seconds),) = script.frechet_speed(dim=1024, counts=(4000,))
    assert ours == pytest.approx(theirs, rel=1e-9)
    assert their_seconds > 5 * seconds
