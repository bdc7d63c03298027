"""Several processes (gloo) on sources that are not cached: WebDataset shards and prompts, encoded beside training."""

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

MICRO = 12  # micro-batches of an iteration, over all processes
RUNS = {  # processes, and over how many of them weights are split
    "replicas": (2, 1),
    "three that share": (3, 3),
    "two replicas of two that share": (4, 2),
}


@pytest.fixture(scope="module")
def made(tiny_sdxl, tmp_path_factory):
    """A recipe for a folder, and whether its images are cached; of the shards two pictures are none."""
    folder = tmp_path_factory.mktemp("split")
    shards = folder / "shards"
    shards.mkdir()
    for number in range(2):
        with tarfile.open(shards / f"{number}.tar", "w") as file:
            for i in range(8):
                picture = io.BytesIO()
                Image.new("RGB", (40, 32), (30 * i, 90 * number, 200 - 20 * i)).save(picture, "PNG")
                content = b"none" if i == 2 else picture.getvalue()
                for suffix, data in (("png", content), ("txt", f"{i} of {number}".encode())):
                    member = tarfile.TarInfo(f"{i}.{suffix}")
                    member.size = len(data)
                    file.addfile(member, io.BytesIO(data))
    options = (
        *("--data.images", str(shards), "--data.max_bad", "0.2", "--data.cache_prompts", "false"),
        *("--student.kind", "full", "--critic.kind", "full", "--student.ema", "0.5", "--train.device", "cpu"),
        *("--train.batch_size", "1", "--method.num_steps", "2", "--method.critic_steps", "1"),
        *("--train.checkpoint_every", "1", "--train.sample_every", "0", "--samples.count", "1"),
        *("--evaluation.num", "0", "--export.kohya", "false", "--method.gan_weight", "0.01"),
    )

    def recipe(name: str, count: int, shard: int, *words: str):
        place = folder / name
        place.mkdir()
        found = tiny("sdxl_dmd2_4step", tiny_sdxl, place, *options, *words)
        train = replace(found.train, steps=1, accumulate=MICRO // count, shard=shard)
        found = replace(found, train=train)
        (place / "recipe.yaml").write_text(recipes.dump(found))
        return found

    return recipe


@pytest.fixture(scope="module")
def alone(made, tmp_path_factory):
    patch = pytest.MonkeyPatch()
    patch.setenv("FEWSTEP_CACHE", str(tmp_path_factory.mktemp("cache")))
    recipe = made("one", 1, 1, "--data.cache_images", "false")
    processes.train(recipe)
    patch.undo()
    return Path(recipe.output)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["three that share", *(pytest.param(n, marks=pytest.mark.long) for n in RUNS if "three" not in n)]
)
def test_several_train_what_one_trains(name, made, alone, tmp_path, monkeypatch):
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))
    count, shard = RUNS[name]
    recipe = made(name, count, shard, "--data.cache_images", "false")
    processes.run(count, [("train", str(Path(recipe.output).parent / "recipe.yaml"))], tmp_path)
    one, several = state(alone, 1), state(Path(recipe.output), 1)
    found = differences(one, several)
    assert found["weight"] < 1e-4 and found["average"] < 1e-4
    assert max(one[n].abs().max() for n in one if n.startswith("student/weight")) > 5e-4
