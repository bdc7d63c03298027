"""Image files that a user gives, as RGB: one rule for real images and for those that are edited."""

from __future__ import annotations

import io
import struct
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image, ImageOps

MAX_PIXELS = 64_000_000  # a larger file is a mistake or a bomb
ORIENTATION = 0x0112  # of EXIF; from 5 on width and height are swapped


def fault(path: Path | IO[bytes]) -> str | None:
    """Why it cannot be read, in a few words; None where it can."""
    try:
        with Image.open(path) as image:  # reads the header only
            if image.width * image.height > MAX_PIXELS:
                return f"{image.width}x{image.height} pixels, at most {MAX_PIXELS} in all"
            if image.mode == "F":
                return "pixels are floating-point numbers, not 8 or 16 bits"
        read_picture(path)
    except Exception as error:  # Pillow raises many kinds on hostile files
        return str(error).splitlines()[0][:80] or type(error).__name__
    return None


def size_of(path: Path | IO[bytes]) -> tuple[int, int]:
    """(width, height) as :func:`read_picture` gives it, by the file's header alone."""
    with Image.open(path) as image:
        # Of a PNG whose header says nothing Pillow decodes all, for what may be told behind the pixels.
        undecoded = image.format == "PNG" and not ("exif" in image.info or _told_behind(image.fp))
        exif = Image.Image.getexif(image) if undecoded else image.getexif()
        return (image.height, image.width) if exif.get(ORIENTATION, 1) >= 5 else image.size


def _told_behind(file: Any) -> bool:
    """Whether anything but pixels follows the first pixels of a PNG, by the names of its chunks; the file stays where
    it is. One that is cut short tells nothing."""
    here, behind = file.tell(), False
    file.seek(8)
    try:
        while len(head := file.read(8)) == 8:
            length, name = struct.unpack(">I4s", head)
            if behind and name not in (b"IDAT", b"IEND"):
                return True
            behind |= name == b"IDAT"
            file.seek(length + 4, io.SEEK_CUR)
    finally:
        file.seek(here)
    return False


def read_picture(path: Path | IO[bytes]) -> Image.Image:
    """Upright RGB; transparent pixels become white, 16 bits become 8."""
    with Image.open(path) as image:
        image = ImageOps.exif_transpose(image)
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        elif image.mode.startswith("I;16") or image.mode == "I":
            image = Image.fromarray((np.asarray(image) / 257).clip(0, 255).astype(np.uint8))
        return image.convert("RGB")
