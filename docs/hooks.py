"""Fills the pages of this folder with what the code and the result files say, while the site is built.

A page holds a marker, ``<!-- options -->``, and this file what stands in its place; markers of a method are in the page
that has its name. Links to files of the repository, as they work in a checkout, bring these files into the site.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import json
import posixpath
import re
import types
from collections.abc import Callable, Iterable, Iterator
from functools import cache, partial
from importlib import import_module
from pathlib import Path, PurePosixPath
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "eval" / "results"
MARKER = re.compile(r"^<!-- (\w+)(?: ([\w.:-]+))? -->$", re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s#:]+)(#[^)]*)?\)")
ROLE = re.compile(r":(?:func|class|meth|mod|attr|data):<code>(.*?)</code>")


# -------------------------------------------------------------------------------------------------- reading the code
def entries(section: str, names: Iterable[str]) -> dict[str, str]:
    """Name -> text of the entries of a docstring's section; several may share a line, and several names a text."""
    lines = re.sub(r"\n {5,}", " ", "\n" + section)  # one line for each entry, or for several
    known = "|".join({*names, *re.findall(r"^ {4}(\*{0,2}\w+)[,:]", section, re.MULTILINE)}).replace(
        "*", r"\*"
    )
    parts = re.split(rf"(?:(?<=[.;)] )|\n)\s*((?:{known})(?:, (?:{known}))*): ", lines)[1:]
    return {
        name: " ".join(text.split())
        for together, text in zip(parts[::2], parts[1::2])
        for name in together.split(", ")
    }


def attributes(cls: type) -> dict[str, str]:
    """What the docstring of a dataclass says of its fields."""
    doc = inspect.cleandoc(vars(cls).get("__doc__") or "")
    section = doc.partition("\nAttributes:\n")[2].split("\n\n")[0]
    return entries(section, (field.name for field in dataclasses.fields(cls)))


