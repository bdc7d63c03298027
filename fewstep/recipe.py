"""The recipe: everything that decides a run, as typed dataclasses, read strictly and written back resolved."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError

from . import extensions
from .configs import (
    DataConfig,
    EvalConfig,
    ExportConfig,
    RoleConfig,
    SampleConfig,
    ShapeConfig,
    TeacherConfig,
    TeacherLora,
    TrainConfig,
)
from .errors import RecipeError
from .files import at_home
from .methods import Method, get_method

__all__ = [
    "DataConfig",
    "EvalConfig",
    "ExportConfig",
    "Recipe",
    "RoleConfig",
    "SampleConfig",
    "ShapeConfig",
    "TeacherConfig",
    "TeacherLora",
    "TrainConfig",
    "digest",
    "dump",
    "from_dict",
    "load",
    "override",
    "to_dict",
]


@dataclass
class Recipe:
    """A whole run.

    Attributes:
        output: run directory. method: options of one method, e.g. ``DMD2.Config(...)``.
        roles: how each trainable network is trained, by role name; ``student`` stands for ``student_1`` and so on,
            and missing ones take the defaults of RoleConfig.
    """

    output: str
    teacher: TeacherConfig
    method: Any
    data: DataConfig
    train: TrainConfig
    roles: dict[str, RoleConfig] = field(default_factory=dict)
    samples: SampleConfig = field(default_factory=SampleConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    evaluation: EvalConfig = field(default_factory=EvalConfig)

    @property
    def method_class(self) -> type[Method]:
        return get_method(_method_name(self.method))

    def role(self, name: str) -> RoleConfig:
        if name in self.method_class.followers:
            return dataclasses.replace(self.role("student"), ema=0.0, ema_images=0)
        return self.roles.get(name) or self.roles.get(family(name)) or RoleConfig()


def family(name: str) -> str:
    """A role's name without its number: ``student`` of ``student_2``."""
    return name.rstrip("0123456789").rstrip("_")


_FORBID = ConfigDict(extra="forbid")
for _cls in (
    TeacherConfig,
    TeacherLora,
    DataConfig,
    SampleConfig,
    ShapeConfig,
    ExportConfig,
    EvalConfig,
    Recipe,
    RoleConfig,
    TrainConfig,
):
    _cls.__pydantic_config__ = _FORBID  # type: ignore[union-attr]  # of pydantic's, on plain dataclasses


def _method_name(config: Any) -> str:
    from .methods import METHODS

    for name, cls in METHODS.items():
        if type(config) is cls.Config:  # a Config may build on another method's
            return name
    raise RecipeError(f"method: {type(config).__name__} is no method's Config; known: {', '.join(METHODS)}")


# -------------------------------------------------------------------------------------------- reading and writing
def to_dict(recipe: Recipe) -> dict[str, Any]:
    """Plain data; the method's options carry its name, and every role of the method is spelled out."""
    plain = dataclasses.asdict(recipe)
    plain["method"] = {"name": recipe.method_class.name, **plain["method"]}
    return json.loads(json.dumps(plain))  # tuples become lists, as in YAML


def from_dict(data: Mapping[str, Any]) -> Recipe:
    """Strict: an unknown field, a wrong type or an impossible value is refused with its dotted path.

    Raises:
        RecipeError: one line per fault.
    """
    if not isinstance(data, Mapping):
        found = "is empty" if data is None else f"holds {type(data).__name__}"
        raise RecipeError(f"recipe: {found}; expected a mapping of fields")
    data = _at_home(data)
    options = data.get("method")
    if not isinstance(options, Mapping) or "name" not in options:
        raise RecipeError(f"method: {options!r}; expected a mapping with a name, e.g. {{name: dmd2}}")
    method = get_method(str(options["name"]))
    method.Config.__pydantic_config__ = _FORBID  # type: ignore[attr-defined]
    known = [*_paths(Recipe, ""), *_paths(method.Config, "method.")]
    config = validate(method.Config, _present(method, options), "method", known)
    recipe = validate(Recipe, {**data, "method": config}, "", known)
    networks = method.networks_for(config)
    known = list(dict.fromkeys([*networks, *map(family, networks), *method.extras]))
    for role in recipe.roles:
        if role not in known:
            raise RecipeError(
                f"roles.{role}: {method.name} has no such role; expected one of {', '.join(known)}"
            )
    return recipe


