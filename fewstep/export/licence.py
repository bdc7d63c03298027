"""Under which licence a student is: that of its teacher, in the words of the hub's model cards."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import yaml

FIELDS = ("license", "license_name", "license_link")


def licence_of(place: str) -> dict[str, str]:
    """The licence of a teacher, as its own model card has it.

    Args:
        place: folder of a pipeline, file, hub id, or ``builtin:NAME``.

    Returns:
        Fields of a card's front matter; nothing where a folder has no card that says it. Of a hub id whose card is not
        on this machine they point to its page.
    """
    if place.startswith("builtin:"):
        return {"license": "apache-2.0"}
    folder = os.path.exists(place)  # or a file, which has no card
    said = _front(Path(place, "README.md") if folder else _cached(place))
    found = {name: str(said[name]) for name in FIELDS if said.get(name)}
    if folder:
        if not found.get("license_link", "https:").startswith("https:"):
            del found["license_link"]  # a file of that folder, which is not in the export
        return found if "license" in found else {}
    page = f"https://huggingface.co/{place}"
    if "license" not in found:
        return {"license": "other", "license_name": "of-the-base-model", "license_link": page}
    if not found.get("license_link", "https:").startswith("https:"):
        found["license_link"] = f"{page}/blob/main/{found['license_link']}"
    return found


def _cached(repository: str) -> Path | None:
    """A hub model's card, where its download brought it along; nothing is fetched."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        path = try_to_load_from_cache(repository, "README.md")
    except HFValidationError:  # neither a folder nor an id
        return None
    return Path(path) if isinstance(path, str) else None


def _front(path: Path | None) -> dict[str, Any]:
    if path is None or not path.is_file():
        return {}
    parts = path.read_text(encoding="utf-8", errors="replace").split("---\n", 2)
    if len(parts) < 3 or parts[0].strip():
        return {}
    try:
        front = yaml.safe_load(parts[1])
    except yaml.YAMLError:
        return {}
    return front if isinstance(front, dict) else {}
