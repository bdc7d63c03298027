"""A board: which recipes are compared, how long each may train, by what all are measured."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from .. import recipe as recipes
from ..bounds import Bounded, Count, Number, Part, Positive, Seed, Steps, shown
from ..configs import DataConfig
from ..errors import FewstepError, RecipeError
from ..methods.base import guidance_of
from ..recipe import Recipe, validate
from ..runs.library import load_recipe


@dataclass(frozen=True)
class BoardTeacher(Bounded):
    """A teacher, and what its students have to beat.

    Attributes:
        path: as in recipes. steps, guidance: of its own row.
        floor: numbers of steps of the rows without training. solvers: of these; at as many network calls the best one
            is the floor.
    """

    path: str
    steps: Count = 50
    guidance: Number = 1.0
    floor: Steps = field(default_factory=list)
    solvers: list[str] = field(default_factory=lambda: ["dpm++"])


@dataclass(frozen=True)
class PairsOf(Bounded):
    """Options of ``fewstep pairs``, whose time is part of a row's budget."""

    num: Count
    steps: Count | None = None
    solver: str | None = None
    seed: Seed = 0


@dataclass(frozen=True)
class Row(Bounded):
    """A recipe with the number of iterations that fills the budget.

    Attributes:
        recipe: name, script or recipe.yaml. steps: iterations; every role's ``decay`` keeps its share of them.
        name: on the page, by default the recipe's.
        options: dotted fields of the recipe -> values.
        start_from: another row, above this one, whose student of the same seed this one begins with; its cost is added.
        pairs: made before, for recipes with ``data.pairs``; without it those of the row that it starts from.
        share: of the budget that :func:`~fewstep.leaderboard.search.settle` fills, for rows that others start from.
    """

    recipe: str
    steps: Count
    name: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    start_from: str | None = None
    pairs: PairsOf | None = None
    share: Part = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not re.fullmatch(r"[\w.+-]+", self.label):
            raise RecipeError(
                f"rows.name: {self.label!r}: expected letters, digits and _.+-, for it names files"
            )

    @property
    def label(self) -> str:
        return self.name or Path(self.recipe).stem


@dataclass(frozen=True)
class Board(Bounded):
    """Everything that decides a leaderboard.

    Attributes:
        title: of the page. rows, teachers: what is compared.
        cpu_seconds: budget of a row, in seconds of one core: of the processes' own time, so that sharing a machine
            changes nothing. Iterations are fixed and their cost is measured, so that a row can be made again to the
            bit; one that costs more than 1.05 times the budget is marked.
        threads: of each training, one by default, so that a second of a process is one of a core.
        seeds: of the trainings; the first of every row, the others of the better half.
        images: captioned images, the training set, as in ``data.images``.
        per_kind: images of each kind: of the drawings, and of the real ones that they are compared with. A kind is a
            caption that so many images share.
        named: drawings of captions that one image has, for retrieval.
        extractor, seed, batch_size: of the measurement.
        search: dotted fields -> [low, high], factors of the recipe's values between which trials are drawn.
    """

    title: str
    rows: list[Row]
    teachers: list[BoardTeacher]
    cpu_seconds: Positive = 1800.0
    threads: Count = 1
    seeds: list[Seed] = field(default_factory=lambda: [0, 1, 2])
    images: str = "builtin:emoji"
    per_kind: Count = 8
    named: Count = 500
    extractor: str = "effnet-lite0@96"
    seed: Seed = 0
    batch_size: Count = 32
    search: dict[str, tuple[Positive, Positive]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        for what, names in (
            ("rows", [row.label for row in self.rows]),
            ("teachers", [teacher.path for teacher in self.teachers]),
            ("seeds", self.seeds),
        ):
            if not names or len({*names}) < len(names):
                raise RecipeError(
                    f"{what}: {shown(names)}: expected at least one, each another; give rows a name"
                )
        above: set[str] = set()
        for row in self.rows:
            if row.start_from and row.start_from not in above:
                raise RecipeError(
                    f"rows.{row.label}.start_from: {row.start_from}: expected the name of a row above it"
                )
            above.add(row.label)
        for name, (low, high) in self.search.items():
            if low >= high:
                raise RecipeError(f"search.{name}: {[low, high]}: expected factors that rise")

    def row(self, label: str) -> Row:
        return next(row for row in self.rows if row.label == label)


for _cls in (Board, BoardTeacher, PairsOf, Row):
    _cls.__pydantic_config__ = {"extra": "forbid"}  # type: ignore[union-attr]


RECORD = "board.json"  # by which its folder is known; another board may go on in it


def to_dict(board: Board) -> dict[str, Any]:
    """Plain data, which :func:`load_board` reads."""
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(board)))
    return plain


