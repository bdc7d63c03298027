"""Pages of methods: each is there, and the functions, tests and options that it names are too."""

import ast
import re
from dataclasses import fields, is_dataclass
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest

from fewstep import configs
from fewstep.methods import METHODS
from fewstep.recipe import Recipe

ROOT = Path(__file__).parent.parent
PAGES = ROOT / "docs" / "methods"
ORDER = (
    "<!-- about -->",
    "## Idea",
    "## Loss",
    "## What an iteration does",
    "## Options that matter",
    "<!-- options -->",
    "## Where this differs from the paper",
    "## What goes wrong",
    "<!-- recipes -->",
    "<!-- results -->",
)
OWN = sorted(name for name, method in METHODS.items() if method.__module__.startswith("fewstep."))


def page(name):
    return (PAGES / f"{name}.md").read_text()


def section(name, title):
    return page(name).split(f"## {title}\n")[1].split("\n## ")[0]


@cache
def slow_by_name():
    """Name of every test -> whether all of that name are slow."""
    found = {}
    for path in (ROOT / "tests").rglob("test_*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                slow = any(re.search("mark.(slow|long)", ast.unparse(d)) for d in node.decorator_list)
                found[node.name] = found.get(node.name, True) and slow
    return found


def there(dotted):
    """Whether ``a.b.C.d`` is a module of fewstep and what follows lies in it."""
    parts = dotted.split(".")
    for i in range(len(parts), 0, -1):
        try:
            value = import_module(".".join(["fewstep", *parts[:i]]))
        except ModuleNotFoundError:
            continue
        for part in parts[i:]:
            if not hasattr(value, part):
                return False
            value = getattr(value, part)
        return True
    return False


def is_option(method, option):
    """Whether a recipe of the method takes it: the method's own, ``role.field`` or ``section.field``."""
    owner, _, field = option.rpartition(".")
    if not owner:
        return field in {f.name for f in fields(method.Config)}
    sections = {f.name: f.default_factory for f in fields(Recipe)} | {
        "teacher": configs.TeacherConfig,
        "data": configs.DataConfig,
        "train": configs.TrainConfig,
    }
    roles = {*method.networks_for(method.Config()), *method.extras}
    config = (
        configs.RoleConfig if owner in {re.sub(r"_?\d+$", "", role) for role in roles} else sections[owner]
    )
    return is_dataclass(config) and field in {f.name for f in fields(config)}


def test_every_method_has_a_page_and_every_page_a_method():
    assert sorted(path.stem for path in PAGES.glob("*.md")) == sorted([*OWN, "index"])
    assert not [name for name in OWN if f"]({name}.md)" not in page("index")]


@pytest.mark.parametrize("name", OWN)
def test_a_page_has_its_parts_in_order_and_is_no_book(name):
    title, *lines = page(name).splitlines()
    assert title.startswith("# ") and 60 <= len(lines) < 120
    assert tuple(line for line in lines if line.startswith(("#", "<!--"))) == ORDER
    equations = re.findall(r"```text\n(.*?)```", page(name), re.DOTALL)
    assert equations and all(len(line) <= 96 for block in equations for line in block.splitlines())


@pytest.mark.parametrize("name", OWN)
def test_what_a_page_says_of_the_code_is_there(name):
    known, text = slow_by_name(), page(name)
    rows = [row.split("|") for row in section(name, "Loss").splitlines() if row.startswith("| ")][1:]
    where = [dotted for row in rows for dotted in re.findall(r"`([\w.]+)`", row[2])]
    assert where and not [dotted for dotted in where if not there(dotted)]
    named = re.findall(r"`(test_\w+)`( \(slow\))?", text)
    assert named and not [test for test, _ in named if test not in known]
    assert not [test for test, slow in named if known[test] != bool(slow)]


@pytest.mark.parametrize("name", OWN)
def test_the_options_that_a_page_advises_on_are_those_of_its_recipes(name):
    bullets = re.findall(r"^- (.*?): ", section(name, "Options that matter"), re.MULTILINE)
    options = [option for bullet in bullets for option in re.findall(r"`([\w.]+)`", bullet)]
    assert 3 <= len(bullets) <= 7 and options
    assert not [option for option in options if not is_option(METHODS[name], option)]


@pytest.mark.parametrize("name", [*OWN, "index"])
def test_links_between_pages_lead_somewhere(name):
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", page(name)) if not link.startswith("http")]
    assert not [link for link in links if not (PAGES / link).exists()]
