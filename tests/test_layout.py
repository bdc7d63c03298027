"""Each folder of the package imports only from those below it, no file imports itself in a circle, and functions are
short."""

import ast
import re
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "fewstep"
# From top to bottom; what stands in one line does not import from one another.
ORDER = [
    ["__init__", "__main__"],
    ["cli"],
    ["cost", "leaderboard"],
    ["runs"],
    ["evaluation", "recipe"],
    ["export"],
    ["training"],
    ["data"],
    ["methods", "vision"],
    ["teachers"],
    ["tokens"],
    ["diffusion", "report"],
    ["configs", "extensions", "process"],
    ["bounds", "device", "files", "pictures", "shape"],
    ["assets", "errors", "version"],
]


def modules(package: Path) -> dict[str, Path]:
    """Name within the package -> file; a folder's own file goes by the folder's name, the package's by __init__."""
    files = {path: path.relative_to(package).with_suffix("").parts for path in sorted(package.rglob("*.py"))}
    return {".".join(p[:-1] if p[-1] == "__init__" and len(p) > 1 else p): path for path, p in files.items()}


def imports(package: Path) -> dict[str, set[str]]:
    """Name of each file -> those it imports, wherever the import stands: in functions and for type checkers too."""
    known = modules(package)
    found: dict[str, set[str]] = {name: set() for name in known}

    def add(name: str, target: str) -> None:
        if target.split(".")[0] != package.name:
            return
        inner = target.split(".")[1:] or ["__init__"]
        while ".".join(inner) not in known and len(inner) > 1:  # a name in a module
            inner = inner[:-1]
        if ".".join(inner) not in known:
            inner = ["__init__"]
        found[name] |= {".".join(inner)} - {name}

    for name, path in known.items():
        here = [package.name, *path.relative_to(package).parts[:-1]]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    add(name, alias.name)
            elif isinstance(node, ast.ImportFrom):
                base = here[: len(here) - node.level + 1] if node.level else []
                base = [*base, *(node.module.split(".") if node.module else [])]
                for alias in node.names:
                    add(name, ".".join([*base, alias.name]))
    return found


def room(name: str) -> str:
    return name.split(".")[0]


def upward(arrows: dict[str, set[str]], order: list[list[str]]) -> set[tuple[str, str]]:
    """Imports from a folder that is not below."""
    level = {name: k for k, line in enumerate(order) for name in line}
    return {
        (name, target)
        for name, targets in arrows.items()
        for target in targets
        if room(name) != room(target) and level[room(target)] <= level[room(name)]
    }


def circle(arrows: dict[str, set[str]]) -> set[str]:
    """What is left when files without imports are taken away again and again: circles, and what leads to them."""
    left = {name: set(targets) for name, targets in arrows.items()}
    while gone := {name for name, targets in left.items() if not targets & left.keys()}:
        left = {name: targets for name, targets in left.items() if name not in gone}
    return set(left)


def test_every_folder_has_its_place():
    rooms = {room(name) for name in modules(PACKAGE)}
    listed = [name for line in ORDER for name in line]
    assert rooms == set(listed) and len(listed) == len(rooms)


def test_the_map_is_the_order():
    text = (PACKAGE.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`.*?`) \| \S.*\|$", text.split("## Map")[1].split("\n## ")[0], re.MULTILINE)
    assert [re.findall(r"`(\w+)`", row) for row in rows] == ORDER


def test_no_folder_imports_from_one_that_is_not_below_it():
    assert upward(imports(PACKAGE), ORDER) == set()


def test_no_file_imports_itself_in_a_circle():
    assert not circle(imports(PACKAGE))


def test_an_import_inside_a_function_counts(tmp_path):
    package = tmp_path / "house"
    for folder in ("roof", "cellar"):
        (package / folder).mkdir(parents=True)
        (package / folder / "__init__.py").touch()
    (package / "__init__.py").touch()
    (package / "cellar" / "coal.py").write_text("def burn():\n    from ..roof.chimney import Smoke\n")
    (package / "roof" / "chimney.py").write_text("import house.cellar.coal\n\nclass Smoke: ...\n")
    arrows = imports(package)
    assert arrows["cellar.coal"] == {"roof.chimney"} and arrows["roof.chimney"] == {"cellar.coal"}
    assert upward(arrows, [["roof"], ["cellar"]]) == {("cellar.coal", "roof.chimney")}
    assert circle(arrows) == {"cellar.coal", "roof.chimney"}


LINES = 60  # of the longest function, its signature and docstring included


def functions(source: str) -> dict[str, int]:
    """Name -> lines of every function, those within others too."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    found = [node for node in ast.walk(ast.parse(source)) if isinstance(node, kinds)]
    return {f"{node.name}, line {node.lineno}": (node.end_lineno or 0) - node.lineno + 1 for node in found}


def test_no_function_is_longer_than_what_it_says():
    long = {
        f"{name}: {where}": lines
        for name, path in modules(PACKAGE).items()
        for where, lines in functions(path.read_text(encoding="utf-8")).items()
        if lines >= LINES
    }
    assert not long


def test_lines_of_a_function_are_all_of_it():
    source = 'class A:\n    def f(\n        self,\n    ):\n        """Words.\n\n        More."""\n        return 0\n'
    assert functions(source) == {"f, line 2": 7}
    assert functions("@one\n@two\nasync def g():\n    def h(): ...\n") == {"g, line 3": 2, "h, line 4": 1}
