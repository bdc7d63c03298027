"""What is trained, what is not trained again, what stays as failed: with processes that only pretend to train."""

import json
import signal
from pathlib import Path

import pytest
import yaml

from fewstep.cli import main
from fewstep.errors import FewstepError
from fewstep.files import held
from fewstep.leaderboard import run as leaderboards
from fewstep.leaderboard import train
from fewstep.leaderboard.board import Board, BoardTeacher, PairsOf, Row, Run, runs_of, to_dict
from fewstep.leaderboard.train import Place, Stopped, found, stale

ROW = Row("demo", 5)


class Pretended:
    """Stands for :class:`train.Children`: notes the commands, and makes what they would, or fails."""

    def __init__(self):
        self.commands, self.fails, self.stops = [], {}, set()

    def __call__(self, threads):
        self.threads = threads
        return self

    def stop(self):
        self.stopped = True

    def call(self, command, log):
        self.commands.append(command)
        log.parent.mkdir(parents=True, exist_ok=True)
        kind, words = command[0], dict(word[2:].split("=", 1) for word in command if word.startswith("--"))
        folder = Path(command[1] if kind == "resume" else words.get("output", words.get("out")))
        name = folder.name.split("-s")[0]
        if name in self.stops:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "recipe.yaml").touch()
            raise Stopped
        if name in self.fails:
            log.write_text(f"Traceback\nfewstep: {self.fails[name]}\n")
            return 3, 1.0
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        made = {**dict.fromkeys(train.KEPT, 1), "cpu_seconds": 50.0}
        (folder / "run.json").write_text(json.dumps(made))
        return 0, 7.0


@pytest.fixture
def pretended(monkeypatch):
    made = Pretended()
    monkeypatch.setattr(train, "Children", made)
    return made


def board_of(*rows, **more):
    return Board("t", list(rows), [BoardTeacher("builtin:emoji-xl")], **{"seeds": [0], **more})


def everything(place, board, **options):
    runs = list(runs_of(board, board.rows, board.seeds))
    train.train(place, runs, **options)
    return {run.key: found(place, run) for run in runs}


def test_a_finished_run_is_not_run_again_and_its_record_says_what_it_cost(tmp_path, pretended):
    place, board = Place(tmp_path), board_of(ROW, threads=3)
    record = everything(place, board)["demo", 0]
    assert (record["status"], record["cpu_seconds"], record["threads"]) == ("done", 50.0, 3)
    assert (
        record["code"] == [train.code_of(Run(board, ROW, 0))]
        and record["digest"] == Run(board, ROW, 0).digest
    )
    assert not (place.run(record["name"]) / "checkpoints").exists() and pretended.threads == 3
    words = pretended.commands[0]
    assert words[:2] == ["train", "demo"] and {"--train.steps=5", "--train.seed=0"} <= {*words}
    assert everything(place, board)["demo", 0] == record and len(pretended.commands) == 1
    everything(place, board, again=True)
    assert len(pretended.commands) == 1


def test_other_options_or_seeds_are_other_runs(tmp_path, pretended):
    place = Place(tmp_path)
    for board in (board_of(ROW), board_of(ROW, seeds=[0, 1]), board_of(Row("demo", 6))):
        everything(place, board)
    assert len(pretended.commands) == 3 and len(list((tmp_path / "records").iterdir())) == 3


def test_a_run_that_failed_stays_with_its_reason_and_the_rest_goes_on(tmp_path, pretended):
    place, board = Place(tmp_path), board_of(Row("demo", 5, name="bad"), ROW)
    pretended.fails["bad"] = "step 4: not finite"
    records = everything(place, board)
    assert records["bad", 0]["status"] == "failed" and records["demo", 0]["status"] == "done"
    assert records["bad", 0]["reason"] == "step 4: not finite (exit code 3)"
    assert everything(place, board) == records and len(pretended.commands) == 2
    pretended.fails.clear()
    assert everything(place, board, again=True)["bad", 0]["status"] == "done" and len(pretended.commands) == 3


