"""A board as it is typed, on a tiny teacher: measured, killed, gone on with; what its drawings are compared with."""

import dataclasses
import json
import os
import signal
import subprocess
import time
from collections import Counter

import boards
import pytest
import torch
from safetensors.torch import load_file

from fewstep.errors import FewstepError
from fewstep.evaluation.images import open_images
from fewstep.evaluation.of_run import reconstruct
from fewstep.evaluation.spec import slug
from fewstep.leaderboard import run as leaderboards
from fewstep.leaderboard import search, train
from fewstep.leaderboard.board import BoardTeacher, Run, load_board, resized
from fewstep.leaderboard.measure import Ruler
from fewstep.leaderboard.train import Place, found
from fewstep.runs.session import execute


@pytest.fixture(scope="module")
def tiny(tiny_sd15, tmp_path_factory):
    """Folder with images, prompts, and the options of a recipe on them."""
    folder = tmp_path_factory.mktemp("board")
    boards.write_images(folder / "images")
    return folder, tiny_sd15, boards.options(folder, tiny_sd15)


def one(name, options, steps=2, **more):
    return {"recipe": "sd15_boot_1step", "name": name, "steps": steps, "options": {**options, **more}}


@pytest.fixture(scope="module")
def ruler(tiny, tmp_path_factory):
    folder, teacher, options = tiny
    board = load_board(boards.write_board(folder, boards.board_of(folder, teacher, [one("a", options)])))
    return Ruler(board, board.teachers[0], tmp_path_factory.mktemp("eval"))


def test_kinds_are_drawn_and_compared_at_equal_counts_and_names_have_their_own_image(ruler):
    kinds, names = ruler.prompts[:8], ruler.prompts[8:]
    assert Counter(kinds) == {"any a": 4, "any b": 4} and set(names) == set(boards.NAMES)
    assert [kinds[0], kinds[1]] == [ruler.prompts[2 * i + k] for i, k in ((1, 0), (1, 1))]  # they take turns
    assert sorted(ruler.reference) == list(range(8))
    # Even images are of the first kind, odd ones of the second, and stand where drawings of theirs do.
    assert [index % 2 for index in ruler.reference] == [boards.KINDS.index(kind) for kind in kinds]
    assert [8 + boards.NAMES.index(name) for name in names] == ruler.named
    assert [ruler.groups[i] == ruler.groups[0] for i in range(8)] == [kind == kinds[0] for kind in kinds]
    assert list(ruler.shown(2)) == [0, 1, 8, 9]


def test_real_images_measured_as_drawings_are_their_own_best(ruler, tmp_path):
    """Those of the reference have distance 0, and named ones are found."""
    from fewstep.evaluation.sampling import save_png

    folder = ruler.out / "samples" / "real"
    for i, index in enumerate([*ruler.reference, *ruler.named]):
        save_png(ruler.images.load(index, ruler.loaded.resolution), folder / f"{i:06d}.png")
    metrics = ruler._measured(folder)["metrics"]
    assert metrics["FD"]["value"] == pytest.approx(0, abs=1e-3) and metrics["precision"]["value"] == 1
    assert metrics["retrieval"]["value"] == 1 and {m["n_fake"] for m in metrics.values()} == {4, 8}
    swapped = [*ruler.reference, *ruler.named[1:], ruler.named[0]]
    for i, index in enumerate(swapped):
        save_png(ruler.images.load(index, ruler.loaded.resolution), folder / f"{i:06d}.png")
    assert ruler._measured(folder)["metrics"]["retrieval"]["value"] == 0


