"""Real processes (gloo) train what one process with accumulation does, and go on with each other's runs."""

import errno
import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path

import processes
import pytest
import torch
from test_end_to_end import tiny
from torch.distributed.checkpoint import CheckpointException

from fewstep import recipe as recipes
from fewstep.errors import RecipeError
from fewstep.files import WriteError
from fewstep.process import Process, start
from fewstep.recipe import RoleConfig
from fewstep.teachers.edm.networks import EDM2Precond
from fewstep.training.checkpoint import _write
from fewstep.training.optimizers import optimizer_of, take_step
from fewstep.training.roles import Role
from fewstep.training.sharding import clip_gradients, distribute, whole

KINDS = {  # how weights are trained, and over how many of two processes, and of three, they are split
    "replicas of a LoRA": ("lora", 1, 1),
    "a sharded LoRA": ("lora", 2, 3),
    "all sharded": ("full", 2, 3),
}
SHOWN = ["replicas of a LoRA", pytest.param("a sharded LoRA", marks=pytest.mark.long), "all sharded"]


@cache
def state(run: Path, step: int) -> dict[str, torch.Tensor]:
    """Everything a checkpoint holds, read by one process whoever wrote it."""
    from torch.distributed.checkpoint import HuggingFaceStorageReader, load

    reader = HuggingFaceStorageReader(str(run / "checkpoints" / f"step_{step:08d}"))
    entries = reader.read_metadata().state_dict_metadata
    tensors = {name: torch.zeros(entry.size) for name, entry in entries.items()}
    load(tensors, storage_reader=reader, no_dist=True)
    return tensors


def differences(one: dict, other: dict) -> dict[str, float]:
    """Largest difference by what a tensor is: weight, average, optimizer."""
    assert one.keys() == other.keys()
    found: dict[str, float] = {}
    for name, value in one.items():
        kind = name.split("/")[1]
        found[kind] = max(found.get(kind, 0.0), (value - other[name]).abs().max().item())
    return found


@pytest.fixture(scope="module")
def trained(tiny_sdxl, tmp_path_factory):
    """(kind, run) -> its folder: an iteration of six micro-batches by one process and by two, and one more by one and
    three. Each run is made when a test first asks for it.

    One process does the same with both kinds of LoRA, since it has nobody to share weights with.
    """
    folder = tmp_path_factory.mktemp("distributed")

    @cache
    def recipe(name, run):
        kind, *shards = KINDS[name]
        steps, accumulate, shard = {
            "one": (2, 6, 1),
            "two": (1, 3, shards[0]),
            "on one": (2, 6, 1),
            "on three": (2, 2, shards[1]),
        }[run]
        options = (
            *("--student.kind", kind, "--critic.kind", kind, "--student.ema", "0.5", "--train.device", "cpu"),
            *("--teacher.gradient_checkpointing", str(kind == "full").lower(), "--train.batch_size", "1"),
            *("--method.num_steps", "2", "--method.critic_steps", "1", "--train.checkpoint_every", "1"),
            *("--train.sample_every", "0", "--samples.count", "1", "--evaluation.num", "0"),
            *("--export.kohya", "false"),  # of an adapter only
        )
        (folder / name).mkdir(exist_ok=True)
        made = tiny("sdxl_dmd2_4step", tiny_sdxl, folder / name, *options)
        train = replace(made.train, steps=steps, accumulate=accumulate, shard=shard)
        made = replace(made, output=str(folder / name / run), train=train)
        (folder / f"{name} {run}.yaml").write_text(recipes.dump(made))
        return made

    @cache
    def get(name, run):
        if (name, run) == ("a sharded LoRA", "one"):
            return get("replicas of a LoRA", "one")
        made = recipe(name, run)
        if run.startswith("on "):
            shutil.copytree(get(name, "two") / "checkpoints", Path(made.output, "checkpoints"))
        if run.endswith("one"):
            processes.train(made, resuming=run == "on one")
        else:
            first = "execute" if name == "all sharded" else "train"
            task = first if run == "two" else "resume"
            processes.run(2 if run == "two" else 3, [(task, str(folder / f"{name} {run}.yaml"))], folder)
        return Path(made.output)

    return get


@pytest.mark.slow
@pytest.mark.parametrize("kind", SHOWN)
def test_two_processes_train_what_one_trains_with_accumulation(kind, trained):
    one, two = (state(trained(kind, run), 1) for run in ("one", "two"))
    found = differences(one, two)
    assert found["weight"] < 1e-4 and found["average"] < 1e-4
    moved = [n for n in one if n.startswith("student/weight") and "lora_A" not in n]
    assert max(one[n].abs().max() for n in moved) > 5e-4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "run"),
    [
        ("all sharded", "on three"),
        ("replicas of a LoRA", "on one"),
        *(
            pytest.param(kind, run, marks=pytest.mark.long)
            for kind, run in [
                ("all sharded", "on one"),
                ("replicas of a LoRA", "on three"),
                ("a sharded LoRA", "on one"),
                ("a sharded LoRA", "on three"),
            ]
        ),
    ],
)
def test_what_two_processes_saved_any_number_continues(kind, run, trained):
    ends = [state(trained(kind, which), 2) for which in (run, "one")]
    found = differences(*ends)
    assert found["weight"] < 1e-4 and found["average"] < 1e-4
    saved = state(trained(kind, "two"), 1)
    assert differences(ends[0], saved)["weight"] > 1e-3  # it did go on


