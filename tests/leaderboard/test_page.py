"""What leaderboard.json says of runs, and that tables, page and README say the same."""

import importlib.util
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fewstep.leaderboard import render, summary
from fewstep.leaderboard.board import Board, BoardTeacher, Row
from fewstep.leaderboard.train import code_hash

ROOT = Path(__file__).parents[2]
TEACHER = "builtin:emoji-xl"


def metrics(fd, error=2.0):
    other = {"KID": 0.5, "precision": 0.5, "recall": 0.25, "diversity": 0.4, "nearest": 1.2, "copies": 0.06}
    found = {name: {"value": value, "error": 0.01, "n_fake": 9} for name, value in other.items()}
    named = {"value": 0.7, "error": 0.02, "n_fake": 5}
    return {"FD": {"value": fd, "error": error, "n_fake": 9}, **found, "retrieval": named}


def drawn(name, fd, nfe, steps=1, kind="student", solver="own", **more):
    about = {"name": name, "kind": kind, "solver": solver, "steps": steps, "nfe": nfe, "guidance": 1.0}
    return {**about, "samples": f"samples/{name}/{steps}", "metrics": metrics(fd, **more)}


def record(row, seed, status="done", cpu=100.0, code=None, before=(), **more):
    return {
        "name": f"{row}-s{seed}", "row": row, "recipe": "demo", "seed": seed, "status": status, "digest": "d",
        "code": code or [code_hash("dmd2")], "threads": 1, "cpu_seconds": cpu, "seconds": cpu, "hardware": "a core",
        "before": [{"what": "pairs", "cpu_seconds": c} for c in before],
        "arithmetic": {"autocast": "bfloat16" if seed else None, "attention": "sdpa"}, **more,
    }  # fmt: skip


@pytest.fixture
def whole():
    rows = [Row("demo", 10, name=name) for name in ("good", "wide", "late", "lost", "old", "idle")]
    board = Board("Tiny", rows, [BoardTeacher(TEACHER)], cpu_seconds=100, seeds=[0, 1, 2])
    records = [
        *(record("good", seed, cpu=cpu) for seed, cpu in ((0, 90.0), (1, 96.0), (2, 99.0))),
        record("wide", 0, cpu=80.0, before=[10.0, 20.0]),
        record("late", 0, status="running", cpu=None),
        record("lost", 0, status="failed", reason="it diverged (exit code 3)", cpu=None),
        record("old", 0, code=["before"]),
        record("old", 1, status="failed", reason="no", cpu=None),
    ]
    measured = {
        "good-s0": [drawn("good-s0", 800, 1)],
        "good-s1": [drawn("good-s1", 806, 1, error=4.0)],
        "good-s2": [drawn("good-s2", 812, 1, error=6.0)],
        "wide-s0": [drawn("wide-s0", 700, 4, 4), drawn("wide-s0", 790, 1)],
        "old-s0": [drawn("old-s0", 900, 1)],
    }
    others = {
        TEACHER: [
            drawn("teacher", 600, 100, 50, "teacher"),
            drawn("floor", 1200, 2, 1, "floor", "ddim"),
            drawn("floor", 1100, 2, 1, "floor", "dpm++"),
            drawn("floor", 850, 4, 2, "floor", "ddim"),
            {"name": "floor", "kind": "floor", "solver": "unipc", "steps": 2, "error": "not finite"},
        ]
    }
    found = {(r["row"], r["seed"]): r for r in records}
    return board, json.loads(
        json.dumps(summary.summary(board, found, measured, others, "fewstep leaderboard b"))
    )


def row_of(whole, name, steps=1):
    return next(row for row in whole[1]["rows"] if row["name"] == name and row["steps"] == steps)


def test_the_code_of_each_method_is_said(whole):
    assert whole[1]["code"] == {"dmd2": code_hash("dmd2")}  # demo's


