"""Files are whole or absent, whatever fails while they are written."""

import os
import subprocess

import pytest
import torch
from processes import Fork

from fewstep import files
from fewstep.errors import FewstepError


def names(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*"))


def test_a_file_and_a_folder_take_the_place_of_the_old_ones(tmp_path):
    for text in ("old", "new"):
        files.write(tmp_path / "deep" / "a.txt", text)
        with files.replacing(tmp_path / "folder", record="ours.json") as part:
            files.write_json(part / f"{text}.txt", {"ü": text})
            files.write_json(part / "ours.json", {})
    assert names(tmp_path) == ["deep", "deep/a.txt", "folder", "folder/new.txt", "folder/ours.json"]
    assert (tmp_path / "deep" / "a.txt").read_text() == "new"


def test_what_others_made_is_never_replaced(tmp_path):
    """A folder by nothing but a folder of the same kind, a device and a file by no folder."""
    files.write(tmp_path / "theirs" / "thesis.tex", "mine")
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    before = names(tmp_path)
    for name in ("theirs", "empty", "pipe"):
        with pytest.raises(FewstepError, match=rf"{name} is (a|not)"):
            files.write(tmp_path / name, "text")
    for name, record in (
        ("theirs", None),
        ("theirs", "ours.json"),
        ("theirs/thesis.tex", None),
        ("nowhere", None),
    ):
        with pytest.raises(FewstepError), files.replacing(tmp_path / name, record=record) as part:
            files.write(part / "ours.json", "{}")
    assert names(tmp_path) == before and (tmp_path / "theirs" / "thesis.tex").read_text() == "mine"
    with files.replacing(tmp_path / "empty") as part:
        files.write(part / "ours.json", "{}")
    assert (tmp_path / "empty" / "ours.json").is_file()


def test_somebody_elses_folder_is_refused_before_its_place_is_written_for(tmp_path):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "a").write_text("x")
    with pytest.raises(FewstepError, match="is not empty"), files.replacing(tmp_path / "theirs"):
        pytest.fail("written")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(FewstepError, match="link is a file; give the name of a folder"):
        files.check_place(tmp_path / "link", True)
    files.check_writable(tmp_path / "A.JSON", "--out", (".json",))


def test_what_a_killed_writer_left_makes_a_folder_nobodys(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / ".part-elsewhere-1-x.json").write_text("half")
    files.check_place(tmp_path / "a", True, "ours.json")
    (tmp_path / "a" / ".mine").write_text("x")
    with pytest.raises(FewstepError, match="is not empty"):
        files.check_place(tmp_path / "a", True, "ours.json")


def test_a_folder_behind_a_link_is_kept_where_another_takes_its_name(tmp_path):
    files.write(tmp_path / "disk" / "ours.json", "old")
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    with files.replacing(tmp_path / "link", record="ours.json") as part:
        files.write(part / "ours.json", "new")
    assert names(tmp_path) == ["disk", "disk/ours.json", "link", "link/ours.json"]
    assert [(tmp_path / name / "ours.json").read_text() for name in ("disk", "link")] == ["old", "new"]


def test_an_output_is_refused_before_anything_is_spent_on_it(tmp_path):
    files.write(tmp_path / "a.json", "mine")
    files.write(tmp_path / "full" / "a.json", "mine")
    (tmp_path / "to_full").symlink_to(tmp_path / "full")
    (tmp_path / "same.json").symlink_to(tmp_path / "a.json")
    before = names(tmp_path)
    for path, options, words in [
        ("full", {"suffixes": ("",)}, "--out .*full is a folder"),
        ("to_full", {"suffixes": ("",)}, "to_full is a folder"),
        ("full", {}, "full is not empty; it is kept"),
        ("full", {"record": "ours.json"}, r"not empty, and no ours\.json says that fewstep made it"),
        ("a.json", {}, r"a\.json is a file; give the name of a folder"),
        ("a.json", {"suffixes": (".md", ".txt")}, r"ends in \.md or \.txt"),
        ("a.json/b.json", {"suffixes": (".json",)}, r"cannot be created: .*a\.json is a file"),
        ("same.json", {"suffixes": (".json",), "inputs": [tmp_path / "a.json"]}, "is what the command reads"),
        (
            "full",
            {"record": files.SHARED, "inputs": ["x", tmp_path / "to_full"]},
            "is what the command reads",
        ),
        ("x" * 300 + ".json", {"suffixes": (".json",)}, "cannot be written: File name too long"),
        ("x" * 240 + ".json", {"suffixes": (".json",)}, "cannot be written: File name too long"),
        ("a\0.json", {"suffixes": (".json",)}, "null byte"),
    ]:
        with pytest.raises(FewstepError, match=words):
            files.check_writable(tmp_path / path, "--out", **options)
    for path, options in [
        ("a.json", {"suffixes": (".json",), "inputs": ["b.json", "full"]}),
        ("new/deep/b.json", {"suffixes": (".json",)}),
        ("full", {"record": "a.json"}),
        ("full", {"record": files.SHARED}),
        ("new/folder", {}),
    ]:
        files.check_writable(tmp_path / path, "--out", **options)
    assert names(tmp_path) == before


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_an_interrupted_write_leaves_the_old_one(tmp_path, error):
    files.write(tmp_path / "a.txt", "old")
    with pytest.raises((KeyboardInterrupt, FewstepError)), files.replacing(tmp_path / "a.txt") as part:
        part.write_text("half")
        raise error
    assert names(tmp_path) == ["a.txt"] and (tmp_path / "a.txt").read_text() == "old"


