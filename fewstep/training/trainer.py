"""The loop that runs every method.

From a method's list of phases follow the optimisers, who is trainable when, learning rates, clipping, accumulation,
the names of the log and what a checkpoint holds. The trainer never looks inside a loss.
"""

from __future__ import annotations

import contextlib
import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..configs import TrainConfig
from ..data.batches import Data, Waits
from ..diffusion.rng import Rng
from ..errors import Interrupted, TrainingError
from ..files import sweep
from ..methods.base import Batch, Method, Phase, Progress
from ..methods.verdicts import settled, weight_of
from ..process import Process
from ..report.health import Watch
from ..report.log import MetricsLog, StatusLine, direction, read_metrics
from . import checkpoint
from .divergence import Divergence, Failed, Outcome
from .means import Means
from .optimizers import optimizer_of, take_step
from .roles import Role
from .scaling import Scales
from .sharding import clip_gradients, shards, sync_gradients, whole
from .signals import StopSignal


class Trainer:
    """Trains the roles of a method and keeps its run directory.

    Args:
        method: whose phases run. roles: every trainable role by name, as the phases name them.
        data: where micro-batches come from. config: see :class:`TrainConfig`.
        folder: run directory; None writes nothing. on_sample: called with the step when a grid is due;
            what it measured goes to the log. on_save: called before a checkpoint is written. scaled: losses are, for
            networks that compute in fp16.
    """

    # Beside weights, optimisers and Progress.
    STATE = ("seconds", "cpu_seconds", "updates", "rolled_back", "best", "begun")

    def __init__(
        self,
        method: Method,
        roles: dict[str, Role],
        data: Data,
        config: TrainConfig,
        *,
        folder: Path | None = None,
        process: Process | None = None,
        on_sample: Callable[[int], Mapping[str, float]] | None = None,
        on_save: Callable[[], None] = lambda: None,
        quiet: bool = False,
        scaled: bool = False,
    ):
        self.method, self.roles, self.data, self.config = method, roles, data, config
        self.folder, self.process = folder, process or Process()
        self.on_sample, self.on_save = on_sample, on_save
        self.on_record: Callable[[Mapping[str, float | None]], None] | None = None  # gets what the log gets
        self.quiet = quiet or not self.process.main
        per_iteration = config.batch_size * config.accumulate * self.process.world
        self.phases, self.progress = method.phases(), Progress(0, config.steps, per_iteration)
        for name in {name for phase in self.phases for name in phase.fresh}:
            roles[name].remember()
        entries = math.prod(method.latent_shape) if method.sums else 1
        self.optimizers = {name: optimizer_of(role, entries) for name, role in roles.items()}
        self.updates = dict.fromkeys(roles, 0)
        self.seconds, self.rolled_back = 0.0, 0
        # Of this process and its threads, whoever shares the cores; None where an earlier release began the run.
        self.cpu_seconds: float | None = 0.0
        self.window, self.judged = Means(), Means()
        self.best: dict[str, float] = {}
        self.begun: dict[str, float] = {}  # what the weights were, to see that they changed
        self.finite: dict[str, Tensor] = {}  # of this iteration's updates, by phase, on the device
        self.divergence = Divergence(self.phases, self.again)
        self.scales = Scales([phase.name for phase in self.phases if scaled], self.process.device)
        self.status = StatusLine(config.steps, quiet=self.quiet)
        self.waits = Waits(data)

    # ------------------------------------------------------------------------------------------------- the loop
    def train(self) -> None:
        """Runs to ``config.steps``; resumes from wherever :meth:`restore` left the state.

        Raises:
            Interrupted: a signal came; the run is saved. TrainingError: no finite gradient any more, or the student
                has not changed. WriteError: an output cannot be written; the last checkpoint is whole.
        """
        with StopSignal() as stop, self._log() as log:
            self.status = StatusLine(self.config.steps, self.progress.iteration, quiet=self.quiet)
            watch = Watch(read_metrics(log.path) if log else ())
            begin = time.perf_counter() - self.seconds
            begin_cpu = time.process_time() - (self.cpu_seconds or 0.0)
            if self.progress.iteration == 0:
                self.begun = {name: _digest(role) for name, role in self.roles.items()}
                self._sample(log)
            while self.progress.iteration < self.config.steps:
                try:
                    self.iterate()
                    if self.progress.iteration == self.config.steps:
                        self._heed(self.divergence.settle())
                except TrainingError as error:
                    self._roll_back(error, log)
                    continue
                step = self.progress.iteration
                self.seconds = time.perf_counter() - begin
                if self.cpu_seconds is not None:
                    self.cpu_seconds = time.process_time() - begin_cpu
                if step % self.config.log_every == 0 or step == self.config.steps:
                    record = self._record()
                    self._note(log, record)
                    self.status.update(step, record)
                    if line := self.waits.read(self.seconds):
                        self.say(line)
                    for line in watch.read(record):
                        self.say(f"warning: {line}")
                stopping = self.process.any(stop.number is not None)
                if _every(step, self.config.sample_every) or step == self.config.steps:
                    self._sample(log)
                if stopping or _every(step, self.config.checkpoint_every) or step == self.config.steps:
                    self.save()
                if stopping and step < self.config.steps:
                    self.status.close()
                    how = f"fewstep resume {self.folder}" if self.folder else None
                    raise Interrupted(stop.number or signal.SIGTERM, step, how)
        self.status.close()
        self._check_changed()

    def iterate(self) -> None:
        """One iteration: the phases that are due, in order, each on the same micro-batches.

        Raises:
            TrainingError: the iteration before was the last of too many in a row without a finite gradient.
        """
        iteration = self.progress.iteration
        batches = self.batches(iteration)
        metrics: dict[str, Tensor] = {}
        if fresh := [name for phase in self.phases if phase.begins(self.progress) for name in phase.fresh]:
            # What is left of an update is for weights and moments as they were.
            self._heed(self.divergence.settle())
            self.restart(tuple(dict.fromkeys(fresh)))
        for phase in self.phases:
            if phase.due(self.progress):
                metrics.update(self.turn(phase, batches))
        self.window.add(metrics)
        self.progress.iteration += 1
        finite, self.finite = self.finite, {}
        self._heed(self.divergence.note(iteration, finite))
        if self.divergence.at_the_end():
            self.save("diverged")  # from here the failure that ends the run shows again

    def batches(self, iteration: int) -> list[Batch]:
        count, world, rank = self.config.accumulate, self.process.world, self.process.rank
        return [self.data.batch(iteration, i * world + rank) for i in range(count)]

    def restart(self, names: tuple[str, ...]) -> None:
        """Roles begin again: the weights they were built from, an empty optimiser."""
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
        sums: dict[str, Tensor] = {}
        for i, batch in enumerate(batches):
            self.add(sums, phase, batch, trained, i == len(batches) - 1, len(batches))
        norm = self.update(phase, trained)
        return {**sums, f"{phase.name}/grad_norm": norm}

    def add(
        self,
        sums: dict[str, Tensor],
        phase: Phase,
        batch: Batch,
        roles: list[Role],
        sync: bool,
        count: int,
    ) -> None:
        """One of ``count`` micro-batches: gradients to the weights, numbers to the sums."""
        for role in roles:
            sync_gradients(role.module, sync)
        assert phase.loss is not None  # of those that do not follow
        terms = phase.loss(batch, self.progress)
        total: Any = sum(terms.values())
        self.backward(self.scales.up(phase.name, total / count))
        named = {f"{phase.name}/{k}": v for k, v in terms.items()}
        for name, value in {**named, **{f"health/{k}": v for k, v in batch.log.items()}}.items():
            sums[name] = sums.get(name, 0) + value.detach() / count
        batch.log.clear()

    def backward(self, loss: Tensor) -> None:
        # A loss that is not finite makes no finite gradient, so that the norm tells, on every rank, at no extra cost.
        loss.backward(torch.where(loss.isfinite(), 1.0, torch.nan).to(loss))

    def update(self, phase: Phase, roles: list[Role]) -> Tensor:
        """Clip jointly, step, average, clear; an update without a finite gradient is skipped by all ranks.

        The fused kernel itself leaves weights and moments alone where ``found_inf`` is 1, so the host need not know.

        Returns:
            The norm of the joint gradient over all ranks, before clipping.
        """
        weights = _weights(roles)
        self.scales.down(phase.name, shards(w.grad for w in weights if w.grad is not None))
        norm = clip_gradients(weights, self.config.clip_norm)
        finite = torch.isfinite(norm)
        self.finite[phase.name] = self.scales.judge(phase.name, finite)
        found_inf = 1 - finite.float()
        for role in roles:
            optimizer = self.optimizers[role.name]
            take_step(optimizer, self.learning_rate(role, phase), found_inf)
            self.updates[role.name] += 1
            role.settle_weights()
            images = self.progress.per_iteration * phase.every
            role.update_average(self.updates[role.name], images, self.progress.images)
            optimizer.zero_grad(set_to_none=True)
        return norm

    # ------------------------------------------------------------------------------------ updates that were not finite
    def again(self, iteration: int, phase: Phase) -> bool:
        """A phase's turn of an earlier iteration again, see :meth:`rescue`; the run goes on from where it is."""
        now, self.progress.iteration = self.progress.iteration, iteration
        try:
            return self.rescue(phase)
        finally:
            self.progress.iteration, self.finite = now, {}

    def rescue(self, phase: Phase) -> bool:
        """A turn again, one sample at a time, without those whose gradient is not finite.

        Returns:
            Whether anything was left to learn from.
        """
        step, roles = self.progress.iteration, [self.roles[name] for name in phase.train]
        for role in self.roles.values():
            role.requires_grad_(role in roles)
        weights = _weights(roles)
        kept: list[Tensor | None] = [None] * len(weights)
        means, lost, count = Means(), [], 0
        earlier = self.phases[: self.phases.index(phase)]
        before = [p.loss for p in earlier if p.loss and p.due(self.progress)]
        for k, batch in enumerate(self.batches(step)):
            for i in range(batch.shape[0]):
                key = (self.config.seed, "rescue", step, phase.name, k, i, self.process.rank)
                one = batch.row(i, Rng(*key, device=batch.rng.device))
                sums: dict[str, Tensor] = {}
                for loss in before:  # leaves what this phase takes over
                    loss(one, self.progress)
                one.log.clear()
                self.add(sums, phase, one, roles, True, 1)
                gradients = [w.grad for w in weights]
                if _finite(gradients):
                    count += 1
                    means.add(sums)
                    kept = [g if k is None else k if g is None else k + g for k, g in zip(kept, gradients)]
                else:
                    odd = [name for name, value in sums.items() if not value.isfinite()]
                    lost.append(f"micro-batch {k} sample {i}" + (f" ({', '.join(odd)})" if odd else ""))
                for role in roles:
                    self.optimizers[role.name].zero_grad(set_to_none=True)
        self.say(f"step {step}: {phase.name}: {_left_out(lost, count)}")
        dropped = torch.tensor(float(len(lost)), device=self.process.device)
        self.window.add({**means.means(), f"{phase.name}/dropped": dropped})
        if count:
            for weight, gradient in zip(weights, kept):
                weight.grad = None if gradient is None else gradient / count
            self.update(phase, roles)
        return count > 0

    def _heed(self, failed: Failed | None) -> None:
        if failed is None:
            return
        step, phase = failed
        where = f"; `fewstep replay {self.folder}` shows it again" if self.folder else ""
        raise TrainingError(
            f"step {step}: the gradient of {' and '.join(phase.train)} was not finite {Divergence.MAX_SKIPPED} times "
            f"in a row{where}. Resume from the last checkpoint with a lower lr or with --train.clip_norm 1, or set "
            "train.rollbacks"
        )

    def learning_rate(self, role: Role, phase: Phase) -> float:
        """Linear warm-up, constant or the inverse root of iterations, linear decay to zero within the phase's share."""
        c, done = role.config, self.progress.iteration
        begin, end = phase.span(self.progress)
        warm = (done - begin + 1) / c.warmup if c.warmup and phase.warm else 1.0
        left = (end - done) / c.decay if c.decay else 1.0
        root = (c.inverse_sqrt / max(done, c.inverse_sqrt)) ** 0.5 if c.inverse_sqrt else 1.0
        return c.lr * root * phase.rate * self.config.rollback_lr**self.rolled_back * min(1.0, warm, left)

    # --------------------------------------------------------------------------------------------- side effects
    @contextlib.contextmanager
    def _log(self) -> Iterator[MetricsLog | None]:
        """The run's log on the first rank, without what a killed run wrote after its last checkpoint."""
        if self.folder is None or not self.process.main:
            yield None
            return
        sweep(self.folder)
        log = MetricsLog(self.folder / "metrics.jsonl")
        try:
            log.truncate_after(self.progress.iteration)
            yield log
        finally:
            log.close()

    def _record(self) -> dict[str, float | None]:
        """Means over the window since the last record; the only place where numbers leave the device."""
        means = self.window.means()
        self.window = Means()
        if not means:
            return {}
        best = self.config.best
        self.judged.add(
            {name: value for name, value in means.items() if best and name in (best, weight_of(best))}
        )
        values = self.process.mean(torch.stack([means[name] for name in sorted(means)])).tolist()
        numbers = settled(dict(zip(sorted(means), values)))
        return {name: value if math.isfinite(value) else None for name, value in numbers.items()}

    def _sample(self, log: MetricsLog | None) -> None:
        if self.on_sample and self.config.sample_every:
            measured = self.on_sample(self.progress.iteration)
            if measured:
                self._note(log, measured)

    def _note(self, log: MetricsLog | None, record: Mapping[str, float | None]) -> None:
        if log:
            line = {"step": self.progress.iteration, "seconds": round(self.seconds, 3), **record}
            log.append(line)
            if self.on_record:
                self.on_record(line)

    def say(self, text: str) -> None:
        self.status.write(f"fewstep: {text}")

    def _roll_back(self, error: TrainingError, log: MetricsLog | None) -> None:
        """Back to the newest checkpoint with a lower rate, as often as the recipe allows; all ranks alike."""
        done, allowed = self.rolled_back, self.config.rollbacks
        if done >= allowed or not self.restore(sound=True):
            self.status.close()
            raise error
        self.rolled_back = done + 1
        step = self.progress.iteration
        if log and self.folder:
            log.truncate_after(step)
            checkpoint.drop_after(self.folder / "checkpoints", step)
        scale = self.config.rollback_lr**self.rolled_back
        self.say(f"{error}\nfewstep: back to step {step}, learning rates times {scale:g}")

    def _check_changed(self) -> None:
        same = [r for r in self.method.student.roles if self.begun.get(r) == _digest(self.roles[r])]
        if same:
            raise TrainingError(
                f"the weights of {' and '.join(dict.fromkeys(same))} have not changed in {self.config.steps} steps; "
                "look at roles.student.lr and targets, and at how often its phase is due (method.critic_steps)"
            )

    def _judge(self) -> None:
        """Whether the checkpoint that is about to be written is the best."""
        name, step = self.config.best, self.progress.iteration
        due = _every(step, self.config.checkpoint_every) or step == self.config.steps
        if name is None or not due:  # a checkpoint because of a signal changes nothing
            return
        means = {n: self.process.mean(value).item() for n, value in sorted(self.judged.means().items())}
        self.judged, means = Means(), settled(means)
        if name not in means:
            self.say(
                f"warning: train.best: no {name!r} was logged since the last checkpoint; see metrics.jsonl"
            )
            return
        value = means[name]
        better = direction(name) or -1  # a loss where the name does not tell
        if math.isfinite(value) and (not self.best or better * value > better * self.best["value"]):
            self.best = {"step": step, "value": value}

    def save(self, name: str | None = None) -> None:
        """Writes a checkpoint of this moment; keeps the newest ``config.keep`` and the best.

        Args:
            name: of a snapshot beside the checkpoints instead, which is kept apart.
        """
        if self.folder is None:
            return
        self.on_save()
        if name is None:
            self._judge()
        checkpoints, step = self.folder / "checkpoints", self.progress.iteration
        state = {field: getattr(self, field) for field in self.STATE}
        state |= {"iteration": step, "per_iteration": self.progress.per_iteration, "rows": self.data.rows}
        state |= {"scales": self.scales.plain()} if self.scales.of else {}
        state |= {"last": self.divergence.last.plain(), "skipped": self.divergence.skipped}
        state |= {k: getattr(self, k).floats(self.process) for k in ("window", "judged")}
        where = self.folder / name if name else checkpoints / f"step_{step:08d}"
        checkpoint.save(where, self.roles, self.optimizers, state, self.process)
        if self.process.main and name is None:
            checkpoint.rotate(checkpoints, self.config.keep, self.best.get("step"))

    def restore(self, folder: Path | None = None, sound: bool = False) -> bool:
        """Continues from a checkpoint, by default the newest whole one of the run directory, if there is one.

        Args:
            sound: pass over those written while gradients were not finite.
        """
        if folder is None and self.folder:
            where = self.folder / "checkpoints"
            found = checkpoint.newest(where, sound) if self.process.main else None
            step = self.process.agree(checkpoint.step_of(found) if found else -1)
            folder = where / f"step_{step:08d}" if step >= 0 else None
        if folder is None:
            return False
        state = checkpoint.load(folder, self.roles, self.optimizers, self.process)
        for name in self.STATE:
            setattr(self, name, state.get(name) if name == "cpu_seconds" else state[name])
        self.progress.iteration = state["iteration"]
        self.divergence.last, self.divergence.skipped = Outcome.of(**state["last"]), state["skipped"]
        self.scales.restore(state.get("scales", {}))
        for name in ("window", "judged"):
            setattr(self, name, Means.of(state[name], self.process.device))
        samples, micro = self.progress.per_iteration, self.config.batch_size * self.process.world
        if samples != (was := state.get("per_iteration", samples)):
            keep = f"; --train.accumulate {was // micro} keeps that" if was % micro == 0 else ""
            self.say(f"note: an iteration has {samples} samples now, and had {was} before{keep}")
        if self.data.rows != (before := state.get("rows", self.data.rows)):
            there, now = (", ".join(f"{n} {k}" for k, n in r.items()) for r in (before, self.data.rows))
            self.say(
                f"warning: {folder} was trained on {there}, and there are {now}: the run goes on with these, and does "
                "not end as it would have; put back what is missing, or begin a new run"
            )
        return True


def _weights(roles: list[Role]) -> list[Tensor]:
    return [w for role in roles for w in role.weights.values()]


def _digest(role: Role) -> float:
    """Tells whether weights have changed; a collective on sharded roles."""
    return float(sum(whole(w).double().abs().sum() for w in role.weights.values()))


def _finite(gradients: list[Tensor | None]) -> bool:
    norm = torch.nn.utils.get_total_norm([g for g in gradients if g is not None])
    return bool(torch.isfinite(norm.full_tensor() if hasattr(norm, "full_tensor") else norm))


def _left_out(lost: list[str], count: int) -> str:
    """What is said of a turn that was taken again: the samples left out, and how many were not."""
    what = f"{len(lost)} of {len(lost) + count} samples left out" if count else "update left out"
    which = f"not finite: {', '.join(lost[:3])}" if lost else "each is finite alone"
    return f"{what}, {which}" + (f" and {len(lost) - 3} more" if len(lost) > 3 else "")


def _every(step: int, period: int) -> bool:
    return period > 0 and step % period == 0
