"""What the README says is what the result files say, and what contributors are told is there."""

import importlib.util
import json
import re
from pathlib import Path

import pytest
import yaml

from fewstep.cli.recipes import methods_table
from fewstep.runs.library import recipe_files

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
TEMPLATES = ROOT / ".github" / "ISSUE_TEMPLATE"
spec = importlib.util.spec_from_file_location("readme", ROOT / "eval" / "readme.py")
readme = importlib.util.module_from_spec(spec)
spec.loader.exec_module(readme)
SECTIONS = ("Added", "Changed", "Fixed", "Results")
RESULTS = sorted(p for p in (ROOT / "eval" / "results").glob("*.json") if p.stem != "leaderboard")


def test_there_are_results():
    assert {"emoji_dmd2_1step", "emoji_dmd2_4step"} <= {path.stem for path in RESULTS}


def test_the_readme_is_read_in_three_minutes():
    assert len(README.splitlines()) <= 130


def test_the_table_of_the_readme_comes_from_the_result_files():
    chosen = re.findall(r"<!-- best (.*?) -->", README)[0].split()
    assert len(chosen) == 6
    assert readme.filled(README, readme.leaderboard(), readme.recipes_files()) == README


@pytest.mark.parametrize("path", RESULTS, ids=lambda p: p.stem)
def test_results_say_how_they_were_made(path):
    result = json.loads(path.read_text())
    assert {"command", "hardware", "versions", "seconds"} <= result.keys()
    counts = [{name: m["n_fake"] for name, m in row["metrics"].items()} for row in result["rows"]]
    assert all(count[name] == counts[0][name] for count in counts for name in count.keys() & counts[0].keys())


def test_every_link_of_the_readme_leads_somewhere():
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if not link.startswith("http")]
    assert links and all((ROOT / link).exists() for link in links)


@pytest.mark.parametrize("name", ["CONTRIBUTING.md", "SECURITY.md"])
def test_what_a_contributor_reads_names_what_is_there(name):
    text = (ROOT / name).read_text()
    paths = re.findall(r"`((?:\.ci|fewstep|tests|recipes|eval)/[\w/.-]*)`", text)
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)]+)\)", text)]
    named = [path for path in (*paths, *links) if "NAME" not in path]
    assert named and not [path for path in named if not (ROOT / path).exists()]
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"(?:^|`)make (\w+)", text, re.MULTILINE)) <= set(targets)


def test_a_bug_report_asks_for_what_answers_it():
    forms = {path.stem: yaml.safe_load(path.read_text()) for path in TEMPLATES.glob("*.yml")}
    forms.pop("config")
    assert all({"name", "description", "body"} <= form.keys() for form in forms.values())
    asked = {field["attributes"]["label"] for field in forms["bug"]["body"]}
    assert {"Output of `fewstep doctor`", "recipe.yaml"} <= asked


def test_the_changelog_has_sections_and_each_but_once():
    for release in re.split(r"^## ", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)[1:]:
        sections = re.findall(r"^### (.*)", release, re.MULTILINE)
        assert sections == [name for name in SECTIONS if name in sections]


def test_nothing_is_left_to_fill_in():
    assert not re.search(r"@(?!register|classmethod)|TODO|METHODS\n|BEST\n", README)


def test_the_gallery_lists_every_recipe_and_links_every_result():
    listed = (ROOT / "recipes" / "README.md").read_text()
    missing = [name for name in recipe_files() if f"| `{name}` |" not in listed]
    unlinked = [path.stem for path in RESULTS if f"eval/results/{path.name}" not in listed]
    assert not missing and not unlinked


def test_the_table_of_methods_is_what_their_classes_say():
    assert methods_table() in README
