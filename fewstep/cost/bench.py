"""What a step takes: seconds, memory and arithmetic, beside a bare loop of the same network calls."""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import recipe as recipes
from ..data.batches import Ahead
from ..device import Mark, keep_freed, peak, reset_peak, wait
from ..diffusion import kernels
from ..diffusion.rng import Rng
from ..process import Process, start
from ..recipe import Recipe
from ..runs.build import build, on_pixels
from ..runs.checks import check_data, check_frozen
from ..runs.session import Session
from ..runs.shapes import check_shapes, shapes_of
from ..runs.summary import hardware
from ..training.trainer import Trainer
from .bare import Bare
from .blank import Blank
from .meter import Meter, storage_bytes

ROUNDS = 5  # of the trainer and the bare loop, in turn
LONG = 2e-3  # seconds beside which starting a product counts for nothing


class Clock:
    """Adds up seconds by name. Nested calls of timed things count once, for the outermost.

    The seconds are those of the device's own queue, so that timing does not empty it.
    """

    def __init__(self, device: torch.device):
        self.device, self.depth = device, 0
        self.spans: list[tuple[str, Mark, Mark]] = []

    def wrap(self, name: str, function):
        def timed(*args, **kwargs):
            self.depth += 1
            begin = Mark(self.device)
            try:
                return function(*args, **kwargs)
            finally:
                self.depth -= 1
                if self.depth == 0:
                    self.spans.append((name, begin, Mark(self.device)))

        return timed

    def seconds(self) -> dict[str, float]:
        wait(self.device)
        sums: dict[str, float] = {}
        for name, begin, end in self.spans:
            sums[name] = sums.get(name, 0.0) + begin.seconds_until(end)
        return sums


def bench(
    recipe: Recipe,
    arguments: Sequence[str] = (),
    iterations: int = 30,
    baseline: str | None = None,
    random_weights: bool = False,
) -> dict[str, Any]:
    """Runs a few iterations of a recipe and says what they take.

    Args:
        iterations: timed ones, in :data:`ROUNDS` rounds, rounded up to whole cycles of the phases.
        baseline: "bare" times a loop of the same network calls too, in turn with the trainer, see
            :mod:`fewstep.cost.bare`.
        random_weights: the teacher's configuration with random weights, and noise for data; needs no files.

    Returns:
        ``seconds_per_iteration``, the median of rounds, and ``images_per_second`` of turns of all kinds;
        ``peak_memory_gb``, weights included; shares of forward, backward and optimiser, and ``outside``, of everything
        else: data, random numbers, losses, bookkeeping; ``tflops``, achieved in the networks, and ``matmul_tflops``, of
        a large product in this dtype on this device; with a baseline ``bare_seconds`` and ``over_bare``, the median
        over rounds of trainer over bare (of CPU time where that is the device). Of random weights ``resolution`` too,
        in which all this is measured, and of a recipe of several shapes ``shapes``: the same of each.
    """
    recipe = recipes.override(recipe, arguments)
    check_frozen(recipe)
    with tempfile.TemporaryDirectory() as folder:
        train = replace(recipe.train, steps=10**6, sample_every=0, checkpoint_every=0)
        recipe = replace(recipe, output=str(Path(folder) / "run"), train=train)
        (trainer, nets), encoders = (_random(recipe), {}) if random_weights else _real(recipe)
        found = _measure(recipe, trainer, nets, encoders, iterations, baseline)
        if random_weights:
            found |= _of_each_shape(recipe, trainer, nets, iterations, found)
        return {**found, "hardware": hardware(trainer.process)}


Networks = dict[str, nn.Module]


def _real(recipe: Recipe) -> tuple[tuple[Trainer, Networks], Networks]:
    """As :func:`_random`, with the weights and data of the recipe, and the networks that encode beside it."""
    session = Session(recipe, *check_data(recipe), start(recipe.train.device))
    return (session.trainer, _networks(session.teacher.net, session.roles)), _encoders(session)


def _encoders(session: Session) -> Networks:
    """What encodes prompts and images where no cache holds them: of the VAE its first half."""
    pipe, data = session.teacher.pipe, session.recipe.data
    found = {name: getattr(pipe, name) for name in session.teacher.encoders if data.cache_prompts is False}
    if data.cache_images is False and session.teacher.autoencoder:
        found["encoder"] = getattr(pipe, session.teacher.autoencoder).encoder
    return found


def _random(recipe: Recipe, folder: Path | None = None) -> tuple[Trainer, Networks]:
    """Random weights are the same in every process; with a folder the run keeps its log and its checkpoints there."""
    from .skeleton import skeleton_teacher

    process = start(recipe.train.device)
    torch.manual_seed(recipe.train.seed)
    with process.device:
        teacher = skeleton_teacher(recipe.teacher.path, **recipe.teacher.options(), device=process.device)
    check_shapes(recipe, teacher)
    if teacher.autoencoder and not on_pixels(recipe):
        getattr(teacher.pipe, teacher.autoencoder).to("cpu")
    kernels.set_precision(process.device, recipe.train.tf32)
    keep_freed(process.device)
    roles, method = build(recipe, teacher, process, read=False)

    def draws(iteration: int, micro: int) -> tuple[Rng, Rng]:
        return Rng(0, iteration, micro, device=process.device), Rng(0, iteration)

    data = Blank(teacher, recipe.train.batch_size, recipe.method_class.needs(recipe.method), draws)
    scaled = teacher.denoiser.autocast == torch.float16
    trainer = Trainer(
        method, roles, Ahead(data), recipe.train, folder=folder, process=process, quiet=True, scaled=scaled
    )
    return trainer, _networks(teacher.net, roles)


