"""Preparing a teacher for continuous-time consistency: a time embedding that is smooth, by distilling it into itself.

Networks on ``1000 t`` read sinusoids that turn hundreds of times while t crosses its range, so their derivative in time
is tens of times the one in space, and the tangent of sCM is mostly that (arXiv 2410.11081, section 4.1). SANA-Sprint
(arXiv 2503.09641, section 3.2) trains its teacher again on t in [0, 1] and with normalised queries and keys. Here the
first is a change of weights, not of the class: columns of the time MLP that read fast sinusoids are set to zero and
stay there, and a copy of the network learns the teacher's own predictions again. Stock diffusers runs it as before.
EDM2's network is fewstep's own: there it is told sCM's angle by slow features, see :mod:`fewstep.teachers.edm.smooth`.
"""

from __future__ import annotations

import copy
import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..bounds import Bounded, Count, Positive, Seed, Share
from ..configs import RoleConfig, TrainConfig
from ..data.batches import Batches
from ..data.cache import encode_images, encode_prompts
from ..data.images import CaptionedImages
from ..data.store import Store
from ..diffusion.cond import Cond, drop_rows
from ..diffusion.consistency import along, angles, refusing_without
from ..diffusion.denoiser import NetDenoiser, ScheduleView
from ..diffusion.embedding import given_to_sinusoids, time_embedder
from ..diffusion.kernels import gather
from ..diffusion.objectives import denoising_weight
from ..diffusion.schedules import EDM, TrigFlow, angle_range, expand, repeated
from ..diffusion.student import Student
from ..errors import FewstepError, Interrupted
from ..export.weights import network_with, save_network
from ..files import replacing, write_json
from ..methods.base import Batch, Method, Phase, Progress
from ..process import Process
from ..teachers.base import Teacher
from ..training.roles import Role, averaged
from ..training.sharding import distribute, gathered
from ..training.trainer import Trainer

QK_NORM = {"SanaTransformer2DModel": "rms_norm_across_heads", "SD3Transformer2DModel": "rms_norm"}


@dataclass
class PrepareConfig(Bounded):
    """When it is done, and how it learns.

    Attributes:
        error: wanted relative error of the velocity, root mean square over noise levels. stiffness: wanted ratio of
            ``|dF/dt|`` to ``|J_x dx/dt|``, the two parts of the tangent's derivative.
        steps: at most. check_every: steps between two measurements.
        turns: sinusoids of more turns over the time range are cut off (1: the slowest only; SANA-Sprint's t in [0, 1]
            is 0.16).
        qk_norm: RMS normalisation of queries and keys, where the network's class has it.
        pixel_norm: sCM's normalisation of what time and label multiply activations by, of EDM2's network.
        null_probability: how often the null condition is shown, so that guidance keeps both its branches.
        lr: SANA-Sprint's is 2e-5. batch_size: of one process at once. accumulate: of these for an update. SANA-Sprint
            takes 1024 images in all, 5,000 times.
    """

    PLACE: ClassVar[str] = "prepare: "

    error: Positive = 0.05
    stiffness: Positive = 3.0
    steps: Count = 5000
    check_every: Count = 250
    turns: Positive = 1.0
    qk_norm: bool = False
    pixel_norm: bool = False
    null_probability: Share = 0.1
    lr: Positive = 2e-5
    batch_size: Count = 16
    accumulate: Count = 1
    seed: Seed = 0

    def role(self) -> RoleConfig:
        return RoleConfig(kind="full", lr=self.lr, weight_decay=0.0, warmup=50, ema=0.99)

    def train(self) -> TrainConfig:
        return TrainConfig(
            steps=self.steps,
            batch_size=self.batch_size,
            accumulate=self.accumulate,
            seed=self.seed,
            log_every=50,
            sample_every=self.check_every,
            checkpoint_every=self.check_every,
            keep=1,
        )


