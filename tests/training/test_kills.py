"""SIGKILL at random moments of a real run, and a process of two that dies: nothing is lost, nobody waits for ever."""

import os
import random
import signal
import time
from pathlib import Path

import pytest
from processes import Fork, command, launch, meeting
from safetensors.torch import load_file
from test_end_to_end import tiny

from fewstep.recipe import dump
from fewstep.report.log import read_metrics
from fewstep.runs.session import execute, resume
from fewstep.training import checkpoint

KILLS, STEPS = 20, 40
WORDS = (
    "--train.steps",
    str(STEPS),
    "--train.checkpoint_every",
    "1",
    "--train.keep",
    "2",
    "--train.sample_every",
    "0",
)
WORDS = (*WORDS, "--samples.teacher_steps", "0", "--train.batch_size", "1", "--train.device", "cpu")


def cpu_seconds(pid):
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")


def steps_done(run):
    return max((int(p.name[5:]) for p in run.glob("checkpoints/step_*[0-9]")), default=0)


@pytest.mark.long
@pytest.mark.skipif(
    not Path("/proc/self/stat").exists(), reason="reads the seconds a process has used from /proc"
)
def test_twenty_kills_change_nothing(tiny_sd15, tmp_path, tally):
    for name in ("straight", "killed"):
        (tmp_path / name).mkdir()
    straight = execute(tiny("sd15_dmd2_1step", tiny_sd15, tmp_path / "straight", *WORDS))
    recipe = tiny("sd15_dmd2_1step", tiny_sd15, tmp_path / "killed", *WORDS)
    run, chance, kills = Path(recipe.output), random.Random(0), 0
    begun = Fork(lambda: execute(recipe))
    while kills < KILLS:
        # Somewhere in its start, or some steps on and then anywhere within a step; all kills fall within the run.
        done, start = steps_done(run), chance.random() < 0.2
        goal = min(STEPS - 1, done + chance.randint(1, max(1, 2 * (STEPS - done) // (KILLS - kills + 1))))
        until = chance.uniform(0, 1) if start else None
        while (cpu_seconds(begun.pid) < until) if start else (steps_done(run) < goal):
            assert begun.poll() is None, "the run ended by itself"
            time.sleep(0.002)
        time.sleep(chance.uniform(0, 0.1))
        tally("faults injected", 1)
        begun.kill()
        assert begun.wait() == -signal.SIGKILL
        kills += 1
        tally("survived", 1)
        begun = Fork(lambda: resume(run) if (run / "recipe.yaml").is_file() else execute(recipe))
    assert begun.wait() == 0
    for name in (
        f"checkpoints/step_{STEPS:08d}/state.safetensors",
        "export/pytorch_lora_weights.safetensors",
    ):
        one, two = load_file(straight / name), load_file(run / name)
        assert one.keys() == two.keys() and not [key for key in one if not one[key].equal(two[key])]
    records = [[{**r, "seconds": 0} for r in read_metrics(f / "metrics.jsonl")] for f in (straight, run)]
    assert records[0] == records[1] and len(records[0]) == STEPS
    assert not list(run.rglob(".part-*"))


@pytest.mark.slow
def test_a_signal_to_torchrun_stops_all_processes_with_everything_saved(tiny_sd15, tmp_path):
    words = ("--train.steps", "2000", "--train.checkpoint_every", "1000", "--train.log_every", "1")
    recipe = tiny("sd15_dmd2_1step", tiny_sd15, tmp_path, *WORDS, *words)
    path, run = tmp_path / "recipe.yaml", Path(recipe.output)
    path.write_text(dump(recipe))
    torchrun = ["torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    torchrun += ["--signals-to-handle", "SIGTERM,SIGUSR1", "-m", "fewstep", "train", str(path)]
    child = launch(torchrun, said := tmp_path / "said.txt")
    try:
        deadline = time.time() + 240
        while len(read_metrics(run / "metrics.jsonl")) < 3:
            assert time.time() < deadline and child.poll() is None, said.read_text()[-3000:]
            time.sleep(0.1)
        child.send_signal(signal.SIGUSR1)
        code = child.wait(120)
    finally:
        child.kill()
    errors = said.read_text()
    assert code and "stopped by SIGUSR1 at step" in errors, errors[-3000:]
    (saved,) = checkpoint.every(run / "checkpoints")
    assert checkpoint.fault(saved) is None and f"at step {checkpoint.step_of(saved)}, saved" in errors


@pytest.mark.slow
def test_when_one_of_two_processes_dies_the_other_ends_with_an_error(tiny_sd15, tmp_path, tally):
    tally("faults injected", 1)
    recipe = tiny(
        "sd15_dmd2_1step", tiny_sd15, tmp_path, *WORDS, "--train.steps", "2000", "--train.log_every", "1"
    )
    path = tmp_path / "recipe.yaml"
    path.write_text(dump(recipe))
    with meeting(2) as places:  # without torchrun, which would end the other by itself
        two = [
            command(["train", path], said=tmp_path / f"{rank}.txt", env=place)
            for rank, place in enumerate(places)
        ]
        try:
            metrics, deadline = Path(recipe.output) / "metrics.jsonl", time.time() + 240
            while not (metrics.exists() and len(read_metrics(metrics)) > 2):
                assert time.time() < deadline and all(p.poll() is None for p in two), "it did not start"
                time.sleep(0.1)
            two[1].send_signal(signal.SIGKILL)
            begin = time.time()
            two[0].wait(120)
            errors = two[0].said.read_text()
            assert time.time() - begin < 60
            assert two[0].returncode == 5, errors[-2000:]
            assert (
                "another of the 2 processes has ended" in errors
                and f"fewstep resume {recipe.output}" in errors
            )
        finally:
            for process in two:
                process.kill()
    tally("survived", 1)