def test_other_images_of_the_kinds_are_a_row_where_there_are_as_many_again(ruler, tiny, tmp_path):
    folder, teacher, options = tiny
    assert ruler._unseen() == []  # kinds of four, all of which are the reference
    board = boards.board_of(folder, teacher, [one("a", options)], per_kind=2)
    half = Ruler(
        load_board(boards.write_board(tmp_path, board)), BoardTeacher(str(teacher)), tmp_path / "eval"
    )
    seen = []
    half._beside = lambda real, drawn, groups: seen.append((real, drawn, groups)) or {}
    left = half.out / "samples" / slug("other images of 2 kinds")  # by a board of larger kinds
    reconstruct(half.loaded, half.images, [0] * 6, left)
    (row,) = half._unseen()
    (real, drawn, groups), kinds = seen[0], list(half.kinds.values())
    assert (row["name"], row["kind"], row["nfe"], row["metrics"]) == (
        "other images of 2 kinds",
        "reference",
        0,
        {},
    )
    assert (
        real == half.reference == [kinds[0][0], kinds[1][0], kinds[0][1], kinds[1][1]]
        and groups == [0, 1] * 2
    )
    assert len(drawn) == 4 and half._unseen() == [row] and len(seen) == 1  # kept
    other = [kinds[0][2], kinds[1][2], kinds[0][3], kinds[1][3]]
    reconstruct(half.loaded, half.images, other, tmp_path / "other")
    assert torch.equal(
        *(torch.cat([*images.batches(4)]) for images in (drawn, open_images(tmp_path / "other")))
    )
    assert not {*other} & {*real}
    half.of, half._ceiling = lambda _: [], lambda: {"name": "ceiling"}
    assert [one["name"] for one in half.others()] == ["other images of 2 kinds", "ceiling"]


def test_few_other_images_are_measured_for_what_they_allow(tiny, tmp_path):
    folder, teacher, options = tiny
    board = boards.board_of(folder, teacher, [one("a", options)], per_kind=1)
    few = Ruler(
        load_board(boards.write_board(tmp_path, board)), BoardTeacher(str(teacher)), tmp_path / "eval"
    )
    (row,) = few._unseen()
    assert "FD" in row["metrics"] and {m["n_fake"] for m in row["metrics"].values()} == {2}


def test_too_few_images_of_a_kind_are_said_before_anything_is_drawn(tiny, tmp_path):
    folder, teacher, options = tiny
    board = boards.board_of(folder, teacher, [one("a", options)], per_kind=5)
    board = load_board(boards.write_board(tmp_path, board))
    with pytest.raises(FewstepError, match=r"per_kind: 5: 0 captions of .* have so many images"):
        Ruler(board, BoardTeacher(str(teacher)), tmp_path / "eval")


