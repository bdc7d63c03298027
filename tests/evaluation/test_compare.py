"""Results side by side."""

import json

import pytest

from fewstep.errors import FewstepError
from fewstep.evaluation.compare import compare, load_result
from fewstep.evaluation.evaluate import evaluate_images


@pytest.fixture
def results(pictures, pool):
    fakes = {"teacher": 255 - pictures[:60], "student": pictures[:60] // 2}
    return {
        name: evaluate_images(
            pictures, fake, extractor=pool, metrics=("fd", "kid") if name == "teacher" else ("fd",)
        )
        for name, fake in fakes.items()
    }


def test_columns_and_missing_numbers(results):
    lines = compare(results).splitlines()
    assert [cell.strip() for cell in lines[0].split("|")[1:-1]] == ["metric", "teacher", "student"]
    assert "FD(pool)" in lines[2] and lines[2].count("±") == 2
    assert "KID(pool)" in lines[3] and lines[3].rstrip("| ").count("±") == 1


@pytest.mark.parametrize(
    "path, value",
    [
        (("extractor", "resize"), "area-8"),
        (("extractor", "weights_sha256"), "y"),
        (("real", "sha256"), "x"),
        (("fake", "n"), 7),
        (("protocol",), {"name": "p"}),
    ],
)
def test_unlike_results_are_refused(results, path, value):
    changed = json.loads(json.dumps(results["student"]))
    inner = changed
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    with pytest.raises(FewstepError, match="cannot be compared") as error:
        compare({"teacher": results["teacher"], "student": changed})
    assert str(value["name"] if isinstance(value, dict) else value) in str(error.value)


def test_statistics_that_name_no_images_are_told_by_their_own_name(results):
    for result in results.values():
        result["real"]["sha256"] = None
    compare(results)
    results["student"]["real"] = {**results["student"]["real"], "name": "other.npz"}
    with pytest.raises(FewstepError, match=r"other\.npz"):
        compare(results)


def test_files(results, tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(results["teacher"]))
    assert load_result(tmp_path / "a.json") == results["teacher"]
    for text in ("no json", "[]", "{}", '{"schema": 9}'):
        (tmp_path / "b.json").write_text(text)
        with pytest.raises(FewstepError, match=r"b\.json is no result"):
            load_result(tmp_path / "b.json")
    with pytest.raises(FewstepError, match="at least 2"):
        compare({"a": results["teacher"]})
