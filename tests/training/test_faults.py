"""Every write of a run fails once, in every way: what is saved stays whole, and the run ends where it should have."""

import errno
import json
import os
import shutil

import numpy as np
import pytest
import torch
from faults import REASON, Disk
from PIL import Image
from safetensors.torch import load_file
from toys import SD, Mlp, fit, toy

from fewstep import files
from fewstep.errors import FewstepError, tell
from fewstep.evaluation.statistics import Statistics
from fewstep.methods.dmd2 import DMD2
from fewstep.methods.router import Router
from fewstep.recipe import TrainConfig
from fewstep.report.log import MetricsLog, read_metrics
from fewstep.report.report import write_report
from fewstep.teachers.analytic import GaussianMixture
from fewstep.training import checkpoint

STEPS, LAST = 4, "step_00000004"


@pytest.fixture(scope="module")
def ring():
    return GaussianMixture.ring(SD, radius=2.2, std=0.2)


@pytest.fixture(scope="module")
def fitted(ring):
    torch.manual_seed(0)
    return fit(ring, Mlp(width=4), steps=2)


@pytest.fixture(scope="module")
def train(ring, fitted):
    """A run in a folder, to its end or to the fault."""

    def run(folder):
        config = DMD2.Config(num_steps=1, start=625, critic_steps=2, gan_weight=0.0)
        trainer = toy(DMD2, config, ring, fitted, STEPS, 2)
        trainer.config = TrainConfig(STEPS, 2, checkpoint_every=2, log_every=1, keep=2, sample_every=0)
        trainer.folder = folder
        trainer.restore()
        trainer.train()

    return run


def final(folder):
    return load_file(folder / "checkpoints" / LAST / "state.safetensors")


def log(folder):
    return [
        {k: v for k, v in record.items() if k != "seconds"}
        for record in read_metrics(folder / "metrics.jsonl")
    ]


@pytest.fixture(scope="module")
def straight(train, tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight")
    with Disk() as disk:
        train(folder)
    return folder, disk.count


def goes_on(train, folder, straight):
    """Whatever is saved is whole, nothing is left beside it, and the end is the end of the undisturbed run."""
    saved = checkpoint.every(folder / "checkpoints")
    assert all(checkpoint.fault(path) is None for path in saved)
    train(folder)
    one, two = final(straight), final(folder)
    assert one.keys() == two.keys() and all(one[key].equal(two[key]) for key in one)
    assert log(folder) == log(straight)
    assert not list(folder.rglob(".part-*"))


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO, errno.EROFS], ids=["full", "broken", "read-only"])
def test_every_write_of_a_run_fails_once(train, straight, tmp_path, error, tally, capsys):
    folder, count = straight
    assert count > 40
    for n in range(1, count + 1):
        tally("faults injected", 1)
        run = tmp_path / str(n)
        with Disk(n, error), pytest.raises((FewstepError, OSError)) as stop:
            train(run)
        assert tell(stop.value) == 4 and REASON[error] in capsys.readouterr().err, n
        goes_on(train, run, folder)
        shutil.rmtree(run)
        tally("survived", 1)


def test_a_process_that_dies_at_any_write(train, straight, tmp_path, tally):
    folder, count = straight
    for n in range(1, count + 1):
        tally("faults injected", 1)
        run = tmp_path / str(n)
        if not (child := os.fork()):
            try:
                with Disk(n, None):
                    train(run)
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9, n
        goes_on(train, run, folder)
        shutil.rmtree(run)
        tally("survived", 1)


# ------------------------------------------------------------------------------------------------ damaged checkpoints
def flip(path, place=0.5):
    data = bytearray(path.read_bytes())
    data[int(len(data) * place)] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "weights cut short": lambda f: os.truncate(f / "state.safetensors", 99),
    "a bit of the weights": lambda f: flip(f / "state.safetensors"),
    "the last byte": lambda f: flip(f / "state.safetensors", 0.9999),
    "a digit of the state": lambda f: flip(f / "state.json"),
    "weights gone": lambda f: (f / "state.safetensors").unlink(),
    "state gone": lambda f: (f / "state.json").unlink(),
    "checksums gone": lambda f: (f / "SHA256SUMS").unlink(),
    "checksums empty": lambda f: (f / "SHA256SUMS").write_text(""),
    "checksums are text": lambda f: (f / "SHA256SUMS").write_text("hello\n"),
    "checksums are bytes": lambda f: (f / "SHA256SUMS").write_bytes(b"\xff\xfe\n"),
    "an empty folder": lambda f: [p.unlink() for p in f.iterdir()],
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_used(
    name, train, straight, tmp_path, capsys, tally
):
    tally("faults injected", 1)
    run = shutil.copytree(straight[0], tmp_path / "run")
    DAMAGE[name](run / "checkpoints" / LAST)
    train(run)
    said = capsys.readouterr().err
    assert f"{LAST}: " in said and "using the one before it" in said
    one, two = final(straight[0]), final(run)
    assert all(one[key].equal(two[key]) for key in one) and log(run) == log(straight[0])
    assert checkpoint.fault(run / "checkpoints" / LAST) is None
    tally("survived", 1)


def test_a_run_without_a_whole_checkpoint_does_not_begin_again_by_itself(train, straight, tmp_path, capsys):
    run = shutil.copytree(straight[0], tmp_path / "run")
    for folder in checkpoint.every(run / "checkpoints"):
        flip(folder / "state.safetensors")
    with pytest.raises(
        FewstepError, match=r"none of its 2 checkpoints is whole; .*remove that folder to begin again"
    ):
        train(run)
    assert len(log(run)) == STEPS  # not even the log is touched


