"""No command replaces what it did not make, and each says so before it spends anything."""

import os

import numpy as np
import pytest
import torch
from PIL import Image
from tries import nothing_lost, tried

from fewstep.cli.commands import Output
from fewstep.cli.main import parser
from fewstep.evaluation.statistics import Statistics

# Inputs that are nowhere, but where they are to be the output too: the output is what is refused, and comes first.
FILES = {
    "eval fid": ("{real} {fake} --out", ".json"),
    "eval stats": ("{real} -o", ".npz"),
    "eval retrieval": ("{fake} --prompts {prompts} --out", ".json"),
    "eval diversity": ("{fake} --per-prompt 2 --out", ".json"),
    "eval scores": ("{fake} --prompts {prompts} --scorer clip:nothing --out", ".json"),
    "sample": ("{real} --prompt x --out", ".png"),
    "bench": ("emoji_dmd2_1step --out", ".json"),
}
FOLDERS = {
    "prepare": ("builtin:nothing --images builtin:emoji --out", None),
    "convert": ("llamagen --transformer {theirs}/thesis.tex --tokenizer nothing --to", None),
    "floor": ("builtin:nothing --steps 2 --out", "floor.json"),
    "pairs": ("emoji_dmd_1step --out", "pairs.json"),
    "eval generate": ("builtin:nothing --steps 1 --prompts {prompts} --out", "1-step"),
    "eval run": ("--teacher builtin:nothing --prompts {prompts} --out", "table.json"),
    "leaderboard": ("{theirs}/thesis.tex --to", "board.json"),
    "train": ("emoji_dmd2_1step --output", "recipe.yaml"),
}


@pytest.fixture
def place(tmp_path):
    """Somebody's files and folders."""
    rng = np.random.default_rng(0)
    for name, count in (("real", 6), ("fake", 6)):
        (tmp_path / name).mkdir()
        for i in range(count):
            image = rng.integers(0, 256, (16, 16, 3)).astype(np.uint8)
            Image.fromarray(image).save(tmp_path / name / f"{i}.png")
    (tmp_path / "prompts.txt").write_text("\n".join(f"thing {i}" for i in range(6)))
    (tmp_path / "theirs" / "chapters").mkdir(parents=True)
    for name in ("thesis.tex", "chapters/1.tex", "model_index.json", "000000.png"):
        (tmp_path / "theirs" / name).write_text("years of work")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "theirs")
    os.mkfifo(tmp_path / "pipe")
    return tmp_path


def command(name, table, place, out):
    words = table[name][0].format(
        **{n: place / n for n in ("real", "fake", "theirs")}, prompts=place / "prompts.txt"
    )
    return [*name.split(), *words.split(), str(out)]


def rename(path, suffix):
    """With the suffix that the command wants, so that nothing else is wrong with it."""
    return path.rename(path.with_name(path.name + suffix))


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("what", ["theirs", "empty", "link", "pipe", "fake", "real"])
def test_a_file_takes_the_place_of_no_folder_and_no_device(tally, place, name, what):
    suffix = FILES[name][1]
    target = place / what
    for given in (target, rename(target, suffix)):
        with nothing_lost(tally, place):
            code, said = tried(tally, *command(name, FILES, place, given))
        assert code == 2
        assert f"--out {given}" in said and (
            "is a folder" in said or "is a device" in said or "ends in" in said
        )


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    "out, words",
    [
        ("theirs/thesis.tex", "expected a name that ends in"),
        ("theirs/thesis.tex/a{}", "is a file"),
        ("x" * 300 + "{}", "File name too long"),
        ("theirs/" + "x" * 245 + "{}", "File name too long"),
        ("/proc/nothing{}", "cannot be written"),
    ],
)
def test_a_file_that_cannot_be_written_there(tally, place, name, out, words):
    with nothing_lost(tally, place):
        code, said = tried(tally, *command(name, FILES, place, place / out.format(FILES[name][1])))
    assert code in (2, 4) and "--out" in said and words in said


@pytest.mark.parametrize("name", FOLDERS)
@pytest.mark.parametrize(
    "what", ["theirs", "link", "theirs/thesis.tex", "theirs/thesis.tex/new", "pipe", "x" * 300]
)
def test_a_folder_takes_the_place_of_nothing_that_is_not_of_its_kind(tally, place, name, what):
    if what in ("theirs", "link"):
        if name == "eval generate":  # it adds its own folder, of which there is one already
            (place / "theirs" / "chapters").rename(place / "theirs" / "1-step")
        if name == "eval run":
            (place / "theirs" / "thesis.tex").rename(place / "theirs" / "index.html")
    with nothing_lost(tally, place):
        code, said = tried(tally, *command(name, FOLDERS, place, place / what))
    assert code in (2, 4) and what.split("/")[-1][:9] in said
    reasons = (
        "not empty",
        "what the command reads",
        "is a file",
        "is there already",
        "too long",
        "no table of",
        "no manifest.json",
    )
    assert any(reason in said for reason in reasons), said