def test_a_stopped_run_goes_on_where_it_was_and_stops_the_rest(tmp_path, pretended):
    place, board = Place(tmp_path), board_of(Row("demo", 5, name="long"), ROW)
    pretended.stops.add("long")
    with pytest.raises(KeyboardInterrupt, match="the same command goes on"):
        everything(place, board)
    assert pretended.stopped and found(place, Run(board, board.rows[0], 0))["status"] == "running"
    pretended.stops.clear()
    pretended.commands.clear()
    assert {record["status"] for record in everything(place, board).values()} == {"done"}
    assert pretended.commands[0][0] == "resume" and pretended.commands[0][1].startswith(str(tmp_path))


def test_other_code_marks_a_run_and_keeps_it(tmp_path, pretended, monkeypatch):
    place, board = Place(tmp_path), board_of(ROW)
    before = everything(place, board)["demo", 0]
    assert not stale(before)
    monkeypatch.setattr(train, "code_hash", lambda _method: "later")
    after = everything(place, board)["demo", 0]
    assert after == before and stale(after) and len(pretended.commands) == 1
    anew = everything(place, board, again=True)["demo", 0]
    assert anew["name"] != before["name"] and not stale(anew) and place.record(before["name"]).is_file()
    monkeypatch.undo()
    assert found(place, Run(board, ROW, 0)) == before


def test_code_of_a_run_is_of_its_method():
    for recipe, method in (("emoji_sid_1step", "sid"), ("emoji_boot_1step", "boot")):
        row = Row(recipe, 5)
        assert train.code_of(Run(board_of(row), row, 0)) == train.code_hash(method)


def test_code_of_another_method_is_no_other_code(tmp_path):
    """Of what a run starts from, or of who made its pairs."""
    codes = [train.code_hash("dmd"), train.code_hash("boot")]
    assert codes[0] != codes[1] and not stale({"code": codes}) and stale({"code": [*codes, "earlier"]})


def test_a_run_that_two_codes_have_trained_says_so(tmp_path, pretended, monkeypatch):
    place, board = Place(tmp_path), board_of(ROW)
    pretended.stops.add("demo")
    with pytest.raises(KeyboardInterrupt):
        everything(place, board)
    pretended.stops.clear()
    first = train.code_of(Run(board, ROW, 0))
    with monkeypatch.context() as patch:
        patch.setattr(train, "code_hash", lambda _method: "later")
        record = everything(place, board)["demo", 0]
        assert record["code"] == [first, "later"] and stale(record)
    assert stale(found(place, Run(board, ROW, 0)))


def test_pairs_are_made_once_and_paid_by_each_and_a_start_costs_what_it_took(tmp_path, pretended):
    half = Row("emoji_dmd_1step", 5, name="half", pairs=PairsOf(9, steps=3))
    board = board_of(half, Row("emoji_dmd_1step", 6, name="rest", start_from="half"), seeds=[0, 1])
    place = Place(tmp_path)
    records = everything(place, board, jobs=2)
    kinds = [command[0] for command in pretended.commands]
    assert kinds.count("pairs") == 1 and kinds.count("train") == 4
    made = next(command for command in pretended.commands if command[0] == "pairs")
    assert {"--num=9", "--steps=3"} <= {*made}
    assert records["half", 1]["before"] == [{"what": "9 pairs", "cpu_seconds": 7.0}]
    assert records["rest", 1]["before"] == [{"what": "half", "cpu_seconds": 57.0}]
    last = next(c for c in pretended.commands if any(w.startswith("--output") and "rest-s1" in w for w in c))
    start = next(word for word in last if word.startswith("--roles.student.start_from="))
    assert records["half", 1]["name"] in start and start.endswith("/export")
    assert sum(word.startswith(f"--data.pairs={place.folder}") for word in last) == 1


def test_pairs_of_other_code_mark_who_trains_on_them(tmp_path, pretended, monkeypatch):
    board = board_of(Row("emoji_dmd_1step", 5, pairs=PairsOf(9)))
    place, first = Place(tmp_path), train.code_of(Run(board, board.rows[0], 0))
    everything(place, board)
    monkeypatch.setattr(train, "code_hash", lambda _method: "later")
    record = everything(place, board, again=True)["emoji_dmd_1step", 0]
    assert record["code"] == sorted([first, "later"]) and stale(record)
    assert [command[0] for command in pretended.commands] == ["pairs", "train", "train"]