def test_the_newest_and_the_best_are_kept(ring, fitted, tmp_path):
    config = DMD2.Config(num_steps=1, start=625, critic_steps=2, gan_weight=0.0)
    trainer = toy(DMD2, config, ring, fitted, 12, 2)
    trainer.config = TrainConfig(
        12, 2, checkpoint_every=2, log_every=1, keep=2, sample_every=0, best="critic/denoising"
    )
    trainer.folder = tmp_path
    trainer.train()
    records = read_metrics(tmp_path / "metrics.jsonl")
    means = {
        s: np.mean([r["critic/denoising"] for r in records if s - 2 < r["step"] <= s])
        for s in range(2, 13, 2)
    }
    best = min(means, key=means.get)
    assert trainer.best["step"] == best and trainer.best["value"] == pytest.approx(means[best], rel=1e-5)
    kept = {checkpoint.step_of(folder) for folder in checkpoint.every(tmp_path / "checkpoints")}
    assert kept == {best, 10, 12}
    assert checkpoint.at(tmp_path / "checkpoints", "best", trainer.best).name == f"step_{best:08d}"
    with pytest.raises(FewstepError, match="no checkpoint of step 3; there are those of"):
        checkpoint.at(tmp_path / "checkpoints", "3", {})
    with pytest.raises(FewstepError, match=r"no best one is known; set train\.best"):
        checkpoint.at(tmp_path / "checkpoints", "best", {})


def test_rotation_keeps_the_newest_and_the_best_one(tmp_path):
    for step in (1, 5, 20, 100, 1000, 2000):
        (tmp_path / f"step_{step:08d}").mkdir()
    checkpoint.rotate(tmp_path, 2, 5)
    assert [checkpoint.step_of(folder) for folder in checkpoint.every(tmp_path)] == [5, 1000, 2000]
    checkpoint.drop_after(tmp_path, 1000)
    assert [checkpoint.step_of(folder) for folder in checkpoint.every(tmp_path)] == [5, 1000]


def test_a_damaged_checkpoint_cannot_be_chosen(straight, tmp_path):
    run = shutil.copytree(straight[0] / "checkpoints", tmp_path / "checkpoints")
    flip(run / LAST / "state.safetensors")
    with pytest.raises(FewstepError, match=r"state\.safetensors is damaged; choose another of 2, 4"):
        checkpoint.at(run, "4", {})
    assert checkpoint.at(run, "2", {}).name == "step_00000002"


def test_a_roll_back_passes_over_checkpoints_within_a_streak(tmp_path):
    states = [(0, True), (0, True), (3, True), (0, False)]  # updates skipped in a row, the last one finite
    for step, (skipped, finite) in enumerate(states):
        folder = tmp_path / f"step_{step:08d}"
        state = {"skipped": {"generator": skipped, "critic": 0}, "last": {"finite": {"critic": finite}}}
        files.write_json(folder / "state.json", state)
        files.write(folder / "SHA256SUMS", f"{checkpoint.digest(folder / 'state.json')}  state.json\n")
        assert checkpoint.step_of(checkpoint.newest(tmp_path)) == step
        assert checkpoint.step_of(checkpoint.newest(tmp_path, sound=True)) == min(step, 1)


def test_checksums_are_those_of_sha256sum(straight):
    import subprocess

    folder = straight[0] / "checkpoints" / LAST
    done = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count("OK") == 2


# ------------------------------------------------------------------------------------------------------ other outputs
def write_log(folder, mark):
    log = MetricsLog(folder / "metrics.jsonl")
    try:
        log.append({"step": 1, "seconds": 1.0, "mark": mark})
    finally:
        log.close()


def write_grid(folder, mark):
    with files.replacing(folder / "grid.png") as part:
        Image.new("RGB", (9, 9), (mark, 0, 0)).save(part)


def write_router(folder, mark):
    router = Router(2)
    router.fit(
        type("Rows", (), {"__len__": lambda s: 4, "rows": lambda s, i: {"pooled": torch.eye(4)[i] * mark}})()
    )
    router.save(folder)


def write_page(folder, mark):
    (folder / "run.json").exists() or files.write_json(folder / "run.json", {"name": "x"})
    write_report(folder)


WRITERS = {
    "metrics": write_log,
    "grid": write_grid,
    "json": lambda folder, mark: files.write_json(folder / "table.json", {"mark": mark}),
    "tensors": lambda folder, mark: files.write_tensors(
        folder / "rows.safetensors", {"x": torch.full((9,), mark)}
    ),
    "router": write_router,
    "report": write_page,
    "statistics": lambda folder, mark: Statistics(
        torch.zeros(3), torch.eye(3) * mark, 5, {"extractor": "x"}
    ).save(folder / "s.npz"),
}


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO], ids=["full", "broken"])
def test_every_output_is_the_old_one_or_the_new_one(name, error, tmp_path, tally):
    write = WRITERS[name]
    write(tmp_path, 1)
    old = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with Disk() as disk:
        write(tmp_path, 2)
    new = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert disk.count
    for n in range(1, disk.count + 1):
        tally("faults injected", 1)
        for key, content in old.items():
            (tmp_path / key).write_bytes(content)
        with Disk(n, error), pytest.raises((FewstepError, OSError)) as stop:
            write(tmp_path, 2)
        assert isinstance(stop.value, FewstepError) or name == "metrics"
        now = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
        assert now.keys() == new.keys()
        if name == "metrics":  # a torn line is repaired by the next writer
            MetricsLog(tmp_path / "metrics.jsonl").close()
            assert read_metrics(tmp_path / "metrics.jsonl")[0] == json.loads(old["metrics.jsonl"])
        else:
            assert all(now[key] in (old[key], new[key]) for key in now)
        tally("survived", 1)