def test_a_row_is_the_mean_of_its_seeds_with_both_errors(whole):
    fd = row_of(whole, "good")["metrics"]["FD"]
    assert (fd["value"], fd["error"], fd["spread"], fd["n"]) == (806, 4.0, 6.0, 3)
    alone = row_of(whole, "wide")["metrics"]["FD"]
    assert (alone["value"], alone["error"], alone["spread"], alone["n"]) == (790, 2.0, None, 1)
    assert [run["metrics"]["FD"]["value"] for run in row_of(whole, "good")["runs"]] == [800, 806, 812]


def test_what_came_before_is_part_of_the_cost_and_more_than_the_budget_is_marked(whole):
    good, wide = row_of(whole, "good"), row_of(whole, "wide")
    assert good["cpu_seconds"] == 95 and not good["over_budget"]
    assert wide["cpu_seconds"] == 110 and wide["over_budget"]


def test_rows_that_failed_or_are_of_other_code_stay_and_say_so(whole):
    said = {row["name"]: (row["status"], row["stale"], list(render.remarks(row))) for row in whole[1]["rows"]}
    assert said["lost"] == ("failed", False, ["seed 0 failed: it diverged (exit code 3)"])
    old = ["seed 0 was trained by other code (before)", "seed 1 failed: no"]
    assert said["old"] == ("partly", True, old) and said["good"] == ("done", False, [])
    assert said["late"][2] == ["seed 0: stopped, not finished"] and said["idle"][2] == ["seed 0: not run"]
    text = render.to_markdown(whole[1])
    assert "- `lost`: seed 0 failed: it diverged (exit code 3)\n" in text
    assert "- floor, 2 x unipc: not finite\n" in text
    assert "| 110!" in text and "seed 0 was trained by other code" in text


def test_the_page_says_what_trainings_computed_in(whole):
    assert ", their CPU time measured, in bfloat16 and float32. " in render.to_markdown(whole[1])
    del row_of(whole, "good")["runs"][1:], row_of(whole, "old")["runs"][1:]
    assert ", their CPU time measured, in float32. " in render.to_markdown(whole[1])
    for row in whole[1]["rows"]:
        row["runs"] = [{**run, "arithmetic": None} for run in row["runs"]]  # of earlier releases
    assert ", their CPU time measured. " in render.to_markdown(whole[1])


def test_the_floor_is_the_best_at_as_many_calls_or_at_the_fewest_above(whole):
    assert row_of(whole, "good")["floor"] == {
        "solver": "dpm++", "steps": 1, "nfe": 2, "FD": {"value": 1100, "error": 2.0}
    }  # fmt: skip
    assert row_of(whole, "wide", 4)["floor"]["FD"]["value"] == 850
    assert row_of(whole, "lost", None)["floor"] is None


def test_the_better_half_is_chosen_by_the_first_seed_at_equal_calls(whole):
    board, made = whole
    assert [row.label for row in summary.better_half(board, made["rows"])] == ["good", "wide"]
    row_of(whole, "good")["runs"][0]["metrics"]["FD"]["value"] = 950  # others of its seeds do not count
    # One of three by one call is left out, and the only one by four is in the better half of one.
    assert [row.label for row in summary.better_half(board, made["rows"])] == ["wide", "old"]


def test_numbers_of_the_table_are_those_of_the_json(whole):
    lines = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in render.to_markdown(whole[1]).splitlines()
        if line.startswith("|")
    ]
    head, body = lines[0], {cells[0]: cells for cells in lines[2:]}
    assert list(body) == [
        "teacher, 50 steps", "floor, 1 x ddim", "floor, 1 x dpm++", "floor, 2 x ddim", "wide, 1 step",
        "good, 1 step", "old, 1 step", "wide, 4 steps",
    ]  # fmt: skip
    good = dict(zip(head, body["good, 1 step"]))
    assert good["FD"] == "806 ± 4 (6)" and good["KID"] == "0.500 ± 0.010 (0.000)"
    assert (good["calls"], good["CPU s"], good["seeds"], good["floor"]) == ("1", "95", "3", "1100 (2)")
    assert dict(zip(head, body["wide, 4 steps"]))["FD"] == "700 ± 2"


