"""Finding and loading a teacher: built-in, a folder, or of the hub."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..diffusion import frozen, kernels
from ..errors import FewstepError, in_line
from ..extensions import plugins
from ..files import at_home
from ..shape import Size
from .base import Teacher
from .fingerprint import of_network
from .folders import absent_parts, check_index, check_parts, check_pipeline_folder
from .origin import Origin, check_loras, merge_loras
from .pipelines import PROCESSED, heard, hushed
from .single import check_single, config_of, load_single

if TYPE_CHECKING:
    import torch


ASSETS = Path(__file__).parent.parent / "assets"
BUILTIN = {f"builtin:{name}": ASSETS / name for name in ("emoji-xl", "emoji-flow", "emoji-ar", "emoji-edm")}
VARIABLE = "FEWSTEP_TEACHERS"
REGISTERED: dict[str, type[Teacher]] = {}
MODULAR = "modular_model_index.json"
# Classes that no adapter could make a student of whose stock call is what was trained, and why.
REFUSED = {
    "Ideogram4Pipeline": "its call runs a second network for the unconditional branch at every step, whatever the "
    "guidance, and makes a schedule of its own that no scheduler's file and no argument replaces",
}


def register(cls: type[Teacher]) -> type[Teacher]:
    """Decorator: an adapter of your own for a pipeline class, named in its ``pipeline_class``."""
    REGISTERED[cls.pipeline_class] = cls
    return cls


def adapters() -> dict[str, type[Teacher]]:
    """Pipeline class -> adapter."""
    from .ar import PIPELINES, Autoregressive
    from .chroma import Chroma
    from .classes import DDPM, DiT
    from .edm.teacher import EDM
    from .flux import Flux
    from .flux2 import Flux2, Flux2Klein
    from .hidream import HiDream
    from .krea2 import Krea2
    from .lumina2 import Lumina2
    from .qwen_image import QwenImage
    from .qwen_image21 import QwenImage21
    from .qwen_image_edit import QwenImageEdit
    from .sd import StableDiffusion, StableDiffusionXL
    from .transformers import PixArtAlpha, PixArtSigma, Sana, StableDiffusion3
    from .z_image import ZImage

    known = (
        *(StableDiffusion, StableDiffusionXL, StableDiffusion3, Flux, Sana, PixArtAlpha, PixArtSigma),
        *(
            QwenImage,
            QwenImageEdit,
            QwenImage21,
            ZImage,
            Flux2,
            Flux2Klein,
            Krea2,
            Chroma,
            Lumina2,
            HiDream,
            DiT,
            DDPM,
            EDM,
        ),
    )
    stock = {cls.pipeline_class: cls for cls in known}
    return {
        **stock,
        "DDIMPipeline": DDPM,
        **dict.fromkeys(PIPELINES, Autoregressive),
        **REGISTERED,
    }


def pipeline_type(name: str):
    """The class of a pipeline: one of ours or of diffusers by name, or its loader, which finds the class itself."""
    import diffusers

    from .ar import PIPELINES
    from .edm.pipeline import EDMPipeline

    if name in (
        *PROCESSED,
        "Flux2Pipeline",
    ):  # diffusers takes stand-ins' only from a module that is imported
        from . import processor  # noqa: F401
    # DDIMPipeline makes DDIM's of any scheduler, and holds the same parts.
    own = {"DDIMPipeline": diffusers.DDPMPipeline, "EDMPipeline": EDMPipeline, **PIPELINES}
    # The loader would not take null for a part that its class can do without.
    return own.get(name) or getattr(diffusers, name, diffusers.DiffusionPipeline)


def resolve(source: str) -> str:
    """The folder of a built-in teacher, or the path of a folder or file, or hub id, as given.

    Raises:
        FewstepError: unknown built-in or one that is not installed, or a local path that is no pipeline.
    """
    if source.startswith("builtin:"):
        if source not in BUILTIN:
            raise FewstepError(f"teacher.path: {source!r} is unknown; built in: {', '.join(BUILTIN)}")
        _check_transformers(source)
        return str(_builtin(source))
    source = at_home(source)
    check_pipeline_folder(source)
    return source


def _builtin(source: str) -> Path:
    """Folder of a built-in teacher; those that a wheel leaves out are looked for in ``$FEWSTEP_TEACHERS``."""
    shipped, elsewhere = BUILTIN[source], os.environ.get(VARIABLE)
    folder = Path(elsewhere, shipped.name) if elsewhere and not shipped.is_dir() else shipped
    if not (folder / "model_index.json").is_file():
        raise FewstepError(
            f"teacher.path: {source} is not in {folder.parent}; expected it in a checkout of fewstep, for a wheel has "
            f"{next(iter(BUILTIN))} only: set {VARIABLE} to the checkout's fewstep/assets, or pip install -e it"
        )
    return folder


def _check_transformers(source: str) -> None:
    """The text encoder of the flow sees few tokens in each of its layers, which older libraries cannot do."""
    from importlib.metadata import version

    have = version("transformers")
    if source == "builtin:emoji-flow" and int(have.split(".")[0]) < 5:
        raise FewstepError(
            f"teacher.path: {source} needs transformers 5, this is {have}: pip install -U transformers"
        )


def _class_name(origin: Origin) -> str:
    from diffusers import DiffusionPipeline

    place = config_of(origin) if origin.single else resolve(origin.path)
    try:
        return str(DiffusionPipeline.load_config(place)["_class_name"])
    except Exception as error:  # the hub client raises a dozen kinds
        _check_modular(origin.path, place)
        raise FewstepError(
            f"teacher.path: cannot read the pipeline {origin.path}: {in_line(error)}"
        ) from error


def _check_modular(source: str, place: str) -> None:
    """Refuses a modular pipeline (FLUX.3) by its name; nothing where it is none.

    Raises:
        FewstepError: with the reason.
    """
    from huggingface_hub import hf_hub_download

    file = Path(place, MODULAR)
    name = ""
    with suppress(Exception):  # no such file there, or no hub
        file = file if Path(place).exists() else Path(hf_hub_download(place, MODULAR))
        name = json.loads(file.read_text())["_class_name"]
    if name:
        raise FewstepError(
            f"teacher.path: {source} is a modular pipeline ({name}): its folder chooses the blocks that guide and "
            "step, so that there is no one stock call to hold a student to; expected a pipeline with model_index.json, "
            f"of {', '.join(adapters())}"
        )


def pipeline_class_of(source: str | Origin) -> str:
    """Class of a pipeline without loading its weights; one clear error if fewstep has no adapter for it."""
    origin = _origin(source)
    name = _class_name(origin)
    if name not in adapters():
        plugins()
    if name in REFUSED and name not in adapters():
        raise FewstepError(f"teacher.path: {origin.path} is an {name}, which is no teacher: {REFUSED[name]}")
    if name not in adapters():
        raise FewstepError(
            f"teacher.path: {origin.path} is a {name}; fewstep has adapters for {', '.join(adapters())}. If it only "
            "wraps the parts of one of these, save them as that class (its from_pipe, then save_pretrained). Else "
            "subclass fewstep.teachers.base.Teacher (encode, call) under @fewstep.teachers.register in your recipe, as "
            "in fewstep/teachers/sd.py"
        )
    check_versions(origin.path, name)
    return name


def check_versions(source: str, name: str) -> None:
    """Refuses a pipeline of a class that an installed library is too old for."""
    from importlib.metadata import version

    from packaging.version import Version

    for library, oldest in adapters()[name].needs.items():
        if Version(version(library)) < Version(oldest):
            raise FewstepError(
                f"teacher.path: {source} is a {name}, for which {library} {version(library)} is too old; expected "
                f"{oldest} or newer: pip install -U {library}"
            )


def check_origin(origin: Origin) -> None:
    """What can be known before anything is loaded: every part's files are there, and LoRAs that its class reads.

    Raises:
        FewstepError: with the field and the remedy.
    """
    name = _class_name(origin)
    if origin.single:
        check_single(origin, name)
    else:
        _check_config(origin)
        check_parts(origin.path, resolve(origin.path), origin.variant)
    check_loras(origin.loras, name)


@contextmanager
def nothing_made_up(source: str) -> Iterator[None]:
    """Refuses a pipeline whose files lack weights: the libraries put random numbers in their place, and only warn.

    Raises:
        FewstepError: with what the library says.
    """
    with heard("diffusers", "transformers") as said:
        yield
    made_up = [text for text in said if "newly initialized" in text]
    if made_up:
        text = " ".join(re.sub(r"\x1b\[[\d;]*m", "", made_up[0]).split())
        raise FewstepError(
            f"teacher.path: {source}: weights are missing in its files, or have names that this version of a library "
            f"does not know: {text[:400]}. Put the whole pipeline there, or upgrade to the version that saved it"
        )


def load_pipeline(source: str | Origin, dtype: str = "float32"):
    """The stock pipeline of a path, hub id or built-in name, of any class; weights from safetensors only.

    Args:
        source: of an :class:`Origin` the file or variant that it names too, with its LoRAs merged.

    Raises:
        FewstepError: no pipeline there, one that cannot be loaded, or a LoRA that does not fit.
    """
    import torch

    origin = _origin(source)
    name = _class_name(origin)
    check_loras(origin.loras, name)
    usual: dict[str, dict[str, Any]] = {
        # A safety checker is no part of distillation, and most folders lack it.
        "StableDiffusionPipeline": {"safety_checker": None, "requires_safety_checker": False},
        "StableDiffusionXLPipeline": {"add_watermarker": False},
    }
    options: dict[str, Any] = {**usual.get(name, {}), "torch_dtype": getattr(torch, dtype)}
    try:
        with hushed(), nothing_made_up(origin.path):
            pipe = (load_single if origin.single else _load_folder)(origin, name, options)
            merge_loras(pipe, origin.loras)
    except FewstepError:
        raise
    except Exception as error:  # a file missing or damaged: each loader raises its own kinds
        raise FewstepError(
            f"teacher.path: cannot load the pipeline {origin.path}: {in_line(error)}"
        ) from error
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _check_config(origin: Origin) -> None:
    """Refuses configurations beside a folder, which has its own and would not look at them."""
    if origin.config and os.path.isdir(resolve(origin.path)):
        raise FewstepError(
            f"teacher.config: {origin.config}: {origin.path} is a folder, with configurations of its own; leave it out"
        )


def _load_folder(origin: Origin, name: str, options: dict[str, Any]):
    from diffusers import DiffusionPipeline

    place = resolve(origin.path)
    _check_config(origin)
    check_parts(origin.path, place, origin.variant)
    index = DiffusionPipeline.load_config(place)
    check_index(origin.path, index)
    absent = absent_parts(origin.path, index, Path(place))
    if origin.variant:
        options = {**options, "variant": origin.variant}
    return pipeline_type(name).from_pretrained(place, use_safetensors=True, **{**absent, **options})


def _origin(source: str | Origin) -> Origin:
    return source if isinstance(source, Origin) else Origin(source)


def load_teacher(
    source: str,
    *,
    dtype: str = "float32",
    quantization: str | None = None,
    offload: bool = False,
    resolution: Size | None = None,
    autocast: str | None = None,
    attention: str = "auto",
    device: torch.device | str = "cpu",
    encoder_device: str | None = None,
    **weights: Any,
) -> Teacher:
    """A pipeline folder, hub id, file or ``builtin:`` name as a teacher.

    Args:
        source: what ``DiffusionPipeline.from_pretrained`` takes, a ``.safetensors`` file, or ``builtin:emoji-xl``.
        dtype: of the frozen weights, "float32" or "bfloat16"; the VAE stays in float32.
        quantization, offload: how those of the network's blocks are kept, see :func:`fewstep.diffusion.frozen.keep`.
        resolution: pixels of a square's side, or height and width; default the pipeline's own.
        autocast: dtype of the networks' arithmetic, "auto" or None.
        attention: kernel, see :class:`~fewstep.recipe.TeacherConfig`. device: where it will be, for which ``auto`` is
            decided. encoder_device: of the text encoders, by default with the rest.
        weights: variant, config and loras, see :class:`~fewstep.recipe.TeacherConfig`.

    Raises:
        FewstepError: no pipeline there, or no adapter for its class.
    """
    import torch

    origin = Origin.of(source, **weights)
    cls = adapters()[pipeline_class_of(origin)]
    pipe = load_pipeline(origin, dtype)
    autoencoder = getattr(pipe, cls.autoencoder or "", None)
    if autoencoder is not None:
        with hushed():
            autoencoder.to(torch.float32)
    teacher = with_arithmetic(partial(cls, pipe, source, resolution), autocast, attention, device)
    teacher.origin = origin
    if quantization:
        teacher.net.known_as = of_network(teacher.net)  # whatever is made of it is of these weights
    frozen.keep(teacher.net, quantization, offload)
    if not encoder_device:
        return teacher.to(device)
    held = {name: getattr(pipe, name) for name in teacher.encoders}
    for name in held:
        setattr(pipe, name, None)  # they never come to the device
    teacher.to(device)
    for name, encoder in held.items():
        setattr(pipe, name, encoder.to(encoder_device))
    return teacher


def with_arithmetic(
    build: Callable[[torch.dtype | None, str], Teacher],
    autocast: str | None,
    attention: str,
    device: torch.device | str,
) -> Teacher:
    """A teacher whose ``auto`` is decided for the device where it will be."""
    import torch

    autocast = kernels.autocast_for(autocast, device)
    teacher = build(getattr(torch, autocast) if autocast else None, attention)
    teacher.denoiser.attention = kernels.attention_for(attention, device, autocast, teacher.positions)
    return teacher
