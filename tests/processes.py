"""What each of several processes does in ``test_distributed.py``; they come from one that has imported it all."""

import multiprocessing
import os
import socket

import torch

from fewstep import recipe as recipes
from fewstep.checks import check_data
from fewstep.distributed import start
from fewstep.run import Session, execute


def train(recipe, resuming: bool = False) -> None:
    """The run without what comes after training."""
    process = start(recipe.train.device, recipe.train.shard)
    session = Session(recipe, *check_data(recipe), process)
    check_split(session)
    session.train(resuming)
    process.barrier()


def check_split(session: Session) -> None:
    """What shells share stays shared and whole; what is trained is split, of full copies block by block."""
    several, base = session.process.world > 1, {id(p) for p in session.teacher.net.parameters()}
    for role in session.roles.values():
        frozen = [p for p in role.module.parameters() if not p.requires_grad]
        assert {id(p) for p in frozen} <= base and not any(hasattr(p, "device_mesh") for p in frozen)
        assert all(hasattr(p, "device_mesh") == several for p in role.weights.values())
        if several and role.base is not None and role.config.kind == "full":
            assert len(role.module.sharded_units) > 5


def work(rank: int, count: int, port: int, tasks: list[tuple[str, str]]) -> None:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_PORT": port}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in place.items()}}
    torch.set_num_threads(1)
    for task, path in tasks:
        recipe = recipes.load(path)
        execute(recipe) if task == "execute" else train(recipe, task == "resume")
    torch.distributed.destroy_process_group()


def run(count: int, tasks: list[tuple[str, str]]) -> None:
    """``count`` processes (gloo) go through the tasks together: (execute, train or resume, file of a recipe)."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.set_forkserver_preload(["processes", "peft", "diffusers", "transformers"])
    torch.multiprocessing.start_processes(
        work, args=(count, port, tasks), nprocs=count, start_method="forkserver"
    )
