"""What a board refuses, what its runs are, which trials a search makes and what it settles on."""

import dataclasses
import json
import math
import shutil
from pathlib import Path

import pytest
import yaml

from fewstep.errors import FewstepError
from fewstep.leaderboard import search, train
from fewstep.leaderboard.board import (
    Board,
    BoardTeacher,
    PairsOf,
    Row,
    Run,
    chosen,
    load_board,
    resized,
    to_dict,
)
from fewstep.methods import METHODS

XL = BoardTeacher("builtin:emoji-xl")


def board_of(*rows, **more):
    return Board("t", list(rows), [XL], **more)


def run_of(row, seed=0, **more):
    return Run(board_of(row, **more), row, seed)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rows": []}, r"rows: .*at least one"),
        ({"rows": [{"recipe": "demo", "steps": 1}] * 2}, r"rows: .*demo.*give rows a name"),
        ({"rows": [{"recipe": "demo", "steps": 0}]}, r"steps: 0: expected at least 1"),
        ({"rows": [{"recipe": "demo", "stepz": 1}]}, r"rows.0.stepz: unknown field; did you mean steps"),
        ({"rows": [{"recipe": "no_such", "steps": 1}]}, r"recipe 'no_such' is neither"),
        ({"rows": [{"recipe": "demo", "steps": 1, "name": "a/b"}]}, r"'a/b': expected letters"),
        (
            {"rows": [{"recipe": "demo", "steps": 1, "options": {"train.stepz": 1}}]},
            r"rows.demo: train.stepz",
        ),
        ({"rows": [{"recipe": "demo", "steps": 1, "start_from": "x"}]}, r"rows.demo.start_from: x: expected"),
        ({"rows": [{"recipe": "emoji_dmd_1step", "steps": 1}]}, r"rows.emoji_dmd_1step.pairs: missing"),
        ({"rows": [{"recipe": "emoji_flow_dmd2_1step", "steps": 1}]}, r"its teacher is builtin:emoji-flow"),
        ({"seeds": [1, 1]}, r"seeds: .*each another"),
        ({"search": {"roles.student.lr": [2, 1]}}, r"search.roles.student.lr: .*rise"),
    ],
)
def test_a_board_that_cannot_run_is_refused_with_its_field(tmp_path, change, said):
    good = {
        "title": "t",
        "rows": [{"recipe": "demo", "steps": 1}],
        "teachers": [{"path": "builtin:emoji-xl"}],
    }
    path = tmp_path / "board.yaml"
    path.write_text(yaml.safe_dump(good))
    assert load_board(path).rows[0].label == "demo"
    path.write_text(yaml.safe_dump({**good, **change}))
    with pytest.raises(FewstepError, match=said) as error:
        load_board(path)
    assert str(error.value).startswith(str(path))


def test_the_boards_that_come_with_it_have_every_recipe_of_the_built_in_teachers(pytestconfig):
    files = (pytestconfig.rootpath / "eval" / "boards").glob("*.yaml")
    boards = {path.stem: load_board(path) for path in files}
    recipes = {path.stem for path in (pytestconfig.rootpath / "recipes").glob("emoji_*.py")}
    assert {row.recipe for board in boards.values() for row in board.rows} == recipes
    budgets = {name: board.cpu_seconds for name, board in boards.items()}
    assert budgets == {"emoji": 1800, "emoji_edm": 1800, "emoji_short": 420}
    assert {(board.threads, len(board.seeds)) for board in boards.values()} == {(1, 3)}
    whole, short = ([row.label for row in boards[name].rows] for name in ("emoji", "emoji_short"))
    assert whole == short and boards["emoji"].teachers == boards["emoji_short"].teachers


def test_a_board_reads_what_it_writes(tmp_path):
    row = Row("demo", 7, options={"train.batch_size": 3}, pairs=PairsOf(5))
    board = board_of(row, search={"roles.student.lr": (0.5, 2.0)})
    (tmp_path / "b.json").write_text(json.dumps(to_dict(board)))
    assert load_board(tmp_path / "b.json") == board


def test_a_run_is_its_recipe_at_so_many_steps_with_rates_that_end_alike():
    recipe = run_of(Row("demo", 500, options={"train.batch_size": 3}), seed=4).recipe
    assert (recipe.train.steps, recipe.train.seed, recipe.train.batch_size) == (500, 4, 3)
    assert recipe.roles["student"].decay == 200  # 80 of 200
    assert recipe.evaluation.num == recipe.train.sample_every == 0


