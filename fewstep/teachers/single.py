"""A whole model in one ``.safetensors`` file, as it is downloaded, and as tools of fine-tuning write it.

diffusers converts it (``from_single_file``) with the configurations and tokenizers of a pipeline of its class. Parts
that such a file often lacks (FLUX's text encoders and VAE) are those of that pipeline.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import FewstepError, in_line
from ..files import at_home
from .folders import RESAVE, check_pipeline_folder, listed_parts, may_lack, missing, null_parts, say
from .origin import Origin

CONFIGS = ("*.json", "*/*.json", "*/*.txt", "*/*.model")  # of a pipeline on the hub, all but its weights
# A part's own keys in such a file, by its name; of a T5, whatever its name.
KEYS = {
    "text_encoder": ("cond_stage_model.", "conditioner.embedders.0.", "text_encoders.clip_l."),
    "text_encoder_2": ("conditioner.embedders.1.", "text_encoders.clip_g."),
    "vae": ("first_stage_model.", "vae."),
}
T5_KEYS = ("text_encoders.t5xxl.",)
# diffusers takes what has no sign of another model for this one.
STABLE_DIFFUSION_1 = "model.diffusion_model.input_blocks.0.0.weight"


def header(file: Path) -> dict[str, Any]:
    """Key -> tensor on the meta device.

    Raises:
        FewstepError: a damaged file.
    """
    import torch
    from safetensors import safe_open

    try:
        with safe_open(file, "pt") as held:
            shapes = {key: held.get_slice(key).get_shape() for key in held.keys()}  # noqa: SIM118
    except Exception as error:  # the library's own kinds
        raise FewstepError(f"teacher.path: {file} is damaged: {in_line(error)}; fetch it again") from error
    return {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}


def publisher(keys: Mapping[str, Any], file: Path) -> str:
    """Hub id of the pipeline that such a file is of, by its keys.

    Raises:
        FewstepError: it is none that diffusers knows.
    """
    from diffusers.loaders.single_file_utils import fetch_diffusers_config, infer_diffusers_model_type

    known = infer_diffusers_model_type(keys) != "v1" or STABLE_DIFFUSION_1 in keys
    if not known:
        lora = any("lora" in key for key in keys)
        remedy = "a LoRA goes to teacher.loras, on a teacher.path" if lora else "give teacher.config"
        raise FewstepError(
            f"teacher.path: {file} is no whole model that is known, by keys such as {', '.join(list(keys)[:2])}; "
            f"expected Stable Diffusion, SDXL, SD3 or FLUX as their authors publish them; {remedy}"
        )
    return str(fetch_diffusers_config(keys)["pretrained_model_name_or_path"])


def config_of(origin: Origin) -> str:
    """Folder of the pipeline whose configurations and tokenizers go with a file: named, or of the hub's cache.

    Raises:
        FewstepError: none can be had.
    """
    if origin.config:
        named = at_home(origin.config)
        check_pipeline_folder(named, "teacher.config")
        return named if Path(named).is_dir() else _fetched(named, CONFIGS, f"teacher.config: {named}")
    file = Path(at_home(origin.path))
    name = publisher(header(file), file)
    return _fetched(name, CONFIGS, f"teacher.config: missing: {file} is of the kind of {name}")


def _fetched(name: str, patterns: tuple[str, ...], who: str) -> str:
    """Files of the hub; without a network those of its cache."""
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(name, allow_patterns=list(patterns))
        if not (Path(folder) / "model_index.json").is_file():
            raise FileNotFoundError("no model_index.json in it")
        return folder
    except Exception as error:  # the hub client raises a dozen kinds
        raise FewstepError(
            f"{who}, whose configurations are neither in the hub's cache nor within reach "
            f"({type(error).__name__}); give teacher.config the folder of a pipeline of that class: model_index.json, "
            "the config.json of each part, tokenizers; no weights but of parts that the file lacks"
        ) from error


@dataclass(frozen=True)
class Plan:
    """How a file becomes a pipeline.

    Attributes:
        folder: with the configurations. borrowed: parts that the file lacks, and the folder has -> class.
        without: parts that it runs without, to be named to its class.
    """

    folder: Path
    borrowed: dict[str, str]
    without: dict[str, None]


def plan_of(origin: Origin) -> Plan:
    """What is in the file, and what in the folder of its configuration.

    Raises:
        FewstepError: a part is in neither.
    """
    from diffusers import DiffusionPipeline

    folder, keys = Path(config_of(origin)), header(Path(at_home(origin.path)))
    index = DiffusionPipeline.load_config(folder)
    listed = listed_parts(index)
    lacking = {
        name: kind
        for name, kind in listed.items()
        if (own := T5_KEYS if kind.startswith("T5E") else KEYS.get(name))
        and not any(key.startswith(own) for key in keys)
    }
    nowhere = [name for name in lacking if not any((folder / name).glob("*.safetensors"))]
    nowhere += missing({name: kind for name, kind in listed.items() if "Tokenizer" in kind}, folder)
    optional = may_lack(nowhere)
    for name in nowhere:
        if name in optional:
            continue
        pickled = any((folder / name).glob("*.bin"))
        remedy = RESAVE.format(folder=str(folder), how="use_safetensors=False") if pickled else "put it there"
        raise FewstepError(
            f"teacher.config: {origin.config or folder}: {name} ({listed[name]}) is not in {origin.path}, and "
            f"{folder / name} has no {'safetensors files' if name in lacking else 'files'} of it; {remedy}"
        )
    borrowed = {name: kind for name, kind in lacking.items() if name not in optional}
    return Plan(folder, borrowed, {**null_parts(index, folder), **dict.fromkeys(optional)})


def recorded(origin: Origin) -> dict[str, Any]:
    """Of an export's ``fewstep.json``: what the teacher is made of, for its file the parts of others too."""
    if not origin.single:
        return origin.record()
    file = Path(at_home(origin.path))
    known = replace(origin, config=origin.config or publisher(header(file), file))
    borrowed = plan_of(known).borrowed
    return {**known.record(), **({"teacher_parts": borrowed} if borrowed else {})}


