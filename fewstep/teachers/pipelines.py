"""Questions to a stock pipeline, whatever its class."""

from __future__ import annotations

import inspect
import logging
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

from ..errors import FewstepError
from ..shape import Shape, Size
from .schedulers import BY_STEPS, shifted


def network_of(pipe: Any) -> Any:
    """The denoiser of a stock pipeline."""
    return pipe.unet if getattr(pipe, "unet", None) is not None else pipe.transformer


def pixels_per_latent(pipe: Any) -> int:
    """Pixels along a side of one latent; 1 without an autoencoder."""
    vae = getattr(pipe, "vae", None)
    if vae is None:
        return 1
    factor: int = getattr(pipe, "vae_scale_factor", None) or 2 ** (len(vae.config.block_out_channels) - 1)
    return factor


ONE_SIZE = ("HiDreamImagePipeline",)  # whose call scales every size to the area of its network's
# Which the code of their calls says alone.
NATIVE = dict.fromkeys(("ZImagePipeline", "Krea2Pipeline", "QwenImage21Pipeline"), 1024)
# Pixels, of whose multiples an image is; others the calls round down, or refuse.
SIDES = {"QwenImage21Pipeline": 32, "SanaPipeline": 32}
UNPACKED = ("QwenImage21Pipeline",)  # whose network takes each latent as a token


def native_shape(pipe: Any) -> Shape:
    """What the stock pipeline makes by default."""
    if type(pipe).__name__ in NATIVE:
        return Shape.of(NATIVE[type(pipe).__name__])
    size: Any = getattr(pipe, "default_sample_size", None) or network_of(pipe).config.sample_size
    return Shape(*(side * pixels_per_latent(pipe) for side in Shape.of(size)))


def fix_shift(pipe: Any, size: Size | None = None) -> None:
    """Gives a scheduler whose shift depends on the size of the image the shift of this size, for good.

    The stock pipelines compute it anew in each call, from the number of tokens (Flux, SD3) and of steps (FLUX.2): then
    it is that of the steps of an ordinary call, and the scheduler keeps what it is of others.
    """
    config = pipe.scheduler.config
    if not config.get("use_dynamic_shifting"):
        return
    packed = 1 if class_of(pipe) in UNPACKED else getattr(pipe, "patch_size", 2)
    shape = native_shape(pipe) if size is None else Shape.of(size)
    tokens = shape.over(pixels_per_latent(pipe)).over(packed).area
    if class_of(pipe) == "Lumina2Pipeline":
        # Whose stock call takes the number of channels for that of tokens.
        tokens = network_of(pipe).config.in_channels
    elif class_of(pipe) == "HiDreamImagePipeline":
        tokens = network_of(pipe).max_seq
    shift = partial(_shift, class_of(pipe), dict(config), bool(pipe.config.get("is_distilled")), tokens)
    usual = inspect.signature(pipe.__call__).parameters["num_inference_steps"].default
    pipe.scheduler = shifted(pipe.scheduler, shift(usual))
    if shift(1) != shift(usual):
        setattr(pipe.scheduler, BY_STEPS, shift)


def _shift(name: str, config: dict[str, Any], distilled: bool, tokens: int, steps: int) -> float:
    """Of a stock call of a pipeline's class, with so many tokens of the image and steps."""
    if name in ("Flux2Pipeline", "Flux2KleinPipeline"):
        from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

        mu = compute_empirical_mu(tokens, steps)
    elif name == "Krea2Pipeline" and distilled:
        mu = 1.15
    elif name == "HiDreamImagePipeline":  # whatever the scheduler's configuration says
        mu = 0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256)
    else:
        low, high = config["base_image_seq_len"], config["max_image_seq_len"]
        mu = config["base_shift"] + (config["max_shift"] - config["base_shift"]) * (tokens - low) / (
            high - low
        )
    return mu if config.get("time_shift_type") == "linear" else math.exp(mu)


def takes(pipe: Any, argument: str) -> bool:
    """Whether the stock pipeline's call has this argument."""
    routed = getattr(pipe, "pipe", pipe)  # which hands on what it does not know
    return argument in inspect.signature(routed.__call__).parameters


def encoding(pipe: Any) -> dict[str, Any]:
    """What ``encode_prompt`` is told beside a prompt and a device: one image of it, unguided, and no other texts."""
    known = inspect.signature(pipe.encode_prompt).parameters
    unsaid = {
        n: None for n, p in known.items() if p.default is p.empty and n not in ("prompt", "device", "kwargs")
    }
    asked = {"num_images_per_prompt": 1, "do_classifier_free_guidance": False}
    return {**unsaid, **{name: value for name, value in asked.items() if name in known}}


def class_of(pipe: Any) -> str:
    """Name of a stock pipeline's class, a router's around it left aside."""
    return type(getattr(pipe, "pipe", pipe)).__name__


