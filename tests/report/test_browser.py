"""The report in a real browser: nothing sticks out or overlaps on a phone or a desktop, and the slider moves."""

import json

import numpy as np
import pytest
from browser import PATH, Browser

from fewstep.report.grid import image_grid
from fewstep.report.report import write_report

pytestmark = pytest.mark.skipif(PATH is None, reason="needs Chromium on PATH")

PROMPTS = [
    "owl",
    "a word-that-is-as-long-as-a-whole-line-of-words-and-has-no-space-in-it",
    *["red apple"] * 14,
]
# What stands beside or below each other: pairs of which none holds the other and both have some area in common.
OVERLAPS = """(() => {
  const all = [...document.querySelectorAll("h1, .lead, .ends span, .sheets, .tiles > div, h2, h3, .card, .scroll, "
    + ".notes, .film, .controls > *, .strip, .charts figure, .charts figcaption > *, pre, .details > *, li")];
  const boxes = all.map(e => e.getBoundingClientRect()), found = [];
  boxes.forEach((a, i) => boxes.forEach((b, k) => {
    if (k <= i || all[i].contains(all[k]) || all[k].contains(all[i])) return;
    const width = Math.min(a.right, b.right) - Math.max(a.left, b.left);
    const height = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
    if (width > 1 && height > 1) found.push(all[i].outerHTML.slice(0, 90) + " | " + all[k].outerHTML.slice(0, 90));
  }));
  return found;
})()"""
# What is cut off at the right edge, though its own box scrolls neither.
OUTSIDE = """[...document.querySelectorAll("body *")].filter(e => !e.closest(".scroll, .strip, pre, svg, .sheets")
  && e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 90))"""


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A report with everything in it."""
    folder = tmp_path_factory.mktemp("run")
    for name in ("samples", "eval", "health", "export"):
        (folder / name).mkdir()
    images = np.zeros((16, 32, 32, 3), np.uint8) + np.arange(16, dtype=np.uint8)[:, None, None, None] * 9
    image_grid(images, 8).save(folder / "samples" / "teacher.png")
    for step in (0, 50, 100):
        image_grid(255 - images, 8).save(folder / "samples" / f"step_{step:06d}.png")
    image_grid(images[:8], 8).save(folder / "health" / "step_000100.png")
    (folder / "samples" / "prompts.json").write_text(json.dumps({"prompts": PROMPTS, "columns": 8}))
    rows = []
    for kind, nfe in (("teacher", 100), ("student", 1), ("floor", 2)):
        image_grid(images, 8).save(folder / "eval" / f"{kind}.png")
        metrics = {f"{m}(effnet-lite0@96)": {"value": nfe, "error": 0.1} for m in ("FD", "KID", "retrieval")}
        row = {"name": kind, "kind": kind, "steps": nfe, "grid": f"{kind}.png", "metrics": metrics}
        rows.append(row | {"speed": {"nfe": nfe, "seconds": nfe / 100}})
    table = {"rows": rows, "notes": ["note " * 40], "prompts": PROMPTS, "columns": 8}
    (folder / "eval" / "table.json").write_text(json.dumps(table))
    log = [
        {
            "step": s,
            "generator/dm": 1 / s,
            "critic/a_name_of_a_loss_that_is_quite_long": s,
            "health/critic_lag": 2,
        }
        for s in range(1, 40)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in log))
    run = {
        "name": "a_run_with_a_name_that_goes_on_and_on",
        "teacher": "somebody/a-teacher-of-a-hub",
        "method": "dmd2",
    }
    run |= {"student_steps": 1, "seconds": 700, "steps": 40, "versions": {"torch": "2.13.0+cpu" * 5}}
    (folder / "run.json").write_text(json.dumps(run))
    (folder / "recipe.yaml").write_text("a_key: " + "value " * 50)
    (folder / "export" / "README.md").write_text("```python\npipe = load('" + "x" * 200 + "')\n```\n")
    return write_report(folder)


@pytest.fixture(scope="module")
def browser():
    with Browser() as browser:
        yield browser


@pytest.mark.parametrize(("width", "height", "dark"), [(390, 844, True), (1440, 900, False)])
def test_the_page_fits(browser, page, width, height, dark):
    browser.show(page, width, height, dark)
    assert browser.run("innerWidth") == width
    browser.run("document.querySelectorAll('details').forEach(e => e.open = true)")
    assert browser.run("document.documentElement.scrollWidth") <= width
    assert browser.run(OUTSIDE) == []
    assert browser.run(OVERLAPS) == []
    # Letters are far from their ground in both schemes.
    colours = browser.run("['color', 'background-color'].map(k => getComputedStyle(document.body)[k])")
    ink, ground = (sum(map(int, c[4:-1].split(","))) / 3 for c in colours)
    assert (ground < 40 < 200 < ink) if dark else (ink < 40 < 200 < ground)
    # Everything is in the file.
    asked = [
        e["params"]["request"]["url"]
        for e in browser.events
        if e.get("method") == "Network.requestWillBeSent"
    ]
    assert {url.partition(":")[0] for url in asked} <= {"file", "data"}


# Whose image lies at a share of the first row: what is cut off by the divide is not there to be hit.
SEEN = """(share => {
  const sheets = document.querySelector(".sheets"), box = sheets.getBoundingClientRect();
  const input = sheets.querySelector("input");
  input.style.pointerEvents = "none";
  const seen = document.elementFromPoint(box.left + share * box.width, box.top + 20);
  input.style.pointerEvents = "";
  return seen.closest(".sheet")?.className;
})"""


def test_the_slider_divides_teacher_from_student(browser, page):
    browser.show(page, 1440, 900)
    sides = lambda: [browser.run(f"{SEEN}({share})") for share in (0.06, 0.31, 0.69, 0.94)]  # noqa: E731
    teacher, student = "sheet teacher", "sheet student"
    assert sides() == [teacher, teacher, student, student]
    for _ in range(9):  # the first thing that takes the keyboard
        browser.press("Tab", 9)
        if browser.run("document.activeElement.closest('.compare') !== null"):
            break
    browser.press("Home", 36)
    assert sides() == [student] * 4
    for _ in range(3):
        browser.press("PageUp", 33)
    assert browser.run("document.activeElement.value") == "30" and sides() == [teacher, *[student] * 3]
    browser.press("ArrowRight", 39)
    assert browser.run("document.activeElement.value") == "31"
    left, top, width = browser.run(
        "(box => [box.left, box.top, box.width])(document.querySelector('.sheets').getBoundingClientRect())"
    )
    browser.drag((left + 0.31 * width, top + 60), (left + 0.8 * width, top + 60))
    assert float(browser.run("document.querySelector('.compare input').value")) == pytest.approx(80, abs=1)
    assert sides() == [teacher, teacher, teacher, student]  # while it is dragged


def test_curves_tell_their_numbers(browser, page):
    browser.show(page, 1440, 900)
    x, y = browser.run(
        "(e => { e.scrollIntoView(); const b = e.getBoundingClientRect(); return [b.left + b.width / 2, b.top + 30]; })"
        "(document.querySelector('svg'))"
    )
    browser.move(x, y)
    told = browser.run("[...document.querySelectorAll('.charts output')].map(e => e.textContent)")
    assert len(told) == 3 and all(text.endswith(told[0][-6:]) and " at " in text for text in told)
