"""Captioned training images: a folder with ``metadata.jsonl`` or sidecar text files, or the built-in emoji."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from ..errors import RecipeError, why
from ..files import ReadError
from . import emoji
from .image_sets import EXTENSIONS, split, walk

MAX_PIXELS = 64_000_000  # a larger file is a mistake or a bomb


@dataclass(frozen=True)
class CaptionedImages:
    """Captions and their images; ``load(i, size)`` is uint8 (size, size, 3).

    With twice as many captions as files every file has two: i and ``i + len(files)``. ``passed_over`` says what else
    lay there.
    """

    captions: list[str]
    files: Sequence[Path] | np.ndarray
    passed_over: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.captions)

    def load(self, index: int, size: int) -> np.ndarray:
        """Centre crop to a square, then Lanczos to ``size``; transparent pixels become white."""
        item = self.files[index % len(self.files)]
        try:
            image = Image.fromarray(item) if isinstance(item, np.ndarray) else _open(item)
        except Exception as error:  # it was fine when the run began
            raise ReadError(
                f"data.images: {item}: {why(error) or error}; put it back, then go on with fewstep resume"
            ) from error
        return np.asarray(ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS))


def load_images(source: str) -> CaptionedImages:
    """Captioned images of a folder, or ``builtin:emoji``, where every image comes under both its captions.

    A folder's captions are in ``metadata.jsonl`` or in ``NAME.txt`` files.

    ``metadata.jsonl`` is the layout of Hugging Face image folders: ``{"file_name": ..., "text": ...}`` per line.
    Every file is checked before anything expensive starts.

    Raises:
        RecipeError: folder missing or empty, a caption missing, or corrupt files (up to ten are named).
    """
    if (captions := emoji.prompts(source)) is not None:
        return CaptionedImages(captions, emoji.load()[0])
    folder = Path(source).expanduser()
    if not folder.is_dir():
        raise RecipeError(f"data.images: {source} is no folder; expected captioned images, or builtin:emoji")
    found = split(walk(folder)[0])
    files = sorted(
        folder / name for name in found.names
    )  # captions go by name, so runs keep the order they had
    if not files:
        raise RecipeError(f"data.images: {source} holds no image; looked for {', '.join(EXTENSIONS)}")
    captions = _captions(folder, files)
    corrupt = [f"{f.name} ({reason})" for f in files if (reason := _fault(f))]
    if corrupt:
        more = f" and {len(corrupt) - 10} more" if len(corrupt) > 10 else ""
        raise RecipeError(
            f"data.images: {source}: {len(corrupt)} of {len(files)} files cannot be read: {', '.join(corrupt[:10])}"
            f"{more}; remove or replace them"
        )
    return CaptionedImages(captions, files, found.passed_over)


def _captions(folder: Path, files: Sequence[Path]) -> list[str]:
    table = folder / "metadata.jsonl"
    if table.is_file():
        try:
            rows = [
                json.loads(line) for line in table.read_text(encoding="utf-8").splitlines() if line.strip()
            ]
            by_name = {str(row["file_name"]): str(row["text"]) for row in rows}
        except (ValueError, KeyError, TypeError) as error:
            raise RecipeError(
                f'data.images: {table}: {error!r}; expected lines like {{"file_name": "a.png", "text": "a cat"}}'
            ) from error
        names = {f: f.relative_to(folder).as_posix() for f in files}
        missing = [n for n in names.values() if n not in by_name]
        captions = [by_name.get(n, "") for n in names.values()]
    else:
        sidecars = [f.with_suffix(".txt") for f in files]
        missing = [f.name for f, s in zip(files, sidecars) if not s.is_file()]
        captions = [s.read_text(encoding="utf-8").strip() if s.is_file() else "" for s in sidecars]
    if missing:
        raise RecipeError(
            f"data.images: {folder}: no caption for {len(missing)} of {len(files)} images, e.g. {missing[0]}; give "
            "metadata.jsonl or a .txt file beside each image"
        )
    return captions


def _fault(path: Path) -> str | None:
    try:
        with Image.open(path) as image:  # reads the header only
            if image.width * image.height > MAX_PIXELS:
                return f"{image.width}x{image.height} pixels, at most {MAX_PIXELS} in all"
            if image.mode == "F":
                return "pixels are floating-point numbers, not 8 or 16 bits"
        _open(path)
    except Exception as error:  # Pillow raises many kinds on hostile files
        return str(error).splitlines()[0][:80] or type(error).__name__
    return None


def _open(path: Path) -> Image.Image:
    with Image.open(path) as image:
        image = ImageOps.exif_transpose(image)
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        elif image.mode.startswith("I;16") or image.mode == "I":
            image = Image.fromarray((np.asarray(image) / 257).clip(0, 255).astype(np.uint8))
        return image.convert("RGB")