EDITING = ("QwenImageEditPlusPipeline",)  # whose call takes one prompt with its images
PROCESSED = (*EDITING, "QwenImage21Pipeline")  # whose texts a processor of images reads, all of a text
# Beside a longer text this one reads a text otherwise than alone.
SINGLY = (*EDITING, "QwenImage21Pipeline")
HANDS_SIGMAS = (
    *("FluxPipeline", "QwenImagePipeline", "QwenImageEditPlusPipeline", "ZImagePipeline"),
    *("ChromaPipeline", "Lumina2Pipeline"),
    *("Flux2Pipeline", "Flux2KleinPipeline", "Krea2Pipeline", "QwenImage21Pipeline"),
)

# To every scheduler but UniPC, whether it takes one or not, and no grid.
TELLS_SHIFT = ("HiDreamImagePipeline",)


def hands_sigmas(pipe: Any) -> bool:
    """Whether the stock pipeline hands its scheduler an even grid from 1 to 1 / K for K steps, instead of K alone."""
    return class_of(pipe) in HANDS_SIGMAS


class Guiding(NamedTuple):
    """How a stock call is told guidance ``u + g (c - u)``: the argument, what it is beside g, and the text of u."""

    argument: str = "guidance_scale"
    beside: float = 0.0
    negative: str | None = None  # that has to be given; others know it


GUIDING = {
    "QwenImagePipeline": Guiding("true_cfg_scale", negative=" "),  # as its model card calls it
    "QwenImageEditPlusPipeline": Guiding("true_cfg_scale", negative=" "),
    "QwenImage21Pipeline": Guiding("true_cfg_scale", negative=" "),
    "ZImagePipeline": Guiding(beside=-1.0),  # c + scale (c - u)
    "Krea2Pipeline": Guiding(beside=-1.0),
}


def guided(pipe: Any, scale: float, rows: int = 1) -> dict[str, Any]:
    """Arguments of the stock call of so many prompts for guidance g; 0 and 1 are none."""
    how = GUIDING.get(class_of(pipe), Guiding())
    if how.negative is not None and scale <= 1:
        return {how.argument: 1.0}
    told = {how.argument: max(scale + how.beside, 0.0) if how.beside else scale}
    return told if how.negative is None else {**told, "negative_prompt": [how.negative] * rows}


def own_guidance(pipe: Any) -> float:
    """g of the stock call by default, 1 where it has none."""
    how = GUIDING.get(class_of(pipe), Guiding())
    found = inspect.signature(pipe.__call__).parameters.get(how.argument)
    default: float = 1.0 if found is None else found.default
    return default - how.beside if how.beside else default


def check_size(pipe: Any, size: Size) -> None:
    """Refuses images of sides that the autoencoder's latents cannot have.

    Raises:
        FewstepError: what is expected.
    """
    if not takes(pipe, "height") or getattr(pipe, "vae", None) is None:
        return
    shape, native = Shape.of(size), native_shape(pipe)
    if class_of(pipe) in ONE_SIZE and shape != native:
        raise FewstepError(
            f"--size {shape.said}: a {class_of(pipe)} makes images of {native.said} pixels only"
        )
    # Stock pipelines ask for the 8.
    side = math.lcm(8, pixels_per_latent(pipe) * getattr(pipe, "patch_size", 1), SIDES.get(class_of(pipe), 1))
    if shape.height % side or shape.width % side:
        raise FewstepError(f"--size {shape.said}: expected a multiple of {side} pixels")


def size_options(pipe: Any, size: Size | None = None) -> dict[str, Any]:
    """Arguments of the stock pipeline's call for images of this size, by default its own."""
    if not takes(pipe, "height") or class_of(pipe) in ONE_SIZE:
        return {}
    shape = native_shape(pipe) if size is None else Shape.of(size)
    options: dict[str, Any] = {"height": shape.height, "width": shape.width}
    if takes(pipe, "use_resolution_binning"):
        options["use_resolution_binning"] = False  # it would round to a size of the published models
    return options


@contextmanager
def hushed() -> Iterator[None]:
    """Loading without the libraries' progress bars and advice; errors still come through."""
    import diffusers
    import transformers

    libraries = (diffusers.utils.logging, transformers.utils.logging)
    levels = [library.get_verbosity() for library in libraries]
    for library in libraries:
        library.set_verbosity_error()
        library.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for library, level in zip(libraries, levels):
            library.set_verbosity(level)
            library.enable_progress_bar()


@contextmanager
def heard(*libraries: str) -> Iterator[list[str]]:
    """What these libraries warn of meanwhile, instead of it being printed."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]  # of this one handler
    loggers = [logging.getLogger(name) for name in libraries]
    before = [(logger, logger.handlers, logger.level) for logger in loggers]
    for logger in loggers:
        logger.handlers = [handler]
        logger.setLevel(logging.WARNING)
    try:
        yield said
    finally:
        for logger, handlers, level in before:
            logger.handlers = handlers
            logger.setLevel(level)
