"""The one place that knows kinds of devices, and that data prefetched by a thread are the data."""

import json
import platform
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fewstep import device
from fewstep.cli import main
from fewstep.data.batches import Ahead, Batches
from fewstep.device import Download, Mark, all_of_them, choose, name_of, peak, real, reset_peak, upload, wait
from fewstep.diffusion import rng
from fewstep.diffusion.cond import Cond
from fewstep.diffusion.schedules import VP, Flow, repeated
from fewstep.errors import RecipeError

CPU = torch.device("cpu")
PACKAGE = Path(device.__file__).parent


class Machine:
    """torch.accelerator of a machine with some cards."""

    def __init__(self, monkeypatch, kind: str, count: int):
        found = torch.device(kind) if count else None
        self.current = None
        for name, value in {
            "current_accelerator": lambda check_available=False: found,
            "device_count": lambda: count,
            "set_device_index": lambda index: setattr(self, "current", index),
        }.items():
            monkeypatch.setattr(torch.accelerator, name, value)


def test_names_of_devices_on_a_machine_with_two_cards(monkeypatch):
    machine = Machine(monkeypatch, "xpu", 2)
    assert choose() == choose("auto") == choose("xpu") == torch.device("xpu:0") and machine.current == 0
    assert choose("xpu:1") == torch.device("xpu:1") and machine.current == 1
    assert choose("cpu") == CPU and choose("cpu:0") == CPU
    monkeypatch.setenv("LOCAL_RANK", "1")  # as launchers number processes
    assert choose("auto") == choose("xpu") == torch.device("xpu:1")
    assert choose("xpu:0") == torch.device("xpu:0")


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "meta", "Cuda", "cuda 1"])
def test_what_names_no_device_is_refused_by_name(name, monkeypatch):
    Machine(monkeypatch, "cuda", 1)
    with pytest.raises(RecipeError, match=f"--device: '{name}': expected auto, cpu"):
        choose(name, "--device")


def test_devices_that_are_not_there_are_refused(monkeypatch):
    Machine(monkeypatch, "cuda", 2)
    with pytest.raises(RecipeError, match=r"train\.device: cuda:2: there are 2; expected a number below 2"):
        choose("cuda:2")
    with pytest.raises(RecipeError, match=r"train\.device: mps: this torch sees cuda and the CPU"):
        choose("mps")
    Machine(monkeypatch, "cuda", 0)
    assert choose() == CPU
    with pytest.raises(RecipeError, match="cuda: this torch sees no accelerator"):
        choose("cuda")


@pytest.mark.parametrize(
    "words",
    [
        ["eval", "fid", "a", "b"],
        ["eval", "stats", "a", "-o", "b"],
        ["eval", "scores", "a", "--prompts", "b", "--scorer", "clip:x"],
        ["eval", "generate", "x", "--prompts", "builtin:emoji", "--steps", "1", "--num", "2", "--out", "x"],
        ["eval", "run", "x", "--out", "x"],
        ["sample", "x", "--prompt", "a"],
        ["floor", "x", "--steps", "4", "--out", "x"],
        ["prepare", "x", "--images", "y", "--out", "z"],
    ],
    ids=lambda words: "-".join(words[:2]),
)
@pytest.mark.parametrize("name", ["gpu", "cuda"])
def test_every_command_refuses_a_missing_device_in_one_line(words, name, monkeypatch, capsys):
    Machine(monkeypatch, "cuda", 0)
    assert main([*words, "--device", name]) == 2
    error = capsys.readouterr().err
    assert error.startswith("fewstep: --device: ") and error.count("\n") == 1 and name in error


