"""Result files and the README's table of them: what a run measured is kept beside what others did."""

import importlib.util
import json
from pathlib import Path

import pytest

from fewstep.evaluation.gallery import best, gallery
from fewstep.recipe import digest
from fewstep.runs.library import load_recipe

ROOT = Path(__file__).parents[2]
NAME = "emoji_dmd2_4step"


@pytest.fixture(scope="module")
def record():
    spec = importlib.util.spec_from_file_location("record", ROOT / "eval" / "record.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def row(kind, value, nfe, solver="own", **more):
    metrics = {
        "FD(x)": {"value": value, "error": 2.0, "error_kind": "said elsewhere", "n_real": 9, "n_fake": 5},
        "retrieval(x)": {"value": 0.75, "error": 0.1, "n_fake": 5},
        "same-noise distance(x)": {"value": 1.0, "error": 0.1, "n_fake": 5},
    }
    speed = {"nfe": nfe, "seconds": 1.0, "seconds_error": None, "batch": 4, "threads": 1}
    made = {"name": kind, "kind": kind, "solver": solver, "steps": max(1, nfe // 2), "speed": speed}
    return {**made, "metrics": metrics, "samples": "samples/x", **more}


def finished(folder, rows, **changes):
    made = {"name": NAME, "teacher": "t", "versions": {"fewstep": "1"}, "seconds": 120.0, "steps": 7}
    table = {"schema": 1, "prompts": ["a"], "images": 5, "named": 5, "rows": rows, **changes}
    (folder / "eval").mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({**made, "hardware": "1 process(es) on CPU"}))
    (folder / "eval" / "table.json").write_text(json.dumps(table))
    return str(folder)


def test_a_result_has_the_runs_rows_and_keeps_those_it_did_not_make(tmp_path, record, capsys):
    first = [row("teacher", 10, 100), row("floor", 30, 4, "ddim"), row("student", 20, 4)]
    out = ["--out", str(tmp_path)]
    assert record.main([finished(tmp_path / "one", first), *out, "--note", "first"]) == 0
    again = finished(tmp_path / "two", [row("floor", 31, 4, "ddim"), row("student", 19, 4)])
    assert record.main([again, *out, "--hardware", "one core"]) == 0
    result = json.loads((tmp_path / f"{NAME}.json").read_text())
    found = [(r["kind"], r["metrics"]["FD(x)"]) for r in result["rows"]]
    said = {"error": 2.0, "n_fake": 5}
    assert found == [(k, {"value": v, **said}) for k, v in (("teacher", 10), ("floor", 31), ("student", 19))]
    assert result["command"] == f"fewstep train {NAME}" and result["recipe"] == digest(load_recipe(NAME))
    assert (result["hardware"], result["notes"], result["seconds"]) == ("one core", ["first"], 120.0)
    assert "samples" not in result["rows"][0] and list(result["rows"][0]["metrics"]) == [
        "FD(x)",
        "retrieval(x)",
    ]


def test_rows_of_other_prompts_do_not_stand_beside_each_other(tmp_path, record, capsys):
    out = ["--out", str(tmp_path)]
    assert record.main([finished(tmp_path / "one", [row("teacher", 10, 100)]), *out]) == 0
    before = (tmp_path / f"{NAME}.json").read_text()
    other = finished(tmp_path / "two", [row("student", 19, 4)], prompts=["b"])
    assert record.main([other, *out]) == 2
    assert "prompts" in capsys.readouterr().err and (tmp_path / f"{NAME}.json").read_text() == before


def test_a_run_without_an_evaluation_is_refused(tmp_path, record, capsys):
    assert record.main([str(tmp_path), "--out", str(tmp_path)]) == 2
    assert "run.json" in capsys.readouterr().err


def test_the_best_stand_beside_their_teacher_and_the_floor_at_as_many_calls():
    floors = [
        row("floor", 9, 8),
        row("floor", 31, 4, "ddim"),
        row("floor", 30, 4, "unipc"),
        row("floor", 50, 2),
    ]
    student = [row("student", 19, 4, steps=4), row("student", 25, 1, steps=1)]
    results = {
        "mine": {"teacher": "t", "seconds": 120, "rows": [row("teacher", 10, 100), *floors, *student]},
        "theirs": {"teacher": "u", "seconds": 60, "rows": [row("teacher", 5, 64), row("student", 7, 1)]},
        "second": {"teacher": "u", "seconds": 180, "rows": [row("student", 7, 1)], "starts_from": ["theirs"]},
    }
    cells = [
        [c.strip() for c in line.split("|")[2:-1]]
        for line in best(results, ["mine:4", "mine:1", "theirs", "second"]).split("\n")
    ]
    assert cells[2] == ["19 ± 2 (4)", "10 ± 2 (100)", "30 ± 2 (4)", "0.75", "2 min"]
    assert cells[3] == ["25 ± 2 (1)", "10 ± 2 (100)", "50 ± 2 (2)", "0.75", "2 min"]
    assert cells[4] == ["7 ± 2 (1)", "5 ± 2 (64)", "", "0.75", "1 min"]
    assert cells[5][-1] == "1 + 3 min"  # what it starts from is part of what it took
    assert gallery({"second": results["second"]}, results).endswith("| 240            |")
    with pytest.raises(StopIteration):
        best(results, ["mine:2"])