# ---------------------------------------------------------------------------------------------------------- surgery
@torch.no_grad()
def turns_of(denoiser: NetDenoiser, latent_shape: Sequence[int]) -> tuple[Tensor, float]:
    """Turns (C,) that each sinusoid makes over the times the network is given, and the largest of these times."""
    _, _, sinusoids = time_embedder(denoiser.net)
    longest = given_to_sinusoids(denoiser, latent_shape, [denoiser.schedule.t_max]).item()
    half = sinusoids.num_channels // 2
    exponent = torch.arange(half, dtype=torch.float64) / (half - sinusoids.downscale_freq_shift)
    turns = sinusoids.scale * 10_000.0**-exponent * longest / (2 * math.pi)
    return F.pad(torch.cat([turns, turns]), (0, sinusoids.num_channels % 2)), longest


def smooth_time(denoiser: NetDenoiser, latent_shape: Sequence[int], turns: float, steps: int = 500) -> int:
    """Cuts the fast sinusoids off the time MLP of a network and fits what is left to what it was; in place.

    The cut columns stay zero: what they would read is zero from now on, so they get no gradient.

    Returns:
        How many were cut.

    Raises:
        FewstepError: nothing would be left.
    """
    _, mlp, sinusoids = time_embedder(denoiser.net)
    found, longest = turns_of(denoiser, latent_shape)
    grid = torch.linspace(0, longest, 1000, device=next(mlp.parameters()).device)
    with torch.no_grad():
        target = mlp(sinusoids(grid))
    net: Any = denoiser.net
    if "timestep_scale" in net.config:
        # SANA's class has a scale of its own, and its Sprint pipeline needs t in [0, 1].
        net.register_to_config(timestep_scale=net.config.timestep_scale / longest)
        found, grid = found / longest, grid / longest
    keep = (found <= turns).to(mlp.linear_1.weight)
    if not keep.any():
        raise FewstepError(f"prepare: turns {turns:g}: no sinusoid of the network turns so little; give more")
    sinusoids.register_forward_hook(lambda _module, _inputs, waves: waves * keep.to(waves))
    features = sinusoids(grid)
    with torch.no_grad():
        mlp.linear_1.weight.mul_(keep)
    mlp.requires_grad_(True)
    optimizer = torch.optim.Adam(mlp.parameters(), lr=1e-3)
    for i in range(steps):
        optimizer.param_groups[0]["lr"] = 1e-3 * (1 - i / steps)
        optimizer.zero_grad()
        F.mse_loss(mlp(features), target).backward()
        optimizer.step()
    optimizer.zero_grad()
    return int((keep == 0).sum())


def smooth(teacher: Teacher, config: PrepareConfig) -> tuple[NetDenoiser, int]:
    """A copy of the teacher that is smooth in time, fp32, to be trained; and how many sinusoids were too fast.

    Raises:
        FewstepError: a network without a time embedding that is known, or without what is asked for.
    """
    from ..teachers.edm.networks import EDM2Precond, EDMPrecond
    from ..teachers.edm.smooth import smoothed

    net, own = teacher.net, teacher.denoiser
    if config.pixel_norm and not isinstance(net, EDM2Precond):
        raise FewstepError(
            f"prepare: pixel_norm: {type(net).__name__} has none, EDM2's has; leave --pixel-norm out"
        )
    if isinstance(net, EDMPrecond) and net.config.model_type == "ncsn++":
        raise FewstepError(
            f"prepare: {teacher.source}: EDM's ncsn++ reads random features of ln(sigma) / 4, which have no "
            "preparation; expected an EDM2, or a network on sinusoids; or distill it by another method than scm"
        )
    if isinstance(net, EDMPrecond):
        raise FewstepError(
            f"prepare: {teacher.source}: EDM's {net.config.model_type} reads ln(sigma) / 4, over which its fastest "
            "sinusoid makes less than half a turn: it is smooth as it is; distill it without"
        )
    if isinstance(net, EDM2Precond) and not config.qk_norm:
        if net.config.turns is not None:
            raise FewstepError(f"prepare: {teacher.source} is prepared already; distill it as it is")
        ends = own.schedule.t_min, own.schedule.t_max
        made, cut = smoothed(net, config.turns, config.pixel_norm, ends)
        return own.with_net(made.requires_grad_(True)), cut
    copied = with_qk_norm(net) if config.qk_norm else copy.deepcopy(net)
    student = own.with_net(copied.float().requires_grad_(True))
    return student, smooth_time(student, teacher.latent_shape, config.turns)