def test_a_device_without_memory_left_is_one_line_with_a_remedy(monkeypatch, capsys):
    def out_of_memory(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee documentation ...")

    monkeypatch.setattr("fewstep.cli.doctor.report", out_of_memory)
    assert main(["doctor"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "out of memory. Tried to allocate 2.00 GiB. `fewstep plan" in error


def test_several_processes_take_a_device_each(monkeypatch):
    from fewstep.process import start

    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RecipeError, match="cuda:1: each of 2 processes takes its own; expected cuda or auto"):
        start("cuda:1")


def test_no_other_module_asks_for_a_kind_of_device():
    for path in PACKAGE.rglob("*.py"):
        code = path.read_text()
        if path.name != "device.py":
            assert not re.search(r"torch\.(cuda|xpu|mps)\b", code), path
            assert not re.search(r"""[=!]= ?["'](cuda|xpu|mps)""", code), path


def test_transfers_and_marks_on_the_cpu():
    x = torch.arange(3.0)
    assert upload(x, "cpu") is x
    assert Download(x).read() == [0.0, 1.0, 2.0]
    begin = Mark(CPU)
    time.sleep(0.01)
    end = Mark(CPU)
    end.wait()
    wait(CPU)
    assert 0.005 < begin.seconds_until(end) < 5
    reset_peak(CPU)
    assert peak(CPU) is None and name_of(CPU) == "CPU" and "threads" in all_of_them()["cpu"]


@pytest.mark.parametrize("kind", ["table", "flow"])
def test_times_take_what_precision_the_device_has(kind, monkeypatch):
    def schedule():
        return Flow(3.0) if kind == "flow" else VP(torch.linspace(0.999, 0.005, 1000, dtype=torch.float64))

    x, u = torch.randn(2, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0.9, 0.2])
    t = schedule().draw_times(u)
    exact = schedule().add_noise(x, x, t)
    assert real(CPU) == t.dtype == repeated(0.5, x).dtype == rng.Rng(0).uniform(2).dtype == torch.float64
    for module in ("fewstep.diffusion.schedules", "fewstep.diffusion.rng"):  # as on MPS, which has no float64
        monkeypatch.setattr(f"{module}.real", lambda _device: torch.float32)
    coarse = schedule()
    coarse.__dict__.get("_on_device", {}).clear()  # another device's copy of the table
    t = t.float()
    assert coarse.log_snr(t).dtype == coarse.draw_times(u).dtype == repeated(0.5, x).dtype == torch.float32
    assert rng.Rng(0).uniform(2).dtype == torch.float32
    assert torch.allclose(coarse.add_noise(x, x, t), exact, atol=1e-5)


class Rows:
    """A store whose rows say which they are."""

    def __len__(self):
        return 7

    def rows(self, index):
        return {"latents": index.float()[:, None, None, None], "embeds": index.float()[:, None]}


def batches():
    return Batches(Rows(), (1, 1, 1), batch_size=2, per_iteration=2, latents=Rows(), captions=Rows())


def test_batches_read_ahead_are_the_batches_in_any_order():
    data, ahead = batches(), Ahead(batches())
    assert ahead.rows == data.rows == {"prompts": 7, "images": 7}
    for iteration in (0, 1, 2, 5, 6, 0, 1):  # a rescue and a return to a checkpoint go back
        for micro in (0, 1):
            one, two = data.batch(iteration, micro), ahead.batch(iteration, micro)
            assert one.index.equal(two.index) and one.real.equal(two.real)
            assert isinstance(two.cond, Cond) and one.cond["embeds"].equal(two.cond["embeds"])
            assert one.rng.normal(3).equal(two.rng.normal(3))
            assert one.shared.integer(100) == two.shared.integer(100)


def test_a_batch_is_read_in_a_thread_before_it_is_asked_for():
    data, seen, done = batches(), [], threading.Event()
    read = data.batch

    def batch(iteration, micro):
        seen.append((iteration, threading.current_thread() is threading.main_thread()))
        if iteration == 1:
            done.set()
        return read(iteration, micro)

    data.batch = batch
    ahead = Ahead(data)
    ahead.batch(0, 0)
    assert done.wait(10) and sorted(seen) == [(0, True), (1, False)]
    ahead.batch(1, 0)
    assert (1, True) not in seen


def test_a_fault_of_the_thread_reaches_whoever_asks_for_the_batch():
    data = batches()
    read = data.batch
    data.batch = lambda iteration, micro: read(iteration, micro) if iteration == 0 else json.loads("{")
    ahead = Ahead(data)
    ahead.batch(0, 0)
    with pytest.raises(json.JSONDecodeError):
        ahead.batch(1, 0)


@pytest.mark.parametrize(
    "machine, amx, avx512, pays, arm, limit, units",
    [
        ("x86_64", True, True, False, True, None, True),
        ("AMD64", True, True, False, True, "DEFAULT", True),
        ("x86_64", True, True, False, True, "AVX512_CORE_AMX", True),
        ("x86_64", True, True, False, True, "avx512_core_bf16", False),
        ("x86_64", True, True, True, True, "avx512_core_bf16", True),
        ("x86_64", True, True, False, True, "AVX2", False),
        ("x86_64", False, True, True, False, None, True),
        ("x86_64", False, True, False, True, None, False),
        (
            "x86_64",
            False,
            False,
            True,
            True,
            None,
            False,
        ),  # arm's question has yes for an answer on any AVX-512
        ("aarch64", False, False, False, True, None, True),
        ("aarch64", True, True, True, False, None, False),
    ],
)
def test_units_are_those_of_the_processor_that_torch_may_use(
    machine, amx, avx512, pays, arm, limit, units, monkeypatch
):
    monkeypatch.setattr(device.platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(device, "_bf16_pays", lambda: pays)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: arm)
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    if limit:
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    assert device.bf16_units("cpu") is units


@pytest.mark.parametrize("bf16, fp32, pays", [(1.0, 4.0, True), (1.0, 1.9, False), (4.0, 1.0, False)])
def test_bf16_pays_if_its_products_take_less_than_half_the_time(bf16, fp32, pays, monkeypatch):
    """By a clock that only products move; the first of them are slow, as where code is loaded or others are at work."""
    now, spent, linear = [0.0], {torch.bfloat16: bf16, torch.float32: fp32}, torch.nn.functional.linear
    seen = []

    def slow(x, weight):
        assert x.device.type == weight.device.type == "cpu"
        seen.append(x.dtype)
        now[0] += spent[x.dtype] + (50 if len(seen) <= 4 else 0)
        return linear(x, weight)

    monkeypatch.setattr(torch.nn.functional, "linear", slow)
    monkeypatch.setattr(device.time, "perf_counter", lambda: now[0])
    with torch.device("meta"):  # as where a plan builds networks
        assert device._bf16_pays.__wrapped__() is pays
    assert {*seen} == {torch.bfloat16, torch.float32}


KEPT = """
import pathlib, torch
from fewstep.device import keep_freed
def resident():
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * 4096
keep_freed(torch.device("cpu"))
before = resident()
held = [torch.ones(5_000_000) for _ in range(6)]  # 20 MB each, which glibc would give back at once
del held
print(resident() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="allocators of other libraries are left alone")
def test_memory_that_was_freed_stays_with_the_process():
    done = subprocess.run([sys.executable, "-c", KEPT], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 100e6


def test_a_card_is_asked_for_units_and_not_for_what_it_emulates(monkeypatch):
    """``torch.cuda`` says yes for every card unless asked so; other kinds have no such question, or none at all."""
    answers = {
        "cuda": SimpleNamespace(is_bf16_supported=lambda including_emulation=True: including_emulation),
        "xpu": SimpleNamespace(is_bf16_supported=lambda: True),
        "mps": SimpleNamespace(),
    }
    monkeypatch.setattr(torch, "get_device_module", lambda which: answers[which.type])
    assert [device.bf16_units(kind) for kind in answers] == [False, True, None]