def load_board(path: str | Path) -> Board:
    """A YAML (or JSON) file with the fields of :class:`Board`.

    Raises:
        FewstepError: no such file, an unknown field, a wrong value, a recipe or an option that is none, a teacher of a
            row that is not listed.
    """
    try:
        data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise FewstepError(
            f"{path}: {error.strerror}; expected the file of a board, see eval/boards"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise FewstepError(f"{path}: no YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(data, Mapping):
        raise FewstepError(f"{path}: holds {type(data).__name__}; expected a mapping of fields")
    try:
        board: Board = validate(Board, data, "", [f.name for f in dataclasses.fields(Row)])
        known = [teacher.path for teacher in board.teachers]
        for row in board.rows:
            recipe = Run(board, row, board.seeds[0]).recipe
            if recipe.teacher.path not in known:
                raise FewstepError(
                    f"rows.{row.label}: its teacher is {recipe.teacher.path}; expected one of teachers: {known}"
                )
            if recipe.data.pairs and not Run(board, row, board.seeds[0]).pairs:
                raise FewstepError(
                    f"rows.{row.label}.pairs: missing; its recipe trains on pairs, which the budget pays: give num"
                )
    except FewstepError as error:
        raise FewstepError(f"{path}: {error}") from None
    return board


def resized(board: Board, cpu_seconds: float | None, seeds: int | None) -> Board:
    """The board at another budget, with iterations in proportion, or of its first seeds.

    Raises:
        FewstepError: more seeds than it names.
    """
    scale = (cpu_seconds or board.cpu_seconds) / board.cpu_seconds
    rows = [dataclasses.replace(row, steps=max(1, round(row.steps * scale))) for row in board.rows]
    count = len(board.seeds) if seeds is None else seeds
    if count > len(board.seeds):
        raise FewstepError(
            f"--seeds {count}: the board names {len(board.seeds)}; name more of them in its file"
        )
    budget = board.cpu_seconds * scale
    return dataclasses.replace(board, rows=rows, cpu_seconds=budget, seeds=board.seeds[:count])


def chosen(board: Board, only: list[str]) -> list[Row]:
    """Rows of these names, or all.

    Raises:
        FewstepError: no such row.
    """
    labels = [row.label for row in board.rows]
    if unknown := sorted({*only} - {*labels}):
        raise FewstepError(f"--only {' '.join(unknown)}: no row of the board; there are {', '.join(labels)}")
    return [row for row in board.rows if not only or row.label in only]


@dataclass(frozen=True)
class Run:
    """A row of one seed: the recipe that is trained, and what it needs before."""

    board: Board
    row: Row
    seed: int

    @property
    def key(self) -> tuple[str, int]:
        return self.row.label, self.seed

    @property
    def before(self) -> Run | None:
        """What it starts from."""
        return (
            Run(self.board, self.board.row(self.row.start_from), self.seed) if self.row.start_from else None
        )

    @property
    def pairs(self) -> Run | None:
        """Whose pairs it trains on: its own, those of what it starts from, or none."""
        if self.row.pairs:
            return self
        return self.before.pairs if self.before and self.source.data.pairs else None

    @property
    def source(self) -> Recipe:
        return load_recipe(self.row.recipe)

    def options(self) -> dict[str, Any]:
        """Dotted field -> value, of everything but places."""
        source, steps = self.source, self.row.steps
        scaled = {
            f"roles.{name}.decay": round(role.decay * steps / source.train.steps)
            for name, role in source.roles.items()
            if role.decay
        }
        return {
            **scaled,
            "train.sample_every": 0,  # grids and the run's own evaluation are no training
            "evaluation.num": 0,
            **self.row.options,
            "train.steps": steps,
            "train.seed": self.seed,
        }

    @property
    def recipe(self) -> Recipe:
        """As it is trained, but for where pairs and the student that it starts from lie.

        Raises:
            RecipeError: naming the row.
        """
        try:
            return recipes.override(self.source, words(self.options()))
        except FewstepError as error:
            raise RecipeError(f"rows.{self.row.label}: {error}") from None

    @property
    def digest(self) -> str:
        """Hash of what decides the training beside the code: its recipe, and the recipes and pairs before it.

        Threads are among it, for they decide how sums are rounded.
        """
        recipe = self.recipe
        data = dataclasses.replace(recipe.data, pairs=None)
        parts = [recipes.digest(dataclasses.replace(recipe, data=data)), self.board.threads]
        parts += [self.pairs.pairs_digest] if self.pairs else []
        parts += [self.before.digest] if self.before else []
        return hash_of(parts)[:12]

    @property
    def pairs_digest(self) -> str:
        recipe, pairs = self.recipe, self.row.pairs
        assert pairs is not None
        data: DataConfig = recipe.data
        made = [dataclasses.asdict(recipe.teacher), data.prompts, data.column, guidance_of(recipe.method)]
        return hash_of([*made, dataclasses.asdict(pairs)])[:12]


def words(options: Mapping[str, Any]) -> list[str]:
    """As ``fewstep train`` takes them."""
    return [
        f"--{name}={value if isinstance(value, str) else json.dumps(value)}"
        for name, value in options.items()
    ]


def hash_of(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def runs_of(board: Board, rows: list[Row], seeds: list[int]) -> Iterator[Run]:
    """Each row of each seed, those that others start from first."""
    for row in board.rows:
        if row in rows:
            for seed in seeds:
                yield Run(board, row, seed)
