"""Texts that a user gives, prompts or captions: lines of a file, or a column of a table; anything else is refused.

What is read is trained on, so nothing is believed for its name alone: bytes that are no UTF-8, markup of another
program and cells that hold no text end in one line that says where.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..errors import FewstepError, why
from ..pictures import fault
from ..teachers.references import Edit

TABLES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
OTHERS = (
    ".yaml",
    ".yml",
    ".xml",
    ".html",
    ".htm",
    ".md",
    ".toml",
    ".ini",
    ".srt",
    ".vtt",
    ".rtf",
    ".tex",
    ".py",
)
COLUMNS = ("text", "caption", "prompt")  # whatever their case
REFERENCE = "reference"  # the column of images that a text speaks of
ANOTHER = (
    (b"\xff\xfe", "UTF-16"),
    (b"\xfe\xff", "UTF-16"),
    (b"PK\x03\x04", "a zip file"),
    (b"\x1f\x8b", "gzip"),
)

Row = tuple[str, Any]  # where it stands, as in "line 3", and what stands there


@dataclass(frozen=True)
class Texts:
    """Texts in their order.

    Attributes:
        texts: as they are in the file. places: where each stands, as in "line 3". records: rows of a table, text
            included; empty for lines.
    """

    texts: tuple[str, ...]
    places: tuple[str, ...]
    records: tuple[dict[str, Any], ...] = ()


def is_table(path: str | Path) -> bool:
    return Path(path).suffix.lower() in TABLES


def column_for(source: str | None, column: str | None) -> str | None:
    """The column of a recipe for this file, which lines and built-in prompts have no use for."""
    return column if source is not None and has_columns(source) else None


def has_columns(source: str) -> bool:
    """Whether it is a table, or a set of tables or of shards."""
    return is_table(source) or Path(source).suffix in (".arrow", ".tar") or Path(source).is_dir()


def read(path: str | Path, column: str | None = None, blank: Literal["skip", "refuse"] = "refuse") -> Texts:
    """One text a line (UTF-8, with or without a byte order mark), or those of a table: JSON lines, JSON, CSV, TSV, and
    Parquet where pyarrow is installed.

    Args:
        column: of a table; None is its only one called text, caption or prompt.
        blank: whether a line without text is left out, or refused, for where position matters.

    Raises:
        FewstepError: in one line that names the file, the place in it, and the remedy.
    """
    path = Path(path).expanduser()
    if is_table(path):
        return _of_table(path, column)
    if column is not None:
        raise FewstepError(
            f"{path} has no column {column!r}: it is no table ({', '.join(TABLES)}); leave it out"
        )
    lines = [(f"line {number}", line) for number, line in enumerate(read_lines(path), 1)]
    if blank == "skip":
        lines = [(place, line) for place, line in lines if line.strip()]
    if empty := next((place for place, line in lines if not line.strip()), None):
        raise FewstepError(f"{path}, {empty} is empty: expected a prompt; remove the line")
    if not lines:
        raise FewstepError(f"{path} holds no prompt; expected one per line")
    return Texts(tuple(line for _, line in lines), tuple(place for place, _ in lines))


def read_lines(path: Path) -> list[str]:
    """Lines of a text file, split at line feeds only: what else separates lines for Python may stand in a prompt.

    Raises:
        FewstepError: no text, or text of another program.
    """
    text = read_text(path).rstrip("\r\n")
    if path.suffix.lower() in OTHERS:
        raise FewstepError(
            f"{path}: {path.suffix} is no list of prompts; expected one per line, or a table: {', '.join(TABLES)}"
        )
    if "\r" in text and "\n" not in text:
        raise FewstepError(f"{path}: its lines end in carriage returns alone; save it with line feeds")
    if _is_json(text):
        raise FewstepError(f"{path} holds JSON, which would be read as prompts; call it .jsonl, or .json")
    return [line.removesuffix("\r").removeprefix("\ufeff") for line in text.split("\n")] if text else []


def read_text(path: Path) -> str:
    """All of a UTF-8 text file, without its byte order mark.

    Raises:
        FewstepError: no such file, or no such text, with the first byte that shows it.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise FewstepError(f"{path} cannot be read ({why(error)}): expected a UTF-8 text file") from None
    kind = next((name for begin, name in ANOTHER if data.startswith(begin)), None)
    try:
        found, at = "", data.index(b"\0")
    except ValueError:
        try:
            return data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            found, at = " (as in Latin-1 and Windows-1252)", error.start
    line = data.count(b"\n", 0, at) + 1
    said = f"it is {kind}" if kind else f"{data[at]:#04x} at byte {at}, line {line}, is none{found}"
    raise FewstepError(f"{path} is no UTF-8 text: {said}; save it as UTF-8")


