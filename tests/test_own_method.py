"""The page on adding a method: its blocks, as they stand there, are a method, its recipe and its test."""

import re
from pathlib import Path

import pytest
from processes import Fork

from fewstep.cli import main
from fewstep.methods import METHODS

PAGE = Path(__file__).parents[1] / "docs" / "extending" / "method.md"
BLOCKS = dict(re.findall(r"^```python\n# (\S+\.py)\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE))


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """A folder with the files of the page."""
    for name, text in BLOCKS.items():
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path  # what is imported from there, a fork imports


def test_the_page_has_a_method_of_at_most_sixty_lines_with_its_recipe_and_test():
    assert list(BLOCKS) == ["progressive.py", "recipe.py", "test_progressive.py"]
    assert len(BLOCKS["progressive.py"].splitlines()) <= 60


def test_the_test_on_the_page_passes(desk):
    assert "progressive" not in METHODS
    words = ["test_progressive.py", "-q", "-p", "no:cacheprovider", "--rootdir", str(desk), "-c", "none.ini"]
    (desk / "none.ini").write_text("[pytest]\n")

    said = desk / "said.txt"
    code = Fork(lambda: int(pytest.main(words)), said).wait()
    assert code == 0 and re.search(r"\b5 passed", said.read_text()), said.read_text()


def test_the_recipe_on_the_page_trains_to_an_export_that_is_verified(desk):
    said = desk / "said.txt"
    code = Fork(lambda: main(["train", "recipe.py", "--smoke"]), said, {"TMPDIR": str(desk)}).wait()
    text = said.read_text()
    assert code == 0 and "verified in stock diffusers" in text, text
    run = next(desk.glob("fewstep-smoke-*/run"))
    assert {p.name for p in (run / "code").glob("*.*")} == {"index.json", "progressive.py"}
    assert '"num_steps": 4' in (run / "export" / "fewstep.json").read_text()
