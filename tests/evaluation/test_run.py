"""`fewstep eval run`: one table of teacher and student, errors beside numbers, a page without outside parts."""

import dataclasses
import json
import re
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from fewstep.cli import main
from fewstep.cli.eval_sampling import steps_of
from fewstep.errors import FewstepError
from fewstep.evaluation import models, yardstick
from fewstep.evaluation.evaluate import evaluate_images
from fewstep.evaluation.images import FirstImages, open_images
from fewstep.evaluation.of_spec import _row, rows_of, run_spec, shown, sized
from fewstep.evaluation.plot import Series, legend, plot, style_of
from fewstep.evaluation.prompts import read_prompts
from fewstep.evaluation.spec import Entry, Spec, load_spec

EVIL = "<script>alert('x')</script> & \"cat\""


def pool_function(images):
    x = images.permute(0, 3, 1, 2).float() / 255
    return torch.nn.functional.adaptive_avg_pool2d(x, 2).flatten(1)


@pytest.fixture
def spec_file(tiny_sd15, tmp_path):
    (tmp_path / "p.txt").write_text("\n".join([EVIL, *(f"thing {i}" for i in range(3))]))
    (tmp_path / "real").mkdir()
    for i, image in enumerate(np.random.default_rng(0).integers(0, 256, (12, 32, 32, 3)).astype(np.uint8)):
        Image.fromarray(image).save(tmp_path / "real" / f"{i:02d}.png")
    text = f"""
title: {json.dumps(EVIL)}
prompts: {tmp_path / "p.txt"}
per_prompt: 2
real: {tmp_path / "real"}
extractor: {__name__}:pool_function
metrics: [fd, kid, vendi, prdc]
speed_runs: 2
models:
  - name: teacher
    pipeline: {tiny_sd15}
    steps: [1, 2]
    solver: [ddim]
    guidance: [1.0, 4.0]
  - name: {json.dumps("student " + EVIL)}
    pipeline: {tiny_sd15}
    steps: 1
    solver: lcm
    guidance: 0.0
"""
    (tmp_path / "spec.yaml").write_text(text)
    return tmp_path / "spec.yaml"


