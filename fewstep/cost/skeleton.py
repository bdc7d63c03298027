"""A pipeline without weights: its configurations alone, for counting what a recipe takes before anything is loaded."""

from __future__ import annotations

from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from ..diffusion import frozen
from ..errors import FewstepError
from ..files import at_home
from ..shape import Size
from ..teachers import adapters, pipeline_class_of, resolve
from ..teachers.base import Teacher
from ..teachers.load import ASSETS, pipeline_type, with_arithmetic
from ..teachers.origin import Origin
from ..teachers.pipelines import hushed
from ..teachers.processor import Wordless
from ..teachers.single import header, publisher
from ..tokens.pipeline import AutoregressivePipeline

PUBLISHED = ASSETS / "published"  # configurations of published models, so that planning needs no network


def configs_of(source: str, config: str | None = None) -> str:
    """Where the configurations of a teacher are: shipped with fewstep, a folder, or the hub; of a single file those of
    its first publisher, unless ``config`` names others."""
    if Origin(source).single:
        file = Path(at_home(source))
        source = at_home(config) if config else publisher(header(file), file)
    shipped = PUBLISHED / source.replace("/", "--")
    return str(shipped) if not Path(source).exists() and shipped.is_dir() else resolve(source)


def skeleton_pipeline(source: str, network: str, dtype: torch.dtype, config: str | None = None):
    """The stock pipeline with the network in ``dtype``, the VAE in fp32, text encoders on the meta device, and no
    tokenizers.

    Under the planner's mode network and VAE take no storage.

    Raises:
        FewstepError: no configuration can be read, e.g. because the hub is out of reach.
    """
    import diffusers
    import transformers

    path = configs_of(source, config)
    components: dict[str, Any] = {}
    try:
        with hushed():
            index = AutoregressivePipeline.load_config(path)  # as diffusers', and older folders too
            parts = {
                k: v for k, v in index.items() if isinstance(v, list) and v and not isinstance(v[0], int)
            }
            for name, (library, class_name) in parts.items():
                cls = _class(library, class_name)
                components[name] = Wordless() if name == "processor" else None
                if name == "scheduler":
                    components[name] = cls.from_config(cls.load_config(path, subfolder=name))
                elif cls is not None and issubclass(cls, diffusers.ModelMixin):
                    config = cls.load_config(path, subfolder=name)
                    components[name] = _built(cls.from_config, config, dtype if name == network else None)
                elif cls is not None and issubclass(cls, transformers.PreTrainedModel):
                    config = cls.config_class.from_pretrained(path, subfolder=name)
                    with torch.device("meta"):
                        components[name] = _built(cls, config, dtype)
            options = {k: v for k, v in index.items() if k not in parts and not k.startswith("_")}
            name = index["_class_name"]
            return pipeline_type(name)(**components, **options)
    except (OSError, ValueError, AttributeError) as error:
        raise FewstepError(f"teacher.path: cannot read the configurations of {source}: {error}") from error


def _class(library: str | None, name: str | None) -> Any:
    """Of a component: of ours, of diffusers, or of transformers, as which a pipeline's own modules count."""
    ours = (library or "").startswith("fewstep.")
    module = import_module(library if ours or library == "diffusers" else "transformers")
    return getattr(module, name or "", None)


def _built(build, config, dtype: torch.dtype | None):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype or torch.float32)
    try:
        return build(config)
    finally:
        torch.set_default_dtype(before)


def skeleton_teacher(
    source: str,
    *,
    dtype: str = "float32",
    quantization: str | None = None,
    offload: bool = False,
    resolution: Size | None = None,
    autocast: str | None = None,
    attention: str = "auto",
    device: torch.device | str = "cpu",
    config: str | None = None,
    **_weights: Any,
) -> Teacher:
    """A teacher that knows every shape and no number; arguments as of :func:`~fewstep.teachers.load_teacher`."""
    cls = adapters()[pipeline_class_of(configs_of(source, config))]
    pipe = skeleton_pipeline(source, cls.network, getattr(torch, dtype), config)
    methods: dict[str, Any] = {"encode": lambda self, prompts: self.blank(len(prompts))}
    if cls.encoders:  # others know it without
        methods["null"] = lambda self: self.blank(1)
    blank = type(cls.__name__, (cls,), methods)
    teacher = with_arithmetic(partial(blank, pipe, source, resolution), autocast, attention, device)
    frozen.keep(teacher.net, quantization, offload)
    return teacher
