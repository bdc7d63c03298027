"""The loop that runs every method.

From a method's list of phases follow the optimisers, who is trainable when, learning rates, clipping, accumulation,
the names of the log and what a checkpoint holds. The trainer never looks inside a loss.
"""

from __future__ import annotations

import contextlib
import math
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from . import checkpoint
from .distributed import Process, sync_gradients
from .errors import FewstepError, RecipeError
from .methods.base import Batch, Method, Phase, Progress
from .report import MetricsLog, StatusLine
from .roles import Role


@dataclass
class TrainConfig:
    """How long, how much at once, and how often something is written.

    Attributes:
        steps: iterations. batch_size: samples of one micro-batch on one process.
        accumulate: micro-batches per update on each process.
        clip_norm: of the gradient of each phase (DMD2: 10).
        sample_every, checkpoint_every: iterations; 0 for never. keep: checkpoints kept.
        device: "auto", "cpu" or "cuda". shard: processes over which trained weights are split.
    """

    steps: int
    batch_size: int = 1
    accumulate: int = 1
    seed: int = 0
    clip_norm: float = 10.0
    log_every: int = 10
    sample_every: int = 500
    checkpoint_every: int = 500
    keep: int = 2
    device: str = "auto"
    shard: int = 1

    def __post_init__(self):
        for name in ("steps", "batch_size", "accumulate", "log_every", "keep", "shard"):
            if getattr(self, name) < 1:
                raise RecipeError(f"train.{name}: {getattr(self, name)}: expected at least 1")
        if self.device not in ("auto", "cpu", "cuda"):
            raise RecipeError(f"train.device: {self.device!r}: expected auto, cpu or cuda")


class Data(Protocol):
    """Micro-batches as a pure function of the iteration."""

    def batch(self, iteration: int, micro: int) -> Batch: ...


class Interrupted(Exception):
    """The run was asked to stop; its state is saved. ``signal`` says by what."""

    def __init__(self, signal_number: int, step: int):
        super().__init__(f"stopped by {signal.Signals(signal_number).name} at step {step}, saved")
        self.signal = signal_number