def kind(hint: Any) -> str:
    """A type as a person reads it in a recipe.yaml."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return ", ".join(json.dumps(value) for value in args)
    if origin in (Union, types.UnionType):
        return " or ".join(kind(arg) for arg in args)
    if origin is list:
        inner = kind(args[0])
        return f"list of ({inner})" if " or " in inner else f"list of {inner}"
    if origin is tuple:
        return f"{len(args)} of {kind(args[0])}"
    return (
        "null"
        if hint is type(None)
        else getattr(hint, "__name__", str(hint))
        if origin is None
        else str(hint)
    )


def shown(value: Any) -> str:
    return f"`{json.dumps(value)}`"


def options(cls: type, prefix: str = "") -> Iterator[tuple[str, str, str, str]]:
    """Name, type, default and meaning of every field, in order; what a group says comes before what its heir adds."""
    hints, said = (
        get_type_hints(cls),
        [attributes(c) for c in reversed(cls.__mro__) if dataclasses.is_dataclass(c)],
    )
    for field in dataclasses.fields(cls):
        text = " Here: ".join(dict.fromkeys(group[field.name] for group in said if field.name in group))
        made = field.default_factory is not dataclasses.MISSING
        default = field.default_factory() if made else field.default
        if dataclasses.is_dataclass(hints[field.name]):
            yield f"`{prefix}{field.name}`", "group of options", "", text
            yield from options(hints[field.name], f"{prefix}{field.name}.")
        else:
            needed = "needed" if default is dataclasses.MISSING else shown(plain(default))
            yield f"`{prefix}{field.name}`", kind(hints[field.name]), needed, text


def plain(value: Any) -> Any:
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value


def table(header: tuple[str, ...], rows: Any) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def first_line(doc: str | None) -> str:
    return " ".join((doc or "").split("\n\n")[0].split())


# ------------------------------------------------------------------------------------------------ markers of a method
def method(name: str) -> Any:
    from fewstep.methods import get_method

    return get_method(name)


def about(name: str) -> str:
    cls = method(name)
    source = cls.__module__.replace(".", "/") + ".py"
    config = cls.Config()
    rows = [
        ("what it is", cls.summary),
        ("papers", ", ".join(f"[{paper}](https://arxiv.org/abs/{paper})" for paper in cls.papers)),
        ("steps", cls.steps),
        ("needs, by default", ", ".join(cls.needs(config))),
        ("trains, by default", ", ".join(f"`{role}`" for role in cls.networks_for(config))),
        ("ends in", cls.exports),
        ("code", f"[{source}](../../{source})"),
    ]
    return table((f"`{name}`", ""), rows)


def method_options(name: str) -> str:
    rows = table(("option", "type", "default", "meaning"), options(method(name).Config))
    return f"## All options\n\n{rows}"


@cache
def recipes() -> dict[str, tuple[str, Any]]:
    """Name -> docstring and recipe of those that come with fewstep."""
    from fewstep.runs.library import load_recipe, recipe_files

    return {
        n: (ast.get_docstring(ast.parse(p.read_text())) or "", load_recipe(n))
        for n, p in recipe_files().items()
    }


def hardware(doc: str) -> str:
    found = re.search(r"Hardware: (.+?)\.(?:\s|$)", " ".join(doc.split()))
    return found[1] if found else ""


def listed(chosen: Callable[[Any], bool]) -> str:
    rows = [
        (f"[`{name}`](../../recipes/{name}.py)", first_line(doc), hardware(doc))
        for name, (doc, recipe) in recipes().items()
        if chosen(recipe)
    ]
    return table(("recipe", "what it makes", "hardware"), rows) if rows else "No recipe yet."


def recipes_of(name: str) -> str:
    return f"## Recipes\n\n{listed(lambda recipe: recipe.method_class.name == name)}"


def results_of(name: str) -> str:
    """Rows of the results of a method's recipes, as the README shows all of them."""
    from fewstep.evaluation.gallery import gallery

    paths = [
        RESULTS / f"{n}.json" for n, (_, recipe) in recipes().items() if recipe.method_class.name == name
    ]
    found = {path.stem: json.loads(path.read_text()) for path in paths if path.is_file()}
    if not found:
        return "## Results\n\nNot measured yet."
    links = ", ".join(f"[{stem}](../../eval/results/{stem}.json)" for stem in found)
    return f"## Results\n\n{gallery(found, all_files())}\n\nHow it was made, and what was tried: {links}."


# ---------------------------------------------------------------------------------------------------- other markers
def fields(name: str) -> str:
    """Options of a dataclass, named by module and class."""
    module, _, cls = name.rpartition(".")
    return table(("field", "type", "default", "meaning"), options(getattr(import_module(module), cls)))


def all_files() -> dict[str, Any]:
    """Results of single recipes."""
    files = sorted(path for path in RESULTS.glob("*.json") if path.stem != "leaderboard")
    return {path.stem: json.loads(path.read_text()) for path in files}


def all_results() -> str:
    from fewstep.evaluation.gallery import gallery

    files = all_files()
    rows = [
        (f"[{stem}](../../eval/results/{stem}.json)", f"`{result['command']}`", result["hardware"])
        for stem, result in files.items()
    ]
    return f"{gallery(files)}\n\n## Files\n\n{table(('file', 'command', 'hardware'), rows)}"


def leaderboard() -> str:
    """The tables of the leaderboard, with its page, its drawings and its trials where they are kept."""
    from fewstep.leaderboard.render import to_markdown

    path = RESULTS / "leaderboard.json"
    if not path.is_file():
        return "Not run yet."
    board = json.loads(path.read_text())
    source = {row["name"]: row["recipe"] for row in board["rows"]}
    text = to_markdown(board, lambda name: f"[`{name}`](../../recipes/{source[name]}.py)").partition("\n")[2]
    kept = {
        "leaderboard.html": "page with plots",
        "leaderboard.png": "drawings of all rows",
        "leaderboard_trials.jsonl": "trials of the search",
        "leaderboard.json": "numbers of every seed",
    }
    links = (
        f"[{what}](../../eval/results/{name})" for name, what in kept.items() if (RESULTS / name).is_file()
    )
    return f"{text.strip()}\n\n{' · '.join(links)}"