@pytest.mark.parametrize("name", FOLDERS)
def test_an_empty_or_a_new_folder_is_no_reason(tally, place, name):
    """What is refused then is the input, which is nowhere."""
    if name == "train":
        pytest.skip("it would train")
    for out in ("new", "deep/er/new", *(["empty"] if name != "prepare" else [])):
        with nothing_lost(tally, place):
            code, said = tried(tally, *command(name, FOLDERS, place, place / out), *_cheap(name))
        assert code == 2 and "--out" not in said and "not empty" not in said, said


def _cheap(name):
    return ["--data.prompts", "nowhere.txt"] if name == "pairs" else []


def inputs(place):
    """Commands whose output is one of their inputs, by name, by a link or by a hard link."""
    extractor = ("--extractor", f"{__name__}:pool_function")
    os.link(place / "a.npz", place / "hard.npz")
    (place / "soft.npz").symlink_to(place / "a.npz")
    for out in ("a.npz", "hard.npz", "soft.npz", "real/../a.npz"):
        yield "eval", "stats", place / "a.npz", "-o", place / out, *extractor
    (place / "prompts.json").write_text("thing 0\nthing 1\n")
    yield (
        "eval",
        "scores",
        place / "fake",
        "--prompts",
        place / "prompts.json",
        "--scorer",
        "clip:x",
        "--out",
        place / "prompts.json",
    )
    yield (
        "eval",
        "scores",
        place / "fake",
        "--prompts",
        place / "prompts.txt",
        "--scorer",
        f"clip:{place}/s.json",
        "--out",
        place / "s.json",
    )
    yield "eval", "run", place / "theirs", "--out", place / "theirs"
    yield (
        "eval",
        "generate",
        place / "theirs",
        "--steps",
        "1",
        "--prompts",
        place / "prompts.txt",
        "--out",
        place / "theirs",
    )
    yield "floor", place / "theirs", "--steps", "2", "--out", place / "theirs"
    yield "floor", place / "theirs", "--steps", "2", "--out", place / "link"
    yield (
        "bench",
        "emoji_dmd2_1step",
        "--data.prompts",
        place / "prompts.json",
        "--out",
        place / "prompts.json",
    )
    yield "bench", "emoji_dmd2_1step", f"--data.prompts={place}/prompts.json", "--out", place / "prompts.json"


def test_an_output_that_is_an_input_is_refused(tally, place):
    np.savez(place / "a.npz", images=np.zeros((4, 8, 8, 3), np.uint8))
    (place / "s.json").write_text("{}")
    (place / "theirs" / "floor.json").write_text("{}")
    for words in inputs(place):
        with nothing_lost(tally, place):
            code, said = tried(tally, *words)
        assert code == 2 and "is what the command reads" in said, said


def pool_function(pixels):
    return torch.nn.functional.adaptive_avg_pool2d(pixels.permute(0, 3, 1, 2).float() / 255, 2).flatten(1)


def test_results_take_the_place_of_older_ones(tally, place):
    """Twice, and to a new folder; nothing else changes."""
    extractor = ("--extractor", f"{__name__}:pool_function")
    for _ in range(2):
        for words, out in [
            (("fid", place / "real", place / "fake"), "new/fid.json"),
            (("stats", place / "real", *extractor), "new/stats.npz"),
            (("diversity", place / "fake", "--per-prompt", 2), "new/diversity.json"),
        ]:
            with nothing_lost(tally, place, place / out):
                assert (
                    tried(
                        tally,
                        "eval",
                        *words,
                        *(extractor if "stats" not in words else ()),
                        "--out",
                        place / out,
                    )[0]
                    == 0
                )
    assert Statistics.load(place / "new" / "stats.npz").n == 6


def declared(parser, words=()):
    """Every command of a parser: its words and its actions."""
    for action in parser._actions:
        if isinstance(action.choices, dict):
            for name, inner in action.choices.items():
                yield from declared(inner, (*words, name))
            return
    yield words, parser


def test_every_argument_that_names_an_output_is_checked():
    """A command that is added later cannot forget it, and has a row in the tables above."""
    tables = {tuple(name.split()) for name in (*FILES, *FOLDERS)} - {
        ("train",)
    }  # whose output is its recipe's
    found = set()
    for words, inner in declared(parser()):
        named = [
            a.dest for a in inner._actions if a.option_strings or a.dest != "results"
        ]  # of eval compare: inputs
        places = {"out", "output", "to", "results"} & {*named}
        if places and words != ("recipes",):  # which refuses whatever is there
            assert {*inner.get_default("outputs")} == places, words
            assert all(isinstance(one, Output) for one in inner.get_default("outputs").values())
            found.add(words)
    assert found == tables


def test_a_measured_floor_is_written_beside_nothing(tally, place):
    """A searched one may be replaced by another such, and is no folder of measurements."""
    (place / "theirs" / "floor.json").write_text("{}")
    words = (
        "floor",
        "emoji_dmd2_1step",
        "--steps",
        "2",
        "--evaluation.num",
        "4",
        "--data.prompts",
        "nowhere.txt",
    )
    with nothing_lost(tally, place):
        code, said = tried(tally, *words, "--out", place / "theirs")
    assert code == 2 and f"--out {place / 'theirs'} is not empty; it is kept as it is" in said