class Outside(HTMLParser):
    """What a page would load, and every tag it has."""

    def __init__(self):
        super().__init__()
        self.tags, self.loads = [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.loads += [value for name, value in attributes if name in ("src", "href", "srcset", "data")]


def test_run_makes_one_table_and_a_page(spec_file, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    assert main(["eval", "run", str(spec_file), "--out", str(out), "--device", "cpu"]) == 0
    whole = json.loads((out / "table.json").read_text())
    rows = whole["rows"]
    assert [(r["steps"], r["guidance"], r["speed"]["nfe"]) for r in rows] == [
        (1, 1.0, 1),
        (2, 1.0, 2),
        (1, 4.0, 2),
        (2, 4.0, 4),
        (1, 0.0, 1),
    ]
    names = {"FD", "KID", "Vendi", "precision", "recall", "density", "coverage", "diversity"}
    for row in rows:
        found = {label.partition("(")[0] for label in row["metrics"]}
        distance = {"same-noise distance"}
        assert found - distance == names and (row is rows[3]) == (found.isdisjoint(distance))
        assert all(m["error"] is not None and m["error_kind"] for m in row["metrics"].values())
        assert row["speed"]["seconds"] > 0 and len(list((out / row["samples"]).glob("*.png"))) == 8
    text = (out / "table.md").read_text()
    assert text.count("±") >= 5 * 9 and "s / image" in text
    assert "Same-noise distance: to teacher, 2 x ddim, guidance 4" in text

    page = (out / "index.html").read_text()
    parser = Outside()
    parser.feed(page)
    assert "script" not in parser.tags and "link" not in parser.tags and "iframe" not in parser.tags
    assert parser.loads and all(value.startswith("data:image/png;base64,") for value in parser.loads)
    assert not re.search(r"https?://|url\(|@import", page) and EVIL not in page
    assert parser.tags.count("svg") == 3 * 9  # every label against evaluations, seconds and guidance
    assert parser.tags.count("img") == 5 and "Guidance sweep" in page

    # Again: nothing is generated, nothing is measured, and the table is the same.
    monkeypatch.setattr(yardstick, "evaluate_images", lambda *_, **__: pytest.fail("measured again"))
    monkeypatch.setattr("fewstep.evaluation.sampling.draw", lambda *_: pytest.fail("generated again"))
    before = (out / "table.json").read_text()
    assert run_spec(load_spec(spec_file), out) == whole and (out / "table.json").read_text() == before
    capsys.readouterr()


def test_results_of_another_protocol_are_refused(spec_file, tmp_path):
    result = {
        "schema": 1,
        "metrics": {},
        "warnings": [],
        "protocol": None,
        "extractor": {"extractor": "effnet-lite0", "weights_sha256": "x", "resize": "y", "dim": 1280},
        "real": {"name": "r", "n": 12, "sha256": "z"},
        "fake": {"name": "f", "n": 8, "sha256": "z"},
    }
    (tmp_path / "old.json").write_text(json.dumps(result))
    text = spec_file.read_text().replace("steps: [1, 2]", "steps: [1]").replace("[1.0, 4.0]", "[1.0]")
    spec_file.write_text(text + f"results: {{old: {tmp_path / 'old.json'}}}\n")
    with pytest.raises(FewstepError, match="cannot be compared") as error:
        run_spec(load_spec(spec_file), tmp_path / "out")
    assert "effnet-lite0" in str(error.value)


def test_without_real_images_and_from_flags(tiny_sd15, tmp_path, capsys):
    (tmp_path / "p.txt").write_text("\n".join(f"thing {i}" for i in range(6)))
    words = [
        "eval",
        "run",
        "--teacher",
        str(tiny_sd15),
        "--steps",
        "1",
        "--solver",
        "ddim",
        "--guidance",
        "1",
    ]
    words += ["--prompts", str(tmp_path / "p.txt"), "--extractor", f"{__name__}:pool_function"]
    assert main([*words, "--device", "cpu", "--out", str(tmp_path / "out")]) == 0
    (row,) = json.loads((tmp_path / "out" / "table.json").read_text())["rows"]
    assert list(row["metrics"]) == [f"Vendi({__name__}:pool_function)"]
    assert main(["eval", "run", "--out", str(tmp_path / "other")]) == 2
    assert "SPEC.yaml, or --teacher and --prompts" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change, message",
    [
        (("title:", "titel:"), "unknown fields titel"),
        (("per_prompt: 2", "per_prompt: two"), "per_prompt is 'two', expected a number"),
        (("metrics: [fd", "metrics: [fid"), "metrics has 'fid'"),
        (("per_prompt: 2", "per_prompt: true"), "per_prompt is True, expected a number"),
        (("per_prompt: 2", "per_prompt: 0"), "per_prompt is 0, expected 1 or more"),
        (("per_prompt: 2", "per_prompt: null"), "per_prompt is null, expected a value"),
        (("speed_runs: 2", "speed_runs: -1"), "speed_runs is -1, expected 0 or more"),
        (("speed_runs: 2", "dtype: float64"), "dtype is 'float64', expected one of float32"),
        (
            ("    steps: [1, 2]", "    steps: [true, 2]"),
            r"models\.steps is \[True, 2\], expected whole numbers",
        ),
        (("solver: lcm", "solver: midpoint"), "solver midpoint: expected one of own"),
        (("steps: 1\n", "steps: 0\n"), r"steps is \[0\]"),
        (("    steps: [1, 2]", "    step: [1, 2]"), r"unknown fields models\.step"),
        (("prompts:", "# prompts:"), "the fields prompts are missing"),
        (
            ("- name: teacher", '- name: "student ' + EVIL.replace('"', '\\"') + '"'),
            "expected different ones",
        ),
        (("models:", "models: [3]\nx:"), "unknown fields x"),
        (("title:", "title: ["), "cannot be read as YAML"),
    ],
)
def test_bad_specs_name_the_file_and_the_field(spec_file, change, message):
    text = spec_file.read_text()
    assert change[0] in text
    spec_file.write_text(text.replace(*change, 1))
    with pytest.raises(FewstepError, match=message) as error:
        load_spec(spec_file)
    assert "spec.yaml" in str(error.value)


def test_rows_have_different_folders(spec_file):
    rows = rows_of(load_spec(spec_file))
    assert len({row.folder for row in rows}) == len(rows) == 5
    assert all("/" not in part and ".." not in part for row in rows for part in row.folder.split("/"))


def test_what_needs_nothing_real_is_measured_without_it():
    asked = Spec("p.txt", (Entry("a", "x"),), metrics=("fd", "kid", "is", "vendi", "prdc"))
    assert asked.measured(False) == ("is", "vendi") and asked.measured(True) == ("is", "vendi", "diversity")
    assert dataclasses.replace(asked, real="y").measured(False) == asked.metrics


def test_names_that_would_share_a_folder_are_refused():
    entries = (Entry("a b", "x", steps=(1,)), Entry("a/b", "x", steps=(2,)))
    with pytest.raises(FewstepError, match=r"models have the folders \['a_b', 'a_b'\], expected names with"):
        Spec("p.txt", entries)


def test_rows_of_two_searched_schedules_have_their_names(tmp_path):
    places = [tmp_path / name for name in ("coarse", "fine")]
    for place in places:
        place.mkdir()
        (place / "floor.json").write_text("{}")
    entry = Entry("floor", "x", steps=(2,), solver=tuple(map(str, places)), guidance=(1.5,))
    folders = [row.folder for row in rows_of(Spec("p.txt", (entry,)))]
    assert folders == ["floor/coarse-g1.5/002-steps", "floor/fine-g1.5/002-steps"]


def test_plot_places_points_and_escapes():
    svg = plot(EVIL, [Series(EVIL, [(1, 2.0, 0.5), (8, 1.0, 0.0)])], [EVIL], logarithmic=True)
    assert EVIL not in svg and svg.count("<circle") == 2 and "nan" not in svg
    assert plot("x", [], []) == "" and "nan" not in plot("x", [Series("one", [(3, 1.0, 0.0)])], ["one"])
    assert EVIL not in legend([EVIL]) and "1240" in plot("x", [Series("a", [(1, 1240.0, 0.0)])], ["a"])


def test_lines_are_told_apart_and_look_alike_in_every_plot():
    names = [f"line {i}" for i in range(21)]
    assert len({style_of(i) for i in range(21)}) == 21
    alone = plot("x", [Series("line 9", [(1, 2.0, 0.0), (2, 1.0, 0.0)])], names)
    colour, style = style_of(9)
    assert f'stroke="{colour}"' in alone and 'stroke-dasharray="6 3"' in alone
    assert f"{style} {colour}" in legend(names)


# ------------------------------------------------------------------------------------------- what a run measures itself
def test_prompts_that_name_real_images_are_for_retrieval_alone(spec_file, tiny_sd15, tmp_path):
    lines = [{"prompt": f"thing {i % 3}"} for i in range(6)] + [
        {"prompt": f"n {i}", "real": i} for i in (7, 2)
    ]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    model = Entry("teacher", str(tiny_sd15), kind="teacher", steps=(1,), solver=("ddim",), guidance=(1.0,))
    real, own = str(tmp_path / "real"), f"{__name__}:pool_function"
    spec = Spec(
        str(tmp_path / "p.jsonl"), (model,), real=real, extractor=own, metrics=("fd", "kid"), speed_runs=0
    )
    spec = dataclasses.replace(spec, batch_size=3)
    (row,) = run_spec(spec, tmp_path / "out")["rows"]
    drawn = open_images(tmp_path / "out" / row["samples"])
    images = torch.cat(list(drawn.batches(8))).numpy()
    assert len(images) == 8
    asked = {"metrics": ("fd", "kid", "diversity"), "groups": [0, 1, 2, 0, 1, 2], "extractor": own}
    wanted = evaluate_images(real, images[:6], **asked)["metrics"]
    wanted |= evaluate_images(real, images[6:], metrics=("retrieval",), prompted=[7, 2], extractor=own)[
        "metrics"
    ]
    assert row["metrics"] == wanted
    assert row["speed"]["batch"] == 3 and row["speed"]["nfe"] == 1 and row["speed"]["runs"] == 3
    whole = json.loads((tmp_path / "out" / "table.json").read_text())
    assert whole["named"] == 2 and whole["prompts"][-2:] == ["n 7", "n 2"]


def test_scores_are_of_the_images_that_name_none(tiny_sd15, clip_folder, tmp_path):
    lines = [{"prompt": p} for p in ("red", "blue")] + [{"prompt": "n", "real": i} for i in (0, 2)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    images = np.random.default_rng(2).integers(0, 256, (4, 32, 32, 3)).astype(np.uint8)
    np.savez(tmp_path / "made.npz", images=images)
    scorer, own = f"clip:{clip_folder}", f"{__name__}:pool_function"
    entry = Entry("made", images=str(tmp_path / "made.npz"))
    shared = {"scorers": (scorer,), "extractor": own, "metrics": ("fd",)}
    (row,) = run_spec(
        Spec(str(tmp_path / "p.jsonl"), (entry,), real=str(tmp_path / "made.npz"), **shared), tmp_path / "out"
    )["rows"]
    wanted = evaluate_images(images[:2], images[:2], captions=["red", "blue"], **shared)["metrics"]
    (label,) = (name for name in wanted if name.startswith("CLIP score"))
    assert row["metrics"][label]["value"] == wanted[label]["value"] and row["metrics"][label]["n_fake"] == 2


def test_the_named_images_and_no_others_are_looked_for(spec_file, tmp_path):
    """Six of noise, then exact copies of two real ones: found again, in their order, and by nobody else."""
    real = open_images(tmp_path / "real")
    everything = torch.cat(list(real.batches(12))).numpy()
    noise = np.random.default_rng(1).integers(0, 256, (6, 32, 32, 3)).astype(np.uint8)
    for order, found in (([7, 2], 1.0), ([2, 7], 0.0)):
        images = np.concatenate([noise, everything[order]])
        np.savez(tmp_path / "made.npz", images=images)
        lines = [{"prompt": f"thing {i}"} for i in range(6)] + [{"prompt": "n", "real": i} for i in (7, 2)]
        (tmp_path / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        made = Entry("made", images=str(tmp_path / "made.npz"))
        own = f"{__name__}:pool_function"
        spec = Spec(
            str(tmp_path / "p.jsonl"), (made,), real=str(tmp_path / "real"), extractor=own, metrics=("fd",)
        )
        (row,) = run_spec(spec, tmp_path / f"out{found}")["rows"]
        again = [line | {"real": 9 - line["real"]} if "real" in line else line for line in lines]
        (tmp_path / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in again))
        (other,) = run_spec(spec, tmp_path / f"out{found}")["rows"]  # not what is stored for other names
        assert {m["value"] for n, m in other["metrics"].items() if n.startswith("retrieval")} == {1 - found}
        values = {label.partition("(")[0]: metric["value"] for label, metric in row["metrics"].items()}
        assert values["retrieval"] == found and values["FD"] > 0


def test_images_made_elsewhere_are_a_row(spec_file, tiny_sd15, tmp_path):
    """A row of images says of itself what it can, and is compared with real ones, not with the noise of others."""
    model = Entry("drawn", str(tiny_sd15), steps=(1, 2), solver=("ddim",), guidance=(1.0,))
    there = Entry("there", images=str(tmp_path / "real"), kind="reference")
    real, own = str(tmp_path / "real"), f"{__name__}:pool_function"
    spec = Spec(
        str(tmp_path / "p.txt"), (there, model), real=real, extractor=own, metrics=("fd",), speed_runs=1
    )
    rows = run_spec(spec, tmp_path / "out")["rows"]
    assert [(r["name"], r.get("steps")) for r in rows] == [("there", None), ("drawn", 1), ("drawn", 2)]
    assert (
        rows[0]["speed"] is None
        and "samples" not in rows[0]
        and (tmp_path / "out" / rows[0]["grid"]).is_file()
    )
    wanted = evaluate_images(real, FirstImages(open_images(real), 4), metrics=("fd",), extractor=own)
    assert rows[0]["metrics"] == wanted["metrics"]
    distance = [any(m.startswith("same-noise") for m in r["metrics"]) for r in rows]
    assert distance == [False, True, False]  # the reference is the pipeline's last
    assert rows[1]["speed-up"] == round(rows[2]["speed"]["seconds"] / rows[1]["speed"]["seconds"], 3)
    assert "speed-up" not in rows[2]
    with pytest.raises(FewstepError, match="real has 12 images, but 13 are asked for"):
        (tmp_path / "many.txt").write_text("\n".join(map(str, range(13))))
        run_spec(
            dataclasses.replace(spec, prompts=str(tmp_path / "many.txt"), models=(there,)), tmp_path / "more"
        )


def test_rows_without_anything_real_stand_beside_one_another(tmp_path):
    """Each is measured against nothing; images that are others by now are measured anew."""
    (tmp_path / "p.txt").write_text("a\nb\nc\n")

    def vendi(*seeds):
        for name, seed in zip("xy", seeds):
            made = np.random.default_rng(seed).integers(0, 256, (3, 16, 16, 3)).astype(np.uint8)
            np.savez(tmp_path / f"{name}.npz", images=made)
        entries = tuple(Entry(name, images=str(tmp_path / f"{name}.npz")) for name in "xy")
        spec = Spec(
            str(tmp_path / "p.txt"), entries, extractor=f"{__name__}:pool_function", metrics=("fd", "vendi")
        )
        return [next(iter(r["metrics"].values()))["value"] for r in run_spec(spec, tmp_path / "out")["rows"]]

    first, again = vendi(0, 1), vendi(0, 2)
    assert len(first) == 2 and first[0] == again[0] and first[1] != again[1]


def test_only_speeds_that_were_measured_alike_are_compared():
    speed = {"seconds": 2.0, "batch": 1, "device": "cpu", "threads": 1}
    reference, record = {"speed": speed}, {"speed": {**speed, "seconds": 0.5}}
    assert _row(record, reference)["speed-up"] == 4
    for key in ("batch", "device", "threads"):
        assert "speed-up" not in _row({"speed": {**record["speed"], key: "other"}}, reference)
    assert "speed-up" not in _row({"speed": None}, reference) and "speed-up" not in _row(record, None)


def test_a_grid_shows_one_image_of_a_prompt_and_those_that_name_a_real_one():
    def indices(cut, per_prompt, images):
        spec = SimpleNamespace(per_prompt=per_prompt)
        return shown(SimpleNamespace(cut=cut, spec=spec, captions=[""] * images))

    assert indices(6, 2, 6) == [0, 2, 4]
    assert indices(20, 1, 40) == [*range(8), *range(20, 28)]


def test_another_student_takes_the_place_of_the_old_one_only_where_asked(tiny_sd15, tmp_path, monkeypatch):
    (tmp_path / "p.txt").write_text("a\nb\n")
    spec = Spec(
        str(tmp_path / "p.txt"), (Entry("m", str(tiny_sd15), steps=(1,)),), speed_runs=0, metrics=("vendi",)
    )
    spec = dataclasses.replace(spec, extractor=f"{__name__}:pool_function")
    run_spec(spec, tmp_path / "out")
    kept = {p: p.read_bytes() for p in (tmp_path / "out" / "samples").rglob("*.png")}
    other = dataclasses.replace(spec, seed=5)
    with pytest.raises(FewstepError, match="another run"):
        run_spec(other, tmp_path / "out")
    assert {p: p.read_bytes() for p in kept} == kept
    run_spec(other, tmp_path / "out", replace=True)
    assert all(p.read_bytes() != old for p, old in kept.items())
    monkeypatch.setattr("fewstep.evaluation.sampling.draw", lambda *_: pytest.fail("generated again"))
    run_spec(other, tmp_path / "out", replace=True)  # whose own images stay


@pytest.mark.parametrize(
    "entry, message",
    [
        ({"name": "x"}, "neither, expected pipeline or images"),
        ({"name": "x", "pipeline": "a", "images": "b"}, "has pipeline and images"),
        ({"name": "x", "images": "b", "kind": "best"}, "kind is 'best', expected one of"),
    ],
)
def test_an_entry_is_a_pipeline_or_images(entry, message):
    with pytest.raises(FewstepError, match=message):
        Entry(**entry)


@pytest.mark.parametrize("real", ["3", -1, True, 1.0])
def test_an_index_of_a_real_image_is_one(real, tmp_path):
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "a", "real": real}) + "\n")
    with pytest.raises(FewstepError, match='"real" is'):
        read_prompts(tmp_path / "p.jsonl").named(1)


