"""Processes that tests start. Those that run fewstep are forks of the test's own process, which has imported it all:
seconds are saved on each. Those that must not have fewstep are forks of an interpreter that has only what users have.
"""

import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch
from torch.distributed import TCPStore

from fewstep import recipe as recipes
from fewstep.process import Process, start
from fewstep.runs.checks import check_data
from fewstep.runs.session import Session, execute


class Fork:
    """A fork that runs one function, to be treated as a ``subprocess.Popen``.

    Args:
        function: where it returns a number, that is the exit code. said: where both outputs go, if not where ours do.
        env: changes of the environment. start_new_session: as of Popen.
    """

    def __init__(
        self, function: Callable, said: Path | None = None, env=None, start_new_session: bool = False
    ):
        sys.stdout.flush(), sys.stderr.flush()
        self.said, self.returncode = said, None
        if self.said:
            self.said.touch()
        self.pid = os.fork()
        if not self.pid:
            code = 1
            try:
                self._begin(env or {}, start_new_session)
                made = function()
                code = made if isinstance(made, int) else 0
            except SystemExit as ended:
                code = ended.code
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush(), sys.stderr.flush()
                os._exit(code)

    def _begin(self, env, start_new_session):
        """What a new process would have otherwise."""
        if start_new_session:
            os.setsid()
        if self.said:
            file = os.open(self.said, os.O_WRONLY | os.O_APPEND)
            os.dup2(file, 1), os.dup2(file, 2)
            sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1):
            signal.signal(number, signal.SIG_DFL)
        os.environ.update(env)
        tempfile.tempdir = None

    def poll(self) -> int | None:
        if self.returncode is None:
            done, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if done else None
        return self.returncode

    def wait(self, timeout: float = 900) -> int:
        """The exit code, negative after a signal.

        Raises:
            subprocess.TimeoutExpired
        """
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("fork", timeout)
            time.sleep(0.005)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def command(words: list[str], **options) -> Fork:
    """``fewstep WORDS`` in a fork."""
    from fewstep.cli import main

    return Fork(lambda: main([str(word) for word in words]), **options)


def launch(words: list[str], said: Path) -> Fork:
    """``python -m LAUNCHER ... -m fewstep WORDS`` in a fork; what the launcher starts are forks of it in turn."""

    def begin():
        from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

        def fork(_handler, args, env):
            return command(args[args.index("fewstep") + 1 :], env=env, start_new_session=True)

        subprocess_handler.SubprocessHandler._popen = fork
        sys.argv[:] = words
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)

    return Fork(begin, said, {"OMP_NUM_THREADS": "1"})


@contextmanager
def meeting(count: int) -> Iterator[list[dict[str, str]]]:
    """The environment of each of several ranks. They meet as under torchrun, at a store that is open before any of
    them begins: a port that is only looked for beforehand can be another's by then. The store is a process of its own:
    a fork of one whose thread serves others at that moment would wait for that thread's locks for ever.
    """
    reading, writing = os.pipe()

    def serve():
        parent, store = os.getppid(), TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        os.write(writing, str(store.port).encode())
        while os.getppid() == parent:
            time.sleep(0.1)

    server = Fork(serve)
    os.close(writing)
    place = {
        "WORLD_SIZE": str(count),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": os.read(reading, 16).decode(),
    }
    place["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    try:
        yield [{**place, "RANK": str(n), "LOCAL_RANK": str(n)} for n in range(count)]
    finally:
        os.close(reading)
        server.kill()
        server.wait()


def together(count: int, function: Callable[[Process], object], folder: Path) -> list:
    """What ``function(process)`` returns on each of several ranks (gloo), as JSON."""

    def rank(number):
        result = function(start("cpu"))
        (folder / f"{number}.json").write_text(json.dumps(result))

    with meeting(count) as places:
        children = [
            Fork(lambda n=n: rank(n), folder / f"rank_{n}.txt", place) for n, place in enumerate(places)
        ]
        end = time.monotonic() + 600
        try:
            while None in (codes := [child.poll() for child in children]) and not any(codes):
                assert time.monotonic() < end, f"{codes} after ten minutes"
                time.sleep(0.01)
        finally:
            for child in children:
                child.kill()
    said = "\n".join(f"rank {n}: {child.said.read_text()[-3000:]}" for n, child in enumerate(children))
    assert codes == [0] * count, f"{codes}\n{said}"
    return [json.loads((folder / f"{n}.json").read_text()) for n in range(count)]


# ---------------------------------------------------------------------------------------------------- a user's python
SERVER = """
import json, os, sys, traceback
import peft, torch, transformers
from diffusers import DiffusionPipeline, LCMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline

for line in sys.stdin:
    script, words, folder, env, out, err = json.loads(line)
    if not (child := os.fork()):
        code = 1
        try:
            os.chdir(folder)
            os.environ.update(env)
            for path, number in ((out, 1), (err, 2)):
                os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND), number)
            sys.argv[:] = [script, *words]
            sys.path[0] = os.path.dirname(script)
            assert "fewstep" not in sys.modules
            exec(compile(open(script).read(), script, "exec"), {"__name__": "__main__", "__file__": script})
            code = 0
        except SystemExit as ended:
            code = int(ended.code or 0)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@cache
def _server() -> subprocess.Popen:
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    return subprocess.Popen([sys.executable, "-c", SERVER], text=True, env=env, **pipes)


def python(script: Path, *words: str, folder: Path, out: Path, err: Path, env=None) -> int:
    """The exit code of ``python SCRIPT WORDS`` in a folder; torch and diffusers are imported, nothing has run yet."""
    server = _server()
    server.stdin.write(json.dumps([str(script), words, str(folder), env or {}, str(out), str(err)]) + "\n")
    server.stdin.flush()
    return int(server.stdout.readline())


def without_fewstep(script: Path, folder: Path, *words: str) -> str:
    """What ``python SCRIPT WORDS`` prints in a folder, where torch and diffusers are imported and fewstep is not."""
    out, err = script.with_suffix(".out"), script.with_suffix(".err")
    assert python(script, *words, folder=folder, out=out, err=err) == 0, err.read_text()[-2000:]
    return out.read_text()


# --------------------------------------------------------------------------------------------------- several train one
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


def run(count: int, tasks: list[tuple[str, str]], folder: Path) -> None:
    """``count`` processes go through the tasks together: (execute, train or resume, file of a recipe)."""

    def work(_process):
        for task, path in tasks:
            recipe = recipes.load(path)
            execute(recipe) if task == "execute" else train(recipe, task == "resume")
        torch.distributed.destroy_process_group()

    together(count, work, folder)