def with_qk_norm(net: Any) -> nn.Module:
    """The same weights in the same class with RMS normalisation of queries and keys.

    Raises:
        FewstepError: the class has none, or this network has it already.
    """
    kind = QK_NORM.get(type(net).__name__)
    if kind is None or net.config.get("qk_norm") is not None:
        state = "has it already" if kind else f"has none; classes that have: {', '.join(QK_NORM)}"
        raise FewstepError(f"prepare: qk_norm: {type(net).__name__} {state}; leave --qk-norm out")
    normed = type(net).from_config({**net.config, "qk_norm": kind})
    missing, unexpected = normed.load_state_dict(net.state_dict(), strict=False)
    if unexpected or any(".norm_" not in name for name in missing):
        raise FewstepError(
            f"prepare: qk_norm: {type(net).__name__}: weights do not fit: {[*missing, *unexpected][:3]}"
        )
    return normed.to(next(net.parameters()).device)


# --------------------------------------------------------------------------------------------------------- measures
@torch.no_grad()
def stiffness(denoiser: NetDenoiser, x_t: Tensor, t: Tensor, ode: Tensor, cond: Cond) -> float:
    """``|dF/dt| / |J_x dx/dt|`` at TrigFlow times t along the velocity ode; both are parts of one derivative."""
    seen = ScheduleView(denoiser.exact(), TrigFlow())
    gather(denoiser.net)

    def velocity(x: Tensor, time: Tensor) -> Tensor:
        return seen.predict("v", x, time, cond)

    still, moment = torch.zeros_like(ode), torch.ones_like(t)
    in_time = along(velocity, (x_t, t), (still, moment))[1]
    in_space = along(velocity, (x_t, t), (ode, torch.zeros_like(t)))[1]
    weight = expand(torch.cos(t) * torch.sin(t), x_t)  # as they stand in the tangent
    return ((weight * in_time).norm() / (weight * in_space).norm()).item()


def check_stiffness(denoiser: NetDenoiser, latent_shape: Sequence[int]) -> None:
    """Measures it once on a single row, before expensive work.

    Raises:
        RecipeError: the network cannot be differentiated in forward mode.
    """
    x = torch.zeros(1, *latent_shape, device=next(denoiser.net.parameters()).device)
    remedy = "distill the teacher as it is, with method.tangent difference and method.difference 1e-4"
    with refusing_without(denoiser.net, "prepare: stiffness", remedy):
        stiffness(denoiser, x, repeated(1.0, x), torch.ones_like(x), denoiser.example.to(x.device))


@torch.no_grad()
def compare(teacher: NetDenoiser, student: NetDenoiser, batch: Batch) -> dict[str, float]:
    """Relative error of the student's velocity and its stiffness, at the noise levels of sCM's training."""
    low, high = angle_range(teacher.schedule)
    t = angles(batch.rng.normal(len(batch.real)), -0.4, 1.6).clamp(low + 1e-2, high - 1e-3)
    x_t = TrigFlow().add_noise(batch.real, batch.rng.normal_like(batch.real), t)
    exact, ours = (
        ScheduleView(d, TrigFlow()).predict("v", x_t, t, batch.real_cond) for d in (teacher, student)
    )
    ratio = stiffness(student, x_t, t, exact, batch.real_cond)
    return {"error": ((ours - exact).norm() / exact.norm()).item(), "stiffness": ratio}


