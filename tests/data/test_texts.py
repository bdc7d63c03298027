"""Prompts and captions: text is recognised, whatever reads it, or refused in one line that says where."""

import json
import sys
from collections import Counter
from functools import partial

import pytest
from PIL import Image

from fewstep.cli.eval import prompted_indices
from fewstep.data import emoji, texts
from fewstep.data.images import TABLES, load_images
from fewstep.data.pairs import Pairs, make_pairs
from fewstep.data.prompts import load_prompts
from fewstep.errors import FewstepError
from fewstep.evaluation.prompts import read_prompts

TWO = ["a red apple", "ein Mädchen, 女の子"]
# What ends a line for `str.splitlines`, and not for a text file.
ODD = "one\u2028two\x0bthree\x0cfour\x1cfive\x85six\u2029seven"


def captions(path, column=None):
    """The reader of captions beside images: a table is read under its name, of lines the whole file is one."""
    if texts.is_table(path) and path.suffix not in TABLES:
        pytest.skip("Hugging Face's folders have no such table")
    folder = path.parent / "folder"
    folder.mkdir(exist_ok=True)
    for number in range(2):
        Image.new("RGB", (8, 8)).save(folder / f"{number}.png")
    if not texts.is_table(path):
        for number in range(2):
            (folder / f"{number}.txt").write_bytes(path.read_bytes())
        return load_images(str(folder)).captions[0].split("\n")
    (folder / f"metadata{path.suffix}").write_bytes(path.read_bytes())
    return load_images(str(folder), column).captions


READERS = {
    "training": lambda path, column=None: load_prompts(str(path), column=column),
    "evaluation": lambda path, column=None: list(read_prompts(path, column).texts),
    "retrieval": lambda path, column=None: [
        [*TWO, ODD][i] for i in prompted_indices(path, [*TWO, ODD], column)
    ],
    "captions": captions,
}


@pytest.fixture(params=READERS)
def read(request):
    return READERS[request.param]


@pytest.fixture
def file(tmp_path):
    def write(name, content):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


@pytest.fixture
def refused(tally):
    """Asserts that a reader refuses a file in one line that names it."""

    def check(read, path, *words):
        tally("inputs tried", 1)
        with pytest.raises(FewstepError) as error:
            read(path)
        message = str(error.value)
        assert "\n" not in message and all(word in message for word in words), message
        tally("refused with a clear error", 1)

    return check


# --------------------------------------------------------------------------------------------------------------- lines
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("last", [True, False])
def test_lines_of_any_editor_are_the_same_texts(file, mark, end, last):
    content = mark + (end.join(TWO) + end * last).encode()
    for name in ("training", "evaluation", "retrieval"):
        assert READERS[name](file("p.txt", content)) == TWO, name
    assert [line.removesuffix("\r") for line in captions(file("p.txt", content))] == TWO


def test_only_a_line_feed_ends_a_line(file, read):
    assert read(file("p.txt", f"{ODD}\n{TWO[0]}\n")) == [ODD, TWO[0]]


def test_files_joined_together_leave_no_mark_within(file):
    content = b"\xef\xbb\xbfone\n\xef\xbb\xbftwo\n"
    assert load_prompts(str(file("p.txt", content))) == ["one", "two"]


@pytest.mark.parametrize(
    "content, words",
    [
        ("a\nein Mädchen\n".encode("latin-1"), ("0xe4 at byte 7, line 2", "Latin-1", "save it as UTF-8")),
        ("a\nb\n".encode("utf-16"), ("it is UTF-16",)),
        ("a\nb\n".encode("utf-16-le"), ("0x00 at byte 1, line 1",)),
        ("a\nb\n".encode("utf-32"), ("it is UTF-16",)),
        (b"ab\n\x00\x01", ("0x00 at byte 3, line 2",)),
        (b"PK\x03\x04\x14\x00", ("a zip file",)),
        (b"\x1f\x8b\x08\x00", ("gzip",)),
    ],
)
@pytest.mark.parametrize("suffix", ["txt", "jsonl", "json", "csv", "tsv"])
def test_what_is_no_text_is_refused_with_its_place(file, read, refused, content, words, suffix):
    refused(read, file(f"p.{suffix}", content), *words)


@pytest.mark.parametrize("name", ["training", "evaluation", "retrieval"])
def test_markup_of_other_programs_is_no_list_of_prompts(file, refused, name):
    read = READERS[name]
    refused(read, file("p.txt", '{"text": "a cat"}\n{"text": "a dog"}\n'), "holds JSON", ".jsonl")
    refused(read, file("p.txt", '[\n  "a cat",\n  "a dog"\n]\n'), "holds JSON")
    refused(read, file("p.txt", b"a cat\ra dog\r"), "carriage returns")
    for suffix in texts.OTHERS:
        refused(read, file(f"p{suffix}", "- a cat\n"), suffix)
    refused(read, file("p.txt", ""), "holds no prompt")


