"""A stand-in accelerator: a device that is not the CPU, whose arithmetic the CPU does.

    import standin; standin.install(); torch.randn(3, device="standin")

Mixing it with tensors of the CPU is an error as on a GPU, random draws are other ones than the CPU's, a download
arrives only when it is waited for, and whatever makes a GPU's host wait is counted::

    with standin.waits() as found:
        trainer.iterate()
    assert not found, found[0]

The device is ``standin.cpp`` beside this file, compiled once for each version of torch. It cannot be taken back, so
that what runs on it runs in a process of its own.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch

NAME = "standin"
SOURCE = Path(__file__).with_suffix(".cpp")
PLACES = (f"{os.sep}fewstep{os.sep}", f"{os.sep}tests{os.sep}")


def compiler() -> str | None:
    """The C++ compiler of this machine, or None."""
    return shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++") or shutil.which("clang++")


def build() -> Path:
    """The device's library, compiled where the source or torch has changed (25 s on one core).

    Raises:
        RuntimeError: it does not compile, with what the compiler said.
    """
    from torch.utils.cpp_extension import get_default_build_root, include_paths

    standard = "-std=c++20" if torch.__version__ >= "2.12" else "-std=c++17"
    key = hashlib.sha256(f"{SOURCE.read_text()} {torch.__version__} {sys.platform}".encode()).hexdigest()[:16]
    library = Path(get_default_build_root()) / NAME / f"{key}.so"
    if library.is_file():
        return library
    library.parent.mkdir(parents=True, exist_ok=True)
    own = library.with_suffix(f".{os.getpid()}.so")  # two processes may compile at once
    lib = Path(torch.__file__).parent / "lib"
    words = [compiler(), "-O1", "-w", standard, "-shared", "-fPIC", str(SOURCE), "-o", str(own)]
    words += [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]
    words += [f"-I{path}" for path in include_paths()] + [f"-L{lib}", "-ltorch", "-ltorch_cpu", "-lc10"]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{SOURCE.name} does not compile: {done.stderr[-2000:]}")
    own.replace(library)
    return library


def install(float64: bool = True) -> torch.device:
    """Makes the device known to this process, for good.

    Args:
        float64: False makes a device that has none, as MPS.
    """
    torch.utils.rename_privateuse1_backend(NAME)
    torch.ops.load_library(build())
    library = ctypes.CDLL(str(build()))
    library.standin_begin()
    library.standin_tell(_heard)
    library.standin_float64(float64)
    torch._register_device_module(NAME, _module())
    torch.utils.generate_methods_for_privateuse1_backend(unsupported_dtype=[torch.quint8])
    return torch.device(NAME)


def _module() -> ModuleType:
    """What torch and others ask of ``torch.standin``, as of ``torch.cuda``."""
    module, ops = ModuleType(f"torch.{NAME}"), torch.ops.standin
    module.is_available = module.is_initialized = lambda: True
    module.device_count = lambda: 1
    module.current_device = lambda: 0
    module.set_device = lambda device: None
    module.device = lambda device: contextlib.nullcontext()
    module._is_in_bad_fork = lambda: False
    module.manual_seed = module.manual_seed_all = lambda seed: ops.seed(seed)
    module.get_rng_state = lambda device=NAME: ops.state()
    module.set_rng_state = lambda state, device=NAME: ops.set_state(state)
    module.get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]
    module.get_device_name = lambda device=None: "stand-in accelerator"
    module.synchronize = lambda device=None: torch.accelerator.synchronize()
    module.empty_cache = lambda: None
    return module


def device() -> torch.device:
    """The stand-in where this process has it, the CPU elsewhere."""
    return torch.device(NAME if torch._C._get_privateuse1_backend_name() == NAME else "cpu")


# ------------------------------------------------------------------------------------------- what the host waited for
@dataclass(frozen=True)
class Wait:
    """Something that a GPU's host would have waited for.

    Attributes:
        kind: "read", values that the host asked for; "upload", a copy to the device out of memory that is not pinned.
        op: the operator. where: the lines of fewstep and of the tests that led there, innermost last.
    """

    kind: str
    op: str
    where: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.kind} by {self.op} at {' > '.join(self.where)}"


_open: list[list[Wait]] = []


@ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_char_p)
def _heard(kind: bytes, op: bytes) -> None:
    if _open:
        stack = [f for f in traceback.extract_stack() if any(place in f.filename for place in PLACES)]
        lines = tuple(f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in stack[-6:-1])
        for found in _open:
            found.append(Wait(kind.decode(), op.decode(), lines))


@contextlib.contextmanager
def waits() -> Iterator[list[Wait]]:
    """Collects what the host waits for meanwhile, in any thread."""
    found: list[Wait] = []
    _open.append(found)
    try:
        yield found
    finally:
        _open[:] = [other for other in _open if other is not found]


@contextlib.contextmanager
def deaf() -> Iterator[None]:
    """Meanwhile nothing is collected."""
    before, _open[:] = list(_open), []
    try:
        yield
    finally:
        _open[:] = before