# --------------------------------------------------------------------------------------------------------- training
class Preparation(Method):
    """A copy of the teacher learns the teacher's own prediction, at all times and under both branches of guidance."""

    student: Student

    teacher: NetDenoiser

    def __init__(self, config: PrepareConfig, teacher: NetDenoiser, *, student: NetDenoiser):
        self.config, self.teacher = config, teacher
        self.student = Student(student, [student.schedule.t_max])

    def phases(self) -> list[Phase]:
        return [Phase("student", ("student",), self.loss)]

    def loss(self, batch: Batch, _progress: Progress) -> dict[str, Tensor]:
        denoiser: Any = self.student.denoiser
        schedule = self.teacher.schedule
        t = schedule.draw_times(batch.rng.uniform(len(batch.real)), 1e-3)
        x_t = schedule.add_noise(batch.real, batch.rng.normal_like(batch.real), t)
        dropped = batch.rng.uniform(len(t)) < self.config.null_probability
        cond = drop_rows(batch.real_cond, self.teacher.null, dropped)
        with torch.no_grad():
            target = self.teacher.predict(x_t, t, cond)
        error = denoiser.predict(x_t, t, cond) - target
        if isinstance(
            schedule, EDM
        ):  # of x0: by EDM's weight, which makes it that of the network's own output
            error = expand(denoising_weight("edm", schedule, t).sqrt(), error) * error
        return {"prediction": error.square().mean()}


@dataclass
class Watch:
    """Measures, every so many steps, how far the network has come, and ends its training where that is enough.

    Every rank measures, because a sharded network runs on all of them together, and the first one's numbers count.

    Attributes:
        train: of the loop, whose steps it shortens. held_out: what it measures on. checks: what it measured.
    """

    config: PrepareConfig
    train: TrainConfig
    role: Role
    student: NetDenoiser
    teacher: NetDenoiser
    held_out: Batches
    process: Process
    quiet: bool
    checks: list[dict[str, float]] = field(default_factory=list)

    def measure(self, denoiser: NetDenoiser) -> dict[str, float]:
        with averaged(self.role):
            return self.process.collect(compare(self.teacher, denoiser, self.held_out.batch(0, 0)))[0]

    @property
    def reached(self) -> bool:
        last = self.checks[-1]
        return last["error"] <= self.config.error and last["stiffness"] <= self.config.stiffness

    def __call__(self, step: int) -> None:
        if self.checks and step == self.checks[-1]["step"]:
            return
        now = {"step": step, **self.measure(self.student)}
        self.checks.append(now)
        if not self.quiet:
            print(f"fewstep: step {step}: error {now['error']:.4f}, stiffness {now['stiffness']:.2f}")
        if self.reached:
            self.train.steps = step  # the loop ends here


