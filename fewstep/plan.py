"""What a recipe takes, before anything is loaded: memory, arithmetic, hours.

The recipe's own code runs, every turn of it, on tensors that have shapes and no storage: the roles, the losses, the
trainer's update. What is alive at each operation is added up, and so are the multiplications. Nothing is modelled
except what the device's libraries keep for themselves.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from . import recipe as recipes
from .cond import Cond
from .distributed import Process
from .errors import FewstepError, RecipeError
from .methods.base import Batch
from .recipe import Recipe
from .rng import Rng
from .roles import Role
from .run import build
from .teachers.base import Teacher
from .teachers.skeleton import skeleton_teacher
from .trainer import Trainer


@dataclass(frozen=True)
class Device:
    """A card: usable bytes, and the data sheet's dense rates in FLOP/s by the dtype of the arithmetic."""

    memory: float
    bfloat16: float
    float32: float  # TF32 where there is one


GPUS = {
    "h100-80gb": Device(79.1 * 2**30, 989e12, 494e12),
    "h200-141gb": Device(139.8 * 2**30, 989e12, 494e12),
    "a100-80gb": Device(79.2 * 2**30, 312e12, 156e12),
    "a100-40gb": Device(39.4 * 2**30, 312e12, 156e12),
    "l40s-48gb": Device(44.4 * 2**30, 362e12, 183e12),
    "rtx4090-24gb": Device(23.5 * 2**30, 165e12, 82.6e12),
}
LIBRARIES = 1.5e9  # assumed: CUDA context, workspaces of cuBLAS and cuDNN
FRAGMENTS = 0.05  # assumed: of what an iteration allocates and frees
UTILISATION = 0.40  # assumed share of the data sheet's rate; hours follow from it


# ------------------------------------------------------------------------------------------------------- counting
_FLOPS = {
    **flop_registry,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda g, q, k, v, *_, **__: (
        sdpa_backward_flop_count(g, q, k, v)
    ),
}  # fmt: skip