@pytest.mark.parametrize("lines", [[{}], [{}, {}, {"real": 1}], [{"real": 1}, {"real": 0}]])
def test_too_few_of_either_kind_are_refused_before_anything_is_drawn(lines, spec_file, tmp_path):
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": "a", **line}) + "\n" for line in lines))
    spec = Spec(str(tmp_path / "p.jsonl"), (Entry("m", "nowhere"),), real=str(tmp_path / "real"))
    with pytest.raises(
        FewstepError, match="expected at least 2 that name none, and none or at least 2 that do"
    ):
        run_spec(spec, tmp_path / "out")


def test_prompts_without_an_image_do_not_follow_those_with_one(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "a", "real": 1}\n{"prompt": "b"}\n')
    assert read_prompts(tmp_path / "p.jsonl").named(1) == [1]
    with pytest.raises(FewstepError, match="prompt 2"):
        read_prompts(tmp_path / "p.jsonl").named(2)


@pytest.mark.parametrize(
    "change, message",
    [
        (("{real}", "{stats}"), "cannot be compared"),
        (
            ("[fd, kid, vendi, prdc]", "[patch-fd, fd_inf]\nnum: 4\nsize: 64"),
            "patch-fd: it takes the middle 224 x 224",
        ),
        (("[fd, kid, vendi, prdc]", "[is]"), "is: it needs a classifier"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is_made(
    spec_file, tmp_path, change, message, monkeypatch
):
    monkeypatch.setattr("fewstep.evaluation.of_spec.open_model", lambda *_: pytest.fail("loaded"))
    np.savez(tmp_path / "stats.npz", mu=np.zeros(12), sigma=np.eye(12))
    places = {"real": f"real: {tmp_path}/real", "stats": f"real: {tmp_path}/stats.npz"}
    old, new = (part.format(**places) if "{" in part else part for part in change)
    text = spec_file.read_text().replace("per_prompt: 2", "per_prompt: 1")  # which would add their diversity
    assert old in text
    spec_file.write_text(text.replace(old, new, 1))
    with pytest.raises(FewstepError, match=message):
        run_spec(load_spec(spec_file), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_images_made_elsewhere_are_as_many_as_the_prompts(spec_file, tmp_path, capsys, monkeypatch):
    """A row of one too many would be shifted against the prompts of the others."""
    monkeypatch.setattr("fewstep.evaluation.of_spec.open_model", lambda *_: pytest.fail("loaded"))
    row = f"  - {{name: elsewhere, images: {tmp_path}/real}}\n"
    spec_file.write_text(spec_file.read_text() + row)
    assert main(["eval", "run", str(spec_file), "--out", str(tmp_path / "out")]) == 2
    assert "12 images for 4 prompts with 2 images each, expected 8" in capsys.readouterr().err


@pytest.mark.parametrize(
    "wrong", [{"lora": "nowhere/export"}, {"network": "nowhere.safetensors"}, {"pipeline": "/no"}]
)
def test_every_model_is_looked_for_before_the_first_one_draws(tiny_sd15, tmp_path, wrong, monkeypatch):
    (tmp_path / "p.txt").write_text("a\nb\n")
    first = Entry("first", str(tiny_sd15), steps=(1,))
    last = Entry(**{"name": "last", "pipeline": str(tiny_sd15), **wrong})
    monkeypatch.setattr("fewstep.evaluation.of_spec.open_model", lambda *_: pytest.fail("loaded"))
    with pytest.raises(FewstepError, match=next(iter(wrong.values()))):
        run_spec(Spec(str(tmp_path / "p.txt"), (first, last), metrics=("vendi",)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_table_is_there_before_its_first_row(tiny_sd15, tmp_path, monkeypatch):
    """So that a folder is known as a table's from its beginning, and one that has rows keeps them."""
    (tmp_path / "p.txt").write_text("a\nb\n")
    spec = Spec(
        str(tmp_path / "p.txt"), (Entry("m", str(tiny_sd15), steps=(1,)),), metrics=("vendi",), speed_runs=0
    )
    spec = dataclasses.replace(spec, extractor=f"{__name__}:pool_function")

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("fewstep.evaluation.of_spec.open_model", stop)
        with pytest.raises(KeyboardInterrupt):
            run_spec(spec, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "table.json").read_text())["rows"] == []
    run_spec(spec, tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr("fewstep.evaluation.of_spec.open_model", stop)
        with pytest.raises(KeyboardInterrupt):
            run_spec(spec, tmp_path / "out")
    assert len(json.loads((tmp_path / "out" / "table.json").read_text())["rows"]) == 1


def test_a_student_is_measured_at_its_own_numbers_of_steps_unless_others_are_asked_for(monkeypatch):
    records = {
        "one": {"num_steps": 4},
        "several": {"num_steps": 8, "steps": {"8": {}, "1": {}}},
        "file": None,
    }
    monkeypatch.setattr(models, "record_of", records.get)
    assert steps_of("one", None) == (4,) and steps_of("several", None) == (8, 1)
    assert steps_of("file", None) == (1, 2, 4, 8) and steps_of("one", [2, 3]) == (2, 3)


def test_all_rows_have_the_size_of_the_students(tmp_path, monkeypatch):
    def student(name, call):
        (tmp_path / name).mkdir()
        record = {"kind": "lora", "num_steps": 4, "call": call}
        (tmp_path / name / "fewstep.json").write_text(json.dumps(record))
        return Entry(name, "teacher", lora=str(tmp_path / name), steps=(4,))

    teacher, other = Entry("teacher", "teacher"), Entry("other", images="images")
    small, large = (student(f"at_{size}", {"height": size, "width": size}) for size in (32, 64))
    free = student("free", {"num_inference_steps": 4})  # of a class whose call has no size
    assert sized(Spec("p", (teacher, small, free, other))).size == 32
    assert sized(Spec("p", (teacher, small, large), size=128)).size == 128
    wide = student("wide", {"height": 32, "width": 48})
    assert sized(Spec("p", (teacher, wide, free))).size == [32, 48]
    with pytest.raises(FewstepError, match=r"different sizes in pixels \(at_32 32, wide \[32, 48\]\)"):
        sized(Spec("p", (small, wide)))
    assert sized(Spec("p", (teacher, free))).size is None
    monkeypatch.chdir(tmp_path / "at_64")  # whose record is nobody's here
    assert sized(Spec("p", (teacher, other))).size is None
    with pytest.raises(FewstepError, match=r"different sizes in pixels \(at_32 32, at_64 64\).*give size"):
        sized(Spec("p", (teacher, small, large)))


def test_a_teacher_draws_at_the_size_of_its_student(tiny_sd15, tmp_path, monkeypatch):
    (tmp_path / "p.txt").write_text("a\nb\n")
    student = {"call": {"height": 32}, "num_steps": 1}
    monkeypatch.setattr("fewstep.evaluation.of_spec.record_of", lambda _path: student)
    spec = Spec(
        str(tmp_path / "p.txt"), (Entry("m", str(tiny_sd15), steps=(1,)),), speed_runs=0, metrics=("vendi",)
    )
    run_spec(dataclasses.replace(spec, extractor=f"{__name__}:pool_function"), tmp_path / "out")
    drawn = list((tmp_path / "out" / "samples").rglob("*.png"))
    assert [Image.open(path).size for path in drawn] == [(32, 32)] * 2


@pytest.mark.parametrize("own", [{"experts": ["a", "b"]}, {"noise": "fixed"}])
def test_steps_that_a_student_cannot_make_are_refused_before_its_teacher_draws(
    own, tiny_sd15, tmp_path, monkeypatch
):
    (tmp_path / "p.txt").write_text("a\nb\n")
    (tmp_path / "s").mkdir()
    record = {"kind": "lora", "num_steps": 2, "scheduler": "DDIMScheduler", "call": {}, **own}
    (tmp_path / "s" / "fewstep.json").write_text(json.dumps(record))
    teacher = Entry("t", str(tiny_sd15), steps=(4,))
    spec = Spec(
        str(tmp_path / "p.txt"), (teacher, Entry("s", str(tiny_sd15), str(tmp_path / "s"), steps=(2, 4)))
    )
    monkeypatch.setattr("fewstep.evaluation.of_spec.Yardstick", lambda *_: pytest.fail("went on"))
    with pytest.raises(FewstepError, match=r"--steps 4: a student of .* runs at its 2 steps only"):
        run_spec(spec, tmp_path / "out")
