"""A release has one version, wherever it is read."""

import re
from pathlib import Path

import pytest
import yaml

from fewstep import __version__

ROOT = Path(__file__).parents[1]
CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text())
# What version 1.2.0 of the Citation File Format has at its top, of which the first four are needed.
NEEDED = ["cff-version", "message", "title", "authors"]
FIELDS = {*NEEDED, "abstract", "date-released", "doi", "identifiers", "keywords", "license", "license-url"}
FIELDS |= {"preferred-citation", "references", "repository-code", "type", "url", "version", "contact"}


def test_the_changelog_begins_with_it():
    newest = re.search(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1]
    assert newest == f"{__version__} ({CITATION['date-released']})"


def test_the_package_reads_it_from_its_one_line():
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    whole = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert whole["project"]["dynamic"] == ["version"] and "version" not in whole["project"]
    assert whole["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "fewstep.version.__version__"}


def test_who_cites_it_cites_it_too():
    assert CITATION["version"] == __version__ and CITATION["cff-version"] == "1.2.0"
    assert CITATION["type"] == "software" and CITATION["license"] == "Apache-2.0"
    assert set(NEEDED) <= set(CITATION) <= FIELDS
    assert all(set(author) & {"name", "family-names"} for author in CITATION["authors"])