@pytest.mark.slow
def test_each_process_writes_what_it_holds(trained):
    """No rank gathers the whole state; together the files hold every weight once."""
    saved = trained("all sharded", "two") / "checkpoints" / "step_00000001"
    files = sorted(saved.glob("*.safetensors"))
    whole = trained("all sharded", "one") / "checkpoints" / "step_00000001" / "state.safetensors"
    sizes = [path.stat().st_size for path in files]
    assert len(sizes) == 2 and max(sizes) < 0.7 * whole.stat().st_size < 0.8 * sum(sizes)
    listed = {line.split()[1] for line in (saved / "SHA256SUMS").read_text().splitlines()}
    assert listed == {"state.json", *(path.name for path in files)}


@pytest.mark.slow
def test_sharded_weights_are_exported_whole(trained):
    """Stock diffusers made the trainer's own sample of it, or the run would have ended with an error."""
    assert (trained("all sharded", "two") / "export" / "pipeline" / "model_index.json").is_file()


def clipped(process=None):
    """A norm, the gradients that were clipped to a tenth, and the weights after a step and their average."""
    torch.manual_seed(0)
    role = Role("x", torch.nn.Linear(4, 3), RoleConfig(kind="full", ema=0.5))  # rows that two do not divide
    if process:
        distribute(role.module, process)
        role.collect()
    role.module(torch.arange(8.0).view(2, 4)).square().sum().backward()
    norm = clip_gradients(role.weights.values(), 0.1)
    gradients = [w.grad for w in role.weights.values()]
    take_step(optimizer_of(role), 0.01, torch.zeros(()))
    role.update_average(0)
    parts = [*gradients, *role.weights.values(), *role.average.values()]
    return [norm.item(), *[whole(part).tolist() for part in parts]]


@pytest.mark.parametrize("shard", [1, 2])
def test_an_update_of_shards_is_that_of_the_whole(shard, tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "start", lambda device: start(device, shard=shard))
    alone = clipped()
    assert alone[0] > 1 and torch.tensor(alone[1]).norm() < 0.1
    for several in processes.together(2, clipped, tmp_path):
        for one, other in zip(alone, several, strict=True):
            torch.testing.assert_close(torch.tensor(other), torch.tensor(one))


def normalised(process=None):
    torch.manual_seed(0)
    role = Role(
        "x",
        EDM2Precond(8, 3, None, model_channels=8, channel_mult=(1,), num_blocks=1),
        RoleConfig(kind="full"),
    )
    if process:
        distribute(role.module, process)
        role.collect()
    role.settle_weights()
    return [whole(weight).sum().item() for weight in role.weights.values()]


def test_shards_of_edm2_are_normalised_as_the_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "start", lambda device: start(device, shard=2))
    alone = normalised()
    for several in processes.together(2, normalised, tmp_path):
        torch.testing.assert_close(torch.tensor(several), torch.tensor(alone))


def test_a_number_of_processes_that_the_shards_do_not_divide_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "6")
    with pytest.raises(
        RecipeError, match=r"train.shard: 4 does not divide .* processes, 6; start a multiple"
    ):
        start("cpu", 4)


def test_a_resumed_run_of_another_batch_says_so(tiny_sdxl, tmp_path, capsys):
    """As with another number of processes and the same accumulation."""
    recipe = tiny(
        "sdxl_sid_4step", tiny_sdxl, tmp_path, "--train.sample_every", "0", "--train.accumulate", "3"
    )
    processes.train(replace(recipe, train=replace(recipe.train, steps=1)))
    processes.train(replace(recipe, train=replace(recipe.train, steps=2, accumulate=1)), resuming=True)
    said = capsys.readouterr()
    assert "note: an iteration has 2 samples now, and had 6 before; --train.accumulate 3 keeps that" in (
        said.out + said.err
    )


def test_a_rank_that_cannot_write_is_named_on_all(tmp_path, monkeypatch):
    def full(*_args, **_options):
        raise CheckpointException("save", {1: (OSError(errno.ENOSPC, "No space left on device"), [])})

    monkeypatch.setattr("torch.distributed.checkpoint.save", full)
    with pytest.raises(WriteError, match=r"process 1 cannot write: No space left on device"):
        _write(tmp_path / "step" / "part", {}, Process(rank=0, world=2))
