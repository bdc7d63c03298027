"""What users add to fewstep: methods, teacher adapters, rewards and extractors, in files of their own or in packages.

A run keeps in ``RUN/code`` the files that it was trained with, and whoever reads its ``recipe.yaml`` executes them
first. Packages are kept by name only; those with an entry point of the group ``fewstep`` need not be named at all.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import os
import sys
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib.machinery import PathFinder
from importlib.metadata import distribution, entry_points, packages_distributions
from pathlib import Path
from types import ModuleType
from urllib.parse import urlparse
from urllib.request import url2pathname

from .errors import RecipeError
from .files import write, write_json

INDEX = "index.json"
SCRIPT = "fewstep_script_"  # what a script is called as a module, before a hash of its path
_loaded: set[str] = set()  # digests of kept code that this process has
_reading = 0


# ------------------------------------------------------------------------------------------------------------ packages
@cache
def plugins() -> None:
    """Imports what installed packages name in the entry-point group ``fewstep``; their modules register themselves."""
    for point in entry_points(group="fewstep"):
        try:
            point.load()
        except (Exception, SystemExit) as error:
            package = point.dist.name if point.dist else "a package"
            print(
                f"fewstep: note: {package}: its entry point {point.name} = {point.value} cannot be loaded: "
                f"{_line(error)}; upgrade or uninstall {package}",
                file=sys.stderr,
            )


# ------------------------------------------------------------------------------------------------------------- scripts
class Reached(BaseException):
    """A script that is only read has come to where it runs its recipe."""


def only_read() -> None:
    """Where a run begins: ends a script that is only read, and has no ``if __name__ == "__main__"``."""
    if _reading:
        raise Reached('it runs its recipe when it is imported; put that under if __name__ == "__main__"')


@contextmanager
def _only_reading() -> Iterator[None]:
    global _reading
    _reading += 1
    try:
        yield
    finally:
        _reading -= 1


def read_script(path: Path) -> ModuleType:
    """A script as a module that nothing else is called like; what it registers is known from then on.

    Its folder comes first where modules are looked for, as under ``python SCRIPT``.
    """
    name = SCRIPT + hashlib.sha256(str(path.absolute()).encode()).hexdigest()[:8] + f"_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec and spec.loader
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    _look_in(path.absolute().parent)
    try:
        with _only_reading():
            spec.loader.exec_module(module)
    except Reached:  # what it registers, it has registered by then
        pass
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _look_in(folder: Path) -> None:
    sys.path[:] = [str(folder), *(place for place in sys.path if place != str(folder))]


# ------------------------------------------------------------------------------------------------------------- keeping
def keep(folder: Path, classes: Iterable[type], modules: Iterable[str] = ()) -> None:
    """Copies the files in which these classes are defined, with all they import that is not installed.

    Args:
        folder: of the copies and their index; is not made where all of it is fewstep's own. modules: looked up by
            name when they are needed, and may be none.
    """
    index: dict[str, list[str]] = {"scripts": [], "modules": []}
    files: dict[str, Path] = {}
    for name in dict.fromkeys(cls.__module__ for cls in classes):
        if name.split(".")[0] == "fewstep":
            continue
        script, own, path = _is_script(name), _own_name(name), _file(name)
        if path is None:
            print(
                f"fewstep: note: what {name} registers stands in no file, so this run cannot be resumed or exported "
                "elsewhere: put it into a .py file and import it",
                file=sys.stderr,
            )
        elif script or not _installed(own, path):
            files |= _with_imports(own, path, script)
            index["scripts" if script else "modules"].append(path.name if script else own)
        else:
            index["modules"].append(own)
    for name in modules:
        path = _file(name)
        if path and not _installed(name, path):
            files |= _with_imports(name, path)
    if not files and not index["modules"]:
        return
    contents = {
        place: path.read_bytes() for place, path in files.items()
    }  # of this very folder, in a run resumed
    for place, content in contents.items():
        write(folder / place, content)
    write_json(folder / INDEX, index)
    _loaded.add(_digest(folder))


def _is_script(name: str) -> bool:
    """Whether a module was run as a file, and not imported by its name."""
    return name.startswith(SCRIPT) or (name == "__main__" and sys.modules[name].__spec__ is None)


def _own_name(name: str) -> str:
    """What a module is called by those who import it: __main__ is no name."""
    if _is_script(name):
        return str(name)
    spec = sys.modules[name].__spec__ if name in sys.modules else None
    return spec.name if spec else name


def _with_imports(name: str, path: Path, script: bool = False) -> dict[str, Path]:
    """Place below the folder of copies -> file, of a module and of what it imports, here or later, from where it is."""
    found: dict[str, Path] = {}
    queue = [(name, path, path.name if script else "")]
    while queue:
        name, path, place = queue.pop()
        place = place or "/".join(name.split(".")) + ("/__init__.py" if path.name == "__init__.py" else ".py")
        if place in found:
            continue
        found[place] = path
        parents = [name.rpartition(".")[0]] if "." in name else []
        for other in [*parents, *_imports(name, path)]:
            file = _file(other)
            if file and not _installed(other, file):
                queue.append((other, file, ""))
    return found


def _imports(name: str, path: Path) -> Iterator[str]:
    """Modules that a file imports, and names in them that may be modules, wherever the import stands."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (package or not node.level):
            relative = "." * node.level + (node.module or "")
            base = importlib.util.resolve_name(relative, package) if node.level else relative
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def _file(name: str) -> Path | None:
    """The Python file of a module, which need not be imported; None where it has none."""
    file = None
    if name in sys.modules:
        file = getattr(sys.modules[name], "__file__", None)
    elif name:
        parent = name.rpartition(".")[0]
        above = _file(parent) if parent else None
        if not parent or above:
            spec = PathFinder.find_spec(name, [str(above.parent)] if above else None)
            file = spec.origin if spec else None
    return Path(file) if file and file.endswith(".py") and Path(file).is_file() else None