def test_what_is_written_is_on_the_disk_before_it_gets_its_name_and_then_the_name_is(tmp_path, monkeypatch):
    done = []
    sync, replace = files._sync, os.replace
    monkeypatch.setattr(files, "_sync", lambda path: done.append(path.name) or sync(path))
    monkeypatch.setattr(os, "replace", lambda a, b: done.append("rename") or replace(a, b))
    with files.replacing(tmp_path / "folder") as part:
        part.mkdir()
        (part / "a").write_text("1")
        (part / "b").write_text("2")
    assert [name for name in done if "folder" not in name] in (
        ["a", "b", "rename", tmp_path.name],
        ["b", "a", "rename", tmp_path.name],
    )
    assert done[0].startswith(".part-")  # the folder's own entries
    done.clear()
    files.write(tmp_path / "quick", "text", durable=False)
    assert done == ["rename"]


def test_a_folder_comes_back_where_the_new_one_cannot_take_its_place(tmp_path, monkeypatch):
    files.write(tmp_path / "folder" / "old", "old")
    replace = os.replace

    def fail(source, target):
        if target == tmp_path / "folder" and "old-" not in str(source):
            raise OSError(5, "Input/output error")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(files.WriteError), files.replacing(tmp_path / "folder", record="old") as part:
        files.write(part / "old", "new")
    assert names(tmp_path) == ["folder", "folder/old"] and (tmp_path / "folder" / "old").read_text() == "old"


def test_the_error_names_the_file_the_reason_and_the_remedy(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        files.WriteError, match=r"file/a\.txt: cannot be written: .*; .*Free some space"
    ) as stop:
        files.write(tmp_path / "file" / "a.txt", "text")
    assert stop.value.code == 4
    # A fault of ours stays a fault of ours.
    with pytest.raises(ZeroDivisionError), files.replacing(tmp_path / "b"):
        _ = 1 / 0


def test_a_file_is_created_once(tmp_path):
    assert files.create(tmp_path / "a", "mine") and not files.create(tmp_path / "a", "yours")
    assert names(tmp_path) == ["a"] and (tmp_path / "a").read_text() == "mine"


def test_leftovers_are_swept_unless_their_writer_may_be_at_work(tmp_path):
    gone = subprocess.Popen(["true"])
    gone.wait()
    swept, kept = tmp_path / "swept", tmp_path / "kept"
    for folder, host, pid in (
        (swept, files.HOST, gone.pid),
        (swept, files.HOST, os.getpid()),
        (kept, files.HOST, os.getppid()),
        (kept, "elsewhere", gone.pid),
    ):
        folder.mkdir(exist_ok=True)
        (folder / f".part-{host}-{pid}-a.png").write_bytes(b"half")
    (swept / f".part-{files.HOST}-{gone.pid}-step_00000001").mkdir()
    (swept / ".part-elsewhere-1-b.png").write_bytes(b"half")
    os.utime(swept / ".part-elsewhere-1-b.png", (0, 0))
    files.sweep(tmp_path)
    assert names(swept) == [] and len(names(kept)) == 2


def test_a_disk_that_is_full_in_the_middle_of_the_weights(tmp_path):
    import resource

    files.write_tensors(tmp_path / "w.safetensors", {"w": torch.zeros(4)})
    before, limits = (tmp_path / "w.safetensors").read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(files.WriteError, match=r"w\.safetensors: cannot be written"):
            files.write_tensors(tmp_path / "w.safetensors", {"w": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert names(tmp_path) == ["w.safetensors"] and (tmp_path / "w.safetensors").read_bytes() == before


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a fork")
def test_what_is_killed_while_it_writes_weights_leaves_nothing_that_is_not_swept(
    tmp_path, monkeypatch, tally
):
    """Whatever names the library gives to its own halves."""

    def killed(_tensors, path):
        path.with_name(".tmpA1b2C3").write_bytes(b"half")
        os._exit(9)

    tally("faults injected", 1)
    files.write_tensors(tmp_path / "w.safetensors", {"w": torch.zeros(4)})
    before = (tmp_path / "w.safetensors").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr("safetensors.torch.save_file", killed)
        child = Fork(lambda: files.write_tensors(tmp_path / "w.safetensors", {"w": torch.ones(4)}))
        assert child.wait() == 9
    assert len(names(tmp_path)) == 3  # the old file, and a room with its half
    files.sweep(tmp_path)
    assert names(tmp_path) == ["w.safetensors"] and (tmp_path / "w.safetensors").read_bytes() == before
    tally("survived", 1)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(tmp_path):
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(files.WriteError, match="Permission denied"):
            files.write(tmp_path / "a", "text")
    finally:
        tmp_path.chmod(0o755)
