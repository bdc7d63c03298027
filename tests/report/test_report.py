"""Report, log, grids and status line, on run directories that are whole, partial or damaged."""

import base64
import importlib.util
import io
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from fewstep import files
from fewstep.report import bar, chart, log, report
from fewstep.report.bar import Bar
from fewstep.report.grid import image_grid, sheet
from fewstep.report.log import MetricsLog, StatusLine, read_metrics
from fewstep.report.report import write_report

HOSTILE = "<script>alert('x')</script> & \"{{body}}\" <img src=x onerror=alert(1)> \u2028 😀"


PROMPTS = ["red apple", "owl", "a prompt so long that no caption has room for all of its words"]


class Page(HTMLParser):
    """The tags of a page, their attributes, and how many were left open."""

    def __init__(self, html: str):
        super().__init__()
        self.tags, self.open, self.text = [], [], ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "input"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def find(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


def write_page(run_dir):
    """Writes the report, checks what holds for every report, and returns the parsed page."""
    html = write_report(run_dir).read_text(encoding="utf-8")
    page = Page(html)
    assert not page.open
    assert len(page.find("script")) == 1  # ours
    assert not any(key.startswith("on") for _, attrs in page.tags for key in attrs)
    sources = [value for _, attrs in page.tags for key, value in attrs.items() if key in ("src", "href")]
    assert all(source.startswith("data:image/") for source in sources)
    assert not re.search(r"\bnan\b|\binf\b|None", html.split("<body>")[1].split("<script>")[0])
    return page


def save_grid(path, seed=0, size=(2, 8)):
    images = np.random.default_rng(seed).integers(0, 256, (size[0] * size[1], 8, 8, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    image_grid(images, size[1]).save(path)


def row(name, nfe, fd, retrieval, **more):
    metrics = {"FD": {"value": fd, "error": None}, "retrieval": {"value": retrieval, "error": None}}
    return {"name": name, "speed": {"nfe": nfe} if nfe else None, "metrics": metrics, **more}


@pytest.fixture
def full_run(tmp_path):
    """A run directory with everything in it, and with hostile text wherever text can be."""
    for name in ("step_000000", "step_000100", "step_001000", "teacher"):
        save_grid(tmp_path / "samples" / f"{name}.png", seed=len(name))
    for name in ("teacher", "student"):
        save_grid(tmp_path / "eval" / "grids" / f"{name}.png")
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for step in range(1, 1001):
        record = {"step": step, "seconds": step / 5, "critic/denoising": 1 / step, f"critic/{HOSTILE}": 0.5}
        if step % 5 == 0:
            record["generator/dm"] = math.sin(step) if step != 500 else math.nan
        log.append(record | {"step_seconds": 0.2})
    log.close()
    rows = [
        row("autoencoder", None, 1.0, 0.99, kind="reference"),
        row("teacher", 100, 10.0, 0.9, steps=50, solver="own", grid="grids/teacher.png"),
        row(f"student {HOSTILE}", 1, 12.5, 0.8, grid="grids/student.png"),
        row("floor", 1, math.nan, None, grid="../secret.png"),
    ]
    evaluation = {"rows": rows, "notes": [HOSTILE], "prompts": [HOSTILE, "red apple"], "columns": 8}
    (tmp_path / "samples" / "prompts.json").write_text(
        json.dumps({"prompts": [HOSTILE, *PROMPTS], "columns": 8})
    )
    run = {"name": HOSTILE, "teacher": HOSTILE, "method": "dmd2", "student_steps": 1, "steps": 1000}
    run |= {"memory": {"peak_gb": 1.31, "kind": HOSTILE}}
    run |= {"seconds": 692.4, "parameters": {"student": 1_234_567}, "versions": {"torch": HOSTILE}}
    (tmp_path / "eval" / "table.json").write_text(json.dumps(evaluation))
    (tmp_path / "run.json").write_text(json.dumps(run))
    (tmp_path / "recipe.yaml").write_text(f"prompts: |\n  {HOSTILE}\n", encoding="utf-8")
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "lora.safetensors").write_bytes(bytes(500_000))
    (tmp_path / "export" / "README.md").write_text("# Card\n```python\npipe = load('<a>')\n```\n")
    return tmp_path


class TestImageGrid:
    images = np.arange(5 * 6 * 4 * 3, dtype=np.uint8).reshape(5, 6, 4, 3)

    def test_geometry(self):
        grid = image_grid(self.images, 3)
        assert grid.mode == "RGB"
        assert grid.size == (3 * (4 + 2) + 2, 2 * (6 + 2) + 2)
        pixels = np.asarray(grid)
        for i, image in enumerate(self.images):
            y, x = 2 + i // 3 * 8, 2 + i % 3 * 6
            assert np.array_equal(pixels[y : y + 6, x : x + 4], image)
        assert (pixels[:2] == 255).all() and (pixels[:, :2] == 255).all()  # the gap around
        assert (pixels[10:, 14:] == 255).all()  # the missing sixth image

    def test_scale_repeats_pixels(self):
        pixels = np.asarray(image_grid(self.images[:1], 1, scale=3))
        assert np.array_equal(pixels[2:-2, 2:-2], self.images[0].repeat(3, 0).repeat(3, 1))

    def test_texts_take_room_and_leave_images_alone(self):
        plain = image_grid(self.images, 3, scale=10)
        labels = ["red apple", "", "a caption far too long for a cell of forty pixels", "é 😀", "x" * 200]
        texts = image_grid(self.images, 3, scale=10, labels=labels, row_labels=["teacher", "student, 1 step"])
        left = texts.width - plain.width
        assert left > 40 and texts.height > plain.height
        gap = 2
        first = np.asarray(texts)[gap : gap + 60, left + gap : left + gap + 40]
        assert np.array_equal(first, self.images[0].repeat(10, 0).repeat(10, 1))
        side = np.asarray(texts)[:, :left]
        assert (side[:, 0] == 255).all() and (side < 128).any()  # text is there and not cut at the edge

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"images": np.zeros((2, 4, 4, 3))}, "uint8"),
            ({"images": np.zeros((0, 4, 4, 3), np.uint8)}, "N > 0"),
            ({"images": np.zeros((2, 3, 4, 4), np.uint8)}, "N, H, W, 3"),
            ({"columns": 0}, "columns"),
            ({"labels": ["one"]}, "labels: expected 2"),
            ({"row_labels": ["one", "two"]}, "row_labels: expected 1"),
        ],
    )
    def test_refuses(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            image_grid(**{"images": np.zeros((2, 4, 4, 3), np.uint8), "columns": 2} | arguments)


class TestSheet:
    images = np.arange(6 * 6 * 4 * 3, dtype=np.uint8).reshape(6, 6, 4, 3)

    def test_the_images_of_a_prompt_stand_together(self):
        page = np.asarray(sheet(self.images, ["red apple", "owl", "pizza"], scale=10))
        corners = {}
        for i, image in enumerate(self.images):
            wanted = image.repeat(10, 0).repeat(10, 1)
            found = [
                (y, x)
                for y, x in zip(*np.nonzero((page[:-60, :-40] == wanted[0, 0]).all(-1)))
                if np.array_equal(page[y : y + 60, x : x + 40], wanted)
            ]
            assert len(found) == 1
            corners[i] = found[0]
        beside = 40 + 8
        assert all(corners[i + 3] == (corners[i][0], corners[i][1] + beside) for i in range(3))
        assert min(corners.values()) == (24, 24)  # the margin

    @pytest.mark.parametrize(
        ("count", "side", "width"), [(1, 64, 192), (3, 64, 3 * 192), (8, 200, 8 * 200), (5, 512, 3 * 512)]
    )
    def test_small_images_are_enlarged_and_rows_are_even(self, count, side, width):
        page = sheet(np.zeros((count, side, side, 3), np.uint8), ["a"] * count)
        black = (np.asarray(page) == 0).all(-1).sum(1).max()
        assert black == width

    def test_prompts_stand_below_their_images_and_are_shortened(self):
        black = np.zeros((2, 64, 64, 3), np.uint8)
        plain, said = (sheet(black, ["", text]) for text in ("", "no caption has room for these words " * 9))
        assert said.width == plain.width and said.height > plain.height + 20
        below = np.asarray(said)[24 + 192 + 1 :]
        left, right = np.array_split(below[:-24] < 128, 2, axis=1)
        assert not left.any() and right.any()

    def test_refuses(self):
        with pytest.raises(ValueError, match="a divisor of 6 images, got 4"):
            sheet(self.images, list("abcd"))
        with pytest.raises(ValueError, match="uint8"):
            sheet(np.zeros((2, 4, 4, 3)), ["a"])


class TestMetricsLog:
    def test_round_trip_is_strict_json(self, tmp_path):
        log = MetricsLog(tmp_path / "new" / "metrics.jsonl")
        values = {"a": np.float32(0.5), "b": math.nan, "c": -math.inf, "d": np.array(math.inf), "e": 3}
        log.append({"step": 1, "seconds": 0.1} | values)
        lines = log.path.read_text().splitlines()  # not closed: flushed line by line
        strict = json.loads(lines[0], parse_constant=pytest.fail)
        assert strict == {"step": 1, "seconds": 0.1, "a": 0.5, "b": None, "c": None, "d": None, "e": 3}
        assert read_metrics(log.path) == [strict]

    @pytest.mark.parametrize("tail", ['{"step": 3, "lo', '{"step": 3}', "\0\0\0", '[1]\n"x"\n'])
    def test_torn_last_line(self, tmp_path, tail):
        path = tmp_path / "metrics.jsonl"
        path.write_text('{"step": 1}\n{"step": 2}\n' + tail)
        complete = [3] if tail == '{"step": 3}' else []
        assert [r["step"] for r in read_metrics(path)] == [1, 2, *complete]
        log = MetricsLog(path)
        log.append({"step": 9})
        assert [r["step"] for r in read_metrics(path)] == [1, 2, *complete, 9]

    def test_reads_nan_of_others_and_missing_files(self, tmp_path):
        path = tmp_path / "metrics.jsonl"
        assert read_metrics(path) == []
        path.write_text('{"step": 1, "a": NaN, "b": -Infinity}\n')
        assert read_metrics(path) == [{"step": 1, "a": None, "b": None}]

    def test_truncate_after(self, tmp_path):
        log = MetricsLog(tmp_path / "metrics.jsonl")
        for step in (1, 2, 3, 4):
            log.append({"step": step, "loss": math.nan})
        log.truncate_after(10)
        assert len(read_metrics(log.path)) == 4
        log.truncate_after(2)
        log.append({"step": 3, "loss": 0.5})
        assert [(r["step"], r["loss"]) for r in read_metrics(log.path)] == [(1, None), (2, None), (3, 0.5)]
        assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]

    def test_truncate_failing_half_way_keeps_the_log(self, tmp_path, monkeypatch):
        log = MetricsLog(tmp_path / "metrics.jsonl")
        log.append({"step": 1})
        log.append({"step": 2})
        before = log.path.read_text()
        monkeypatch.setattr(files.os, "replace", _no_space)
        with pytest.raises(OSError, match="space"):
            log.truncate_after(1)
        assert log.path.read_text() == before
        assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def _no_space(*_):
    raise OSError("no space left on device")