def plans() -> str:
    text = (RESULTS / "plans" / "README.md").read_text().partition("\n")[2]
    return re.sub(
        r"^\| (?!recipe )(\w+)", r"| [\1](../../eval/results/plans/\1.json)", text, flags=re.MULTILINE
    )


def cards() -> str:
    return (RESULTS / "cards" / "README.md").read_text().partition("\n")[2].strip()


def teacher(pipeline_class: str) -> str:
    """What an adapter says of itself, and the recipes that are written for its pipelines."""
    from fewstep.teachers.load import adapters

    cls = adapters()[pipeline_class]
    source = cls.__module__.replace(".", "/") + ".py"
    encoders = ", ".join(f"`{name}`" for name in cls.encoders)
    rows = [
        ("adapter", f"[`{cls.__name__}`](../../{source}): {first_line(cls.__doc__)}"),
        ("network", f"`{cls.network}`"),
        ("text encoders", encoders or "none"),
        ("pairs, by default", f"`{cls.solver[0]}` in {cls.solver[1]} steps"),
        ("ComfyUI reads its LoRA", "yes" if cls.comfyui else "no"),
    ]
    kinds = listed(lambda recipe: recipe.teacher.pipeline_class == pipeline_class)
    return f"{table((f'`{pipeline_class}`', ''), rows)}\n\n{kinds}"


def commands() -> str:
    """Every command of the command line with its options."""
    from fewstep.cli.main import parser

    return "\n\n".join(_commands(parser()))


def _commands(parser: argparse.ArgumentParser) -> Iterator[str]:
    inner = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not inner:
        parser.formatter_class = partial(argparse.HelpFormatter, width=100)  # whatever the terminal's is
        usage = re.sub(r"^(?:usage:| {7})", "", parser.format_usage(), flags=re.MULTILINE).strip()
        if parser.get_default("takes_overrides"):
            usage += " [--FIELD VALUE ...]"
        yield f"## {parser.prog}\n\n{parser.description}\n\n```text\n{usage}\n```"
        rows = [_option(action) for action in parser._actions if action.dest != "help"]
        if rows:
            yield table(("argument", "default", "meaning"), rows)
    for action in inner:
        for one in dict.fromkeys(action.choices.values()):
            yield from _commands(one)


def _option(action: argparse.Action) -> tuple[str, str, str]:
    name = (
        ", ".join(f"`{option}`" for option in action.option_strings) or f"`{action.metavar or action.dest}`"
    )
    given = action.default is not None and action.default is not False and action.default != []
    choices = f"one of {', '.join(f'`{choice}`' for choice in action.choices)}" if action.choices else ""
    said = (action.help or "") % vars(action)
    return name, f"`{action.default}`" if given else "", "; ".join(filter(None, [said, choices]))


def exits() -> str:
    """Exit codes, from the docstring of the function that returns them."""
    from fewstep import errors

    said = " ".join((inspect.getdoc(errors.tell) or "").split("\n\n")[1].split())
    rows = re.findall(r"(?:^|; )(\d+(?: \+ N)?) ([^;]*?)(?=; \d|\. )", said)
    return table(("code", "meaning"), [(f"`{code}`", text) for code, text in rows])


def errors() -> str:
    """The exceptions that a user may catch, each with its exit code."""
    from fewstep import errors

    found = [
        cls for cls in vars(errors).values() if isinstance(cls, type) and issubclass(cls, errors.FewstepError)
    ]
    rows = [
        # One that is made with a signal's number has a code by it.
        (
            f"`fewstep.errors.{c.__name__}`",
            "128 + N" if "__init__" in vars(c) else str(c.code),
            first_line(c.__doc__),
        )
        for c in found
    ]
    return table(("exception", "exit code", "what it says"), rows)