def test_brackets_are_no_markup(file):
    lines = ["[close-up] a cat", "{a|b} cat", "<lora:x:1> cat", "$HOME, `id`"]
    assert load_prompts(str(file("p.txt", "\n".join(lines)))) == lines


def test_a_file_that_is_gone_or_a_folder(tmp_path, refused):
    for path in (tmp_path / "gone.txt", tmp_path, tmp_path / "gone.csv"):
        refused(read_prompts, path, str(path))
        refused(partial(prompted_indices, captions=TWO), path, str(path))


# -------------------------------------------------------------------------------------------------------------- tables
def table(suffix, rows):
    """Rows as a file of this kind, by its usual writer."""
    if suffix == "json":
        return json.dumps(rows, indent=1)
    if suffix in ("jsonl", "ndjson"):
        return "".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in rows)
    comma = {"csv": ",", "tsv": "\t"}[suffix]
    cells = [list(rows[0]), *(list(row.values()) for row in rows)]
    quoted = [comma.join('"' + cell.replace('"', '""') + '"' for cell in line) for line in cells]
    return "\n".join(quoted) + "\n"


KINDS = ["jsonl", "csv"]
PROMPTED = ["training", "evaluation", "retrieval"]


def rows_of(**columns):
    names = ("0.png", "1.png")
    return [{"file_name": n, **{c: v[i] for c, v in columns.items()}} for i, n in enumerate(names)]


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("column", ["text", "caption", "prompt", "TEXT"])
@pytest.mark.parametrize("suffix", ["jsonl", "ndjson", "json", "csv", "tsv"])
def test_the_usual_column_of_a_table(file, suffix, column, mark):
    path = file(f"p.{suffix}", mark + table(suffix, rows_of(**{column: TWO})).encode())
    for name in (*PROMPTED, *(["captions"] if suffix in KINDS else [])):
        assert READERS[name](path) == TWO, name
    assert read_prompts(path).records[1]["file_name"] == "1.png"


@pytest.mark.parametrize("suffix", KINDS)
def test_a_column_by_name(file, read, refused, suffix):
    path = file(f"p.{suffix}", table(suffix, rows_of(text=["x", "y"], caption=["v", "w"], long=TWO)))
    assert read(path, "long") == TWO
    refused(read, path, "'text' and 'caption' might hold the texts", "--column")
    refused(partial(read, column="lnog"), path, "no 'lnog'", "'long'")
    path = file(f"p.{suffix}", table(suffix, rows_of(long=TWO)))
    refused(read, path, "expected one of text, caption, prompt")


@pytest.mark.parametrize("name", ["p.jsonl", "p.json"])
def test_only_a_line_feed_ends_a_row(tmp_path, name):
    rows = [{"text": "a\u2028b\x85c"}, {"text": "d"}]
    (tmp_path / name).write_text(
        "\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8"
    )
    assert texts.read(tmp_path / name).texts == ("a\u2028b\x85c", "d")


def test_a_list_of_texts_and_lines_under_the_name_of_json(file):
    for content in (json.dumps(TWO), "".join(json.dumps({"text": text}) + "\n" for text in TWO)):
        path = file("p.json", content)
        assert all(READERS[name](path) == TWO for name in PROMPTED)
    path = file("p.jsonl", "\n".join(map(json.dumps, TWO)))
    assert all(READERS[name](path) == TWO for name in PROMPTED)


@pytest.mark.parametrize("name", ["evaluation", "retrieval"])
def test_a_column_of_lines_is_refused(file, refused, name):
    refused(partial(READERS[name], column="text"), file("p.txt", TWO[0]), "has no column 'text'")


@pytest.mark.parametrize("value", [None, 5, 0.5, True, ["a cat"], {"en": "a cat"}, "gone", "\ud800"])
def test_a_cell_without_text_is_refused_with_its_row(file, read, refused, value):
    rows = rows_of(text=[TWO[0], value])
    if value == "gone":
        del rows[1]["text"]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    refused(
        read,
        file("p.jsonl", lines),
        "line 2",
        "text",
        "p.jsonl" if read is not captions else "metadata.jsonl",
    )


@pytest.mark.parametrize("name", PROMPTED)
@pytest.mark.parametrize("text", ["", "  "])
def test_an_empty_cell_is_no_prompt(file, refused, name, text):
    for suffix, place in (("jsonl", "line 2"), ("json", "row 2"), ("csv", "line 3")):
        rows = rows_of(text=[TWO[0], text])
        refused(READERS[name], file(f"p.{suffix}", table(suffix, rows)), place, "expected a text")


