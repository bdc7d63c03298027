"""What `fewstep eval run` compares: models at several steps, solvers and guidances, by one yardstick."""

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any, get_args

from fewstep.errors import FewstepError
from fewstep.evaluation.images import ImageSource
from fewstep.evaluation.mixture import Mixture
from fewstep.evaluation.models import check_solver
from fewstep.files import all_at_home
from fewstep.teachers.origin import Origin

WITHOUT_REAL = ("vendi", "diversity", "is")  # measures that need no real images
DTYPES = ("float32", "float16", "bfloat16")
KINDS = ("model", "reference", "teacher", "student", "floor")


@dataclass(frozen=True)
class Entry:
    """One pipeline or student, or images that were made elsewhere.

    Attributes:
        name: of its rows. pipeline, lora, network, variant, config, loras: see `open_model`.
        images: folder, zip or npz file instead of a pipeline, in the order of the prompts: one row.
        kind: "teacher", "student", "floor", "reference" (which no sampler can reach) or "model".
        steps, solver, guidance: every combination is a row; a guidance of None is the model's own.
    """

    name: str
    pipeline: str | None = None
    lora: str | None = None
    network: str | None = None
    variant: str | None = None
    config: str | None = None
    loras: tuple[dict, ...] = ()
    images: str | None = None
    kind: str = "model"
    steps: tuple[int, ...] = (1, 2, 4, 8)
    solver: tuple[str, ...] = ("own",)
    guidance: tuple[float | None, ...] = (None,)

    def __post_init__(self):
        _check(bool(self.name), f"models.name is {self.name!r}", "a text")
        known = all(set(one) <= {"path", "weight"} and isinstance(one.get("path"), str) for one in self.loras)
        _check(known, f"models.{self.name}.loras is {list(self.loras)}", "mappings of path and weight")
        given = [n for n in ("pipeline", "images") if getattr(self, n)]
        _check(
            len(given) == 1,
            f"models.{self.name} has {' and '.join(given) or 'neither'}",
            "pipeline or images",
        )
        _check(self.kind in KINDS, f"models.{self.name}.kind is {self.kind!r}", f"one of {', '.join(KINDS)}")
        ok = self.steps and all(type(k) is int and k > 0 for k in self.steps)
        _check(ok, f"models.{self.name}.steps is {list(self.steps)}", "numbers from 1 on")
        for solver in self.solver:
            check_solver(solver, f"models.{self.name}.solver")
        ok = all(g is None or (isinstance(g, int | float) and math.isfinite(g)) for g in self.guidance)
        _check(
            ok,
            f"models.{self.name}.guidance is {list(self.guidance)}",
            "numbers, or null for the model's own",
        )

    @property
    def base(self) -> Origin | None:
        """What is measured, or the LoRA's and the network's base."""
        return Origin.of(self.pipeline, self.variant, self.config, self.loras) if self.pipeline else None


@dataclass(frozen=True)
class Spec:
    """All rows of a table share everything but the model, so that they can be compared.

    Attributes:
        title: of the page.
        prompts, column: see `read_prompts`. num, per_prompt, seed, size, rounding: see `Job`; without a size the
            students' own is that of all rows.
        shapes: several sizes in place of one, mappings of `size` and `share`: each prompt has one of them, the same in
            every row; without them and without a size those that the students were trained in.
        models: the rows; the reference of same-noise distances is the first pipeline, at its last steps and guidance.
        real: folder, npz, statistics, "builtin:emoji" (or -32) or an `ImageSource`; without it nothing is compared with
            real images.
        protocol, extractor, weights: see `evaluate_images`.
        metrics: names of measures. scorers: of images and captions.
        results: name to file of an earlier `eval fid ... --out`, shown beside if made in the same way.
        dtype, batch_size, speed_runs: of the generation.
    """

    prompts: str
    models: tuple[Entry, ...]
    title: str = "Few-step generators side by side"
    column: str | None = None
    num: int | None = None
    per_prompt: int = 1
    seed: int = 0
    size: int | list[int] | None = None
    shapes: tuple[dict[str, Any], ...] = ()
    rounding: str = "nearest"
    real: str | ImageSource | None = None
    protocol: str | None = None
    extractor: str | None = None
    weights: str | None = None
    metrics: tuple[str, ...] = ("fd", "kid", "prdc", "vendi")
    scorers: tuple[str, ...] = ()
    results: dict[str, str] = field(default_factory=dict)
    dtype: str = "float32"
    batch_size: int = 8
    speed_runs: int = 5

    def __post_init__(self):
        from fewstep.evaluation.measures import MEASURES

        _check(len(self.models) > 0, "models is empty", "at least one")
        names = [entry.name for entry in self.models]
        _check(len(set(names)) == len(names), f"models have the names {names}", "different ones")
        slugs = [slug(name) for name in names]
        _check(
            len(set(slugs)) == len(slugs), f"models have the folders {slugs}", "names with different letters"
        )
        for name, least in (("batch_size", 1), ("per_prompt", 1), ("speed_runs", 0)):
            _check(getattr(self, name) >= least, f"{name} is {getattr(self, name)}", f"{least} or more")
        _check(self.dtype in DTYPES, f"dtype is {self.dtype!r}", f"one of {', '.join(DTYPES)}")
        _check(not (self.mixture and self.size), f"size is {self.size} beside shapes", "one of them")
        for metric in self.metrics:
            _check(metric in MEASURES, f"metrics has {metric!r}", f"of {', '.join(MEASURES)}")

    @property
    def mixture(self) -> Mixture | None:
        """Of the shapes; None where all images have one size."""
        return Mixture.read(self.shapes)

    @property
    def reference(self) -> Entry | None:
        """The first model that draws, which the others are compared with at the same noise."""
        return next((entry for entry in self.models if entry.pipeline), None)

    def measured(self, repeated: bool) -> tuple[str, ...]:
        """The measures that this run can have; prompts with several images add the diversity of these."""
        names = dict.fromkeys((*self.metrics, *["diversity"] * repeated))
        return tuple(n for n in names if self.real is not None or n in WITHOUT_REAL)


