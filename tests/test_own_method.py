"""The methods of the page on adding one and of the README are, as they stand there, methods that train."""

import re
from pathlib import Path

import pytest
import torch
from processes import Fork
from toys import NONE, SD

from fewstep.cli import main
from fewstep.diffusion.rng import Rng
from fewstep.methods import METHODS, Batch
from fewstep.teachers.analytic import GaussianMixture

ROOT = Path(__file__).parents[1]


def blocks(page):
    return dict(
        re.findall(
            r"^```python\n# (\S+\.py)\n(.*?)^```$", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE
        )
    )


BLOCKS = {**blocks("docs/extending/method.md"), **blocks("README.md")}


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """A folder with the files of the page."""
    for name, text in BLOCKS.items():
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path  # what is imported from there, a fork imports


def test_the_page_has_a_method_of_at_most_sixty_lines_with_its_recipe_and_test():
    assert list(BLOCKS) == ["progressive.py", "recipe.py", "test_progressive.py", "knowledge.py"]
    assert len(BLOCKS["progressive.py"].splitlines()) <= 60 and len(BLOCKS["knowledge.py"].splitlines()) <= 30


def test_the_test_on_the_page_passes(desk):
    assert "progressive" not in METHODS
    words = ["test_progressive.py", "-q", "-p", "no:cacheprovider", "--rootdir", str(desk), "-c", "none.ini"]
    (desk / "none.ini").write_text("[pytest]\n")

    said = desk / "said.txt"
    code = Fork(lambda: int(pytest.main(words)), said).wait()
    assert code == 0 and re.search(r"\b6 passed", said.read_text()), said.read_text()


def test_the_recipe_on_the_page_trains_to_an_export_that_is_verified(desk):
    said = desk / "said.txt"
    code = Fork(lambda: main(["train", "recipe.py", "--smoke"]), said, {"TMPDIR": str(desk)}).wait()
    text = said.read_text()
    assert code == 0 and "verified in stock diffusers" in text, text
    run = next(desk.glob("fewstep-smoke-*/run"))
    assert {p.name for p in (run / "code").glob("*.*")} == {"index.json", "progressive.py"}
    assert '"num_steps": 4' in (run / "export" / "fewstep.json").read_text()


def test_the_method_of_the_readme_is_the_squared_error_of_its_one_step(desk):
    """In a fork, for the name stays registered."""

    def check():
        from knowledge import Knowledge

        teacher = GaussianMixture.ring(SD, radius=2.0, std=0.2)
        method = Knowledge(Knowledge.Config(), teacher, (2,), student=teacher)
        noise, x0 = Rng("noise").normal(8, 2), Rng("x0").normal(8, 2)
        made = teacher.x0(noise, torch.full((8,), 999.0), NONE)
        batch = Batch(NONE, (8, 2), Rng("b"), Rng("s"), pairs=(noise, x0), pair_cond=NONE)
        loss = method.loss(batch, None)["regression"]
        assert loss == (made - x0).square().mean() and Knowledge.needs(method.config) == ("prompts", "pairs")
        return 0

    said = desk / "said.txt"
    assert Fork(check, said).wait() == 0, said.read_text()


def test_the_method_of_the_readme_trains_to_an_export_that_is_verified(desk):
    text = (ROOT / "recipes" / "emoji_dmd_1step.py").read_text()
    for old, new in (
        ("from fewstep.methods.dmd import DMD", "from knowledge import Knowledge"),
        (r"DMD\.Config\(.*?\)", "Knowledge.Config()"),
        (r" *\"critic\".*?\n", ""),
    ):
        text, found = re.subn(old, new, text)
        assert found == 1
    (desk / "mine.py").write_text(text)
    said = desk / "said.txt"
    code = Fork(lambda: main(["train", "mine.py", "--smoke"]), said, {"TMPDIR": str(desk)}).wait()
    assert code == 0 and "verified in stock diffusers" in said.read_text(), said.read_text()