def _is_json(text: str) -> bool:
    """Whether the first line, or all of it, is an object or a list."""
    first = text.lstrip().split("\n", 1)[0].strip()
    if first[:1] not in ("{", "["):
        return False
    for part in (first, text):
        try:
            return isinstance(json.loads(part), (dict, list))
        except (ValueError, RecursionError):
            continue
    return False


# --------------------------------------------------------------------------------------------------------------- tables
def rows(path: Path) -> list[Row]:
    """Rows of a table: mappings, or texts alone in a list of JSON.

    Raises:
        FewstepError: as :func:`read`.
    """
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        found = _parquet(path)
    elif suffix in (".csv", ".tsv"):
        found = list(_separated(path, "," if suffix == ".csv" else "\t"))
    elif suffix == ".json":
        found = _json(path)
    else:
        found = list(_json_lines(path, read_text(path)))
    if not found:
        raise FewstepError(f"{path} holds no row; expected one per text")
    return found


def column_of(path: Path, found: list[Row], column: str | None = None) -> str:
    """The column that holds the texts.

    Raises:
        FewstepError: no such column, or none or several that it might be.
    """
    names = list(dict.fromkeys(str(name) for _, row in found if isinstance(row, dict) for name in row))
    if not names:
        cell(path, *found[0], column or COLUMNS[0])
    usual = [name for name in names if name.lower() in COLUMNS]
    if column is None and len(usual) == 1:
        return usual[0]
    if column is not None and column in names:
        return column
    has = f"has the columns {', '.join(map(repr, names[:20]))}"
    if column is not None:
        raise FewstepError(f"{path} {has}, and no {column!r}; choose one of them as the column")
    several = (
        f"{' and '.join(map(repr, usual))} might hold the texts"
        if usual
        else f"expected one of {', '.join(COLUMNS)}"
    )
    raise FewstepError(f"{path} {has}; {several}; name it (data.column, or --column)")


def cell(path: Path, place: str, row: Any, column: str, blank: bool = False) -> str:
    """The text in a column of a row.

    Args:
        blank: whether it may be empty.

    Raises:
        FewstepError: there is none, or something else than a text.
    """
    value = row.get(column) if isinstance(row, dict) else row
    if not isinstance(row, dict):
        problem = f"is {_short(row)}"
    elif column not in row:
        problem = f"has no {column!r}"
    else:
        problem = f"{column} is {_short(value)}"
    if isinstance(value, str) and (blank or value.strip()) and _encodes(value):
        return value
    example = json.dumps({column: "a.png" if column == "file_name" else "a cat"})
    raise FewstepError(
        f"{path}, {place}: {problem}; expected a text, as in {example}; mend or remove the row"
    )


def with_references(path: Path, found: Sequence[Row], texts: Sequence[str]) -> tuple[str, ...]:
    """Texts of a table; where it has a column ``reference``, an :class:`~fewstep.teachers.references.Edit` each.

    The column holds a file or a list of files, relative to the table; in CSV and TSV a list is JSON.

    Raises:
        FewstepError: a row without one, or a file that is missing or no image.
    """
    if not any(isinstance(row, dict) and row.get(REFERENCE) for _, row in found):
        return tuple(texts)
    sound: set[Path] = set()
    return tuple(_edit(path, place, row, text.strip(), sound) for (place, row), text in zip(found, texts))