class Trainer:
    """Trains the roles of a method and keeps its run directory.

    Args:
        method: whose phases run. roles: every trainable role by name, as the phases name them.
        data: where micro-batches come from. config: see :class:`TrainConfig`.
        folder: run directory; None writes nothing. on_sample: called with the step when a grid is due.
    """

    MAX_SKIPPED = 10  # updates in a row without a finite gradient before the run gives up

    def __init__(
        self,
        method: Method,
        roles: dict[str, Role],
        data: Data,
        config: TrainConfig,
        *,
        folder: Path | None = None,
        process: Process | None = None,
        on_sample: Callable[[int], None] | None = None,
        quiet: bool = False,
    ):
        self.method, self.roles, self.data, self.config = method, roles, data, config
        self.folder, self.process, self.on_sample = folder, process or Process(), on_sample
        self.quiet = quiet or not self.process.main
        per_iteration = config.batch_size * config.accumulate * self.process.world
        self.phases, self.progress = method.phases(), Progress(0, config.steps, per_iteration)
        self.optimizers = {name: self._optimizer(role) for name, role in roles.items()}
        self.updates = dict.fromkeys(roles, 0)
        self.skipped = dict.fromkeys((phase.name for phase in self.phases), 0)
        self.seconds = 0.0
        self.window: list[dict[str, Tensor]] = []
        self.stop_signal: int | None = None

    def _optimizer(self, role: Role) -> torch.optim.Optimizer:
        c = role.config
        # One fused kernel per update where the weights are plain tensors; shards take the foreach kernels.
        fused = not any(hasattr(w, "device_mesh") for w in role.weights.values())
        return torch.optim.AdamW(
            role.weights.values(),
            lr=c.lr,
            betas=c.betas,
            eps=c.eps,
            weight_decay=c.weight_decay,
            fused=fused or None,
        )

    # ------------------------------------------------------------------------------------------------- the loop
    def train(self) -> None:
        """Runs to ``config.steps``; resumes from wherever :meth:`restore` left the state.

        Raises:
            Interrupted: SIGINT or SIGTERM came; the run is saved. FewstepError: no finite gradient any more.
        """
        log = MetricsLog(self.folder / "metrics.jsonl") if self.folder and self.process.main else None
        if log:
            log.truncate_after(self.progress.iteration)
        status = StatusLine(self.config.steps, self.progress.iteration, quiet=self.quiet)
        begin = time.perf_counter() - self.seconds
        if self.progress.iteration == 0:
            self._sample()
        with self._signals():
            while self.progress.iteration < self.config.steps:
                self.iterate()
                step = self.progress.iteration
                self.seconds = time.perf_counter() - begin
                if step % self.config.log_every == 0 or step == self.config.steps:
                    record = self._record()
                    if log:
                        log.append({"step": step, "seconds": round(self.seconds, 3), **record})
                    status.update(step, record)
                stop = self.process.any(self.stop_signal is not None)
                if _every(step, self.config.sample_every) or step == self.config.steps:
                    self._sample()
                if stop or _every(step, self.config.checkpoint_every) or step == self.config.steps:
                    self.save()
                if stop and step < self.config.steps:
                    status.close()
                    raise Interrupted(self.stop_signal or signal.SIGTERM, step)
        status.close()

    def iterate(self) -> None:
        """One iteration: the phases that are due, in order, each on the same micro-batches."""
        count, world = self.config.accumulate, self.process.world
        batches = [
            self.data.batch(self.progress.iteration, i * world + self.process.rank) for i in range(count)
        ]
        metrics: dict[str, Tensor] = {}
        for phase in self.phases:
            if phase.fresh and phase.span(self.progress)[0] == self.progress.iteration:
                self.restart(phase.fresh)
            if phase.due(self.progress):
                metrics.update(self.turn(phase, batches))
        self.window.append(metrics)
        self.progress.iteration += 1

    def restart(self, names: tuple[str, ...]) -> None:
        """Roles begin again: the teacher's weights, an empty optimiser."""
        for name in names:
            self.roles[name].restart()
            self.optimizers[name].state.clear()
            self.updates[name] = 0

    def turn(self, phase: Phase, batches: list[Batch]) -> dict[str, Tensor]:
        """One update of one phase; only its roles want gradients meanwhile."""
        trained = [self.roles[name] for name in phase.train]
        if phase.follows:
            source, decay = phase.follows
            for role in trained:
                role.follow(self.roles[source], decay)
            return {}
        for role in self.roles.values():
            role.requires_grad_(role.name in phase.train)
        totals: dict[str, Tensor] = {}
        health: dict[str, Tensor] = {}
        for i, batch in enumerate(batches):
            for role in trained:
                sync_gradients(role.module, i == len(batches) - 1)
            terms = phase.loss(batch, self.progress)
            self.backward(sum(terms.values()) / len(batches))
            for sums, values in ((totals, terms), (health, batch.log)):
                for name, value in values.items():
                    sums[name] = sums.get(name, 0) + value.detach() / len(batches)
            batch.log.clear()
        norm = self.update(phase, trained)
        named = {f"{phase.name}/{k}": v for k, v in totals.items()}
        return {**named, f"{phase.name}/grad_norm": norm, **{f"health/{k}": v for k, v in health.items()}}

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def update(self, phase: Phase, roles: list[Role]) -> Tensor:
        """Clip jointly, step, average, clear; an update without a finite gradient is skipped by all ranks."""
        weights = [w for role in roles for w in role.weights.values()]
        norm = torch.nn.utils.clip_grad_norm_(weights, self.config.clip_norm)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        if torch.isfinite(norm):
            self.skipped[phase.name] = 0
            for role in roles:
                optimizer = self.optimizers[role.name]
                optimizer.param_groups[0]["lr"] = self.learning_rate(role, phase)
                optimizer.step()
                self.updates[role.name] += 1
                role.update_average(self.updates[role.name])
        else:
            self.skipped[phase.name] += 1
            if self.skipped[phase.name] >= self.MAX_SKIPPED:
                raise FewstepError(
                    f"step {self.progress.iteration}: the gradient of {' and '.join(phase.train)} was not finite "
                    f"{self.MAX_SKIPPED} times in a row; lower the lr, or resume from the last checkpoint with "
                    "train.clip_norm 1"
                )
        for role in roles:
            self.optimizers[role.name].zero_grad(set_to_none=True)
        return norm.detach()

    def learning_rate(self, role: Role, phase: Phase) -> float:
        """Linear warm-up, constant, linear decay to zero within the phase's share; counted in iterations."""
        c, done = role.config, self.progress.iteration
        begin, end = phase.span(self.progress)
        warm = (done - begin + 1) / c.warmup if c.warmup else 1.0
        left = (end - done) / c.decay if c.decay else 1.0
        return c.lr * min(1.0, warm, left)

    # --------------------------------------------------------------------------------------------- side effects
    def _record(self) -> dict[str, float | None]:
        """Means over the window since the last record; the only place where numbers leave the device."""
        names = sorted({name for metrics in self.window for name in metrics})
        if not names:
            return {}
        means = [torch.stack([m[name].float() for m in self.window if name in m]).mean() for name in names]
        self.window = []
        values = self.process.mean(torch.stack(means)).tolist()
        return {name: value if math.isfinite(value) else None for name, value in zip(names, values)}

    def _sample(self) -> None:
        if self.on_sample and self.config.sample_every:
            self.on_sample(self.progress.iteration)

    def save(self) -> None:
        """Writes a checkpoint of this moment; keeps the newest ``config.keep``."""
        if self.folder is None:
            return
        checkpoints = self.folder / "checkpoints"
        step = self.progress.iteration
        state = {"iteration": step, "seconds": self.seconds, "updates": self.updates, "skipped": self.skipped}
        checkpoint.save(checkpoints / f"step_{step:08d}", self.roles, self.optimizers, state, self.process)
        if self.process.main:
            checkpoint.rotate(checkpoints, self.config.keep)

    def restore(self) -> bool:
        """Continues from the newest whole checkpoint of the run directory, if there is one."""
        found = checkpoint.newest(self.folder / "checkpoints") if self.folder else None
        if found is None:
            return False
        state = checkpoint.load(found, self.roles, self.optimizers)
        self.progress.iteration, self.seconds = state["iteration"], state["seconds"]
        self.updates, self.skipped = state["updates"], state["skipped"]
        return True

    @contextlib.contextmanager
    def _signals(self):
        """SIGINT and SIGTERM end the run after the iteration in progress; a second one ends it at once."""

        def note(number, _frame):
            if self.stop_signal is not None:
                raise KeyboardInterrupt
            self.stop_signal = number

        try:
            before = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not the main thread, e.g. a notebook's worker
            before = {}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _every(step: int, period: int) -> bool:
    return period > 0 and step % period == 0
