"""What the README says is what the result files say."""

import json
import re
from pathlib import Path

import pytest

from fewstep.evaluation.of_run import gallery
from fewstep.runs.library import recipe_files

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
RESULTS = sorted((ROOT / "eval" / "results").glob("*.json"))


def test_there_are_results():
    assert {"emoji_dmd2_1step", "emoji_dmd2_4step"} <= {path.stem for path in RESULTS}


def test_the_table_of_the_readme_comes_from_the_result_files():
    assert gallery({path.stem: json.loads(path.read_text()) for path in RESULTS}) in README


@pytest.mark.parametrize("path", RESULTS, ids=lambda p: p.stem)
def test_results_say_how_they_were_made(path):
    result = json.loads(path.read_text())
    assert {"command", "hardware", "versions", "seconds"} <= result.keys()
    assert len({row["images"] for row in result["rows"]}) == 1  # equal sample counts


def test_every_link_of_the_readme_leads_somewhere():
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if not link.startswith("http")]
    assert links and all((ROOT / link).exists() for link in links)


def test_nothing_is_left_to_fill_in():
    assert "@" not in README.replace("effnet-lite0@96", "")


def test_the_gallery_lists_every_recipe_and_links_every_result():
    listed = (ROOT / "recipes" / "README.md").read_text()
    missing = [name for name in recipe_files() if f"| `{name}` |" not in listed]
    unlinked = [path.stem for path in RESULTS if f"eval/results/{path.name}" not in listed]
    assert not missing and not unlinked