class TestReport:
    def test_empty_directory(self, tmp_path):
        page = write_page(tmp_path)
        assert tmp_path.name in page.text
        assert not page.find("img") and not page.find("section")

    def test_full_directory(self, full_run):
        page = write_page(full_run)
        for title in ("Prompt by prompt", "Measured", "Samples over time", "Curves", "Use it", "recipe.yaml"):
            assert title in page.text
        assert "11 min 32 s" in page.text and "1.23M" in page.text and "pipe = load('<a>')" in page.text
        assert "100× more" in page.text  # evaluations per image of the teacher
        frames = [image["alt"] for image in page.find("img") if "title" in image]
        assert frames == ["step 0", "step 100", "step 1,000"]
        assert "1.31 GB" in page.text and "0.5 MB" in page.text

    def test_pictures_come_first(self, full_run):
        html = write_report(full_run).read_text()
        places = [
            html.index(f'class="{name}"') for name in ("compare", "tiles", "cards", "scroll", "charts c0")
        ]
        assert places == sorted(places)

    def test_teacher_and_student_of_a_prompt_lie_on_each_other(self, full_run):
        page = write_page(full_run)
        alts = [image["alt"] for image in page.find("img")]
        for kind in ("teacher", "student"):
            mine = [alt for alt in alts if alt.startswith(f"{kind}: ")]
            assert mine == [f"{kind}: {prompt}" for prompt in (HOSTILE, *PROMPTS)]
        [slider] = [x for x in page.find("input") if "student" in x["aria-label"]]
        assert (slider["min"], slider["max"]) == ("0", "100")
        uris = {image["alt"]: image["src"] for image in page.find("img") if "src" in image}
        with Image.open(full_run / "samples" / "teacher.png") as grid:
            expected = np.asarray(grid.crop((12, 2, 20, 10)))
        data = base64.b64decode(uris["teacher: red apple"].partition("base64,")[2])
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), expected)

    def test_the_student_beside_the_teacher_is_the_newest(self, full_run):
        newest = full_run / "samples" / "step_001000.png"
        with Image.open(newest) as grid:
            other = Image.fromarray(255 - np.asarray(grid.convert("RGB")))
        other.save(newest)
        uris = {image["alt"]: image["src"] for image in write_page(full_run).find("img") if "src" in image}
        data = base64.b64decode(uris["student: red apple"].partition("base64,")[2])
        expected = np.asarray(other.crop((12, 2, 20, 10)))
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(data)).convert("RGB")), expected)

    def test_a_grid_that_cannot_be_cut_is_shown_whole(self, full_run):
        (full_run / "samples" / "prompts.json").unlink()
        table = json.loads((full_run / "eval" / "table.json").read_text())
        (full_run / "eval" / "table.json").write_text(json.dumps({**table, "columns": 5}))
        page = write_page(full_run)
        assert not [tag for tag in page.find("div") if tag.get("class") in ("compare", "cards")]
        assert {"teacher, 50 steps", "samples"} <= {image["alt"] for image in page.find("img")}

    def test_every_picture_and_curve_has_a_text(self, full_run):
        page = write_page(full_run)
        assert all(image["alt"].strip() for image in page.find("img"))
        assert all(svg["role"] == "img" and svg["aria-label"] for svg in page.find("svg"))

    def test_healthy_ranges_are_shaded(self, tmp_path):
        rows = [{"step": i, "health/critic_lag": 0.2 if i else -1.5, "health/grad_norm": 1} for i in range(9)]
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        page = write_page(tmp_path)
        [band] = page.find("rect")
        # The axis goes from -1.5 to 0.5 with 6 % more on both sides, over 132 pixels.
        assert float(band["height"]) == pytest.approx(132 / (2 * 1.12), abs=0.1)
        assert float(band["y"]) == pytest.approx(8 + 132 * 0.12 / 2.24, abs=0.1)
        assert "1 of 9 outside" in page.text

    def test_hostile_text_stays_text(self, full_run):
        page = write_page(full_run)
        # Name (three times), teacher and memory (twice), row (slider, table, two cards), note, prompt (both sides of
        # the slider, card), version, recipe.
        # The metric's name is cut at its slashes, and covered by what holds for every page.
        assert page.text.count(HOSTILE) == 17
        assert all("onerror" not in image for image in page.find("img"))

    def test_best_values_ignore_references_and_gaps(self, full_run):
        html = write_report(full_run).read_text()
        assert re.findall(r"<td class=best>(.*?)</td>", html) == ["10", "0.900"]
        assert "FD ↓" in html and "retrieval ↑" in html and "nfe<" in html

    def test_files_outside_the_run_are_not_embedded(self, full_run):
        save_grid(full_run.parent / "secret.png", size=(1, 3))
        widths = {int(image["width"]) for image in write_page(full_run).find("img") if "width" in image}
        assert widths == {8 * 10 + 2, 8}

    def test_curves_stay_small_and_mark_what_is_not_finite(self, tmp_path):
        rows = ({"step": i, "loss": 0.1 + i % 7, "gap": None if i == 5000 else -1} for i in range(20_000))
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        page = write_page(tmp_path)
        assert "1 not finite" in page.text
        assert (tmp_path / "report.html").stat().st_size < 80_000
        points = [json.loads(svg["data-points"]) for svg in page.find("svg")]
        assert [len(p) for p in points] == [chart.MAX_POINTS] * 2
        assert points[0][-1][2] == 19_999 and float(points[0][-1][3]) == pytest.approx(3.1, abs=0.05)

    def test_a_spike_survives_thinning(self, tmp_path):
        values = np.ones(5000)
        values[1234] = 50
        rows = [{"step": i, "loss": v} for i, v in enumerate(values)]
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        [bars] = [path["d"] for path in write_page(tmp_path).find("path") if path.get("class") == "bars"]
        heights = [float(low) - float(high) for low, high in re.findall(r" ([\d.]+)V([\d.]+)", bars)]
        assert sum(h > 100 for h in heights) == 1

    @pytest.mark.parametrize(
        "values",
        [
            [1.0],
            [0.0, 0.0],
            [-3, -3],
            [None, None],
            [1e-30, 1e30],
            [1e308, -1e308],
            [10**400, 1],
            [1, 1 + 1e-15],
        ],
    )
    def test_odd_curves(self, tmp_path, values):
        rows = [{"step": i, "loss": v, "text": "x"} for i, v in enumerate(values)]
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        assert len(write_page(tmp_path).find("svg")) == 1

    def test_log_axis_only_for_positive_values_over_two_decades(self, tmp_path):
        rows = [{"step": i, "wide": 10.0**-i, "narrow": 2.0 + i, "signed": 10.0**i - 5} for i in range(4)]
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        html = write_report(tmp_path).read_text()
        assert html.count("<i>log</i>") == 1 and "<b>wide</b><i>log</i>" in html

    def test_damaged_files_are_left_out(self, full_run):
        whole = (full_run / "samples" / "teacher.png").read_bytes()
        (full_run / "samples" / "step_000100.png").write_bytes(whole[: len(whole) // 2])
        (full_run / "samples" / "step_001000.png").write_bytes(b"")
        (full_run / "samples" / "step_last.png").write_bytes(b"no image")
        rows = [
            1,
            {"name": None, "metrics": {"FD": {"value": "x"}, "KID": 3}, "grid": 3, "speed": [], "steps": "x"},
        ]
        (full_run / "eval" / "table.json").write_text(json.dumps({"rows": rows, "notes": 7}))
        (full_run / "run.json").write_text('{"seconds": "long", "parameters": 3, "steps"')
        (full_run / "recipe.yaml").write_bytes(b"\xff\xfe\x00")
        page = write_page(full_run)
        assert [image["alt"] for image in page.find("img") if "title" in image] == ["step 0"]

    def test_large_images_shrink_and_frames_are_limited(self, tmp_path):
        (tmp_path / "samples").mkdir()
        Image.new("RGB", (4000, 1000), "teal").save(tmp_path / "samples" / "step_999999.png")
        for step in range(0, 5000, 100):
            Image.new("RGB", (8, 8)).save(tmp_path / "samples" / f"step_{step:06}.png")
        page = write_page(tmp_path)
        assert page.find("img")[0]["width"] == "1600"
        frames = [image["alt"] for image in page.find("img") if "title" in image]
        assert len(frames) == report.MAX_FRAMES
        assert (frames[0], frames[-1]) == ("step 0", "step 999,999")

    def test_failed_write_keeps_the_old_report(self, tmp_path, monkeypatch):
        path = write_report(tmp_path)
        before = path.read_text()
        monkeypatch.setattr(files.os, "replace", _no_space)
        with pytest.raises(OSError, match="space"):
            write_report(tmp_path)
        assert path.read_text() == before
        assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


class TestStatusLine:
    def test_prints_rarely_without_a_terminal(self, capsys, monkeypatch):
        clock = iter(np.arange(0, 1000, 3))
        monkeypatch.setattr(log.time, "monotonic", lambda: float(next(clock)))
        line = StatusLine(total=160, initial=100)
        for step in range(101, 161):
            losses = {"critic": 0.12345, "generator": np.float32(2)}
            line.update(step, losses | {"critic/grad_norm": 3, "health/critic_lag_2": 4})
        line.close()
        printed = capsys.readouterr().err.splitlines()
        assert len(printed) == 3  # after a minute, after two, and the last step
        line = "fewstep: training: 120/160 steps, 0.333/s, 2 min 00 s left  critic 0.123  generator 2"
        assert printed[0] == line
        assert printed[-1].startswith("fewstep: training: 160/160 steps, 0.333/s, 3 min 00 s  critic")

    def test_reads_losses_only_when_it_shows_them(self, capsys):
        class Loss:
            def __float__(self):
                raise AssertionError("an accelerator would have had to wait here")

        StatusLine(total=10).update(1, {"critic": Loss()})
        StatusLine(total=10, quiet=True).update(10, {"critic": Loss()})
        StatusLine(total=10, quiet=True).write("hidden")
        assert capsys.readouterr().err == ""

    def test_bar_on_a_terminal(self, capsys, monkeypatch):
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
        line = StatusLine(total=10, initial=4)
        line.update(10, {"critic": 0.5})
        line.write("saved")
        line.close()
        shown = capsys.readouterr().err
        assert "4/10" in shown and "10/10" in shown and "critic 0.5" in shown and "saved" in shown


def test_report_needs_no_torch():
    code = "import sys, fewstep.report.report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


class TestBar:
    @pytest.fixture
    def clock(self, monkeypatch):
        monkeypatch.setattr(bar.time, "monotonic", lambda: self.now)
        self.now = 0.0
        return self

    def fill(self, seconds, **options):
        with Bar("drawing", 40, "images", **options) as shown:
            shown.update(8)
            self.now += seconds
            shown.update(32)

    def test_one_line_when_it_is_done(self, capsys, clock):
        clock.fill(75)
        clock.fill(0.5)  # what is over at once is not told
        clock.fill(75, quiet=True)
        assert capsys.readouterr().err == "fewstep: drawing: 40 images, 1 min 15 s\n"

    def test_a_terminal_gets_a_bar_that_makes_way_for_the_line(self, capsys, clock, monkeypatch):
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
        clock.fill(2)
        *bars, line = capsys.readouterr().err.rsplit("\r", 1)
        assert "fewstep: drawing: " in bars[0] and "/40" in bars[0]
        assert line.strip() == "fewstep: drawing: 40 images, 2 s"

    def test_nothing_of_what_failed_or_was_not_needed(self, capsys, clock):
        with pytest.raises(KeyError), Bar("drawing", 40, "images"):
            clock.now += 9
            raise KeyError
        with Bar("drawing", 0, "images"):
            clock.now += 9
        assert capsys.readouterr().err == ""


def test_curves_of_several_runs_side_by_side_are_the_charts_of_their_reports(tmp_path, capsys):
    spec = importlib.util.spec_from_file_location("curves", Path(__file__).parents[2] / "eval" / "curves.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    for name, lag in (("well", 0.1), ("ill", 2.0)):
        (tmp_path / name).mkdir()
        lines = [json.dumps({"step": 10 * i, "seconds": i, "health/critic_lag": lag}) for i in range(1, 9)]
        (tmp_path / name / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    runs = [
        f"{title}={tmp_path / name}" for title, name in (("it <follows>", "well"), ("it does not", "ill"))
    ]
    out = tmp_path / "lag.svg"
    assert script.main(["health/critic_lag", *runs, "--out", str(out)]) == 0
    tree = ElementTree.fromstring(out.read_text())
    texts = [node.text for node in tree.iter("{http://www.w3.org/2000/svg}text")]
    assert "it <follows>" in texts and "it does not" in texts
    healthy = [n for n in tree.iter("{http://www.w3.org/2000/svg}rect") if n.get("class") == "healthy"]
    assert len(healthy) == 2 and float(healthy[0].get("height")) > float(healthy[1].get("height"))
    assert script.main(["health/none", *runs, "--out", str(out)]) == 2
    assert "there are health/critic_lag" in capsys.readouterr().err