def exported() -> str:
    """What ``import fewstep`` offers."""
    import fewstep

    rows = [
        (f"`fewstep.{name}`", first_line(getattr(fewstep, name).__doc__), f"`{module}`")
        for name, module in fewstep._EXPORTS.items()
    ]
    return table(("name", "what it is", "documented in"), rows)


OF_METHODS: dict[str, Callable[[str], str]] = {
    "about": about,
    "options": method_options,
    "recipes": recipes_of,
    "results": results_of,
}
OTHERS: dict[str, Callable[..., str]] = {
    function.__name__: function
    for function in (
        fields,
        all_results,
        leaderboard,
        plans,
        cards,
        teacher,
        commands,
        exits,
        errors,
        exported,
    )
}


def fill(text: str, src_uri: str) -> str:
    """A page with what belongs in place of its markers; comments that are none stay."""

    def filled(found: re.Match[str]) -> str:
        name, argument = found[1], found[2]
        if name in OF_METHODS:
            return OF_METHODS[name](PurePosixPath(src_uri).stem)
        return OTHERS[name](*filter(None, [argument])) if name in OTHERS else found[0]

    return MARKER.sub(filled, text)


# ------------------------------------------------------------------------------------------------------------ mkdocs
def leads_to(src_uri: str, link: str) -> str:
    """Where a link of a page leads, from the root of the repository."""
    return posixpath.normpath(posixpath.join("docs", posixpath.dirname(src_uri), link))


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    from mkdocs.structure.files import File

    here = page.file.src_uri

    def local(found: re.Match[str]) -> str:
        path = leads_to(here, found[1])
        if path.startswith("docs/") or not (ROOT / path).is_file():
            return found[0]  # a page, or what mkdocs warns of
        # As text, for a browser would load a script down and mkdocs make a page of a .md.
        place = "repository/" + path + ("" if path.endswith((".json", ".png", ".html", ".ipynb")) else ".txt")
        if place not in files.src_uris:
            files.append(File.generated(config, place, abs_src_path=str(ROOT / path)))
        return f"]({posixpath.relpath(place, posixpath.dirname(here))})"

    return LINK.sub(local, fill(markdown, here)).replace(" ± ", "\u00a0±\u00a0")


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    """Sphinx's roles of docstrings as links where the site has what they name, else as words."""

    def role(found: re.Match[str]) -> str:
        name = found[1].lstrip("~.")
        return f'<autoref identifier="{name}" optional><code>{name.rpartition(".")[2]}</code></autoref>'

    return ROLE.sub(role, html)


def summary(markdown: str) -> str:
    """The first sentence of a page's prose."""
    for part in re.split(r"\n\s*\n", re.sub(r"```.*?```", "", markdown, flags=re.DOTALL)):
        if re.match(r"[\w`*\[\"(]", text := " ".join(part.split())):
            return re.split(r"(?<=[.:]) (?=[A-Z`])", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text))[0].rstrip(
                ":"
            )
    return ""


def on_env(env: Any, config: Any, files: Any) -> Any:
    """Writes llms.txt, the index of all pages for those who read no menus."""
    from mkdocs.structure.files import File

    lines = [f"# {config.site_name}", "", f"> {config.site_description}"]
    for item in config.nav:
        title, content = next(iter(item.items()))
        lines += ["", f"## {title}", ""]
        for uri in uris(content):
            page = files.get_file_from_path(uri).page
            lines.append(f"- [{page.title}]({page.url}): {summary(page.markdown)}")
    files.append(File.generated(config, "llms.txt", content="\n".join(lines) + "\n"))
    return env


def uris(nav: Any) -> list[str]:
    """Pages of a part of mkdocs.yml's nav, in order."""
    if isinstance(nav, str):
        return [nav]
    return [uri for item in nav for uri in uris(item if isinstance(item, str) else next(iter(item.values())))]
