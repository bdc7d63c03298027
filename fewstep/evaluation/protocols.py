"""Protocols: everything besides the images that a published number depends on, as data.

They are YAML files in `eval/protocols/`, one each, read strictly. A number is called FID only under one of
them.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewstep.errors import FewstepError
from fewstep.evaluation.reading import READINGS, SHOWN
from fewstep.vision import preprocess
from fewstep.vision.extractor import Extractor, Prepared
from fewstep.vision.extractors import SCALINGS, Inception2015, get_extractor

PACKAGE = Path(__file__).parent.parent
FOLDERS = (PACKAGE / "protocols", PACKAGE.parent / "eval" / "protocols")  # in a wheel, in a checkout

OF_INCEPTION = ("sfd", "is")


@dataclass(frozen=True)
class Protocol:
    """How one kind of number is made.

    Attributes:
        name: also the name of the file.
        about: whose protocol it is and what it measures.
        samples: how many generated images it wants, or None for any number.
        reference: what the real images are.
        extractor: name of the network.
        crop: "none", "center" (square of the shorter side) or "patch" (middle pixels of the network's input
            size).
        resize: Pillow filter and side of the uint8 resize after the crop, such as ["lanczos", 256], or None.
        extractor_resize: id in `preprocess.RESIZES`, for Inception.
        scaling: "128" or "127.5", for Inception.
        reads_as: whose reading of files it takes, a name of `reading.READINGS`.
        image_size: side of the images as they come, where others are refused.
        metrics: what belongs to it.
        prompts: which captions, in which order, how many images each.
        seeds: which seeds.
        rounding: how generated images become uint8.
        clip: model, pretraining tag, text prefix and scale of its CLIP score.
        approximate: True if a detail of the original could not be found out.
        published: numbers to reproduce.
        notes: what else one should know.
    """

    name: str
    about: str
    samples: int | None
    reference: str
    extractor: str = "inception-2015"
    crop: str = "none"
    resize: tuple[str, int] | None = None
    extractor_resize: str = "pil-bicubic-float"
    scaling: str = "128"
    reads_as: str = SHOWN
    image_size: int | None = None
    metrics: tuple[str, ...] = ("fd",)
    prompts: str | None = None
    seeds: str | None = None
    rounding: str | None = None
    clip: dict[str, Any] | None = None
    approximate: bool = False
    published: dict[str, float] | None = None
    notes: tuple[str, ...] = ()

    def __post_init__(self):
        def check(field: str, ok: bool, expected: str) -> None:
            if not ok:
                raise FewstepError(f"{self.name}.{field} is {getattr(self, field)!r}, expected {expected}")

        ok = self.samples is None or (isinstance(self.samples, int) and self.samples > 1)
        check("samples", ok, "a number above 1, or null")
        check("crop", self.crop in ("none", "center", "patch"), "none, center or patch")
        ok = self.resize is None or (len(self.resize) == 2 and self.resize[0] in preprocess.FILTERS)
        check("resize", ok, f"[filter, side] with a filter of {', '.join(preprocess.FILTERS)}, or null")
        check(
            "extractor_resize",
            self.extractor_resize in preprocess.RESIZES,
            f"one of {', '.join(preprocess.RESIZES)}",
        )
        check("reads_as", self.reads_as in READINGS, f"one of {', '.join(READINGS)}")
        check("scaling", self.scaling in SCALINGS, f"one of {', '.join(SCALINGS)}")

    def get_extractor(
        self, name: str | None = None, device: str = "cpu", weights: str | None = None
    ) -> Extractor:
        """The network behind this protocol's crop and resize; with `name` another one, which makes no FID."""
        name = name or self.extractor
        if name == "inception-2015":
            base: Extractor = Inception2015(self.extractor_resize, self.scaling, device, weights)
        else:
            base = get_extractor(name, device, weights)
        steps = preprocess.crop_and_resize(self.crop, self.resize, base.size)
        return Prepared(base, steps) if steps else base

    def metrics_of(self, extractor: str | None) -> tuple[str, ...]:
        """Its metrics; by another network than its own without those that only its own has."""
        own = extractor in (None, self.extractor)
        return self.metrics if own else tuple(m for m in self.metrics if m not in OF_INCEPTION)

    def label(self, metric: str, by: str, n_fake: int, whole: bool = False) -> str:
        """Name of a number made by a network. "FID" only by this protocol's own; a smaller sample says so.

        Args:
            metric: such as "FD". by: the network. n_fake: number of generated images.
            whole: it saw whole images even if the protocol crops patches.
        """
        remarks = [self.name]
        if by == self.extractor == "inception-2015":
            metric = metric.replace("FD", "FID")
        else:
            remarks.insert(0, by)
        if self.crop == "patch" and not whole and not metric.startswith("patch-"):
            metric = f"patch-{metric}"
        if self.samples and n_fake < self.samples:
            metric += f"-{short(n_fake)}"
            remarks.append(f"which wants {short(self.samples)}")
        if self.approximate:
            remarks.append("approximate")
        return f"{metric}({', '.join(remarks)})"


def short(n: int) -> str:
    """30000 as "30k"."""
    return f"{n // 1000}k" if n >= 1000 and n % 1000 == 0 else str(n)


def names() -> list[str]:
    """Names of all protocols."""
    return sorted(file.stem for file in _folder().glob("*.yaml"))


def load(name: str) -> Protocol:
    """Reads a protocol by its name, or from a path that ends in .yaml.

    Raises:
        FewstepError: unknown name, unknown or missing fields, values out of range.
    """
    import difflib

    import yaml

    path = Path(name) if name.endswith(".yaml") else _folder() / f"{name}.yaml"
    if not path.is_file():
        near = difflib.get_close_matches(name, names(), 1)
        hint = f"; the nearest is {near[0]}" if near else ""
        raise FewstepError(f"unknown protocol {name!r}: expected one of {', '.join(names())}{hint}")
    data = yaml.safe_load(path.read_text(encoding="utf-8"))
    fields = {field.name: field for field in dataclasses.fields(Protocol)}
    if not isinstance(data, dict):
        raise FewstepError(f"{path} is no protocol: expected a mapping of fields")
    if unknown := sorted(set(data) - (set(fields) - {"name"})):
        raise FewstepError(
            f"{path}: unknown fields {', '.join(unknown)}: expected some of {', '.join(fields)}"
        )
    required = {n for n, f in fields.items() if f.default is dataclasses.MISSING} - {"name"}
    if missing := sorted(required - set(data)):
        raise FewstepError(f"{path}: the fields {', '.join(missing)} are missing")
    data = {key: tuple(value) if isinstance(value, list) else value for key, value in data.items()}
    return Protocol(name=path.stem, **data)


def _folder() -> Path:
    return next((folder for folder in FOLDERS if folder.is_dir()), FOLDERS[0])