def check_single(origin: Origin, kind: str) -> Plan:
    """What can be known before anything is loaded.

    Raises:
        FewstepError: with the field and the remedy.
    """
    import diffusers

    if origin.variant:
        raise FewstepError(
            f"teacher.variant: {origin.variant}: is of the files of a folder, and {origin.path} is one; set it null"
        )
    if not hasattr(getattr(diffusers, kind, None), "from_single_file"):
        raise FewstepError(
            f"teacher.path: {origin.path}: diffusers reads no {kind} from a single file; give a folder written by "
            "save_pretrained"
        )
    return plan_of(origin)


def load_single(origin: Origin, kind: str, options: Mapping[str, Any]) -> Any:
    """The stock pipeline of a file.

    Args:
        kind: its class. options: of ``from_single_file``.

    Raises:
        FewstepError: as :func:`check_single`; or weights are missing in the file.
    """
    import diffusers
    import torch
    import transformers

    plan = check_single(origin, kind)
    parts: dict[str, Any] = {}
    for name, part in plan.borrowed.items():
        cls = getattr(diffusers, part, None) or getattr(transformers, part)
        dtype = options["torch_dtype"]
        parts[name] = cls.from_pretrained(
            plan.folder, subfolder=name, torch_dtype=dtype, use_safetensors=True
        )
    if plan.borrowed:
        say(f"teacher.path: {origin.path} holds no {', '.join(plan.borrowed)}: taken from {plan.folder}")
    try:
        pipe = getattr(diffusers, kind).from_single_file(
            at_home(origin.path),
            config=str(plan.folder),
            local_files_only=True,
            **{**plan.without, **parts, **options},
        )
        held = [part.state_dict() for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
        lost = any(value.is_meta for state in held for value in state.values())
    except NotImplementedError:  # what is still on the meta device cannot be moved
        lost = True
    if lost:
        raise FewstepError(
            f"teacher.path: {origin.path}: lacks weights of a {kind} of the size that {plan.folder} says; expected a "
            "whole one, and a teacher.config of its kind"
        )
    return pipe
