"""Two real processes (torchrun, gloo) train the same student as one process that accumulates."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_end_to_end import tiny

from fewstep import recipe as recipes
from fewstep.run import execute, resume


def torchrun(recipe, folder: Path) -> None:
    path = folder / "two.yaml"
    path.write_text(recipes.dump(recipe))
    script = Path(__file__).with_name("two_processes.py")
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*words, "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0", str(script), str(path)],
        capture_output=True,
        text=True,
        env=env,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def state(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoints" / "step_00000004" / "state.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("kind, shard", [("lora", 1), ("lora", 2), ("full", 2)])
def test_two_processes_train_what_one_trains_with_accumulation(tiny_sdxl, tmp_path, kind, shard):
    words = ("--student.kind", kind, "--critic.kind", kind, "--train.accumulate", "2", "--student.ema", "0.5")
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    one = execute(tiny("sdxl_dmd2_4step", tiny_sdxl, tmp_path / "one", *words))
    words = (*words, "--train.accumulate", "1", "--train.shard", str(shard), "--train.device", "cpu")
    recipe = tiny("sdxl_dmd2_4step", tiny_sdxl, tmp_path / "two", *words)
    torchrun(recipe, tmp_path)
    first, second = state(one), state(tmp_path / "two" / "run")
    assert first.keys() == second.keys()
    weights = [name for name in first if "/weight/" in name]
    assert max((first[n] - second[n]).abs().max() for n in weights) < 2e-4
    moved = [n for n in weights if n.startswith("student") and "lora_A" not in n]
    assert max(first[n].abs().max() for n in moved) > 1e-3
    # What two processes saved, one process continues.
    longer = replace(recipe, train=replace(recipe.train, steps=6, accumulate=2, shard=1))
    (tmp_path / "two" / "run" / "recipe.yaml").write_text(recipes.dump(longer))
    assert resume(tmp_path / "two" / "run").joinpath("checkpoints", "step_00000006").is_dir()