def test_the_hash_of_a_run_is_of_all_that_decides_it_and_of_nothing_else():
    row = Row("demo", 5)
    same = run_of(row).digest
    assert run_of(Row("demo", 5, name="other")).digest == same == run_of(row, cpu_seconds=1).digest
    others = [
        run_of(row, seed=1),
        run_of(row, threads=2),
        run_of(Row("demo", 6)),
        run_of(Row("demo", 5, options={"roles.student.lr": 1e-5})),
        run_of(Row("demo", 5, pairs=PairsOf(5))),
        run_of(Row("demo", 5, pairs=PairsOf(6))),
    ]
    before = [Row("demo", 3, name="a"), Row("demo", 4, name="b")]
    for start in before:
        second = Row("demo", 5, start_from=start.name)
        others.append(Run(board_of(start, second), second, 0))
    assert len({same, *(run.digest for run in others)}) == 9


def test_pairs_are_shared_by_who_starts_from_another():
    first = Row("emoji_dmd_1step", 1, name="half", pairs=PairsOf(9))
    second = Row("emoji_dmd_1step", 1, name="rest", start_from="half")
    board = board_of(first, second)
    assert Run(board, second, 0).pairs.key == ("half", 0)
    plain = Row("demo", 1, name="plain", start_from="half")
    assert Run(board_of(first, plain), plain, 0).pairs is None


def test_another_budget_takes_iterations_in_proportion():
    rows = [Row("demo", 100, name="a"), Row("demo", 10, name="b", start_from="a"), Row("demo", 10, name="c")]
    found = resized(board_of(*rows, cpu_seconds=1000), 100, 2)
    assert [(row.label, row.steps) for row in found.rows] == [("a", 10), ("b", 1), ("c", 1)]
    assert (found.cpu_seconds, found.seeds) == (100, [0, 1])
    with pytest.raises(FewstepError, match=r"--only d: no row of the board; there are a, b, c"):
        chosen(board_of(*rows), ["d", "a"])
    with pytest.raises(FewstepError, match=r"--seeds 4: the board names 3"):
        resized(board_of(*rows), None, 4)
    assert chosen(board_of(*rows), ["c"]) == [rows[2]] and chosen(board_of(*rows), []) == rows


def test_words_about_code_are_no_code():
    code = "def f(x):\n    return x + 1\n"
    words = 'def f(x):\n    """Adds."""\n    # one\n    return (x + 1)\n'
    silent = '"""."""\n\ndef f(x):\n    """."""\n    return x + 1\n'
    assert train._bare(silent) == train._bare('"""Of it."""\n' + words) and "return x + 1" in train._bare(
        code
    )
    assert train._bare(words) != train._bare(words.replace("+ 1", "+ 2"))
    assert train._bare(words) != train._bare(words.replace("f(x)", "f(x, y=0)"))


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A copy of the package's code, of which a file can be changed; a call gives the hashes then."""
    folder = tmp_path / "fewstep"
    shutil.copytree(Path(train.__file__).parents[1], folder, ignore=shutil.ignore_patterns("assets", "*.pyc"))
    monkeypatch.setattr(train, "__file__", str(folder / "leaderboard" / "train.py"))

    def hashes(file, more="LATER = 1\n"):
        path = folder / file
        path.write_text(path.read_text() + more if path.is_file() else more)
        train.code_hash.cache_clear()
        train._sources.cache_clear()
        return {name: train.code_hash(name) for name in METHODS}

    yield hashes
    train.code_hash.cache_clear()
    train._sources.cache_clear()


@pytest.mark.parametrize(
    ("file", "changed"),
    [
        ("methods/sim.py", {"sim"}),
        ("methods/dmd2.py", {"dmd2", "disback", "fdistill", "multi_student"}),  # these build on it
        ("methods/gan.py", {"dmd2", "disback", "fdistill", "multi_student"}),  # through dmd2
        ("methods/terms.py", {*METHODS} - {"boot", "dd1", "dd2", "ladd", "sana_sprint", "scm"}),
        ("methods/segments.py", {"hyper_sd"}),
        ("methods/verdicts.py", {*METHODS}),  # the trainer's
        ("methods/base.py", {*METHODS}),
        ("diffusion/solvers.py", {*METHODS}),
        ("methods/new.py", set()),
        ("report/health.py", set()),
    ],
)
def test_other_code_of_a_method_is_other_code_of_what_builds_on_it_alone(package, file, changed):
    before = package("report/html.py", "")
    after = package(file)
    assert {name for name in before if before[name] != after[name]} == changed


@pytest.mark.parametrize(
    "line",
    [
        "from .boot import BOOT",
        "from . import base, boot",
        "from .. import methods\nfrom ..methods.boot import BOOT",
        "from fewstep.methods.boot import BOOT as Other",
        "from fewstep.methods import boot",
        "import fewstep.methods.boot",
        "if TYPE_CHECKING:\n    from .boot import BOOT",
        "def later():\n    from .boot import BOOT",
    ],
)
def test_however_a_file_imports_a_method_it_depends_on_it(line):
    assert train.METHODS / "boot.py" in train._imported(train.METHODS / "sim.py", line)


