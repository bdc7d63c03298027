"""Counting: every kind of iteration of a recipe, executed on tensors without storage."""

from __future__ import annotations

from collections import Counter
from collections.abc import Set
from dataclasses import replace

import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException

from .. import recipe as recipes
from ..data.prompts import shown_prompts
from ..diffusion.frozen import held_bytes, numel
from ..diffusion.kernels import ATTENTION
from ..errors import FewstepError, RecipeError
from ..methods.base import Method
from ..process import Process
from ..recipe import Recipe
from ..report.bar import Bar
from ..runs.build import build, on_pixels
from ..runs.checks import check_frozen
from ..runs.disk import cached, on_disk
from ..runs.shapes import shapes_of
from ..teachers.base import Teacher
from ..training.optimizers import bytes_8bit
from ..training.trainer import Trainer
from ..vision.perceptual import distance_of
from .blank import Blank
from .blocks import remember
from .meter import Meter, storage_bytes
from .shapes import VGG, Shapeless, Shapes, group, norms_as_on_a_gpu, products, quietly
from .skeleton import skeleton_teacher
from .table import Part, Plan, Turn


def plan(recipe: Recipe, processes: int = 1, quiet: bool = True) -> Plan:
    """Counts a recipe on one of ``processes`` devices.

    Every kind of iteration of the whole run is executed at the recipe's micro-batch, on tensors without storage, and
    at a second size where that tells something new: memory that another kind does not take as well, or a rollout of
    another length. With accumulation the micro-batch that is run is not the first, so gradients meet activations.
    Roles are the teacher's: what else they may start from has the same shapes, and need not be there yet.

    Raises:
        FewstepError: no configuration of the teacher can be read, or the method decides by values it computes.
        RecipeError: as when the recipe is run.
    """
    recipe = recipes.from_dict(recipes.to_dict(recipe))
    if recipe.teacher.autocast == "auto":  # every card has units for it
        recipe = replace(recipe, teacher=replace(recipe.teacher, autocast="bfloat16"))
    check_frozen(recipe, here=False)
    full, recipe = recipe, _plainly(_largest(recipe))
    size = recipe.train.batch_size
    if processes % recipe.train.shard:
        raise RecipeError(
            f"train.shard: {recipe.train.shard} does not divide the number of processes, {processes}"
        )
    with (
        quietly(),
        Shapeless(),
        products(recipe.train.tf32),
        norms_as_on_a_gpu(),
        group(processes, recipe.train.shard) as process,
    ):
        turns: list[Turn] = []
        rehearsal = None
        with Bar("counting the arithmetic", unit="turns", quiet=quiet) as bar:
            for batch_size, shapes in ((size, Shapes(last=True)), (size + 1, Shapes(last=False))):
                # Weights that were gathered once would not be counted again.
                if rehearsal is None or process.mesh is not None:
                    rehearsal = Rehearsal(recipe, process)
                turns = turns or _turns(rehearsal.trainer)
                for turn in turns:
                    bar.update()
                    if not turn.told:
                        rehearsal.count(turn, batch_size, shapes)
                for turn in turns:
                    turn.told &= any(
                        set(turn.phases) < set(o.phases) and turn.peak[size] <= o.peak[size] for o in turns
                    )
        teacher, shown = rehearsal.teacher, shown_prompts(recipe.samples.prompts, recipe.data.column)
        images = len(shown or ()) or recipe.samples.count
        preview = 0 if recipe.samples.vae else _preview(teacher, images)
        disk = on_disk(full, teacher)
        live = {name for name in ("prompts", "images") if not cached(full, disk, name)}
        parts = _parts(full, teacher, rehearsal.trainer, live)
        return Plan(full, processes, *parts, preview, turns, disk)


class Rehearsal:
    """The trainer of a recipe, built of tensors without storage.

    Attributes:
        micro: micro-batches of an iteration that are run, and stand for all of them.
        known: what is remembered of blocks that were run once, where weights are not sharded.
    """

    def __init__(self, recipe: Recipe, process: Process):
        self.recipe = recipe
        self.teacher = skeleton_teacher(recipe.teacher.path, **recipe.teacher.options())
        roles, method = build(recipe, self.teacher, process, read=False)
        _stand_in(method, recipe, self.teacher)
        # Shards gather gradients in one way within an iteration and in another at its end.
        self.micro = min(2, recipe.train.accumulate) if process.mesh is not None else 1
        train = replace(recipe.train, accumulate=self.micro)
        self.trainer = Trainer(method, roles, None, train, process=process, quiet=True)
        _fill_optimizers(self.trainer)
        self.known: dict = {}
        if process.mesh is None:
            for net in {self.teacher.net, *(role.module for role in roles.values())}:
                remember(net, self.known)

    def count(self, turn: Turn, batch_size: int, shapes: Shapes) -> None:
        """Memory and arithmetic of one iteration; the turn is told where no shape in it was one of several."""
        accumulate, needs = self.recipe.train.accumulate, self.recipe.method_class.needs(self.recipe.method)
        self.trainer.data = Blank(self.teacher, batch_size, needs, shapes.pair)
        shapes.chose = False
        meter, kept = _run(self.trainer, turn, accumulate, self.known)
        turn.peak[batch_size] = meter.peak + kept * (accumulate - self.micro)
        turn.flops[batch_size] = {k: v * accumulate / self.micro for k, v in meter.flops.items()}
        turn.told = not shapes.chose


