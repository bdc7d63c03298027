"""How an image file becomes pixels: as a viewer shows it, or as each public evaluator reads it.

On files with transparency, 16 bits or an EXIF orientation this decides a distance more than any training does. A
protocol names its reading, so that a number called after a tool is that tool's.
"""

import io
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
from PIL import Image, ImageOps

ORIENTATION = 0x0112  # in EXIF; 1 is upright
KINDS = {
    "alpha": "an alpha channel",
    "16-bit": "16-bit grey",
    "turned": "an EXIF orientation",
    "palette": "a palette",
    "cmyk": "CMYK colours",
    "1-bit": "1-bit black and white",
    "grey": "grey instead of RGB",
}


def as_shown(image: Image.Image) -> np.ndarray:
    """uint8 RGB (H, W, 3): upright as EXIF says, transparency over white, 16 bits scaled."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16-bit grayscale; Pillow's own conversion would clip it at 255
        grey = (np.asarray(image).astype(np.float64) / 257).round().clip(0, 255).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.array(image.convert("RGB"))


def as_rgb(image: Image.Image) -> np.ndarray:
    """uint8 RGB (H, W, 3) by `Image.convert`: alpha dropped, 16 bits clipped, EXIF ignored."""
    image.info.pop("transparency", None)  # dropped anyway, and Pillow would warn of it for each palette
    return np.array(image.convert("RGB"))


@dataclass(frozen=True)
class Reading:
    """One way to read files.

    Attributes:
        tool: whose, for messages.
        pixels: from an open image to uint8 RGB (H, W, 3).
        same: what tool and we alike do to a kind of file that a viewer would show otherwise.
        other: what the tool does to a kind of file where we read as `as_rgb`.
        one_size: what the tool does to images of unlike sizes, where it does not take them.
    """

    tool: str
    pixels: Callable[[Image.Image], np.ndarray]
    same: Mapping[str, str] = field(default_factory=dict)
    other: Mapping[str, str] = field(default_factory=dict)
    one_size: str = ""

    def remarks(
        self, name: str, kinds: Iterable[Iterable[str]], sizes: set[tuple[int, int]]
    ) -> Iterator[str]:
        """What one should know about reading these files in this way.

        Args:
            name: of the set. kinds: of each file, see `kinds_of`. sizes: that occur.
        """
        counts = Counter(kind for of_file in kinds for kind in of_file)
        for kind in (kind for kind in KINDS if counts[kind]):
            some = f"{counts[kind]} images of {name} have {KINDS[kind]}"
            if kind in self.same:
                yield f"{some}: {self.tool} {self.same[kind]}, and so it was read here"
            if kind in self.other:
                yield f"{some}: {self.tool} {self.other[kind]}, which was not done here; save 8-bit RGB"
        if self.one_size and len(sizes) > 1:
            yield f"{name} has images of {len(sizes)} sizes: {self.tool} {self.one_size}"


PILLOW = {
    "alpha": "drops it and sees the colours beneath",
    "16-bit": "clips it at 255",
    "turned": "does not turn them",
}
ARRAYS = {
    "alpha": "refuses it",
    "16-bit": "refuses it",
    "palette": "takes its indices for grey",
    "cmyk": "refuses it",
    "1-bit": "refuses it",
}
UNTURNED = {"turned": PILLOW["turned"]}
BY_ONE = "takes them with a batch size of 1 only"
SHOWN = "shown"
READINGS = {
    SHOWN: Reading("a viewer", as_shown),
    "clean-fid": Reading("clean-fid", as_rgb, PILLOW),
    "pytorch-fid": Reading("pytorch-fid", as_rgb, PILLOW, one_size=BY_ONE),
    "torch-fidelity": Reading("torch-fidelity", as_rgb, PILLOW, one_size=BY_ONE),
    "edm": Reading("EDM's fid.py", as_rgb, UNTURNED, ARRAYS, "refuses them"),
    "adm": Reading(
        "ADM's evaluator takes an npz, and the script that packs it for DiT",
        as_rgb,
        UNTURNED,
        {**ARRAYS, "palette": "refuses it", "grey": "refuses it"},
        "refuses them",
    ),
}


def kinds_of(image: Image.Image, data: bytes) -> frozenset[str]:
    """Which of `KINDS` an open image is; from its header alone, so an alpha channel may be opaque.

    Args:
        image: not decoded yet. data: the file.
    """
    mode = image.mode
    found = {
        "alpha": image.has_transparency_data,
        "16-bit": mode.startswith("I"),
        "turned": _orientation(image, data) in range(2, 9),
        "palette": mode in ("P", "PA"),
        "cmyk": mode == "CMYK",
        "1-bit": mode == "1",
        "grey": mode in ("L", "LA", "La"),
    }
    return frozenset(kind for kind, is_so in found.items() if is_so)


def _orientation(image: Image.Image, data: bytes) -> int:
    """What EXIF says, or XMP in its place."""
    if image.format != "PNG":
        return image.getexif().get(ORIENTATION, 1)
    # Pillow decodes a whole PNG to look for EXIF behind its pixels, and then cannot verify it any more.
    if not any(tag in data for tag in (b"eXIf", b"Raw profile type", b"adobe.xmp")):
        return 1
    with Image.open(io.BytesIO(data)) as another:
        return another.getexif().get(ORIENTATION, 1)


def matters(kinds: Iterable[frozenset[str]]) -> bool:
    """Whether any of these files has other pixels by `as_shown` than by `as_rgb`."""
    return any(of_file & PILLOW.keys() for of_file in kinds)