@pytest.mark.parametrize(
    ("file", "line", "found"),
    [
        ("training/trainer.py", "from ..methods.boot import BOOT", True),
        ("tokens/deep/down.py", "from ...methods.boot import BOOT", True),
        ("methods/deep/down.py", "from ..boot import BOOT", True),
        ("teachers/boot.py", "from .boot import BOOT", False),  # others of the same name
        ("methods/sim.py", "from ..teachers.boot import BOOT", False),
        ("methods/sim.py", "from mine.fewstep.methods.boot import BOOT", False),
    ],
)
def test_an_import_is_of_the_file_that_it_names(file, line, found):
    assert (train.METHODS / "boot.py" in train._imported(Path(file), line)) is found


@pytest.mark.parametrize("module", ["mine.sim", "sim", "__main__"])
def test_a_method_from_elsewhere_depends_on_all_of_them(package, monkeypatch, module):
    stranger = type("Stranger", (METHODS["sim"],), {"__module__": module})
    monkeypatch.setitem(METHODS, "stranger", stranger)
    assert package("report/html.py", "")["stranger"] != package("methods/boot.py")["stranger"]


# ------------------------------------------------------------------------------------------------------- the search
RATES = {"roles.student.lr": (0.5, 2.0), "roles.critic.lr": (0.1, 10.0), "train.batch_size": (0.5, 2.0)}


def test_trials_are_factors_between_bounds_of_what_a_recipe_has_and_the_first_is_the_recipe():
    row = Row("emoji_boot_1step", 1000)  # which has no critic
    board = board_of(row, search=RATES)
    made = [search.trial_of(board, row, i, 0.2) for i in range(60)]
    assert made[0].options == {} and {one.steps for one in made} == {200}
    assert set(made[1].options) == {"roles.student.lr", "train.batch_size"}
    assert made[7] == search.trial_of(board, row, 7, 0.2) != dataclasses.replace(made[8], name=made[7].name)
    rates = [math.log2(one.options["roles.student.lr"] / 1e-3) for one in made[1:]]
    assert -1 <= min(rates) < -0.8 and 0.8 < max(rates) <= 1 and abs(sum(rates) / 59) < 0.25
    sizes = {one.options["train.batch_size"] for one in made[1:]}
    assert 12 <= min(sizes) < 15 and 40 < max(sizes) <= 48 and all(type(size) is int for size in sizes)


def line(row, trial, fd, cpu=10.0, steps=100, before=(), **options):
    parts = [{"what": what, "cpu_seconds": seconds} for what, seconds in before]
    scores = {str(k): v for k, v in fd.items()}
    return {
        "row": row, "trial": trial, "steps": steps, "options": options, "cpu_seconds": cpu, "before": parts,
        "FD": scores,
    }  # fmt: skip


def test_the_settled_board_has_the_best_trials_and_fills_the_budget_at_the_measured_rate():
    rows = [
        Row("demo", 1, name="one"),
        Row("demo", 1, name="several"),
        Row("demo", 1, name="half", share=0.5, pairs=PairsOf(9)),
        Row("demo", 1, name="rest", start_from="half"),
        Row("demo", 1, name="lost"),
    ]
    pairs = [("9 pairs", 100.0)]
    lines = [
        line("one", 0, {1: 900}, cpu=10, a=0),
        line("one", 1, {1: 800}, cpu=12, a=1),
        line("one", 2, {}, cpu=None, a=2),  # failed
        line("several", 0, {1: 100, 4: 100}, a=0),
        line("several", 1, {1: 199, 4: 50}, a=1),
        line("half", 0, {1: 5}, cpu=20, before=pairs, a=0),
        line("rest", 0, {1: 5}, cpu=40, before=[("half.t0", 777.0)], a=0),
        line("lost", 0, {}, cpu=None),
    ]
    settled = search.settle(board_of(*rows, cpu_seconds=1000), lines)
    found = {row.label: (row.steps, row.options) for row in settled.rows}
    assert found["one"] == (math.floor(970 / 0.11), {"a": 1}) and found["several"] == (9700, {"a": 1})
    assert found["half"] == (math.floor((485 - 100) / 0.2), {"a": 0})  # pairs are part of its half
    assert found["rest"] == (math.floor((970 - 100 - 1925 * 0.2) / 0.4), {"a": 0})
    assert found["lost"] == (1, {})
    with pytest.raises(FewstepError, match=r"rows.half: 100 of 50 s are spent before it begins"):
        search.settle(board_of(*rows, cpu_seconds=100), lines)
