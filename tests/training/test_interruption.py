"""Real signals to a real run: it saves, says how to go on, and ends where an undisturbed run ends."""

import signal
import time
from pathlib import Path

import pytest
import torch
from processes import command
from safetensors.torch import load_file
from test_end_to_end import tiny

from fewstep.recipe import dump
from fewstep.runs.session import execute, resume
from fewstep.training.signals import AT_ONCE, StopSignal

WORDS = ("--train.steps", "12", "--train.checkpoint_every", "3", "--samples.teacher_steps", "0")
WORDS = (*WORDS, "--train.sample_every", "0", "--train.keep", "50")


def final(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / "step_00000012" / "state.safetensors")


@pytest.fixture(scope="module")
def undisturbed(tiny_sd15, tmp_path_factory):
    return final(execute(tiny("sd15_dmd2_1step", tiny_sd15, tmp_path_factory.mktemp("straight"), *WORDS)))


@pytest.mark.parametrize(
    "number, code",
    [
        (signal.SIGINT, 130),
        pytest.param(signal.SIGUSR1, 138, marks=pytest.mark.long),
        (signal.SIGKILL, -9),
    ],
)
def test_an_interrupted_run_goes_on_exactly(undisturbed, tiny_sd15, tmp_path, number, code):
    path = tmp_path / "recipe.yaml"
    recipe = tiny("sd15_dmd2_1step", tiny_sd15, tmp_path, *WORDS)
    path.write_text(dump(recipe))
    run = Path(recipe.output)
    child = command(["train", path], said=tmp_path / "said.txt")
    deadline = time.time() + 120
    while not list(run.glob("checkpoints/step_*[0-9]")) and time.time() < deadline and child.poll() is None:
        time.sleep(0.02)
    child.send_signal(number)
    child.wait()
    errors = child.said.read_text()
    last = max(int(p.name[5:]) for p in run.glob("checkpoints/step_*[0-9]"))
    assert last < 12, "the run was over before the signal came"
    assert child.returncode == code, errors
    if number != signal.SIGKILL:
        assert f"fewstep resume {run}" in errors
    resume(run)
    resumed = final(run)
    assert resumed.keys() == undisturbed.keys()
    off = {
        n: (v - undisturbed[n]).abs().max().item() for n, v in resumed.items() if not v.equal(undisturbed[n])
    }
    assert not off


def test_signals_at_once_are_one_and_a_later_one_ends_the_program(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("fewstep.training.signals.time.monotonic", lambda: now[0])
    before = signal.getsignal(signal.SIGTERM)
    with StopSignal() as stop:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)  # as Linux tells of a parent's death for each of its threads
        now[0] += AT_ONCE
        signal.raise_signal(signal.SIGINT)
        assert stop.number == signal.SIGTERM
        now[0] += 0.01
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.gpu
def test_on_a_gpu_a_resumed_run_agrees_within_a_tolerance(tiny_sd15, tmp_path):
    """Some kernels add in no fixed order there: weights agree to 1e-3 of their own size and 1e-5."""
    from fewstep.process import start
    from fewstep.runs.checks import check_data
    from fewstep.runs.session import Session

    def run(folder, *stops):
        (tmp_path / folder).mkdir()
        recipe = tiny("sd15_dmd2_1step", tiny_sd15, tmp_path / folder, *WORDS, "--train.device", "cuda")
        for stop in stops:
            trainer = Session(recipe, *check_data(recipe), start("cuda")).trainer
            trainer.restore()
            while trainer.progress.iteration < stop:
                trainer.iterate()
            trainer.save()
        return final(Path(recipe.output))

    once, twice = run("once", 20), run("twice", 7, 20)
    assert all(torch.allclose(once[name], twice[name], rtol=1e-3, atol=1e-5) for name in once)