def _of_each_shape(
    recipe: Recipe, trainer: Trainer, nets: Networks, iterations: int, measured: dict[str, Any]
) -> dict[str, Any]:
    """In which resolution was ``measured``, and what the iterations of each of several shapes take."""
    blank: Any = trainer.data
    blank, found = blank.data, {}
    for shape in shapes_of(recipe):
        if shape != blank.teacher.shape:
            data = Blank(blank.teacher.at(shape), recipe.train.batch_size, blank.needs, blank.draws)
            trainer.data = Ahead(data)
            found[str(shape)] = _measure(recipe, trainer, nets, {}, iterations, None)
        else:
            found[str(shape)] = {name: value for name, value in measured.items() if "bare" not in name}
    return {"resolution": blank.teacher.resolution, **({"shapes": found} if found else {})}


def _networks(net: nn.Module, roles) -> Networks:
    return {"teacher": net, **{name: role.module for name, role in roles.items()}}


def _measure(
    recipe: Recipe,
    trainer: Trainer,
    nets: Networks,
    encoders: Networks,
    iterations: int,
    baseline: str | None,
) -> dict[str, Any]:
    cycle = math.lcm(*(phase.every for phase in trainer.phases))
    count = cycle * math.ceil(iterations / ROUNDS / cycle)
    process, images = trainer.process, recipe.train.batch_size * recipe.train.accumulate
    begun = trainer.progress.iteration

    def train() -> None:
        """Always the same iterations, of which randomness, and with it the length of rollouts, is a function."""
        trainer.progress.iteration = begun
        for _ in range(count):
            trainer.iterate()

    train()  # moments come into being, kernels are chosen
    with Meter() as meter:
        train()
    flops, memory = sum(meter.flops.values()) / count, _peak(trainer, nets, meter, train)
    bare = None
    if baseline == "bare":
        bare = Bare(trainer, nets | encoders)
        bare.record(train)
        bare.run()
    ours, theirs = [], []
    for _ in range(ROUNDS):
        ours.append(_timed(process, train))
        if bare:
            theirs.append(_timed(process, bare.run))
    seconds = statistics.median(wall for wall, _ in ours) / count
    shares = _shares(trainer, nets, train)
    network = seconds * (shares["forward"] + shares["backward"])
    denoiser: Any = next(iter(trainer.method.student.denoisers))
    rate = matmul_rate(process.device, denoiser.autocast or torch.float32)
    result = {
        "iterations": count * ROUNDS,
        "autocast": str(denoiser.autocast).removeprefix("torch."),
        "seconds_per_iteration": round(seconds, 4),
        "images_per_second": round(images / seconds, 2),
        "peak_memory_gb": round(memory / 1e9, 3),
        **{name: round(share, 4) for name, share in shares.items()},
        "tflop_per_iteration": round(flops / 1e12, 4),
        "tflops": round(flops / network / 1e12, 4),
        "matmul_tflops": round(rate / 1e12, 4),
        "of_matmul_rate": round(flops / network / rate, 3),
    }
    if bare:
        pairs = [a[-1] / b[-1] for a, b in zip(ours, theirs)]
        result["bare_seconds"] = round(statistics.median(wall for wall, _ in theirs) / count, 4)
        result["over_bare"] = round(statistics.median(pairs), 4)
    return result


def _timed(process: Process, function) -> tuple[float, float]:
    """Wall seconds, and seconds to compare by: those of a CPU leave out what other programs took."""
    wait(process.device)
    wall, cpu = time.perf_counter(), time.process_time()
    function()
    wait(process.device)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return wall, cpu if process.device.type == "cpu" else wall


def _peak(trainer: Trainer, nets, meter: Meter, train: Callable[[], None]) -> float:
    """Bytes: of the device's allocator; where none counts, what is held and what the meter saw beside it."""
    reset_peak(trainer.process.device)
    if peak(trainer.process.device) is not None:
        train()
        return peak(trainer.process.device) or 0
    held = [t for net in nets.values() for t in (*net.parameters(), *net.buffers())]
    for name, optimizer in trainer.optimizers.items():
        held += [m for state in optimizer.state.values() for m in state.values() if torch.is_tensor(m)]
        held += (trainer.roles[name].average or {}).values()
    return storage_bytes(held) + meter.peak


def _shares(trainer: Trainer, nets, train: Callable[[], None]) -> dict[str, float]:
    clock, device = Clock(trainer.process.device), trainer.process.device
    before = {name: net.forward for name, net in nets.items()}
    backward, update = trainer.backward, trainer.update
    for net in nets.values():
        net.forward = clock.wrap("forward", net.forward)
    timed: Any = trainer  # whose methods are replaced meanwhile
    timed.backward, timed.update = clock.wrap("backward", backward), clock.wrap("optimiser", update)
    wait(device)
    begin = time.perf_counter()
    train()
    wait(device)
    total = time.perf_counter() - begin
    for name, net in nets.items():
        net.forward = before[name]
    timed.backward, timed.update = backward, update
    shares = {name: seconds / total for name, seconds in sorted(clock.seconds().items())}
    return {**shares, "outside": 1 - sum(shares.values())}


def matmul_rate(device: torch.device, dtype: torch.dtype, repeats: int = 10) -> float:
    """FLOP/s of a large square product on this device, the best of some; as large as takes it some milliseconds."""
    best = 0.0
    for size in (1024, 2048, 4096, 8192):
        a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in "ab")
        took = []
        for _ in range(repeats):
            wait(device)
            begin = time.perf_counter()
            a @ b
            wait(device)
            took.append(time.perf_counter() - begin)
        best = max(best, 2 * size**3 / min(took))
        if min(took) > LONG:
            break
    return best
