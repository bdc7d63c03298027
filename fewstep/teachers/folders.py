"""What lies in a pipeline's folder, looked at before a library does: each fault in one line that says what to do."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from ..errors import FewstepError
from .origin import to_safetensors

PICKLED = (".ckpt", ".pt", ".pth", ".bin")
SINGLE = (".safetensors", ".gguf", *PICKLED)
WEIGHTS = "*.safetensors"
WITHOUT_WEIGHTS = ("Scheduler", "Tokenizer", "Processor", "Extractor")
UNUSED = ("safety_checker", "feature_extractor", "image_encoder")  # parts that a distillation runs without
OPTIONAL = {
    "text_encoder_3": "tokenizer_3"
}  # encoders without which a pipeline runs as well, and what goes with them
APART = {
    "HiDreamImagePipeline": (("text_encoder_4", "tokenizer_4"), "Llama 3.1 8B Instruct")
}  # parts that a class needs and its publishers leave out, and what they are
# Processors of texts and images, which take films too.
NEED_TORCHVISION = ("Qwen2VLProcessor", "Qwen3VLProcessor", "PixtralProcessor")
RESAVE = (
    'python -c "from diffusers import DiffusionPipeline as P; P.from_pretrained({folder!r}, {how})'
    ".save_pretrained('NEW')\""
)


def check_pipeline_folder(source: str, field: str = "teacher.path") -> None:
    """Refuses a local path that holds no pipeline, before anything is loaded; a ``.safetensors`` file may be one.

    Raises:
        FewstepError: with what would make one of it.
    """
    path = Path(source)
    if path.is_file() and path.suffix == ".safetensors" and field == "teacher.path":
        return
    if singles := _singles(path):
        raise FewstepError(f"{field}: {source} {_not_this(path, singles[0])}")
    if (path / "modular_model_index.json").is_file():
        return  # which is refused by its class
    if path.exists() and not (path / "model_index.json").is_file():
        near = [p for p in (path.parent, *sorted(path.glob("*/"))) if (p / "model_index.json").is_file()]
        hint = f"; there is one in {near[0]}" if near else ""
        raise FewstepError(
            f"{field}: {source} is no diffusers pipeline (no model_index.json in it){hint}; give a folder written "
            "by save_pretrained, a hub id, or builtin:emoji-xl"
        )
    if not path.exists() and (path.is_absolute() or source.startswith((".", "~")) or source.count("/") != 1):
        raise FewstepError(
            f"{field}: {source} does not exist; give a folder written by save_pretrained, a hub id such as "
            "stabilityai/stable-diffusion-xl-base-1.0, or builtin:emoji-xl"
        )


def _not_this(path: Path, single: Path) -> str:
    """What is wrong with a file, or with a folder that holds such files only, and what would do."""
    if path.is_dir():
        if single.suffix == ".safetensors":
            return f"is a folder of single files; name the file: {single}"
        return f"is a folder of single files; {single.name} {_not_this(single, single)}"
    if single.suffix in PICKLED:
        return (
            "is a pickled file, which can run code as it is read; expected .safetensors. Make one of its tensors: "
            f"{to_safetensors(str(single))}"
        )
    return (
        f"is a {single.suffix} file, which is no pipeline or is quantised; expected a whole model as .safetensors, or "
        "a folder written by save_pretrained"
    )


def _singles(path: Path) -> list[Path]:
    """Weights of a whole model in one file, where there is nothing that says what they are."""
    if path.is_file():
        return [path] if path.suffix in SINGLE else []
    if any((path / name).exists() for name in ("model_index.json", "config.json", "fewstep.json")):
        return []
    return sorted(p for p in path.glob("*") if p.suffix in SINGLE)


def check_parts(source: str, folder: str | Path, variant: str | None = None) -> None:
    """Refuses a folder without the files of a part that it lists, or with weights of another form.

    Args:
        source: what errors name. folder: where it lies; an id of the hub is not looked at.
        variant: of its weights, where they have one; parts that have none are taken without, as diffusers does.

    Raises:
        FewstepError: with the part and the remedy.
    """
    folder = Path(folder)
    index = _index(folder / "model_index.json")
    check_index(source, index)
    listed = listed_parts(index)
    weighed = [name for name, kind in listed.items() if not any(word in kind for word in WITHOUT_WEIGHTS)]
    there = [found for name in weighed if (found := _variants(folder / name))]
    known = set().union(*there) - {""}
    if variant and listed and variant not in known:
        none = (
            ["null"] if all("" in found for found in there) else []
        )  # not where some part has variants alone
        raise FewstepError(
            f"teacher.variant: {variant}: no weights of {source} are of it; expected "
            f"{' or '.join([*sorted(known), *none])}"
        )
    lacking = missing(listed, folder)
    for name, kind in listed.items():
        if name in lacking and name not in may_lack(lacking):
            raise FewstepError(
                f"teacher.path: {source} lists {name} ({kind}), and the folder {folder / name} is missing; put it there"
            )
        if name in weighed and name not in lacking:
            _check_weights(source, folder, name, variant)


def check_index(source: str, index: Mapping[str, Any]) -> None:
    """Refuses what a ``model_index.json`` says that cannot be loaded here, or not be distilled.

    Args:
        index: one that could not be read is left to others.

    Raises:
        FewstepError: parts that are published elsewhere, with the command that puts them there; a processor of images
            and films without its library, which would say so in its own words; a call that walks a grid of its own
            whatever number of steps it is told (Qwen-Image-2.1).
    """
    from transformers.utils import is_torchvision_available

    name, listed = index.get("_class_name"), listed_parts(index)
    names, what = APART.get(str(name), ((), ""))
    if absent := [n for n in names if n not in listed]:
        given = ", ".join(f"{n}=..." for n in names)
        raise FewstepError(
            f"teacher.path: {source}: a {name} without {' and '.join(absent)}, which are {what} and published apart: "
            f"{name}.from_pretrained({source!r}, {given}).save_pretrained('NEW'), then give NEW"
        )
    kind = next((kind for kind in listed.values() if kind in NEED_TORCHVISION), None)
    if kind and not is_torchvision_available():
        raise FewstepError(
            f"teacher.path: {source}: its processor of images, a {kind}, needs torchvision: pip install torchvision"
        )
    if index.get("sample_sigmas"):
        raise FewstepError(
            f"teacher.path: {source}: its model_index.json has sample_sigmas, a grid of {len(index['sample_sigmas'])} "
            "steps that its call walks whatever number it is told, with a student's LoRA too; expected null there"
        )


def listed_parts(index: Mapping[str, Any]) -> dict[str, str]:
    """Part -> class, of a ``model_index.json``, without what a distillation does not use."""
    pairs = {n: v for n, v in index.items() if isinstance(v, (list, tuple)) and len(v) == 2}
    return {n: str(v[1]) for n, v in pairs.items() if v[1] and n not in UNUSED}


def missing(parts: Iterable[str], folder: Path) -> list[str]:
    """Parts of which a folder has no file; of the hub, where nothing is looked at, none."""
    there = folder.is_dir()
    return [n for n in parts if there and not ((folder / n).is_dir() and any((folder / n).iterdir()))]


def may_lack(missing: list[str]) -> list[str]:
    """Those of the missing parts without which the pipeline runs: a third encoder, and its tokenizer with it."""
    encoders = [name for name in OPTIONAL if name in missing]
    return [*encoders, *(OPTIONAL[name] for name in encoders if OPTIONAL[name] in missing)]


def null_parts(index: Mapping[str, Any], folder: Path) -> dict[str, None]:
    """Parts that a pipeline was saved without, and those that are listed, of no use here, and not there.

    Its class may want them named all the same when it is loaded.
    """
    pairs = {n: list(v) for n, v in index.items() if isinstance(v, (list, tuple)) and len(v) == 2}
    null = [name for name, value in pairs.items() if value == [None, None]]
    unused = [name for name, value in pairs.items() if name in UNUSED and value[1]]
    return dict.fromkeys([*null, *missing(unused, folder)])


def absent_parts(source: str, index: Mapping[str, Any], folder: Path) -> dict[str, None]:
    """Parts that a pipeline runs without: saved as null, or listed and not there, which is said.

    Args:
        index: its ``model_index.json``. folder: where its parts would be.
    """
    lacking = may_lack(missing(listed_parts(index), folder))
    if lacking:
        say(f"teacher.path: {source} lists {', '.join(lacking)}, and has no such folder: it runs without")
    return {**null_parts(index, folder), **dict.fromkeys(lacking)}


@cache
def say(text: str) -> None:
    """Once in a process, which may load a teacher several times."""
    print(f"fewstep: note: {text}", file=sys.stderr)


def _index(path: Path) -> dict[str, Any]:
    """What is no JSON, or none that is known, is left to the library to refuse."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _variants(place: Path) -> set[str]:
    """Of the safetensors files of a part: ``fp16`` for model.fp16.safetensors, "" for one without."""
    names = [path.name.split(".") for path in place.glob(WEIGHTS)]
    return {words[1].split("-")[0] if len(words) > 2 else "" for words in names}


def _check_weights(source: str, folder: Path, name: str, variant: str | None) -> None:
    """A part's files of safetensors, of this variant or of none."""
    there = _variants(folder / name)
    if there & {variant, ""}:
        return
    if there:
        only = min(there)
        raise FewstepError(
            f"teacher.path: {source}: the weights of {name} are there as variant {only} only; set "
            f"teacher.variant {only}"
        )
    if any((folder / name).glob("*.bin")):
        raise FewstepError(
            f"teacher.path: {source}: the weights of {name} are .bin files, which can run code as they are read; "
            "expected .safetensors. Where you trust them: "
            + RESAVE.format(folder=str(folder), how="use_safetensors=False")
            + ", then give NEW"
        )
    raise FewstepError(
        f"teacher.path: {source}: {name} has no weights ({WEIGHTS} in {folder / name}); put them there"
    )
