"""Sets of tables, read by the library ``datasets`` (extra ``data``): folders of Parquet, Arrow, JSON lines or CSV, and
what its ``save_to_disk`` wrote. Rows are mapped from the disk and read one by one.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

from ..errors import FewstepError, in_line
from .image_sets import natural
from .left_out import BadRecord
from .places import cache_root
from .texts import cell, column_of

KINDS = {".parquet": "parquet", ".arrow": "arrow", ".jsonl": "json", ".csv": "csv"}
SAVED, SPLITS = "dataset_info.json", "dataset_dict.json"  # of save_to_disk


@dataclass(frozen=True)
class Tables:
    """Rows of a set. ``files`` is what they lie in; ``rows`` a ``datasets.Dataset``."""

    source: Path
    files: list[Path]
    rows: Any

    def texts(self, column: str | None = None) -> list[str]:
        """A column of texts, None is the only one called text, caption or prompt.

        Raises:
            FewstepError: there is no such column, or a row holds no text.
        """
        names: list[str] = self.rows.column_names
        column = column_of(self.source, [("the first row", dict.fromkeys(names))], column)
        found: list[str] = []
        for part in self.rows.select_columns([column]).iter(batch_size=10_000):
            for text in part[column]:
                if not isinstance(text, str) or not text.strip():
                    cell(self.source, f"row {len(found) + 1}", {column: text}, column)
                found.append(text.strip())
        return found

    def pictures(self) -> Pictures:
        """The only column of pictures: files or bytes.

        Raises:
            FewstepError: none, or several.
        """
        features = self.rows.features
        named = [name for name, feature in features.items() if _holds_bytes(feature)]
        if len(named) != 1:
            raise FewstepError(
                f"{self.source} has the columns {', '.join(features)}, of which {len(named)} hold pictures; expected "
                "one, of datasets' Image or of bytes"
            )
        return Pictures(self, named[0])


@dataclass(frozen=True)
class Cell:
    """A picture in a row."""

    pictures: Pictures
    row: int

    @property
    def name(self) -> str:
        return f"row {self.row + 1}"

    def open(self) -> io.BytesIO | Path:
        value = self.pictures.rows[self.row][self.pictures.column]
        data = value["bytes"] if isinstance(value, dict) else value
        if data is None and isinstance(value, dict) and value.get("path"):
            path = Path(value["path"])
            return path if path.is_absolute() else self.pictures.folder / path
        if not data:
            raise BadRecord("no picture")
        return io.BytesIO(data)

    def __str__(self) -> str:
        return f"{self.pictures.source}, {self.name}"


class Pictures(Sequence[Cell]):
    """A column of pictures."""

    def __init__(self, tables: Tables, column: str):
        from datasets import Image

        rows = tables.rows
        if isinstance(rows.features[column], Image):
            rows = rows.cast_column(column, Image(decode=False))
        self.rows, self.column, self.source = rows.select_columns([column]), column, tables.source
        self.folder = tables.source if tables.source.is_dir() else tables.source.parent

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Cell: ...
    @overload
    def __getitem__(self, index: slice) -> list[Cell]: ...
    def __getitem__(self, index: int | slice) -> Cell | list[Cell]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return Cell(self, index % len(self))


def _holds_bytes(feature: Any) -> bool:
    if isinstance(feature, dict):
        return set(feature) == {"bytes", "path"}
    return type(feature).__name__ == "Image" or getattr(feature, "dtype", None) in ("binary", "large_binary")


def tables_in(source: Path) -> list[Path]:
    """Files of the set that a folder is, all of one kind; none where it is none."""
    if source.is_file():
        return [source] if source.suffix.lower() in KINDS else []
    if (source / SPLITS).is_file():
        parts = ", ".join(sorted(p.name for p in source.iterdir() if p.is_dir()))
        raise FewstepError(f"{source} holds several sets ({parts}); name the folder of one")
    found = [p for p in source.rglob("*") if p.suffix.lower() in KINDS and not p.name.startswith(".")]
    found.sort(key=lambda p: natural(p.relative_to(source).as_posix()))
    if len(kinds := {p.suffix.lower() for p in found}) > 1:
        raise FewstepError(
            f"{source} holds tables of several kinds ({', '.join(sorted(kinds))}); keep one of them"
        )
    return found


def open_tables(source: Path) -> Tables:
    """Maps a set into memory; what is no Arrow file yet is written once as one, into the cache.

    Raises:
        FewstepError: the library is not installed, nothing is there, or a file is damaged.
    """
    files = tables_in(source)
    if not files:
        raise FewstepError(
            f"{source} holds no table; expected {', '.join(KINDS)}, or what save_to_disk wrote"
        )
    try:
        import datasets
    except ImportError:
        raise FewstepError(
            f'{source}: sets of tables are read by datasets, which is not installed: pip install "fewstep[data]"'
        ) from None
    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        if source.is_dir() and (source / SAVED).is_file():
            rows = datasets.load_from_disk(str(source))
        else:
            names, kept = [str(path) for path in files], str(cache_root() / "tables")
            builder: Any = datasets.Dataset
            kind = KINDS[files[0].suffix.lower()]
            if kind == "arrow":
                rows = datasets.concatenate_datasets([builder.from_file(name) for name in names])
            else:
                rows = getattr(builder, f"from_{kind}")(names, cache_dir=kept)
    except Exception as error:  # damaged files raise arrow's, pandas' and the library's own kinds
        cause = error.__cause__ or error
        raise FewstepError(f"{source} cannot be read: {in_line(cause)}; mend or remove the file") from None
    finally:
        if shown:
            datasets.enable_progress_bars()
    if not len(rows):
        raise FewstepError(f"{source} holds no row")
    return Tables(source, files, rows)