def _installed(name: str, path: Path) -> bool:
    """Whether a module comes with Python or in a package, be it one that is installed as editable."""
    if name.split(".")[0] == "fewstep" or path.is_relative_to(Path(os.__file__).parent):
        return True
    if {"site-packages", "dist-packages"} & set(path.parts):
        return True
    return any(path.is_relative_to(folder) for folder in _editable(name.split(".")[0]))


@cache
def _editable(top: str) -> list[Path]:
    """Folders of the packages that are installed as editable and bring a module of this name."""
    found = (
        distribution(name).read_text("direct_url.json") for name in packages_distributions().get(top, ())
    )
    return [Path(url2pathname(urlparse(json.loads(text)["url"]).path)) for text in found if text]


# ------------------------------------------------------------------------------------------------------------- loading
def load(folder: Path) -> None:
    """Executes what :func:`keep` has put there, once; nothing where there is no index.

    Raises:
        RecipeError: an index that is none; a file that cannot be imported, with the reason.
    """
    folder = folder.absolute()
    if not (folder / INDEX).is_file():
        return
    scripts, modules = _read_index(folder / INDEX)
    if (digest := _digest(folder)) in _loaded:
        return
    try:
        _put_first(folder, scripts)
        with _only_reading():
            for name in modules:
                importlib.import_module(name)
        for name in scripts:
            read_script(folder / name)
    except (Exception, SystemExit, Reached) as error:
        raise RecipeError(
            f"{_place(error, folder)}: {_line(error)}; this run was trained with this code: install what it needs, or "
            "mend it there"
        ) from error
    _loaded.add(digest)


def _read_index(path: Path) -> tuple[list[str], list[str]]:
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        scripts, modules = index["scripts"], index["modules"]
        if not all(isinstance(name, str) for name in [*scripts, *modules]):
            raise ValueError("a name that is no text")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RecipeError(
            f'{path}: is damaged ({error!r}); expected {{"scripts": [...], "modules": [...]}}'
        ) from error
    return scripts, modules


def _files(folder: Path) -> list[Path]:
    return [
        path for path in sorted(folder.rglob("*.py")) if not path.name.startswith(".")
    ]  # half a file is hidden


def _digest(folder: Path) -> str:
    """Of all code in a folder."""
    sha = hashlib.sha256()
    for path in _files(folder):
        sha.update(f"{path.relative_to(folder).as_posix()}\0".encode() + path.read_bytes() + b"\0")
    return sha.hexdigest()


def _put_first(folder: Path, scripts: list[str]) -> None:
    """Its modules are found before others of their names, those of another run among them, now and later."""
    places = [path.relative_to(folder).as_posix() for path in _files(folder)]
    tops = {place.split("/")[0].removesuffix(".py") for place in places if place not in scripts}
    for name in [n for n in sys.modules if n.split(".")[0] in tops]:
        del sys.modules[name]
    importlib.invalidate_caches()
    _look_in(folder)


def _place(error: BaseException, folder: Path) -> str:
    """File and line, below the folder, at which an import has failed."""
    frames = traceback.extract_tb(error.__traceback__)
    inside = [
        f"{frame.filename}:{frame.lineno}" for frame in frames if Path(frame.filename).is_relative_to(folder)
    ]
    if isinstance(error, SyntaxError) and error.filename:
        inside.append(f"{error.filename}:{error.lineno}")
    return inside[-1] if inside else str(folder / INDEX)


def _line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
