"""What lies in a pipeline's folder, looked at before a library does: each fault in one line that says what to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import FewstepError

SINGLE = (".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".gguf")
WEIGHTS = "*.safetensors"
WITHOUT_WEIGHTS = ("Scheduler", "Tokenizer", "Processor", "Extractor")
UNUSED = ("safety_checker", "feature_extractor", "image_encoder")  # parts that a distillation runs without
RESAVE = (
    'python -c "from diffusers import DiffusionPipeline as P; P.from_pretrained({folder!r}, {how})'
    ".save_pretrained('NEW')\""
)


def check_pipeline_folder(source: str) -> None:
    """Refuses a local path that holds no pipeline, before anything is loaded.

    Raises:
        FewstepError: with what would make one of it.
    """
    path = Path(source)
    if singles := _singles(path):
        raise FewstepError(
            f"teacher.path: {source} is {'a single file' if path.is_file() else 'a folder of single files'}; expected "
            "a folder written by save_pretrained. Make one of it: "
            f"StableDiffusionXLPipeline.from_single_file({str(singles[0])!r}).save_pretrained('NEW'), with the class "
            "of your model, then give NEW"
        )
    if path.exists() and not (path / "model_index.json").is_file():
        near = [p for p in (path.parent, *sorted(path.glob("*/"))) if (p / "model_index.json").is_file()]
        hint = f"; there is one in {near[0]}" if near else ""
        raise FewstepError(
            f"teacher.path: {source} is no diffusers pipeline (no model_index.json in it){hint}; give a folder written "
            "by save_pretrained, a hub id, or builtin:emoji-xl"
        )
    if not path.exists() and (path.is_absolute() or source.startswith((".", "~")) or source.count("/") != 1):
        raise FewstepError(
            f"teacher.path: {source} does not exist; give a folder written by save_pretrained, a hub id such as "
            "stabilityai/stable-diffusion-xl-base-1.0, or builtin:emoji-xl"
        )


def _singles(path: Path) -> list[Path]:
    """Weights of a whole model in one file, where there is nothing that says what they are."""
    if path.is_file():
        return [path] if path.suffix in SINGLE else []
    if any((path / name).exists() for name in ("model_index.json", "config.json", "fewstep.json")):
        return []
    return sorted(p for p in path.glob("*") if p.suffix in SINGLE)


def check_parts(source: str, folder: str | Path) -> None:
    """Refuses a folder without the files of a part that it lists, or with weights of another form.

    Args:
        source: what errors name. folder: where it lies; an id of the hub is not looked at.

    Raises:
        FewstepError: with the part and the remedy.
    """
    folder = Path(folder)
    index = _index(folder / "model_index.json")
    listed = {
        n: v for n, v in index.items() if isinstance(v, list) and len(v) == 2 and v[1] and n not in UNUSED
    }
    for name, (_, kind) in listed.items():
        place = folder / name
        if not place.is_dir() or not any(place.iterdir()):
            others = [
                n
                for n in listed
                if n != name and n.replace("tokenizer", "") == name.replace("text_encoder", "")
            ]
            null = " and ".join(f'"{n}": [null, null]' for n in (name, *others))
            optional = (
                f", or {null} in model_index.json to run without it" if name == "text_encoder_3" else ""
            )
            raise FewstepError(
                f"teacher.path: {source} lists {name} ({kind}), and the folder {place} is missing; put it there"
                f"{optional}"
            )
        if not any(word in str(kind) for word in WITHOUT_WEIGHTS):
            _check_weights(source, folder, name)


def _index(path: Path) -> dict[str, Any]:
    """What is no JSON, or none that is known, is left to the library to refuse."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _check_weights(source: str, folder: Path, name: str) -> None:
    """A part's own files of safetensors, not those of a variant (``model.fp16.safetensors``)."""
    files = [p.name for p in (folder / name).glob(WEIGHTS)]
    variants = {file.split(".")[1].split("-")[0] for file in files if file.count(".") > 1}
    if len(files) > sum(file.count(".") > 1 for file in files):
        return
    if variants:
        variant = min(variants)
        raise FewstepError(
            f"teacher.path: {source}: the weights of {name} are there as variant {variant} only; save it without: "
            + RESAVE.format(folder=str(folder), how=f"variant={variant!r}")
            + ", then give NEW"
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