def test_what_starts_from_a_failed_run_fails_and_says_why(tmp_path, pretended):
    board = board_of(Row("demo", 5, name="first"), Row("demo", 6, name="second", start_from="first"))
    pretended.fails["first"] = "no"
    records = everything(Place(tmp_path), board)
    assert records["second", 0]["reason"] == "first, which it starts from, has failed"


def test_a_run_that_another_process_trains_is_not_a_failure(tmp_path, pretended, monkeypatch):
    place, board = Place(tmp_path), board_of(ROW)

    def busy(folder):
        raise FewstepError(f"{folder}: process 7 is at work in it")

    monkeypatch.setattr(train, "held", busy)
    with pytest.raises(FewstepError, match="process 7 is at work"):
        everything(place, board)
    monkeypatch.setattr(train, "held", held)
    assert everything(place, board)["demo", 0]["status"] == "done"


def test_signals_that_end_a_child_are_no_failures_but_others_are(tmp_path):
    assert {130, 138, 143, -signal.SIGTERM} <= train.STOPPED and -signal.SIGKILL not in train.STOPPED
    (tmp_path / "log.txt").write_text(f"fewstep: {Path.cwd()}/x: gone\n")
    assert train._last(tmp_path / "log.txt", -9) == "x: gone (signal 9)"


def test_a_damaged_record_is_named(tmp_path, pretended):
    place, board = Place(tmp_path), board_of(ROW)
    place.record(everything(place, board)["demo", 0]["name"]).write_text("{")
    with pytest.raises(FewstepError, match=r"records/demo-s0-.*: no record of a run; remove it"):
        everything(place, board)


def test_the_command_hands_over_whether_every_seed_is_asked_for(tmp_path, monkeypatch, capsys):
    board = tmp_path / "board.yaml"
    board.write_text(yaml.safe_dump(to_dict(board_of(ROW))))
    given = []
    monkeypatch.setattr(
        leaderboards, "leaderboard", lambda *a, **how: given.append((a[2], how)) or {"rows": []}
    )
    command = ["leaderboard", str(board), "--to", str(tmp_path / "made")]
    more = ["--every-seed", "--again", "--jobs", "2", "--minutes", "1.5", "--seeds", "1"]
    assert main(command) == main([*command, *more]) == 0
    # What decides the numbers is part of the record.
    assert given == [
        ("fewstep leaderboard board.yaml", {"jobs": 1, "again": False, "every": False}),
        (
            "fewstep leaderboard board.yaml --minutes 1.5 --seeds 1 --every-seed",
            {"jobs": 2, "again": True, "every": True},
        ),
    ]


@pytest.mark.parametrize("words", [["--every-seed"], ["--again"], ["--only", "a"]])
def test_showing_what_there_is_refuses_what_is_trained(tmp_path, capsys, words):
    assert main(["leaderboard", "none.yaml", "--to", str(tmp_path / "made"), "--render-only", *words]) == 2
    said = capsys.readouterr().err
    assert said.startswith("fewstep: --render-only: trains nothing") and words[0] in said


@pytest.mark.parametrize("word", ["--every-seed", "--again", "--render-only", "--results=results"])
def test_a_search_refuses_what_is_the_boards(tmp_path, capsys, word):
    assert main(["leaderboard", "none.yaml", "--to", str(tmp_path / "made"), "--search", "2", word]) == 2
    said = capsys.readouterr().err
    assert said.startswith("fewstep: --search: ") and word.partition("=")[0] in said


@pytest.mark.parametrize("every, others", [(False, ["good"]), (True, ["good", "bad"])])
def test_the_other_seeds_are_of_the_better_half_or_of_every_row(tmp_path, monkeypatch, every, others):
    rows = [Row("demo", 5, name="good"), Row("demo", 5, name="bad")]
    board, trained = board_of(*rows, seeds=[0, 1, 2]), []
    monkeypatch.setattr(leaderboards, "rulers_of", lambda *_: None)
    monkeypatch.setattr(
        leaderboards, "train", lambda _place, runs, *_: trained.extend(run.key for run in runs)
    )
    monkeypatch.setattr(leaderboards, "measure", lambda *_: {"rows": []})
    monkeypatch.setattr(leaderboards, "better_half", lambda *_: rows[:1])
    leaderboards.leaderboard(board, Place(tmp_path), "", rows, every=every)
    first = [(row.label, 0) for row in rows]
    assert trained == [*first, *((name, seed) for name in others for seed in (1, 2))]