def killed_at_its_first_checkpoint(folder, run):
    """The command, killed for good while its child trains; waits until the child has ended too."""
    child = subprocess.Popen(boards.command(folder), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    place, deadline = Place(folder / "made"), time.time() + 300
    while not list(place.run(train.name_of(run, train.code_of(run))).glob("checkpoints/*/state.json")):
        assert child.poll() is None and time.time() < deadline
        time.sleep(0.05)
    child.send_signal(signal.SIGKILL)
    child.wait()
    return place, found(place, run)


def wait_for_lock(folder):
    for _ in range(600):
        try:
            with train.held(folder):
                return
        except FewstepError:
            time.sleep(0.1)
    raise AssertionError("the child goes on without its parent")


def test_what_is_left_is_told_at_the_pace_so_far(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(train.time, "monotonic", lambda: now[0])
    pace = train.Pace(3)
    now[0] += 90
    assert pace.one_ended() == "2 of 3 runs left, about 3 min 00 s"
    now[0] += 10  # two at a time: a mean of 50 s
    assert pace.one_ended() == "1 of 3 runs left, about 50 s"
    assert pace.one_ended() == "the last run"


@pytest.mark.slow
def test_a_board_that_is_killed_goes_on_to_the_same_bits_and_then_has_nothing_to_do(
    tiny, tmp_path, monkeypatch, tally
):
    folder, teacher, options = tiny
    path = tmp_path / "board.yaml"
    rows = [
        one("long", options, steps=48),  # so that it still trains when it is killed
        one("broken", {**options, "roles.student.start_from": "/nowhere"}),
    ]
    boards.write_board(tmp_path, boards.board_of(folder, teacher, rows, seeds=[0]))
    board = load_board(path)
    run = Run(board, board.rows[0], 0)
    tally("faults injected", 1)
    place, record = killed_at_its_first_checkpoint(tmp_path, run)
    assert record["status"] == "running"
    wait_for_lock(place.run(record["name"]))
    said = boards.run(tmp_path, "--results", str(tmp_path / "kept"))
    assert said.returncode == 0, said.stderr
    assert "1 of 2 runs left, about " in said.stderr and "; the last run\n" in said.stderr
    assert "broken: failed" in said.stderr and said.stdout.strip().endswith("leaderboard.html")
    assert "resuming at step" in place.log(record["name"]).read_text()
    straight = execute(dataclasses.replace(run.recipe, output=str(tmp_path / "straight")))
    made = place.run(record["name"])
    files = [path.relative_to(straight) for path in straight.glob("export/**/*.safetensors")]
    for one_go, pieces in ((load_file(straight / file), load_file(made / file)) for file in files):
        assert one_go and all(one_go[name].equal(pieces[name]) for name in one_go)
    assert files
    tally("survived", 1)

    whole = leaderboards.load(tmp_path / "kept")
    long, broken = sorted(whole["rows"], key=lambda row: row["name"], reverse=True)
    assert (long["status"], broken["status"]) == ("done", "failed") and long["cpu_seconds"] > 0
    assert "/nowhere: no such folder" in broken["runs"][0]["reason"] and "FD" in long["metrics"]
    assert {row["kind"] for row in whole["teachers"][str(teacher)]} == {"reference", "teacher", "floor"}
    assert {p.name for p in (tmp_path / "kept").iterdir()} == {
        f"leaderboard.{suffix}" for suffix in ("json", "md", "html", "png")
    }

    def refuse(*_):
        raise AssertionError("trained or drawn again")

    monkeypatch.setattr(train.Children, "call", refuse)
    monkeypatch.setattr("fewstep.leaderboard.measure.open_model", refuse)
    pages = {p.name: p.read_bytes() for p in place.folder.glob("leaderboard.*")}
    again = leaderboards.leaderboard(board, place, whole["command"], board.rows)
    assert again == whole and pages == {p.name: p.read_bytes() for p in place.folder.glob("leaderboard.*")}
    monkeypatch.setattr("fewstep.leaderboard.summary.code_hash", lambda _method: "later")
    monkeypatch.setattr(train, "code_hash", lambda _method: "later")
    later = leaderboards.leaderboard(board, place, whole["command"], board.rows)
    assert all(row["stale"] for row in later["rows"]) and not any(row["stale"] for row in whole["rows"])
    assert later["rows"][0]["metrics"] == whole["rows"][0]["metrics"]


@pytest.mark.long
def test_a_search_keeps_all_its_trials_and_the_board_it_settles_on_can_run(tiny, tmp_path, monkeypatch):
    folder, teacher, options = tiny
    rows = [one("good", options, steps=10), one("lost", {**options, "roles.student.start_from": "/nowhere"})]
    factors = {"roles.student.lr": [0.5, 2.0]}
    board = boards.board_of(folder, teacher, rows, seeds=[0], search=factors, cpu_seconds=50)
    board = load_board(boards.write_board(tmp_path, board))
    place = Place(tmp_path / "made")
    settled = search.search(board, place, 2, 0.2, board.rows)
    lines = [json.loads(line) for line in (place.folder / search.TRIALS).read_text().splitlines()]
    assert [(line["row"], line["trial"], line["status"]) for line in lines] == [
        ("good", 0, "done"), ("good", 1, "done"), ("lost", 0, "failed"), ("lost", 1, "failed")
    ]  # fmt: skip
    assert all(line["steps"] == 2 and set(line["FD"]) == {"1"} for line in lines[:2])
    assert "/nowhere" in lines[2]["reason"] and lines[2]["FD"] == {}
    best = min(lines[:2], key=lambda line: line["FD"]["1"])
    assert load_board(place.folder / search.SETTLED) == settled
    assert settled.rows[0].options == best["options"] and settled.rows[0].steps > 1
    monkeypatch.setattr(train.Children, "call", lambda *_: pytest.fail("trained again"))
    assert (
        search.search(board, place, 2, 0.2, board.rows) == settled == search.search(board, place, 2, 0.2, [])
    )
    assert resized(settled, 25, 1).rows[0].steps == pytest.approx(settled.rows[0].steps / 2, abs=1)


def test_a_folder_of_somebody_else_is_refused(tiny, tmp_path):
    folder, teacher, options = tiny
    boards.write_board(tmp_path, boards.board_of(folder, teacher, [one("a", options)]))
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "mine.txt").touch()
    said = boards.run(tmp_path)
    assert said.returncode == 2 and "board.json says that fewstep made it" in said.stderr
    assert os.listdir(tmp_path / "made") == ["mine.txt"]
