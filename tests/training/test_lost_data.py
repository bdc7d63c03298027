"""Data that vanish while a run trains on them: one error, the last checkpoint is whole, and the run goes on."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_end_to_end import tiny

from fewstep import cli
from fewstep.data import pairs, store
from fewstep.data.images import load_images
from fewstep.errors import tell
from fewstep.files import ReadError
from fewstep.recipe import dump
from fewstep.training import checkpoint
from fewstep.training.trainer import Trainer

STEPS = 8
WORDS = ("--train.steps", str(STEPS), "--train.sample_every", "0", "--samples.teacher_steps", "0")
WORDS = (*WORDS, "--train.device", "cpu", "--train.keep", "9")
LOSSES = {"gone": lambda path: path.unlink(), "cut short": lambda path: os.truncate(path, 2000)}


def main(words):
    try:
        return cli.main(words)
    except SystemExit as stop:
        return stop.code


@pytest.fixture(autouse=True)
def many_small_files(monkeypatch):
    """Every row is read when it is needed, as with data larger than the memory kept for them."""
    monkeypatch.setattr(store, "IN_MEMORY", 0)
    monkeypatch.setattr(store, "SHARD", 2)
    monkeypatch.setattr(pairs, "SHARD", 4)


@pytest.fixture
def command(tiny_sd15, tmp_path, monkeypatch):
    """Runs ``fewstep train`` on a shipped recipe, tiny, with a cache of its own; (exit code, run directory)."""
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))

    def run(name, folder, before=None):
        (tmp_path / folder).mkdir()
        words = (*WORDS, "--data.pairs", str(tmp_path / "pairs")) if name == "sd15_dmd_1step" else WORDS
        recipe = tiny(name, tiny_sd15, tmp_path / folder, *words)
        path = tmp_path / folder / "recipe.yaml"
        path.write_text(dump(recipe))
        if name == "sd15_dmd_1step" and not (tmp_path / "pairs").exists():
            assert main(["pairs", str(path), "--num", "10", "--steps", "2"]) == 0
        iterate = Trainer.iterate

        def disturbed(trainer):
            if trainer.progress.iteration == 3:
                before()
            iterate(trainer)

        with monkeypatch.context() as patch:
            if before:
                patch.setattr(Trainer, "iterate", disturbed)
            return main(["train", str(path)]), Path(recipe.output)

    return run


def final(run):
    return load_file(run / "checkpoints" / f"step_{STEPS:08d}" / "state.safetensors")


def same(one, two):
    return one.keys() == two.keys() and all(one[key].equal(two[key]) for key in one)


def stopped(code, run, capsys, path):
    """The run ended with one message that names the file, and what it had saved is whole."""
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("fewstep: /")]
    assert code == 4 and len(lines) == 1 and str(path) in lines[0] and "fewstep resume" in lines[0], lines
    saved = checkpoint.every(run / "checkpoints")
    assert saved and all(checkpoint.fault(folder) is None for folder in saved)
    assert checkpoint.step_of(saved[-1]) < STEPS
    return lines[0]


@pytest.mark.parametrize("loss", ["cut short", pytest.param("gone", marks=pytest.mark.long)])
def test_a_file_of_pairs(loss, command, tmp_path, capsys, tally):
    code, straight = command("sd15_dmd_1step", "straight")
    assert code == 0
    path = tmp_path / "pairs" / "000000004.safetensors"
    content = path.read_bytes()
    tally("faults injected", 1)
    capsys.readouterr()
    code, run = command("sd15_dmd_1step", "disturbed", lambda: LOSSES[loss](path))
    assert "or run fewstep pairs again" in stopped(code, run, capsys, path)
    assert main(["resume", str(run)]) == 2  # not before it is back
    assert "data.pairs: " in capsys.readouterr().err
    assert main(["pairs", str(run / "recipe.yaml"), "--num", "10", "--steps", "2"]) == 0
    assert path.read_bytes() == content
    assert main(["resume", str(run)]) == 0
    assert same(final(straight), final(run))
    tally("survived", 1)


@pytest.mark.parametrize("kind, loss", [("prompts", "gone"), ("latents", "cut short")])
def test_a_file_of_the_cache(kind, loss, command, tmp_path, capsys, tally):
    code, straight = command("sd15_dmd2_1step", "straight")
    assert code == 0
    files = sorted((tmp_path / "cache").glob(f"{kind}-*/*.safetensors"))
    tally("faults injected", 1)
    capsys.readouterr()
    damaged = []

    def damage():
        now = sorted((tmp_path / "cache").glob(f"{kind}-*/000000002.safetensors"))
        damaged.extend(path for path in now if kind == "prompts" or path not in files)
        for path in damaged:
            LOSSES[loss](path)

    code, run = command("sd15_dmd2_1step", "disturbed", damage)
    assert "encodes it again" in stopped(code, run, capsys, damaged[0])
    assert main(["resume", str(run)]) == 0
    assert same(final(straight), final(run))
    tally("survived", 1)


def test_an_image_that_is_gone_is_said_when_the_run_goes_on(command, tmp_path, capsys):
    def stop():
        raise KeyboardInterrupt

    code, run = command("sd15_dmd2_1step", "run", stop)
    images = load_images(str(tmp_path / "run" / "images"))
    assert code == 130
    (tmp_path / "run" / "images" / "4.png").unlink()
    with pytest.raises(
        ReadError, match=r"data\.images: .*4\.png: .*No such file.*; put it back, then"
    ) as gone:
        images.load(4, 8)
    assert tell(gone.value) == 4
    capsys.readouterr()
    assert main(["resume", str(run)]) == 2
    assert f"data.images: {tmp_path / 'run' / 'images'}: holds something else" in capsys.readouterr().err
    assert main(["resume", str(run), "--images", str(tmp_path / "run" / "images")]) == 0
    said = capsys.readouterr().err
    assert "step_00000002 was trained on 5 prompts, 5 images, and there are 5 prompts, 4 images" in said


def test_rows_on_disk_are_the_rows_in_memory(tmp_path, monkeypatch):
    rows = {
        "a": torch.randn(5, 3, 2),
        "b": torch.randn(5, 7).bfloat16(),
        "c": torch.arange(5),
        "d": torch.arange(10).view(5, 2) % 3 == 0,
    }
    rows["a"][[0, 1, 3], 1:] = 0  # padding of other lengths, of which one row is all
    rows["b"][1:3] = 0
    rows["e"] = torch.zeros(5, 3, 2).bfloat16()
    for start in (0, 2, 4):
        part = {name: value[start : start + 2] for name, value in rows.items()}
        save_file(store.joined([store.without_padding(part)]), store.shard_path(tmp_path, start))
    index = torch.tensor([4, 0, 3, 3, 1, 2])
    disk = store.Store(tmp_path, 5)
    monkeypatch.setattr(store, "IN_MEMORY", 1 << 20)
    memory = store.Store(tmp_path, 5)
    assert memory.in_memory and not disk.in_memory
    for one in (disk, memory):
        found = one.rows(index)
        assert found.keys() == rows.keys()
        for name, value in found.items():
            wanted = rows[name][index]
            assert value.equal(wanted.float() if wanted.is_floating_point() else wanted)