@pytest.mark.parametrize(
    "suffix, content, words",
    [
        ("jsonl", '{"text": "a"}\n{"text": \n', ("line 2",)),
        ("jsonl", "[" * 10**5, ("line 1",)),
        ("jsonl", "5\n", ("line 1", "is 5")),
        ("jsonl", "", ("holds no row",)),
        ("json", "[" * 10**5, ("is no JSON",)),
        ("json", '{"text": ["a"]}', ("row 1", 'text is ["a"]')),
        ("json", "[]", ("holds no row",)),
        ("json", "[{}]", ("row 1", "has no 'text'")),
        ("csv", "file_name,text\na.png,a cat, black\n", ("line 2", "3 cells for 2 columns")),
        ("csv", 'file_name,text\na.png,"a cat\n', ("line 2",)),
        ("csv", "text,text\na,b\n", ("two columns have one name",)),
        ("csv", "a red apple\na blue bird\n", ("has the columns 'a red apple'",)),
        ("csv", "text\n" + "x" * 200_000, ("field larger",)),
        ("csv", "", ("holds no row",)),
    ],
)
def test_a_damaged_table_is_refused_with_its_place(file, read, refused, suffix, content, words):
    refused(read, file(f"p.{suffix}", content), *words)


def test_parquet_needs_a_library(file, read, refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    refused(read, file("p.parquet", b"PAR1"), "fewstep[data]")


def test_parquet_is_a_table_like_any_other(file, read, refused, tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")

    def write(rows):
        parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "p.parquet")
        return tmp_path / "p.parquet"

    assert read(write(rows_of(text=TWO))) == TWO
    refused(read, write(rows_of(text=[TWO[0], None])), "row 2", "text is null")
    refused(read, write(rows_of(text=[1, 2])), "row 1", "text is 1")
    refused(read, file("p.parquet", b"PAR1 and noise"), "cannot be read as Parquet")


# ---------------------------------------------------------------------------------------------------- captioned images
@pytest.fixture
def pictures(tmp_path):
    """A folder with images at these places."""

    def make(*names):
        for name in names:
            path = tmp_path / "data" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8)).save(path)
        return tmp_path / "data"

    return make


@pytest.mark.parametrize(
    "place, prefix",
    [
        ("metadata.jsonl", "./train/"),
        ("metadata.jsonl", "train/"),
        ("metadata.jsonl", "train\\"),
        ("train/metadata.jsonl", ""),
        ("train/metadata.jsonl", "./"),
        ("train/metadata.jsonl", "train/"),
        ("train/metadata.jsonl", "../train/"),
    ],
)
def test_a_table_names_its_images_as_hugging_face_does(pictures, place, prefix):
    folder = pictures("train/b.png", "train/a.png")
    rows = [{"file_name": f"{prefix}{name}.png", "text": f"the {name}"} for name in "ba"]
    (folder / place).write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert load_images(str(folder)).captions == ["the a", "the b"]
    if place.startswith("train"):
        assert load_images(str(folder / "train")).captions == ["the a", "the b"]


def test_each_folder_may_have_its_table(pictures):
    folder = pictures("train/a.png", "more/a.png")
    for part in ("train", "more"):
        (folder / part / "metadata.csv").write_text(f"file_name,text\na.png,of {part}\n")
    assert load_images(str(folder)).captions == ["of more", "of train"]


def test_tables_that_say_two_things_are_refused(pictures, refused):
    folder = pictures("a.png")
    row = json.dumps({"file_name": "a.png", "text": "one"}) + "\n"
    (folder / "metadata.jsonl").write_text(row + row.replace("one", "two").replace("a.png", "./a.png"))
    refused(load_images, str(folder), "metadata.jsonl, line 2", "another caption")
    (folder / "metadata.jsonl").write_text(row + row)
    assert load_images(str(folder)).captions == ["one"]
    (folder / "metadata.csv").write_text("file_name,text\na.png,one\n")
    refused(load_images, str(folder), "metadata.csv", "in one folder")


def test_rows_of_images_that_are_not_there_are_counted(pictures, capsys):
    folder = pictures("a.png")
    rows = [{"file_name": f"{name}.png", "text": name} for name in "abc"]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert load_images(str(folder)).captions == ["a"]
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "2 rows" in said and "b.png" in said


@pytest.mark.parametrize(
    "row", [{"text": "a"}, {"file_name": 3, "text": "a"}, {"file_name": None, "text": "a"}, 7]
)
def test_a_row_without_a_file_name(pictures, refused, row):
    folder = pictures("a.png")
    (folder / "metadata.jsonl").write_text(json.dumps(row))
    refused(load_images, str(folder), "metadata.jsonl, line 1", "data.images")


# --------------------------------------------------------------------------------------------------------------- pairs
def test_prompts_of_pairs_keep_their_places(tmp_path, sdxl):
    prompts = [ODD, "two\r", "three"]
    folder = make_pairs(tmp_path / "pairs", sdxl, prompts, num=3, steps=1)
    assert sorted(Pairs(folder).prompts) == sorted(prompts)
    make_pairs(folder, sdxl, prompts, num=3, steps=1)  # the same, so nothing is refused


def test_builtin_prompts_may_be_mostly_names():
    """Where names are to be learned, pairs of which half were groups would show each name too seldom."""
    found = Counter(load_prompts("builtin:emoji-mostly-names"))
    assert found == Counter(emoji.names() * 2) + Counter(emoji.groups())
    assert found["red apple"] == 2 and found["any food fruit"] == emoji.groups().count("any food fruit") > 1