def prepare(
    teacher: Teacher,
    out: Path,
    images: CaptionedImages,
    config: PrepareConfig,
    *,
    process: Process | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Writes the prepared pipeline to ``out`` and says what was reached; called again, it goes on where it stopped.

    Training stops as soon as error and stiffness are below their bounds, or after ``config.steps``. Several processes
    share each batch, as a run's do.

    Returns:
        What ``prepare.json`` in the folder says: error and stiffness before, after the cut, and in the end.

    Raises:
        FewstepError: the folder is there already, or the network has no time embedding that is known or no
            forward-mode derivative.
    """
    process = process or Process(device=teacher.device)
    if out.exists():
        raise FewstepError(f"prepare: {out} is there already; give another folder")
    training = out.with_name(out.name + ".training")
    check_same(training, teacher.source, config)
    check_stiffness(teacher.denoiser, teacher.latent_shape)
    student, cut = smooth(teacher, config)
    net = student.net
    conditions, latents = _encoded(teacher, images, process, quiet := quiet or not process.main)
    teacher.drop_encoders()

    batches = partial(
        Batches, conditions, teacher.latent_shape, latents=latents, captions=conditions, device=teacher.device
    )
    held_out, own = batches(batch_size=64, seed=config.seed + 1), teacher.denoiser
    role = _role(net, config, process)
    watch = Watch(config, config.train(), role, student, own, held_out, process, quiet)
    micro = config.accumulate * process.world
    data = batches(batch_size=config.batch_size, per_iteration=micro, seed=config.seed)
    if process.main:
        _begin(training, teacher.source, config)
    seconds = _train(watch, data, training)
    before = compare(own, own, held_out.batch(0, 0))
    record = _told(teacher.source, config, cut, micro, before, watch, seconds)
    weights = gathered(role.final_weights(), process)
    if process.main:
        _keep(network_with(teacher, net, weights, torch.float32), teacher, record, out)
        # Else it would go on there, were the result deleted and made anew.
        shutil.rmtree(training, ignore_errors=True)
    process.barrier()
    return record


def _told(
    source: str,
    config: PrepareConfig,
    cut: int,
    micro: int,
    before: dict[str, float],
    watch: Watch,
    seconds: float,
) -> dict[str, Any]:
    """What ``prepare.json`` says."""
    return {
        "teacher": source,
        "sinusoids_cut": cut,
        "qk_norm": config.qk_norm,
        **({"pixel_norm": True} if config.pixel_norm else {}),
        "batch": config.batch_size * micro,
        "before": before,
        "checks": watch.checks,
        "after": watch.checks[-1],
        "reached": watch.reached,
        "seconds": round(seconds, 1),
    }


def _keep(made: Any, teacher: Teacher, record: dict[str, Any], out: Path) -> None:
    """The teacher's pipeline with another network, and what is to be said of it."""
    with replacing(out) as part:
        save_network(teacher, made, teacher.pipe.scheduler, part)
        write_json(part / "prepare.json", record)


def _begin(training: Path, source: str, config: PrepareConfig) -> None:
    training.mkdir(parents=True, exist_ok=True)
    write_json(training / "options.json", options_of(source, config))


def options_of(source: str, config: PrepareConfig) -> dict[str, Any]:
    """What a training that goes on must have in common with the one that was stopped; not when it is done."""
    ends = ("error", "stiffness", "steps", "check_every")
    return {"teacher": source, **{k: v for k, v in asdict(config).items() if k not in ends}}


def check_same(folder: Path, source: str, config: PrepareConfig) -> None:
    """Whether what was stopped in this folder, if anything was, is this training.

    Raises:
        FewstepError: it was another one.
    """
    place, now = folder / "options.json", options_of(source, config)
    if not place.is_file():
        return
    before = json.loads(place.read_text())
    if other := [f"{name} {before.get(name)!r}" for name in now if before.get(name) != now[name]]:
        raise FewstepError(
            f"prepare: {folder} was stopped with {', '.join(other)}; go on with these, or delete it to begin anew"
        )


def _role(net: nn.Module, config: PrepareConfig, process: Process) -> Role:
    role = Role("student", net, config.role())
    distribute(net, process)
    role.collect()
    return role


def _train(watch: Watch, data: Batches, folder: Path) -> float:
    """Until the watch has seen enough; seconds of all the sittings it took."""
    method = Preparation(watch.config, watch.teacher, student=watch.student)
    options: dict[str, Any] = {"on_sample": watch, "process": watch.process, "quiet": watch.quiet}
    trainer = Trainer(method, {"student": watch.role}, data, watch.train, folder=folder, **options)
    trainer.restore()
    watch(trainer.progress.iteration)
    if trainer.progress.iteration < watch.train.steps:
        try:
            trainer.train()
        except Interrupted as stop:
            raise Interrupted(stop.number, stop.step, "the same command") from None
    return trainer.seconds


def _encoded(teacher: Teacher, images: CaptionedImages, process: Process, quiet: bool) -> tuple[Store, Store]:
    """Captions and images; the first rank encodes, the others find the cache."""
    if not process.main:
        process.barrier()
    found = encode_prompts(teacher, images.captions, quiet=quiet), encode_images(teacher, images, quiet=quiet)
    if process.main:
        process.barrier()
    return found