def test_tables_page_and_plots_are_functions_of_the_json(whole):
    board = whole[1]
    again = json.loads(json.dumps(board))
    assert render.to_markdown(board) == render.to_markdown(again) and render.to_html(board) == render.to_html(
        again
    )
    html = render.to_html(board, "leaderboard.png")
    assert html.count("<circle") > 30 and 'src="leaderboard.png"' in html and "806 ± 4 (6)" in html
    calls = {s.name: s.points for s in render.series_of(board, TEACHER, "FD", "calls")}
    assert calls["wide"] == [(1, 790, 2.0), (4, 700, 2.0)] and calls["floor, ddim"] == [
        (2, 1200, 2.0),
        (4, 850, 2.0),
    ]
    cost = {s.name: s.points for s in render.series_of(board, TEACHER, "FD", "cost")}
    assert cost["good"] == [(95, 806, 6.0)] and "teacher" not in cost  # the spread is the larger one


def test_a_sheet_has_a_line_for_each_row_of_the_same_drawings(whole, tmp_path):
    board = whole[1]
    for name, side in (("teacher/50", 8), ("floor/1", 8), ("floor/2", 8), ("wide-s0/1", 8), ("wide-s0/4", 4),
                       ("good-s0/1", 8), ("old-s0/1", 8)):  # fmt: skip
        (tmp_path / "samples" / name).mkdir(parents=True)
        for i in (0, 3):
            image = np.full((side, side, 3), (255, 40 * i, 0), np.uint8)
            Image.fromarray(image).save(tmp_path / "samples" / name / f"{i:06d}.png")
    for path in (tmp_path / "one.png", tmp_path / "two.png"):
        assert render.draw_sheet(board, {TEACHER: tmp_path}, [0, 3], ["a", "b"], path)
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
    pixels = np.asarray(Image.open(tmp_path / "one.png"))
    assert [(pixels == (255, green, 0)).all(-1).sum() for green in (0, 120)] == [7 * 64, 7 * 64]


# ------------------------------------------------------------------------------------------------------ the README
@pytest.fixture(scope="module")
def readme():
    spec = importlib.util.spec_from_file_location("readme", ROOT / "eval" / "readme.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_readme_takes_its_rows_from_the_board_once_it_has_numbers_for_all_of_them(readme, whole):
    text, files = (ROOT / "README.md").read_text(), readme.recipes_files()
    board = whole[1]
    assert readme.filled(text, board, files) == readme.filled(text, None, files)  # it has not these rows
    asked = re.sub(r"<!-- best .*? -->", "<!-- best good wide:4 -->", text)
    made = readme.filled(asked, board, files)
    assert re.search(r"\| \[`good`\]\(recipes/demo.py\) +\| 806 ± 4 \(6\), 1 call +\|", made)
    last = next(line for line in made.splitlines() if line.startswith("| [`wide`](recipes/demo.py), 4 steps"))
    assert [cell.strip() for cell in last.split("|")[2:-1]] == [
        "700 ± 2, 4 calls", "600 ± 2, 100 calls", "850 ± 2, 4 calls", "0.700", "2 min"
    ]  # fmt: skip
    assert "3 seeds for the better half" in made and "833 ± 10" not in made and "One core that" not in made
    alone = json.loads(json.dumps(board))
    for row in alone["rows"]:
        for metric in row["metrics"].values():
            metric["n"] = 1
    told = readme.filled(asked, alone, files)
    assert "minutes of a core, one seed. FD" in told and "better half" not in told
    with pytest.raises(KeyError):  # failed: no row of numbers, nor a file of its own
        readme.filled(asked.replace("wide:4", "lost"), board, files)
    assert made.partition("\n## Six")[0] == text.partition("\n## Six")[0]
    assert made.partition("\n## What you")[2] == text.partition("\n## What you")[2]
