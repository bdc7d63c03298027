"""The documentation site: what pages show is executed or parsed, what they say of the code is what the code says."""

import argparse
import dataclasses
import importlib.util
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Literal, get_type_hints

import pytest
import yaml
from processes import Fork

from fewstep import recipe as recipes
from fewstep.cli.main import parser
from fewstep.methods import METHODS
from fewstep.runs.library import load_recipe, recipe_files
from fewstep.teachers.load import adapters

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = {path.relative_to(DOCS).as_posix(): path.read_text() for path in sorted(DOCS.rglob("*.md"))}
BLOCK = re.compile(r"^(<!-- needs weights -->\n+)?```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
OUTSIDE = ["README.md", "CONTRIBUTING.md", "recipes/README.md", "recipes/launch/README.md", "eval/README.md"]
TABLES = {f"table of tests/{name}.py" for name in ("methods/test_support", "export/test_readers")}
NOTES = {"needs weights", *TABLES, "end of table"}
OF_METHODS = ["about", "options", "recipes", "results"]


def _hooks():
    spec = importlib.util.spec_from_file_location("docs_hooks", DOCS / "hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


hooks = _hooks()


# ---------------------------------------------------------------------------------------------------------- snippets
def blocks(text: str, *languages: str) -> list[tuple[bool, str]]:
    """(whether it needs weights, the code) of each block in one of these languages."""
    return [(bool(needs), code) for needs, language, code in BLOCK.findall(text) if language in languages]


def execute(text: str) -> None:
    """The Python of a page from top to bottom, in one namespace; what begins with the name of a file is that file."""
    names: dict = {"__name__": "page"}
    sys.path.insert(0, os.getcwd())
    for needs_weights, code in blocks(text, "python"):
        compiled = compile(code, "page", "exec")
        if needs_weights:
            continue
        if file := re.match(r"# (\w+)\.py\n", code):
            Path(file[1] + ".py").write_text(code)
            import_module(file[1])
        else:
            exec(compiled, names)


def test_every_block_is_in_a_language_that_is_read_here():
    for page, text in PAGES.items():
        fences = re.findall(r"^ *```(.*)$", text, re.MULTILINE)
        assert len(fences) == 2 * len(BLOCK.findall(text)), page
        assert {word for word in fences if word} <= {"python", "bash", "text", "yaml", "json"}, page


@pytest.mark.usefixtures("sdxl")  # imports once what the forks need
@pytest.mark.parametrize("page", [page for page, text in PAGES.items() if blocks(text, "python")])
def test_what_a_page_shows_in_python_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = tmp_path / "said.txt"
    assert Fork(lambda: execute(PAGES[page]), said).wait() == 0, said.read_text()


def commands(text: str) -> list[list[str]]:
    """Words of every command of a page: lines of its shell blocks, and of those that are indented."""
    shells = "\n".join(code for _, code in blocks(text, "bash", "sh", "console"))
    lines = [
        *shells.replace("\\\n", " ").splitlines(),
        *re.findall(r"^    (fewstep .*)", BLOCK.sub("", text), re.MULTILINE),
    ]
    found = []
    for line in lines:
        lexer = shlex.shlex(line.removeprefix("$ "), posix=True, punctuation_chars="|&;>")
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if not re.fullmatch(r"[|&;>]+", word):
                words.append(word)
            elif words:
                found.append(words)
                words = []
    return found


def leaves(command: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    inner = [a.choices.values() for a in command._actions if isinstance(a, argparse._SubParsersAction)]
    return [leaf for one in inner for choice in one for leaf in leaves(choice)] if inner else [command]


TEXTS = {**PAGES, **{name: (ROOT / name).read_text() for name in OUTSIDE}}
COMMANDS = [(page, words) for page, text in TEXTS.items() for words in commands(text)]


def check_recipe(name: str, overrides: list[str]) -> None:
    """A recipe that comes with fewstep, or a file of the reader's, or a word in capitals for any."""
    stem = name.removesuffix(".py").removeprefix("recipes/")
    if name.isupper() or (stem not in recipe_files() and name.endswith((".py", ".yaml"))):
        return
    words = [word for word in overrides if word != "--smoke"]
    assert recipes.override(load_recipe(stem), words)


def check(words: list[str]) -> None:
    """That a command exists, takes these arguments, and that what it names is there."""
    while "=" in words[0]:
        words = words[1:]
    for i, word in enumerate(words):
        if re.match(r"(recipes|eval|tests)/\w+\.py$", word):
            assert (ROOT / word).is_file(), words
            if word.startswith("recipes/") and not word.startswith("recipes/train_"):
                check_recipe(word, words[i + 1 :])
    if "-m" in words and words[words.index("-m") + 1] == "fewstep":  # of torchrun
        words = words[words.index("-m") + 1 :]
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), words
    if words[0] != "fewstep":
        return
    whole = parser()
    for leaf in leaves(whole):
        leaf.allow_abbrev = False  # what is shown is spelt out
    args, rest = whole.parse_known_args(words[1:])
    assert args.takes_overrides or not rest, f"{words}: {rest}"
    if getattr(args, "recipe", None):
        check_recipe(args.recipe, rest)
    if args.command == "recipes" and args.action == "copy":
        assert args.name in recipe_files() or args.name.isupper(), words


@pytest.mark.parametrize("page", sorted({page for page, _ in COMMANDS}))
def test_commands_of_a_page_are_what_the_parser_takes(page):
    for words in (words for where, words in COMMANDS if where == page):
        check(words)


def test_commands_are_read_as_a_shell_reads_them():
    text = "```bash\n# first\nfewstep train a \\\n  --b c   # why\nx=1 make demo && fewstep methods | head\n```\n"
    text += "\n    fewstep doctor\n"
    assert commands(text) == [
        ["fewstep", "train", "a", "--b", "c"],
        ["x=1", "make", "demo"],
        ["fewstep", "methods"],
        ["head"],
        ["fewstep", "doctor"],
    ]


@pytest.mark.parametrize(
    "line",
    [
        "fewstep trian emoji_dmd2_1step",
        "fewstep train emoji_dmd3_1step",
        "fewstep train emoji_dmd2_1step --train.stepz 3",
        "fewstep eval fid a b --kidd",
        "fewstep eval fid a b --extract looking:colours",
        "fewstep recipes copy nothing .",
        "make coffee",
        "python eval/nothing.py",
        "torchrun --nproc_per_node 8 recipes/sdxl_dmd2_4step.py --imags images",
        "torchrun --nproc_per_node 8 -m fewstep resum runs/mine",
    ],
)
def test_a_command_that_is_none_is_found(line):
    with pytest.raises((SystemExit, AssertionError, ValueError)):
        check(shlex.split(line))


# ------------------------------------------------------------------------------------------------------------- pages
def test_the_menu_has_every_page_once():
    menu = hooks.uris(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    assert sorted(menu) == sorted(PAGES)


def test_every_method_has_a_page_with_what_the_code_says_of_it():
    for name in METHODS:
        if METHODS[name].__module__.startswith("fewstep."):
            markers = re.findall(r"^<!-- (\w+) -->$", PAGES.get(f"methods/{name}.md", ""), re.MULTILINE)
            assert sorted(set(markers) & set(OF_METHODS)) == OF_METHODS, name


def test_every_marker_is_one_that_is_filled():
    known = {*hooks.OF_METHODS, *hooks.OTHERS}
    for page, text in PAGES.items():
        notes = set(re.findall(r"<!-- (.*?) -->", re.sub(r"`[^`\n]*`", "", text))) - NOTES
        assert {note.split()[0] for note in notes} <= known, page
        assert {note for note in notes if not hooks.MARKER.search(f"<!-- {note} -->")} == set(), page


def test_links_of_pages_lead_somewhere():
    for page, text in PAGES.items():
        prose = re.sub(r"`[^`\n]*`", "", BLOCK.sub("", text))
        for link in re.findall(r"\]\(([^)\s#]+)[^)]*\)", prose):
            assert link.startswith(("http://", "https://")) or ((DOCS / page).parent / link).is_file(), (
                f"{page}: {link}"
            )


def test_every_extra_is_told_to_those_who_install():
    extras = re.findall(
        r"^(\w+) = \[\"",
        (ROOT / "pyproject.toml").read_text().split("dependencies]")[1].split("\n[")[0],
        re.M,
    )
    assert {"docs", "test"} < set(extras) == set(re.findall(r"`fewstep\[(\w+)\]`", PAGES["start/install.md"]))


def test_every_teacher_has_a_page():
    markers = [
        name
        for text in PAGES.values()
        for name in re.findall(r"^<!-- teacher (\w+) -->$", text, re.MULTILINE)
    ]
    assert {*markers, "DDIMPipeline"} == {
        name for name, cls in adapters().items() if cls.__module__.startswith("fewstep.")
    }
    assert "DDIMPipeline" in PAGES["teachers/ddpm.md"]


# --------------------------------------------------------------------------------------------------- from the code
@dataclass
class Group:
    """A group.

    Attributes:
        first: its first (a: b). second, third: both
            of them; more. fourth: the last.
    """

    first: int
    second: float | None = None
    third: Literal["x", "y"] = "x"
    fourth: list[int | float] = dataclasses.field(default_factory=lambda: [1, 2.5])


@dataclass
class Heir(Group):
    """An heir.

    Attributes:
        first: of the heir's.
        own: a pair of first: and second.

    More.
    """

    own: tuple[float, float] = (0.0, 1.0)


def test_options_are_read_from_docstrings_of_the_class_and_what_it_inherits():
    assert list(hooks.options(Heir)) == [
        ("`first`", "int", "needed", "its first (a: b). Here: of the heir's."),
        ("`second`", "float or null", "`null`", "both of them; more."),
        ("`third`", '"x", "y"', '`"x"`', "both of them; more."),
        ("`fourth`", "list of (int or float)", "`[1, 2.5]`", "the last."),
        ("`own`", "2 of float", "`[0.0, 1.0]`", "a pair of first: and second."),
    ]


@pytest.mark.parametrize(
    "cls",
    [
        *(cls.Config for _, cls in sorted(METHODS.items()) if cls.__module__.startswith("fewstep.")),
        *(getattr(recipes, name) for name in recipes.__all__ if name.endswith("Config")),
    ],
    ids=lambda cls: cls.__qualname__,
)
def test_every_option_is_explained(cls):
    rows = [row for row in hooks.options(cls) if "." not in row[0]]
    assert [row[0] for row in rows] == [f"`{field.name}`" for field in dataclasses.fields(cls)]
    assert [row[0] for row in hooks.options(cls) if not row[3]] == []


def test_the_page_of_fields_has_every_part_of_a_recipe():
    parts = set(
        re.findall(r"^<!-- fields fewstep\.recipe\.(\w+) -->$", PAGES["reference/recipe.md"], re.MULTILINE)
    )
    hints = get_type_hints(recipes.Recipe)
    own = {hint.__name__ for hint in hints.values() if dataclasses.is_dataclass(hint)}
    assert parts == own | {"RoleConfig", "ShapeConfig"}


def test_the_page_of_commands_has_every_command_with_every_option():
    sections = dict(re.findall(r"^## (.*?)\n(.*?)(?=^##|\Z)", hooks.commands(), re.DOTALL | re.MULTILINE))
    assert list(sections) == [leaf.prog for leaf in leaves(parser())] and len(sections) > 20
    for leaf in leaves(parser()):
        named = [o for action in leaf._actions for o in action.option_strings if action.dest != "help"]
        assert [option for option in named if f"`{option}`" not in sections[leaf.prog]] == [], leaf.prog
        silent = {str(a.option_strings or a.dest) for a in leaf._actions if not (a.help or a.choices)}
        assert silent <= {"['--top-k']", "['--top-p']"}, leaf.prog  # what samplers call so everywhere
        assert ("[--FIELD VALUE ...]" in sections[leaf.prog]) == leaf.get_default("takes_overrides")


def test_the_page_of_errors_has_every_exit_code():
    rows = dict(re.findall(r"^\| `(.*?)` \| (.*?) \|$", hooks.exits(), re.MULTILINE))
    assert list(rows) == ["0", "2", "3", "4", "5", "128 + N"] and rows["5"] == "another process was lost"
    errors = hooks.errors()
    assert "| `fewstep.errors.Interrupted` | 128 + N |" in errors
    assert (
        "| `fewstep.errors.TrainingError` | 3 | The numbers went wrong" in errors
        and "LostProcess` | 5 |" in errors
    )


def test_rows_of_tables_have_as_many_cells_as_their_heads():
    for page, text in PAGES.items():
        for rows in re.findall(r"(?:^\|.*\n)+", hooks.fill(text, page) + "\n", re.MULTILINE):
            cells = [len(re.findall(r"(?<!\\)\|", row)) for row in rows.splitlines()]
            assert len(set(cells)) == 1 and len(cells) > 2, f"{page}: {rows[:200]}"


def test_results_of_a_method_are_those_of_its_recipes():
    text = hooks.fill("<!-- results -->", "methods/phased_dmd.md")
    rows = re.findall(r"^\| `(\w+)`", text, re.MULTILINE)
    assert set(rows) == {"emoji_phased_dmd_4step", "emoji_flow_phased_dmd_4step"}
    assert all(f"](../../eval/results/{name}.json)" in text for name in rows)
    listed = re.findall(
        r"^\| \[`(\w+)`\]", hooks.fill("<!-- recipes -->", "methods/phased_dmd.md"), re.MULTILINE
    )
    assert {*rows, "sdxl_phased_dmd_4step"} <= set(listed)


def test_a_recipe_is_listed_once_with_its_hardware():
    listed = [
        row for name in METHODS for row in re.findall(r"^\| \[.*", hooks.recipes_of(name), re.MULTILINE)
    ]
    assert sorted(re.findall(r"recipes/(\w+)\.py", "\n".join(listed))) == sorted(recipe_files())
    assert [row for row in listed if re.search(r"\| *\|$", row)] == []


# ---------------------------------------------------------------------------------------------------------- the site
@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site, built as CI builds it."""
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    folder = tmp_path_factory.mktemp("site")
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    assert not done.returncode, done.stdout[-3000:] + done.stderr[-3000:]
    return folder


@pytest.mark.slow
def test_the_site_takes_nothing_from_a_network(site):
    pages = {path: path.read_text() for path in site.rglob("*.html")}
    assert len(pages) > len(PAGES)
    loads = r"<(?:script|img|iframe|source)[^>]*\ssrc=\"?(?:https?:)?//"
    loads += r"|<link(?![^>]*rel=\"?canonical)[^>]*href=\"?(?:https?:)?//"
    assert [str(path) for path, text in pages.items() if re.search(loads, text)] == []
    assert [
        path for path in site.rglob("*.css") if re.search(r"url\(\"?(?:https?:)?//", path.read_text())
    ] == []


@pytest.mark.slow
def test_the_site_shows_what_belongs_in_place_of_markers(site):
    page = (site / "methods" / "dmd2.html").read_text()
    assert (
        "critic_on_student_turn" in page
        and "recipes/sdxl_dmd2_4step.py.txt" in page
        and "emoji_dmd2_4step" in page
    )
    assert "<!-- options -->" not in page and ":func:" not in page
    for name in ("eval/results/emoji_dmd2_4step.json", "recipes/emoji_dmd2_4step.py"):
        brought = site / "repository" / (name if name.endswith(".json") else name + ".txt")
        assert brought.read_text() == (ROOT / name).read_text()
    assert (
        'id="fewstep.diffusion.schedules.Schedule"'
        in (site / "reference" / "api" / "schedules.html").read_text()
    )


@pytest.mark.slow
def test_the_index_for_those_who_read_no_menus_has_every_page_with_a_sentence(site):
    lines = re.findall(r"^- \[(.+?)\]\((.+?)\): (.*)$", (site / "llms.txt").read_text(), re.MULTILINE)
    assert sorted(place for _, place, _ in lines) == sorted(page.replace(".md", ".html") for page in PAGES)
    assert all((site / place).is_file() for _, place, _ in lines)
    assert [title for title, _, sentence in lines if not 10 < len(sentence) < 400] == []