def _at_home(data: Mapping[str, Any]) -> dict[str, Any]:
    """With the user's folder for ``~``, in whichever field holds a path; texts in lists are none."""

    def of(value: Any) -> Any:
        if isinstance(value, Mapping):
            return _at_home(value)
        if isinstance(value, list):
            return [_at_home(one) if isinstance(one, Mapping) else one for one in value]
        return at_home(value) if isinstance(value, str) else value

    return {name: of(value) for name, value in data.items()}


def _present(method: type[Method], options: Mapping[str, Any]) -> dict[str, Any]:
    """Options as they are called today; one that has moved and says nothing is left out."""
    for old, new in method.moved.items():
        if options.get(old) is not None:
            raise RecipeError(
                f"method.{old}: {options[old]}: is {new} now; give it there, and leave this out"
            )
    return {name: value for name, value in options.items() if name not in ("name", *method.moved)}


def validate(cls: type, data: Any, prefix: str, known: Sequence[str]) -> Any:
    try:
        return TypeAdapter(cls).validate_python(data)
    except ValidationError as error:
        faults: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
        for fault in error.errors():
            faults.setdefault(_place(data, fault), []).append(fault)
        lines = [_fault(cls, data, place, found, prefix, known) for place, found in faults.items()]
        raise RecipeError("\n".join(lines)) from None


def _place(data: Any, fault: Mapping[str, Any]) -> tuple[Any, ...]:
    """The field that a fault is of; behind it a location names elements, and members of a union, each with a fault."""
    place: tuple[Any, ...] = fault["loc"]
    of_field = ("missing", "missing_argument", "unexpected_keyword_argument", "extra_forbidden")
    if fault["type"] in of_field and isinstance(place[-1], str):  # and not one of several numbers
        return place
    for depth, part in enumerate(place):
        if not isinstance(data, Mapping) or part not in data:
            return place[:depth]
        data = data[part]
    return place


def _fault(
    cls: type,
    data: Any,
    place: tuple[Any, ...],
    faults: Sequence[Mapping[str, Any]],
    prefix: str,
    known: Sequence[str],
) -> str:
    path, fault = ".".join(str(p) for p in ([prefix] if prefix else []) + list(place)), faults[0]
    if fault["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        return f"{path}: unknown field; {_nearest(str(place[-1]), _fields_at(cls, place[:-1]), known)}"
    if fault["type"] in ("missing", "missing_argument"):
        return f"{path}: missing; this field has no default"
    if fault["type"] == "value_error":
        text = str(fault["ctx"]["error"])
        return text if text.startswith(path.split(".")[0] + ".") else f"{path}.{text}" if path else text
    for part in place:
        data = data[part]
    words = []
    for one in faults:
        inner = [str(part) for part in one["loc"][len(place) :] if isinstance(part, int)]
        of = f"element {'.'.join(inner)}: " if inner else ""
        words.append(of + one["msg"][0].lower() + one["msg"][1:])
    return f"{path}: {data!r}: {'; '.join(dict.fromkeys(words))}"


def _nearest(name: str, names: Sequence[str], known: Sequence[str]) -> str:
    """The field that was meant: of this name elsewhere, or of nearly this name here or elsewhere."""
    name = name.replace("-", "_")
    here = difflib.get_close_matches(name, names, 1)
    exact = [path for path in known if path.rpartition(".")[2] == name]
    if here != [name] and exact:
        return f"did you mean {' or '.join(exact)}?"
    if here:
        return f"did you mean {here[0]}?"
    leaves = {path.rpartition(".")[2]: path for path in known}
    close = difflib.get_close_matches(name, leaves, 1, cutoff=0.8)
    return f"did you mean {leaves[close[0]]}?" if close else f"known fields: {', '.join(names)}"


def _paths(cls: Any, prefix: str) -> Iterator[str]:
    """Dotted paths of every field; of the roles those of the student."""
    hints = get_type_hints(cls)
    for name in (f.name for f in dataclasses.fields(cls)):
        inner = hints[name]
        where = f"{prefix}{name}"
        if get_origin(inner) is dict and dataclasses.is_dataclass(get_args(inner)[1]):
            inner, where = get_args(inner)[1], f"{prefix}{name}.student"
        if dataclasses.is_dataclass(inner):
            yield from _paths(inner, f"{where}.")
        else:
            yield where


def _fields_at(cls: type, location: Sequence[Any]) -> list[str]:
    """Names of the fields of the dataclass at a location inside cls."""
    for part in location:
        hints = get_type_hints(cls) if dataclasses.is_dataclass(cls) else {}
        inner = hints.get(part, cls)
        if get_origin(inner) in (Union, types.UnionType):
            inner = next((a for a in get_args(inner) if dataclasses.is_dataclass(a)), inner)
        cls = get_args(inner)[-1] if get_origin(inner) in (dict, list) else inner
    return [f.name for f in dataclasses.fields(cls)] if dataclasses.is_dataclass(cls) else []


def dump(recipe: Recipe) -> str:
    return yaml.safe_dump(to_dict(recipe), sort_keys=False, width=110)


def load(path: str | Path) -> Recipe:
    """A ``recipe.yaml``; raises RecipeError with the file's name on anything that is no recipe.

    The code that its run was trained with, in the folder ``code`` beside it, is executed first.
    """
    try:
        data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"{path}: {error.strerror}; expected a recipe file") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: no YAML: {str(error).splitlines()[0]}") from error
    extensions.load(Path(path).parent / "code")
    return from_dict(data)


