"""What a recipe trains, and what it trains on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..data.buckets import Part, Rows
from ..data.cache import encode_images, encode_prompts
from ..data.images import CaptionedImages
from ..data.live import Live, LiveImages
from ..data.pairs import check_pairs, load_pairs
from ..diffusion import kernels
from ..errors import RecipeError
from ..methods import Method
from ..methods.base import guidance_of
from ..process import Process
from ..recipe import Recipe
from ..teachers.base import Teacher
from ..training.roles import Role, build_role
from ..training.sharding import distribute
from ..vision.perceptual import distance_of
from ..vision.reward import load_reward, of_latents
from . import starts
from .checks import check_gain
from .shapes import parts_of, stream

# What methods want beside a teacher (:meth:`Method.wants`), of their options, the teacher and the prompts.
TOOLS: dict[str, Callable[[Any, Teacher, list[str]], Any]] = {
    "distance": lambda config, teacher, _prompts: distance_of(config.regression, teacher),
    "reward": lambda config, teacher, prompts: of_latents(
        load_reward(config.reward, str(teacher.device)), teacher, prompts
    ),
}


def build(
    recipe: Recipe, teacher: Teacher, process: Process, read: bool = True
) -> tuple[dict[str, Role], Method]:
    """Roles and method of a recipe; trained weights are sharded over the processes, if there are several.

    Args:
        read: what roles start from (``start_from``); without it they are the teacher's, for a checkpoint to fill
            them, or where nothing but their shapes matters.
    """
    cls, t = recipe.method_class, recipe.teacher
    kernels.set_attention(teacher.net, t.attention)
    if t.channels_last:
        kernels.use_channels_last(teacher.net)
    if t.gradient_checkpointing:
        kernels.checkpoint_blocks(teacher.net)
    roles: dict[str, Role] = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.train.seed)  # networks that are new in part start equal on every rank
        bases = {name: cls.network(recipe.method, teacher, name) for name in cls.networks_for(recipe.method)}
    for name, base in bases.items():
        if base is not teacher.net:
            kernels.set_attention(base, t.attention)
        try:
            roles[name] = build_role(name, base, recipe.role(name), recipe.train.seed)
        except RecipeError as error:
            raise RecipeError(f"roles.{error}") from None
        if t.channels_last:
            kernels.use_channels_last(roles[name].module)
    if t.compile:
        for net in [teacher.net, *(role.module for role in roles.values())]:
            kernels.compile_blocks(net)
    # Told the teacher's scale, a student starts as the teacher that users know, and not as the plain, weaker one.
    told = guidance_of(recipe.method)
    denoisers = {name: teacher.denoiser.with_net(role.module, told) for name, role in roles.items()}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.train.seed)  # heads start equal on every rank
        method = cls(recipe.method, teacher.denoiser, teacher.latent_shape, **denoisers)
    for name, module in method.heads().items():
        roles[name] = Role(name, module.to(process.device), recipe.role(name))
    check_gain(method, teacher)
    if read:
        starts.start(roles, recipe, teacher, process)
    for role in roles.values():
        distribute(role.module, process)
        role.collect()
    return roles, method


def encode(
    recipe: Recipe,
    teacher: Teacher,
    prompts: list[str],
    images: CaptionedImages | None,
    process: Process | None = None,
) -> dict[str, Rows]:
    """Everything a recipe trains on, as :class:`~batches.Batches` takes it; what is cached is not made again."""
    process, needs = process or Process(), recipe.method_class.needs(recipe.method)
    quiet = not process.main

    def conditions(texts: Sequence[str]) -> Rows:
        if recipe.data.cache_prompts is False:
            return Live(teacher, texts, quiet)
        return encode_prompts(teacher, texts, quiet=quiet, process=process)

    found: dict[str, Rows] = {"conditions": conditions(prompts)}
    if images is not None and "images" in needs:
        found["captions"] = found["conditions"] if images.captions == prompts else conditions(images.captions)
        for view, part in parts_of(recipe, teacher, images):
            live = recipe.data.cache_images is False
            rows = LiveImages(view, part) if live else encode_images(view, part, quiet=quiet, process=process)
            found |= {"latents": rows} if part.of is None else {stream(view.shape): Part(rows, part.of)}
    if "pairs" in needs:
        pairs = found["pairs"] = load_pairs(recipe.data.pairs)
        check_pairs(pairs, teacher, guidance_of(recipe.method), quiet)
        found["pair_conditions"] = conditions(pairs.prompts)
    return found


def on_pixels(recipe: Recipe) -> bool:
    """Whether a loss decodes, so that the VAE has to stay with the networks."""
    method = recipe.method
    return bool(getattr(method, "reward", None)) or getattr(method, "regression", "l2") != "l2"
