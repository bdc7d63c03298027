"""The log's numbers in TensorBoard, Weights & Biases and others that accelerate knows, beside ``metrics.jsonl``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import RecipeError


def check_trackers(names: Sequence[str]) -> None:
    """Refuses what accelerate does not know or cannot import.

    Raises:
        RecipeError: with the names that are known, or how to install the missing one.
    """
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    installed = {str(getattr(name, "value", name)) for name in get_available_trackers()}
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            known = ", ".join(sorted(LOGGER_TYPE_TO_CLASS))
            raise RecipeError(f"train.trackers: {name!r} is unknown; expected some of {known}")
        if name not in installed:
            raise RecipeError(f"train.trackers: {name} is not installed; pip install {name}, or leave it out")


class Trackers:
    """Open while a run trains, on its first rank.

    Args:
        names: see :func:`check_trackers`. folder: of the run, whose name is the run's and the project's.
        config: the recipe in its plain form.
    """

    def __init__(self, names: Sequence[str], folder: Path, config: Mapping[str, Any]):
        self.names, self.folder, self.config = names, folder, config

    def __enter__(self) -> Trackers:
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        self.open = []
        for name in self.names:
            cls = LOGGER_TYPE_TO_CLASS[name]
            where = {"logging_dir": str(self.folder / "trackers")} if cls.requires_logging_directory else {}
            tracker = cls(self.folder.name, **where)
            getattr(tracker, "start", lambda: None)()  # versions before 1.10 start when they are made
            tracker.store_init_configuration(_flat(self.config))
            self.open.append(tracker)
        return self

    def __exit__(self, *_exc) -> None:
        for tracker in self.open:
            tracker.finish()

    def log(self, record: Mapping[str, Any]) -> None:
        values = {k: v for k, v in record.items() if isinstance(v, (int, float)) and k != "step"}
        for tracker in self.open:
            tracker.log(values, step=record["step"])


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted names to numbers and texts."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value if isinstance(value, (bool, int, float, str)) else str(value)
    return flat