def digest(recipe: Recipe) -> str:
    """Hash of everything but the output folder; stands in ``fewstep.json`` of the export."""
    plain = to_dict(from_dict(to_dict(recipe)))  # 64 and 64.0 are the same alpha
    del plain["output"]
    # An option that came later leaves the hashes of what does without it alone.
    for part, name in [
        *((plain["data"], name) for name in ("column", "shapes")),
        *((plain["teacher"], name) for name in ("variant", "config", "loras", "quantization")),
        *(
            (role, n)
            for n in ("start_from", "ema_images", "inverse_sqrt")
            for role in plain["roles"].values()
        ),
    ]:
        if not part[name]:
            del part[name]
    for name in ("cache_prompts", "cache_images", "cache_gb", "encoder_device"):  # where the same is done
        del plain["data"][name]
    del plain["teacher"]["offload"]
    later: dict[str, Any] = {"guidance_time_range": [0.0, 1.0]}
    if plain["method"]["name"] not in ("diff_instruct", "swiftbrush"):  # which had it before
        later["time_law"] = "uniform"
    for name, default in later.items():
        if plain["method"].get(name) == default:
            del plain["method"][name]
    for new in dataclasses.fields(DataConfig):
        if new.name in ("upscale", "max_bad") and plain["data"][new.name] == new.default:
            del plain["data"][new.name]
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:16]


# ------------------------------------------------------------------------------------------------------ overrides
SHORT = {
    "teacher": "teacher.path",
    "prompts": "data.prompts",
    "images": "data.images",
    "steps": "train.steps",
    "student": "roles.student",
    "critic": "roles.critic",
}


def override(recipe: Recipe, arguments: Sequence[str]) -> Recipe:
    """The recipe with ``--train.steps 100 --teacher PATH`` or ``--train.steps=100`` applied; values are YAML.

    ``--teacher``, ``--prompts``, ``--images``, ``--steps`` are short for their dotted paths, and
    ``--student.lr`` for ``--roles.student.lr``.

    Raises:
        RecipeError: a word that is no option, an option without a value, an unknown field, a wrong value.
    """
    plain = to_dict(recipe)
    for name, value in _options(arguments):
        # A folder may be called 2026.
        _set(plain, name.split("."), value if name == "output" else _parse(value), name)
    return from_dict(plain)


def named(arguments: Sequence[str]) -> set[str]:
    """Dotted names of the fields that these words override."""
    return {name for name, _ in _options(arguments)}


def _options(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(dotted name, text of the value)."""
    words = list(arguments)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            raise RecipeError(f"{word!r}: expected an option such as --train.steps 100")
        name, equals, value = word[2:].partition("=")
        if not equals:
            if not words:
                raise RecipeError(f"--{name}: needs a value")
            value = words.pop(0)
        head, dot, rest = name.partition(".")
        if not dot:
            name = SHORT.get(name, name)
        elif head in ("student", "critic", "discriminator", "weighting"):
            name = f"roles.{head}.{rest}"
        yield name, value


def _parse(text: str) -> Any:
    """YAML, with 1e-4 as a number and anything YAML cannot read as plain text (prompts, paths)."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _set(data: dict, path: list[str], value: Any, name: str) -> None:
    for part in path[:-1]:
        inner = data.setdefault(part, {})
        if not isinstance(inner, dict):
            raise RecipeError(f"{name}: {part} is a single value and has no field {path[-1]}")
        data = inner
    data[path[-1]] = value
