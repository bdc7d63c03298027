"""Several processes (gloo) on frozen weights in fewer bits, or in the host's memory: they train what one trains."""

import io
import tarfile
from dataclasses import replace
from pathlib import Path

import processes
import pytest
from PIL import Image
from test_distributed import differences, state
from test_end_to_end import tiny

from fewstep import recipe as recipes

KINDS = {  # of roles, of the frozen weights, and over how many of two processes trained ones are split
    "int8, replicas": ("lora", ("--teacher.quantization", "int8"), 1),
    "fp8 and the host's memory, sharded": (
        "lora",
        ("--teacher.quantization", "fp8", "--teacher.offload", "true"),
        2,
    ),
    "the host's memory, all sharded": ("full", ("--teacher.offload", "true"), 2),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [next(iter(KINDS)), *(pytest.param(n, marks=pytest.mark.long) for n in [*KINDS][1:])]
)
def test_two_processes_train_what_one_trains(name, tiny_sdxl, tmp_path):
    kind, words, shard = KINDS[name]
    options = (
        *("--student.kind", kind, "--critic.kind", kind, "--student.ema", "0.5", "--train.device", "cpu"),
        *("--teacher.gradient_checkpointing", "true", "--train.batch_size", "1", "--method.num_steps", "2"),
        *("--method.critic_steps", "1", "--train.checkpoint_every", "1", "--train.sample_every", "0"),
        *("--samples.count", "1", "--evaluation.num", "0", "--export.kohya", "false", *words),
    )
    made = {}
    for run, accumulate in (("one", 2), ("two", 1)):
        (tmp_path / run).mkdir()
        recipe = tiny("sdxl_dmd2_4step", tiny_sdxl, tmp_path / run, *options)
        split = shard if run == "two" else 1
        recipe = replace(recipe, train=replace(recipe.train, steps=1, accumulate=accumulate, shard=split))
        path = tmp_path / f"{run}.yaml"
        path.write_text(recipes.dump(recipe))
        if run == "one":
            processes.train(recipe)
        else:
            processes.run(2, [("execute", str(path))], tmp_path)
        made[run] = state(Path(recipe.output), 1)
    found = differences(made["one"], made["two"])
    assert found["weight"] < 1e-4 and found["average"] < 1e-4
    moved = [n for n in made["one"] if n.startswith("student/weight") and "lora_A" not in n]
    assert max(made["one"][n].abs().max() for n in moved) > 5e-4


SIZES = [(40, 36), (90, 40), (36, 80), (70, 36), (40, 40), (32, 64)]  # width and height; of each shape two


@pytest.mark.long
def test_three_processes_on_an_int8_base_in_several_shapes_of_shards_encoded_beside_training(
    tiny_sdxl, tmp_path, monkeypatch
):
    """Two pictures are none, and each process may be the first to see it."""
    shards = tmp_path / "shards"
    shards.mkdir()
    for number in range(2):
        with tarfile.open(shards / f"{number}.tar", "w") as file:
            for i, size in enumerate(SIZES):
                picture = io.BytesIO()
                Image.new("RGB", size, (40 * i, 99 * number, 250 - 40 * i)).save(picture, "PNG")
                content = picture.getvalue()[: 60 if i == 3 * number else None]
                for suffix, data in (("png", content), ("txt", f"{i} of {number}".encode())):
                    member = tarfile.TarInfo(f"{i}.{suffix}")
                    member.size = len(data)
                    file.addfile(member, io.BytesIO(data))
    shapes = "[{size: 32}, {size: [16, 32]}, {size: [32, 16]}]"
    words = (
        *("--data.images", str(shards), "--data.max_bad", "0.2", "--data.shapes", shapes),
        *("--data.cache_prompts", "false", "--data.cache_images", "false"),
        *("--teacher.quantization", "int8", "--teacher.offload", "true", "--train.device", "cpu"),
        *("--train.batch_size", "1", "--method.num_steps", "2", "--method.critic_steps", "1"),
        *("--method.gan_weight", "0.01", "--train.checkpoint_every", "3", "--train.sample_every", "0"),
        *("--samples.count", "1", "--evaluation.num", "0", "--export.kohya", "false"),
    )
    made = {}
    for run, accumulate in (("one", 6), ("three", 2)):
        monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache" / run))
        (tmp_path / run).mkdir()
        recipe = tiny("sdxl_dmd2_4step_24gb", tiny_sdxl, tmp_path / run, *words)
        recipe = replace(recipe, train=replace(recipe.train, steps=3, accumulate=accumulate))
        path = tmp_path / f"{run}.yaml"
        path.write_text(recipes.dump(recipe))
        if run == "one":
            processes.train(recipe)
        else:
            processes.run(3, [("train", str(path))], tmp_path)
        made[run] = state(Path(recipe.output), 3)
    found = differences(made["one"], made["three"])
    assert found["weight"] < 1e-4
    moved = [n for n in made["one"] if n.startswith("student/weight") and "lora_A" not in n]
    assert max(made["one"][n].abs().max() for n in moved) > 5e-4
    bad = [{*map(str.strip, file.open())} for file in (tmp_path / "cache" / "three").rglob("left_out.jsonl")]
    assert sum(map(len, bad)) == 2