def _edit(path: Path, place: str, row: Any, text: str, sound: set[Path]) -> Edit:
    where = f"{path}, {place}"
    names = row.get(REFERENCE) if isinstance(row, dict) else None
    if isinstance(names, str) and names.startswith("["):
        with contextlib.suppress(ValueError):
            names = json.loads(names)
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not names or not all(isinstance(n, str) and n.strip() for n in names):
        raise FewstepError(
            f"{where}: {REFERENCE} is {_short(names)}; expected the name of an image, or a list of names, in every row"
        )
    files = [path.parent / Path(name).expanduser() for name in names]
    for name, file in zip(names, files):
        if file not in sound:
            _check_image(f"{where}: {REFERENCE} {name}", file)
        sound.add(file)
    return Edit(text, files, where)


def _check_image(where: str, file: Path) -> None:
    if not file.is_file():
        raise FewstepError(
            f"{where} is no file ({file}); expected an image; names are relative to their table"
        )
    if reason := fault(file):
        raise FewstepError(f"{where} cannot be read ({reason}); remove or replace it")


def read_edits(texts: Sequence[str], files: Sequence[Path]) -> list[str]:
    """Instructions of a command, each about all of these images.

    Raises:
        FewstepError: one is missing, or no image.
    """
    for file in files:
        _check_image(f"--reference {file}", file)
    return [Edit(text, files, f"--prompt {text!r}") for text in texts]


def _short(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 40 else text[:37] + "..."


def _encodes(text: str) -> bool:
    """No half of a surrogate pair, which JSON may hold and no file can."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _of_table(path: Path, column: str | None) -> Texts:
    found = rows(path)
    if column is None and all(isinstance(row, str) for _, row in found):
        texts = tuple(cell(path, place, {"text": row}, "text") for place, row in found)
        return Texts(texts, tuple(place for place, _ in found))
    name = column_of(path, found, column)
    texts = with_references(path, found, [cell(path, place, row, name) for place, row in found])
    return Texts(texts, tuple(place for place, _ in found), tuple(row for _, row in found))


def _json(path: Path) -> list[Row]:
    text = read_text(path)
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        try:  # as datasets write it: an object a line, under this name
            return list(_json_lines(path, text))
        except FewstepError:
            raise FewstepError(f"{path} is no JSON ({error}); mend it, or give one text a line") from None
    rows = data if isinstance(data, list) else [data]
    return [(f"row {number}", row) for number, row in enumerate(rows, 1)]


def _json_lines(path: Path, text: str) -> Iterator[Row]:
    for number, line in enumerate(text.rstrip().split("\n"), 1):
        if not line.strip():
            continue
        try:
            yield f"line {number}", json.loads(line)
        except (ValueError, RecursionError) as error:
            raise FewstepError(
                f'{path}, line {number} ({error}): expected JSON such as {{"text": "a cat"}}'
            ) from None


def _separated(path: Path, delimiter: str) -> Iterator[Row]:
    reader = csv.reader(io.StringIO(read_text(path), newline=""), delimiter=delimiter, strict=True)
    names: list[str] | None = None
    try:
        for values in reader:
            place = f"line {reader.line_num}"
            if not values:
                continue
            if names is None:
                names = [name.strip() for name in values]
                if len(set(names)) < len(names):
                    raise FewstepError(f"{path}: two columns have one name: {', '.join(names)}; rename one")
                continue
            if len(values) != len(names):
                raise FewstepError(
                    f"{path}, {place}: {len(values)} cells for {len(names)} columns; put texts with commas in quotes"
                )
            yield place, dict(zip(names, values))
    except csv.Error as error:
        raise FewstepError(f"{path}, line {reader.line_num}: {error}; mend the row") from None


def _parquet(path: Path) -> list[Row]:
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise FewstepError(
            f'{path}: Parquet needs pyarrow, which is not installed: pip install "fewstep[data]", or save it as CSV'
        ) from None
    try:
        found = parquet.read_table(path).to_pylist()
    except Exception as error:  # a damaged file raises arrow's own kinds
        raise FewstepError(f"{path} cannot be read as Parquet: {' '.join(str(error).split())}") from None
    return [(f"row {number}", row) for number, row in enumerate(found, 1)]