# Kind of a field that is a list: what its items are.
ITEMS = {
    str: ("texts", (str,)),
    int: ("whole numbers", (int,)),
    float | None: ("numbers, or null for the model's own", (int, float, NoneType)),
    Entry: ("mappings of fields", (dict,)),
    dict: ("mappings of path and weight", (dict,)),
    dict[str, Any]: ("mappings of size and share", (dict,)),
}


def load_spec(path: str | Path) -> Spec:
    """Reads a YAML file with the fields of `Spec`; FewstepError names what is wrong."""
    import yaml

    try:
        data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise FewstepError(f"{path} cannot be read as YAML: {error}") from None
    try:
        data = _fields(Spec, data, "")
        data["models"] = tuple(Entry(**_fields(Entry, entry, "models.")) for entry in data["models"])
        return Spec(**data)
    except FewstepError as error:
        raise FewstepError(f"{path}: {error}") from None


def slug(name: str) -> str:
    """A name as a file name."""
    return "".join(c if c.isalnum() or c in "-.+" else "_" for c in name).strip("._") or "_"


def _fields(cls: type, data: Any, where: str) -> dict[str, Any]:
    """A mapping with the fields of a dataclass, each of its kind; a single value stands for a list of one."""
    known = {f.name: f for f in dataclasses.fields(cls)}
    _check(
        isinstance(data, dict), f"{where or 'the file'} holds {type(data).__name__}", "a mapping of fields"
    )
    unknown = sorted(set(map(str, data)) - set(known))
    _check(
        not unknown, f"unknown fields {', '.join(where + u for u in unknown)}", f"some of {', '.join(known)}"
    )
    empty = dataclasses.MISSING
    required = {n for n, f in known.items() if f.default is empty and f.default_factory is empty}
    missing = sorted(required - set(data))
    _check(not missing, f"the fields {', '.join(where + m for m in missing)} are missing", "them")
    values = {}
    for name, value in data.items():
        kind = str(known[name].type)
        if "tuple" in kind:
            value = tuple(value) if isinstance(value, list) else (value,)
            what, types = ITEMS[get_args(known[name].type)[0]]
            ok = all(type(item) in types for item in value)
            _check(ok, f"{where}{name} is {list(value)!r}", what)
        elif "dict" in kind:
            texts = isinstance(value, dict) and all(type(x) is str for pair in value.items() for x in pair)
            _check(texts, f"{where}{name} is {value!r}", "a mapping of texts to texts")
        elif "list" in kind and isinstance(value, list):
            two = [type(item) for item in value] == [int, int]
            _check(two, f"{where}{name} is {value!r}", "a number, or a height and a width")
        elif value is None:
            _check("None" in kind, f"{where}{name} is null", "a value")
        else:
            wanted = int if "int" in kind else str
            _check(
                type(value) is wanted,
                f"{where}{name} is {value!r}",
                "a number" if wanted is int else "a text",
            )
        values[name] = all_at_home(value)
    return values


def _check(ok: Any, found: str, expected: str) -> None:
    if not ok:
        raise FewstepError(f"{found}, expected {expected}")