class Meter(TorchDispatchMode):
    """Bytes alive among those allocated under it, their peak, and floating-point operations of matrix products."""

    def __init__(self):
        super().__init__()
        self.alive = self.peak = self.flops = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        for tensor in (out,) if isinstance(out, Tensor) else tree_leaves(out):
            if isinstance(tensor, Tensor) and id(storage := tensor.untyped_storage()) not in self._seen:
                given = (t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor))
                if all(t.untyped_storage() is not storage for t in given):  # no view of what was there before
                    self._note(storage)
        count = _FLOPS.get(function._overloadpacket)
        if count is not None:
            shapes = [a.shape if isinstance(a, Tensor) else a for a in args]
            raw = function._overloadpacket in flop_registry
            self.flops += count(*args, **kwargs, out_val=out) if raw else count(*shapes)
        return out

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        self._seen.add(key)
        self.alive += size
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._freed, key, size).atexit = False

    def _freed(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.alive -= size


class _Planning(TorchFunctionMode):
    """Weights of networks get no storage, and norms run as on a GPU.

    ``torch.empty``, by which layers make their weights, gives a tensor of shape and dtype only; whatever is computed
    from one is one. Everything else, such as times and schedules, stays real. Under autocast a GPU normalises in fp32
    where a CPU does not, which doubles what those layers keep.
    """

    NORMS = (F.layer_norm, F.group_norm)

    def __init__(self):
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        # Weak references of its memo keep ``Module.to`` from working.
        self.fake.fake_tensor_converter.set_tensor_memo = lambda *_: None

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.empty:
            with self.fake:
                return function(*args, **kwargs)
        if function is Tensor.__bool__ and isinstance(args[0], FakeTensor):
            return True  # that a gradient is finite
        if function in self.NORMS and torch.is_autocast_enabled("cpu"):
            args = [a.float() if isinstance(a, Tensor) else a for a in args]
            kwargs = {k: v.float() if isinstance(v, Tensor) else v for k, v in kwargs.items()}
            with torch.autocast("cpu", enabled=False):
                return function(*args, **kwargs)
        return function(*args, **kwargs)


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Each storage once."""
    found = {id(s): s.nbytes() for s in (local(t).untyped_storage() for t in tensors)}
    return sum(found.values())


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


# ------------------------------------------------------------------------------------------- data without content
class _Shapes(Rng):
    """Draws have shapes only; choices take their first or their last value."""

    def __init__(self, last: bool):
        self.last = last

    def normal(self, *shape: int) -> Tensor:
        return torch.empty(shape)

    def uniform(self, *shape: int) -> Tensor:
        return torch.full(shape, 0.5, dtype=torch.float64)

    def integer(self, below: int) -> int:
        return below - 1 if self.last else 0


class _Blanks:
    """Micro-batches of the right shapes."""

    def __init__(self, teacher: Teacher, batch_size: int, needs: Sequence[str]):
        self.teacher, self.needs, self.last = teacher, needs, True
        self.shape = (batch_size, *teacher.latent_shape)

    def batch(self, iteration: int, micro: int) -> Batch:
        def cond() -> Cond:
            return self.teacher.blank(self.shape[0]).map(lambda value: torch.empty_like(value))

        rng, batch = _Shapes(self.last), {}
        if "images" in self.needs:
            batch = {"real": torch.empty(self.shape), "real_cond": cond()}
        if "pairs" in self.needs:
            batch |= {"pairs": (torch.empty(self.shape), torch.empty(self.shape)), "pair_cond": cond()}
        return Batch(cond=cond(), shape=self.shape, rng=rng, shared=rng, **batch)


# ----------------------------------------------------------------------------------------------------------- a plan
@dataclass
class Part:
    """One row of a plan, in bytes on one device."""

    name: str
    parameters: int = 0
    trained: int = 0
    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    average: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.optimizer + self.average


@dataclass
class Turn:
    """One kind of iteration: the phases that run in it, how often, and what they take at a batch size."""

    phases: tuple[str, ...]
    count: int
    peak: dict[int, int] = field(default_factory=dict)  # batch size -> bytes beyond the parts
    flops: dict[int, float] = field(default_factory=dict)  # batch size -> of all micro-batches on one device


@dataclass
class Plan:
    """What a recipe takes on one device; see :func:`plan`."""

    recipe: Recipe
    processes: int
    parts: list[Part]
    leaving: int
    preview: int
    turns: list[Turn]

    @property
    def held(self) -> int:
        """Bytes that stay through the run."""
        return sum(part.total for part in self.parts)

    def activations(self, batch_size: int) -> float:
        """Peak beyond what is held, with gradients, at any micro-batch size: linear through two counted ones."""
        peaks = []
        for turn in self.turns:
            (b1, p1), (b2, p2) = sorted(turn.peak.items())
            peaks.append(p1 + (p2 - p1) / (b2 - b1) * (batch_size - b1))
        return max(*peaks, self.preview)

    def total(self, batch_size: int | None = None) -> float:
        batch_size = batch_size or self.recipe.train.batch_size
        return self.held + (1 + FRAGMENTS) * self.activations(batch_size) + LIBRARIES

    def largest_batch(self, memory: float) -> int:
        """Largest micro-batch that fits; 0 if none does."""
        slope = self.total(2) - self.total(1)
        if self.total(1) > memory:
            return 0
        low = 1
        while self.total(low + 1) <= memory and slope > 0:
            low += max(1, int((memory - self.total(low)) / slope) - 1)
        return low

    def flops(self) -> float:
        """Of the whole run on one device; both ends of a rollout's length count half."""
        size = self.recipe.train.batch_size
        return sum(t.count * size * sum(f / b for b, f in t.flops.items()) / len(t.flops) for t in self.turns)

    def hours(self, device: Device) -> float:
        rate = device.bfloat16 if self.recipe.teacher.autocast == "bfloat16" else device.float32
        return self.flops() / (UTILISATION * rate) / 3600

    def to_dict(self, gpu: str) -> dict[str, Any]:
        size = self.recipe.train.batch_size
        return {
            "gpu": gpu,
            "processes": self.processes,
            "batch_size": size,
            "held_gb": round(self.held / 1e9, 2),
            "iteration_gb": round(self.activations(size) / 1e9, 2),
            "total_gb": round(self.total() / 1e9, 2),
            "gb_per_sample": round((self.activations(2) - self.activations(1)) / 1e9, 3),
            "largest_batch": self.largest_batch(GPUS[gpu].memory),
            "tflop_per_iteration": round(self.flops() / 1e12 / sum(t.count for t in self.turns), 2),
            "hours": round(self.hours(GPUS[gpu]), 1),
            "parts": {p.name: {**vars(p), "total": p.total} for p in self.parts},
        }

    def text(self, gpu: str) -> str:
        """A table, and under it what follows from it."""
        gb = lambda size: f"{size / 1e9:.2f}"  # noqa: E731
        head = ["", "parameters", "trained", "weights", "gradients", "optimiser", "average", "held GB"]
        rows = [
            [p.name, f"{p.parameters / 1e6:.1f} M", f"{p.trained / 1e6:.1f} M"]
            + [gb(v) for v in (p.weights, p.gradients, p.optimizer, p.average, p.total)]
            for p in self.parts
        ]
        widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
        lines = [" | ".join(cell.rjust(w) for cell, w in zip(row, widths)) for row in [head, *rows]]
        t, size = self.recipe.train, self.recipe.train.batch_size
        per_image = (self.activations(2) - self.activations(1)) / 1e9
        total, device = sum(turn.count for turn in self.turns), GPUS[gpu]
        best = self.largest_batch(device.memory)
        lines += [
            "",
            f"held                        {gb(self.held)} GB",
            f"an iteration, at most       {gb(self.activations(size))} GB, gradients included, at micro-batches of "
            f"{size}; {per_image:.2f} GB per sample",
            f"libraries and fragments     {gb(self.total() - self.held - self.activations(size))} GB (assumed)",
            f"total                       {gb(self.total())} GB of {gb(device.memory)} on {gpu}"
            + (f", {self.processes} of them" if self.processes > 1 else ""),
            f"largest micro-batch         {best or 'none fits'}",
            f"text encoders               {gb(self.leaving)} GB, gone once prompts are encoded",
        ]
        for turn in self.turns:
            flops = sum(f / b for b, f in turn.flops.items()) / len(turn.flops)
            lines.append(
                f"{' + '.join(turn.phases):28}{turn.count} of {total} iterations, {flops * size / 1e12:.1f} TFLOP each"
            )
        samples = t.batch_size * t.accumulate * self.processes
        lines.append(
            f"the run                     {self.flops() / 1e18:.1f} EFLOP per device, {self.hours(device):.1f} h at an "
            f"assumed {UTILISATION:.0%} of the data sheet's rate; {samples} samples per iteration"
        )
        return "\n".join(lines)


def plan(recipe: Recipe, processes: int = 1) -> Plan:
    """Counts a recipe on one of ``processes`` devices.

    Every kind of iteration of the whole run is executed at the recipe's micro-batch and at a second size, on tensors
    without storage; with accumulation two micro-batches are run, which is where gradients meet activations.

    Raises:
        FewstepError: no configuration of the teacher can be read, or the method decides by values it computes.
        RecipeError: as when the recipe is run.
    """
    recipe = recipes.from_dict(recipes.to_dict(recipe))
    t, size = recipe.teacher, recipe.train.batch_size
    if processes % recipe.train.shard:
        raise RecipeError(
            f"train.shard: {recipe.train.shard} does not divide the number of processes, {processes}"
        )
    with _Planning(), _group(processes, recipe.train.shard) as process:
        teacher = skeleton_teacher(
            t.path, dtype=t.dtype, resolution=t.resolution, autocast=t.autocast, attention=t.attention
        )
        if t.gradient_checkpointing:
            teacher.net.enable_gradient_checkpointing()
        roles, method = build(recipe, teacher, process)
        accumulate = min(2, recipe.train.accumulate)
        train = replace(recipe.train, accumulate=accumulate)
        trainer = Trainer(method, roles, None, train, process=process, quiet=True)
        _fill_optimizers(trainer)
        parts, leaving = _parts(teacher, roles, trainer)
        turns = _turns(trainer)
        for count, last in ((size, True), (size + 1, False)):
            trainer.data = _Blanks(teacher, count, recipe.method_class.needs(recipe.method))
            trainer.data.last = last
            for turn in turns:
                meter = _run(trainer, turn)
                turn.peak[count] = meter.peak
                turn.flops[count] = meter.flops * recipe.train.accumulate / accumulate
        return Plan(
            recipe,
            processes,
            parts,
            leaving,
            _preview(teacher, len(recipe.samples.prompts or ()) or recipe.samples.count),
            turns,
        )


@contextmanager
def _group(processes: int, shard: int) -> Iterator[Process]:
    """This process as one of several whose messages go nowhere."""
    if processes == 1:
        yield Process()
        return
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=processes)
    mesh = init_device_mesh("cpu", (processes // shard, shard), mesh_dim_names=("replicate", "shard"))
    try:
        yield Process(0, processes, torch.device("cpu"), mesh)
    finally:
        dist.destroy_process_group()


def _fill_optimizers(trainer: Trainer) -> None:
    """Moments come into being at the first step."""
    for role in trainer.roles.values():
        for weight in role.weights.values():
            weight.grad = torch.zeros_like(weight)
        trainer.optimizers[role.name].step()
        trainer.optimizers[role.name].zero_grad(set_to_none=True)


def _parts(teacher: Teacher, roles: dict[str, Role], trainer: Trainer) -> tuple[list[Part], int]:
    def tensors(module: nn.Module) -> list[Tensor]:
        return [*module.parameters(), *module.buffers()]

    def numel(module: nn.Module) -> int:
        return sum(p.numel() for p in module.parameters())

    pipe = teacher.pipe
    parts = [Part("teacher", numel(teacher.net), 0, storage_bytes(tensors(teacher.net)))]
    for role in roles.values():
        weights = list(role.weights.values())
        moments = [m for state in trainer.optimizers[role.name].state.values() for m in state.values()]
        parts.append(
            Part(
                role.name,
                numel(role.module),
                sum(w.numel() for w in weights),
                storage_bytes(weights),
                storage_bytes(weights),
                storage_bytes(m for m in moments if isinstance(m, Tensor)),
                storage_bytes((role.average or {}).values()),
            )
        )
    if getattr(pipe, "vae", None) is not None:
        parts.append(Part("vae", numel(pipe.vae), 0, storage_bytes(tensors(pipe.vae))))
    encoders = [getattr(pipe, name) for name in teacher.encoders if getattr(pipe, name, None) is not None]
    return parts, sum(storage_bytes(tensors(encoder)) for encoder in encoders)


def _turns(trainer: Trainer) -> list[Turn]:
    """Kinds of iterations, by the phases that are due in them, over the whole run."""
    kinds: Counter[tuple[str, ...]] = Counter()
    for iteration in range(trainer.config.steps):
        trainer.progress.iteration = iteration
        kinds[tuple(phase.name for phase in trainer.phases if phase.due(trainer.progress))] += 1
    return [Turn(phases, count) for phases, count in kinds.items() if phases]


def _run(trainer: Trainer, turn: Turn) -> Meter:
    count = trainer.config.accumulate
    with Meter() as meter:
        batches = [trainer.data.batch(0, i) for i in range(count)]
        try:
            for phase in trainer.phases:
                if phase.name in turn.phases:
                    trainer.turn(phase, batches)
        except DataDependentOutputException as error:
            raise FewstepError(
                f"plan: {trainer.method.name} decides by a value it computes ({error.func}), which a plan does not "
                "have; measure it instead: fewstep bench RECIPE"
            ) from error
    return meter


@torch.no_grad()
def _preview(teacher: Teacher, images: int) -> int:
    """Peak of decoding a grid of images, as many at a time as :meth:`Teacher.decode` takes."""
    vae = getattr(teacher.pipe, "vae", None)
    if vae is None:
        return 0
    with Meter() as meter:
        vae.decode(torch.empty(min(images, teacher._at_once()), *teacher.latent_shape), return_dict=False)
    return meter.peak


# ------------------------------------------------------------------------------------------------------ what would fit
REMEDIES: tuple[tuple[str, Callable[[Recipe], bool], Sequence[str]], ...] = (
    ("recomputation", lambda r: not r.teacher.gradient_checkpointing, ["--teacher.gradient_checkpointing=true"]),
    ("frozen weights in bf16", lambda r: r.teacher.dtype == "float32", ["--teacher.dtype=bfloat16"]),
    ("arithmetic in bf16", lambda r: r.teacher.autocast is None, ["--teacher.autocast=bfloat16"]),
    ("a LoRA critic", lambda r: _full(r, "critic"), ["--critic.kind=lora"]),
    ("a LoRA student", lambda r: _full(r, "student"), ["--student.kind=lora"]),
)  # fmt: skip


def _full(recipe: Recipe, name: str) -> bool:
    return any(
        n.startswith(name) and recipe.role(n).kind == "full"
        for n in recipe.method_class.networks_for(recipe.method)
    )


def remedy(made: Plan, gpu: str) -> str:
    """What would make a recipe fit that does not, found by planning it.

    Returns:
        One sentence with the options to add.
    """
    memory, recipe = GPUS[gpu].memory, made.recipe
    words: list[str] = []
    if best := made.largest_batch(memory):
        accumulate = -(-recipe.train.batch_size * recipe.train.accumulate // best)
        return f"--train.batch_size={best} --train.accumulate={accumulate} would fit"
    recipe = recipes.override(recipe, ["--train.batch_size=1"])
    words.append("--train.batch_size=1")
    for _, applies, change in REMEDIES:
        if applies(recipe):
            recipe = recipes.override(recipe, change)
            words += change
            if plan(recipe, made.processes).total() <= memory:
                return f"{' '.join(words)} would fit"
    larger = [name for name, d in GPUS.items() if d.memory > memory]
    return (
        f"even {' '.join(words)} would not; shard full weights over more devices (--processes 8 --train.shard=8), "
        f"lower teacher.resolution, or take {' or '.join(larger) or 'a larger card'}"
    )


def check_fits(made: Plan, gpu: str) -> None:
    """Raises FewstepError, with what would make it fit, for a recipe that is too large for a card."""
    memory = GPUS[gpu].memory
    if made.total() > memory:
        raise FewstepError(
            f"plan: {made.recipe.output}: {made.total() / 1e9:.1f} GB do not fit {gpu} ({memory / 1e9:.1f} GB); "
            + remedy(made, gpu)
        )
