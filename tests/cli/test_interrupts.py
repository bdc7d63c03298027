"""Ctrl-C at any moment: one line that is true, and exit code 130."""

import signal
import subprocess
import sys

import pytest

from fewstep.errors import interruptible
from fewstep.runs import session
from fewstep.runs.library import load_recipe

# Importing one module of the command line takes forever.
SLOW = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever this process began with
class Slow:
    def find_spec(self, name, *_):
        if name == NAME:
            print("importing", flush=True)
            time.sleep(60)
sys.meta_path.insert(0, Slow())
from fewstep.cli import main
sys.exit(main(["methods"]))
"""


@pytest.fixture(autouse=True)
def handler():
    """That of a terminal; a shell's jobs in the background begin without one."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("name", ["fewstep.cli.commands", "fewstep.methods"])
def test_an_import_is_ended_at_once(name):
    words = [sys.executable, "-c", SLOW.replace("NAME", repr(name))]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        assert child.stdout.readline() == "importing\n"
        child.send_signal(signal.SIGINT)
        assert (child.wait(30), child.stderr.read()) == (130, "fewstep: stopped\n")


def test_elsewhere_it_is_an_exception_that_cleans_up():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), interruptible():
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # as under nohup
    try:
        with interruptible():
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    ("made", "said"),
    [
        ([], "stopped before the run began; nothing is kept of it"),
        (["recipe.yaml"], "stopped before the first checkpoint; it begins again with: fewstep resume {run}"),
        (
            ["recipe.yaml", "checkpoints/step_00000020/x", "checkpoints/step_00000100/x"],
            "stopped; its checkpoint of step 100 goes on with: fewstep resume {run}",
        ),
    ],
)
def test_a_run_says_what_is_left_of_it(made, said, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"

    def stopped(*_):
        for name in made:
            (run / name).parent.mkdir(parents=True, exist_ok=True)
            (run / name).touch()
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(session, "check_data", stopped)
    with pytest.raises(SystemExit) as end:
        session.run(load_recipe("demo"), ["--output", str(run)])
    assert end.value.code == 130
    assert capsys.readouterr().err == f"fewstep: {said.format(run=run)}\n"