def _largest(recipe: Recipe) -> Recipe:
    """A run of several shapes as one of the largest alone."""
    shapes = shapes_of(recipe)
    if not shapes:
        return recipe
    height, width = max(shapes, key=lambda shape: shape.area)
    teacher = replace(recipe.teacher, resolution=(height, width))
    return replace(recipe, data=replace(recipe.data, shapes=[]), teacher=teacher)


def _plainly(recipe: Recipe) -> Recipe:
    """With what can run on tensors without storage: torch's own attention and optimiser, nothing compiled or read.

    Fused attention of any kind keeps what torch's does, and compiled blocks at most as much as eager ones.
    """
    attention = recipe.teacher.attention
    attention = attention if attention in ATTENTION and attention != "auto" else "sdpa"
    names = (*recipe.method_class.networks_for(recipe.method), *recipe.method_class.extras)
    roles = {name: replace(recipe.role(name), optimizer="adamw") for name in names}
    teacher = replace(recipe.teacher, attention=attention, compile=False)
    return replace(recipe, teacher=teacher, roles=roles)


def _stand_in(method: Method, recipe: Recipe, teacher: Teacher) -> None:
    """For what a run loads or fits: what judges decoded images, of a reward only the decoder before it; a router, which
    gives one part all that it can get."""
    wanted = method.wants(recipe.method)
    if "distance" in wanted:
        method.distance = distance_of(recipe.method.regression, teacher, VGG())
    if "reward" in wanted:
        method.reward = lambda latents, _: teacher.decode_pixels(latents).mean((1, 2, 3))
    if hasattr(method, "router"):
        method.router = lambda cond: torch.zeros(len(cond), dtype=torch.long)


def _fill_optimizers(trainer: Trainer) -> None:
    """Moments come into being at the first step."""
    for role in trainer.roles.values():
        for weight in role.weights.values():
            weight.grad = torch.zeros_like(weight)
        trainer.optimizers[role.name].step()
        trainer.optimizers[role.name].zero_grad(set_to_none=True)


def _parts(recipe: Recipe, teacher: Teacher, trainer: Trainer, live: Set[str]) -> tuple[list[Part], int]:
    """What stays on the device through the run, and bytes that leave it once prompts are encoded.

    Args:
        live: what is encoded beside training, "prompts" or "images".
    """

    def size(module: nn.Module) -> int:
        return storage_bytes([*module.parameters(), *module.buffers()]) + held_bytes(module)

    pipe = teacher.pipe
    parts = [Part("teacher", numel(teacher.net), 0, size(teacher.net))]
    for name, role in trainer.roles.items():
        weights, config = list(role.weights.values()), recipe.role(name)
        moments = [m for state in trainer.optimizers[name].state.values() for m in state.values()]
        parts.append(
            Part(
                name,
                numel(role.module),
                sum(w.numel() for w in weights),
                storage_bytes([*weights, *(role.start or {}).values()]),
                storage_bytes(weights),
                bytes_8bit(weights) if config.optimizer == "adamw8bit" else storage_bytes(moments),
                0 if config.ema_device else storage_bytes((role.average or {}).values()),
            )
        )
    if (on_pixels(recipe) or "images" in live) and getattr(pipe, "vae", None) is not None:
        parts.append(Part("vae", numel(pipe.vae), 0, size(pipe.vae)))
    encoders = [getattr(pipe, name) for name in teacher.encoders if getattr(pipe, name, None) is not None]
    texts = sum(map(size, encoders))
    if "prompts" in live and not recipe.data.encoder_device:
        parts.append(Part("text encoders", sum(map(numel, encoders)), 0, texts))
    return parts, 0 if "prompts" in live else texts


def _turns(trainer: Trainer) -> list[Turn]:
    """Kinds of iterations, by the phases that are due in them, over the whole run."""
    kinds = Counter(_due(trainer, iteration) for iteration in range(trainer.config.steps))
    return [Turn(phases, count) for phases, count in kinds.items() if phases]


def _due(trainer: Trainer, iteration: int) -> tuple[str, ...]:
    """Names of the phases of an iteration, without those that copy once, which takes nothing."""
    progress = replace(trainer.progress, iteration=iteration)
    return tuple(p.name for p in trainer.phases if (p.loss or not p.once) and p.due(progress))


def _run(trainer: Trainer, turn: Turn, accumulate: int, known: dict) -> tuple[Meter, int]:
    """Counts one iteration. Beside the meter, bytes that each micro-batch keeps from its first to its last phase."""
    count = trainer.config.accumulate
    with Meter(known) as meter:
        batches = [trainer.data.batch(0, i) for i in range(count)]
        try:
            for phase in trainer.phases:
                if phase.name in turn.phases:
                    if accumulate > count and not phase.follows:
                        for weight in (
                            w for name in phase.train for w in trainer.roles[name].weights.values()
                        ):
                            weight.grad = torch.zeros_like(weight)
                    trainer.turn(phase, batches)
        except DataDependentOutputException as error:
            raise FewstepError(
                f"plan: {trainer.method.name} decides by a value it computes ({error.func}), which a plan does not "
                "have; measure it instead: fewstep bench RECIPE"
            ) from error
        left = meter.alive  # gathered weights too, which all micro-batches share
        batches.clear()
        return meter, (left - meter.alive) // count


@torch.no_grad()
def _preview(teacher: Teacher, images: int) -> int:
    """The VAE and its peak at decoding a grid of images, as many at a time as :meth:`Teacher.decode` takes."""
    vae = getattr(teacher.pipe, "vae", None)
    if vae is None:
        return 0
    with Meter() as meter:
        teacher.vae_decode(torch.empty(min(images, teacher._at_once()), *teacher.latent_shape))
    return storage_bytes(vae.parameters()) + meter.peak