def test_copying_a_recipe_replaces_nothing(tally, place):
    (place / "empty" / "emoji_dmd2_1step.py").write_text("mine")
    for to in ("empty", "empty/emoji_dmd2_1step.py", "theirs/thesis.tex"):
        with nothing_lost(tally, place):
            assert tried(tally, "recipes", "copy", "emoji_dmd2_1step", place / to)[0] == 2


def test_an_export_in_the_way_is_noticed_before_training(tally, place, tiny_sd15, monkeypatch):
    from fewstep.training.trainer import Trainer

    monkeypatch.setattr(Trainer, "train", lambda _: pytest.fail("trained"))
    run = place / "run"
    (run / "export").mkdir(parents=True)
    (run / "export" / "mine.txt").write_text("years of work")
    (run / "recipe.yaml").write_text(_recipe_text())
    for words in (("resume", run), ("export", run)):
        with nothing_lost(tally, place):
            code, said = tried(tally, *words)
        assert code == 2 and "export is not empty, and no fewstep.json says that fewstep made it" in said


def _recipe_text():
    from fewstep import recipe as recipes
    from fewstep.runs.library import load_recipe

    return recipes.dump(load_recipe("emoji_dmd2_1step"))


@pytest.mark.parametrize(
    "out, reason",
    [
        ("fake/notes.json", "lies in what the command reads"),
        ("made/manifest.json", "a record of its folder"),
        ("made/table.json", "a record of its folder"),
        ("made/run.json", "a record of its folder"),
    ],
)
def test_a_result_takes_the_place_of_no_record_and_lies_in_no_input(tally, place, out, reason):
    (place / "made").mkdir()
    for name in ("fake/notes.json", "made/manifest.json", "made/table.json", "made/run.json"):
        (place / name).write_text("{}")
    with nothing_lost(tally, place):
        code, said = tried(tally, *command("eval fid", FILES, place, place / out))
    assert code == 2 and reason in said


def test_statistics_take_the_place_of_statistics_only(tally, place):
    np.savez(place / "mine.npz", images=np.zeros((2, 4, 4, 3), np.uint8))
    with nothing_lost(tally, place):
        code, said = tried(tally, *command("eval stats", FILES, place, place / "mine.npz"))
    assert code == 2 and "an archive of other arrays than statistics" in said


@pytest.mark.parametrize("name", ["photo.png", "photo.jpg", "damaged.png"])
def test_a_grid_takes_the_place_of_no_picture_of_others(tally, place, name):
    image = Image.fromarray(np.zeros((8, 8, 3), np.uint8))
    (place / name).write_bytes(b"x") if name == "damaged.png" else image.save(place / name)
    with nothing_lost(tally, place):
        code, said = tried(tally, *command("sample", FILES, place, place / name))
    assert code == 2 and "fewstep did not make this picture" in said


@pytest.mark.parametrize("name", ["own.png", "own.jpg", "own.webp"])
def test_a_grid_takes_the_place_of_an_older_one(tmp_path, name):
    from fewstep.cli.runs import MAKER, SOFTWARE, _check_picture

    signed = Image.Exif()
    signed[SOFTWARE] = MAKER
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / name, exif=signed)
    _check_picture(tmp_path / name)
    _check_picture(tmp_path / "new.png")


@pytest.mark.parametrize("name", ["eval run", "eval generate"])
def test_images_are_not_drawn_among_those_of_others(tally, place, name):
    with nothing_lost(tally, place):
        code, said = tried(tally, *command(name, FOLDERS, place, place / "real"), *_cheap(name))
    assert code == 2 and "give another place" in said


@pytest.mark.parametrize(
    "words, reason",
    [
        ("sample {real} --prompt a --num 0", "--num: 0: expected at least 1, a whole number"),
        ("sample {real} --prompt a --scale -2", "--scale: -2: expected at least 1, a whole number"),
        (
            "eval generate builtin:emoji-xl --steps 1 --prompts {prompts} --out x --guidance nan",
            "--guidance: nan: expected a finite number",
        ),
        (
            "floor builtin:emoji-xl --steps 4 --prompts {prompts} --out x --guidance inf",
            "--guidance: inf: expected a finite number",
        ),
        ("eval fid {loop} {fake}", "does not exist"),
        ("eval fid {real} {fake} --num -1", "--num: -1: expected at least 1"),
        ("eval compare {real} {fake}", "is a folder: expected a result"),
        ("eval compare {real}/no.json {real}/no.json", "does not exist: expected a result"),
        ("train emoji_dmd2_1step --output {real}", "is not empty and holds no run; give another --output"),
    ],
)
def test_what_cannot_be_is_said_in_one_message(tally, place, words, reason):
    (place / "loop").symlink_to(place / "loop")
    given = {name: place / name for name in ("real", "fake", "loop")} | {"prompts": place / "prompts.txt"}
    with nothing_lost(tally, place):
        code, said = tried(tally, *words.format(**given).split())
    assert code == 2 and reason in said, said
