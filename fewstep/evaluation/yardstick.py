"""How every row of a table is measured: one extractor, one reference, one set of prompts."""

import dataclasses
import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from fewstep.errors import FewstepError
from fewstep.evaluation import protocols
from fewstep.evaluation.compare import load_result
from fewstep.evaluation.evaluate import check_captions, check_sizes, evaluate_images, open_side
from fewstep.evaluation.features import extract
from fewstep.evaluation.images import ArrayImages, FirstImages, ImageSource
from fewstep.evaluation.measures import Sides, describe, possible
from fewstep.evaluation.metrics import paired_distance
from fewstep.evaluation.prompts import Prompts
from fewstep.evaluation.sampling import check_num
from fewstep.evaluation.spec import Spec
from fewstep.evaluation.tokens import Tokens, tokens_of
from fewstep.files import write
from fewstep.shape import Shape, Size
from fewstep.vision.extractor import Extractor
from fewstep.vision.extractors import DEFAULT, get_extractor
from fewstep.vision.scores import get_scorer

LARGE = 1 << 20  # pixels of a side, where nobody has said how many
PAIRED = "over pairs of the same prompt and noise"


class Yardstick:
    """One for all rows, checked before anything is generated.

    Attributes:
        captions: of the images of a row. named: indices of the real images that the last of them name.
    """

    def __init__(self, spec: Spec, prompts: Prompts, device: str):
        self.spec, self.device = spec, device
        self.protocol = protocols.load(spec.protocol) if spec.protocol else None
        self.extractor: Extractor = (
            self.protocol.get_extractor(spec.extractor, device, spec.weights)
            if self.protocol
            else get_extractor(spec.extractor or DEFAULT, device, spec.weights)
        )
        num = check_num(spec.num, prompts, spec.per_prompt)
        self.captions = prompts.of_images(num, spec.per_prompt)
        self.real = None if spec.real is None else open_real(spec.real)
        self.named = prompts.named(num) if self.real is not None else []
        if self.named and spec.per_prompt > 1:
            raise FewstepError(f"per_prompt is {spec.per_prompt}, expected 1 where prompts name real images")
        self.cut = num - len(self.named)
        if self.cut < 2 or len(self.named) == 1:
            raise FewstepError(
                f"{spec.prompts}: {num} prompts, of which {len(self.named)} name a real image: expected at least 2 "
                "that name none, and none or at least 2 that do"
            )
        counts = Counter(self.captions[: self.cut])
        numbers = {caption: i for i, caption in enumerate(counts)}
        self.groups = [numbers[caption] for caption in self.captions[: self.cut]]
        self.measured = spec.measured(sum(n > 1 for n in counts.values()) > 1)
        clip = self.protocol.clip if self.protocol else None
        self.scorers = [get_scorer(scorer, device, clip) for scorer in spec.scorers]
        if self.scorers:
            check_captions(self.captions, len(self.captions))
        self.others = {name: load_result(path) for name, path in spec.results.items()}
        coming = Coming(self.cut, *(spec.mixture.shapes if spec.mixture else [spec.size or LARGE]))
        if self.protocol and self.protocol.image_size and spec.mixture:
            check_sizes(self.protocol, coming)
        groups = torch.tensor(self.groups) if "diversity" in self.measured else None
        real = coming if self.real is None else self.real
        possible(self.measured, Sides(real, coming, self.extractor, groups=groups))  # before any are made
        # Of the row that others are compared with: how it was made, its features, and its tokens if it has any.
        self.reference: tuple[dict[str, Any], torch.Tensor] | None = None
        self.tokens: Tokens | None = None

    def measure(
        self, images: ImageSource, file: Path, run: dict[str, Any], pipe: Any = None
    ) -> dict[str, Any]:
        """The result of one row, from its file if that was made of the same images in the same way.

        Args:
            images: of the row. run: what decided them. pipe: what drew them, None for images made elsewhere.
        """
        some = FirstImages(images, self.cut) if self.named else images
        features = None
        if pipe is not None and self.reference is None:  # the first row
            features = extract(some, self.extractor, cached=True)
            self.reference = (run, features)
            self.tokens = tokens_of(pipe, images)
        made_of = json.loads(json.dumps(self._made_of(run, len(images))))
        if file.is_file():
            found = load_result(file)
            if found.get("made_of") == made_of:
                return found
        result = self._evaluate(images, some)
        if pipe is not None and features is None and self.reference is not None:
            value, error = paired_distance(self.reference[1], extract(some, self.extractor, cached=True))
            label = f"same-noise distance({self.extractor.name})"
            result["metrics"][label] = self._entry(value, error, PAIRED)
        if self.tokens is not None:
            numbers = self.tokens.statistics(images)
            result["metrics"] |= {name: self._entry(value) for name, value in numbers.items()}
        result["made_of"] = made_of
        write_json(file, result)
        return result

    def _evaluate(self, images: ImageSource, some: ImageSource) -> dict[str, Any]:
        """Everything by the images whose prompts name none; retrieval by the others."""
        shared = {"extractor": self.extractor, "protocol": self.protocol}
        result = evaluate_images(
            self.real if self.real is not None else some,
            some,
            metrics=self.measured,
            groups=self.groups if "diversity" in self.measured else None,
            captions=self.captions[: self.cut],
            scorers=self.scorers,
            **shared,
        )
        if self.named:
            rest = FirstImages(images, len(self.named), after=self.cut)
            asked = {"metrics": ("retrieval",), "prompted": self.named}
            result["metrics"] |= evaluate_images(self.real, rest, **asked, **shared)["metrics"]
        return result

    def _entry(self, value: float, error: float | None = None, kind: str | None = None) -> dict[str, Any]:
        counts = {"n_real": self.cut, "n_fake": self.cut}
        return {"value": value, "error": error, "error_kind": kind, **counts}

    def _made_of(self, run: dict[str, Any], num: int) -> dict[str, Any]:
        return {
            "run": run,
            "num": num,
            "captions": hashlib.sha256(json.dumps(self.captions).encode()).hexdigest(),
            "named": self.named,
            "metrics": list(self.measured),
            "scorers": [[s.label, s.name, s.weights_sha256] for s in self.scorers],
            "real": describe(self.real) if self.real is not None else None,
            "extractor": [self.extractor.name, self.extractor.weights_sha256, self.extractor.resize],
            "protocol": dataclasses.asdict(self.protocol) if self.protocol else None,
            "reference": self.reference and self.reference[0],
        }


class Coming(ImageSource):
    """Images that are still to be made: how many, and of which size."""

    def __init__(self, count: int, *sizes: Size):
        self.name, self.count, self.sizes = "the samples", count, {*map(Shape.of, sizes)}

    def __len__(self) -> int:
        return self.count


def open_real(real: Any) -> Any:
    """Images or statistics; "builtin:emoji" and "builtin:emoji-32" are those that come with fewstep."""
    from fewstep.data import emoji

    pictures = emoji.pictures(real) if isinstance(real, str) else None
    return open_side(real) if pictures is None else ArrayImages(pictures, real)


def write_json(path: Path, data: dict[str, Any]) -> None:
    try:
        text = json.dumps(data, indent=1, allow_nan=False) + "\n"
    except ValueError:
        raise FewstepError(f"{path}: a number is not finite; look at the images of this row") from None
    write(path, text)
