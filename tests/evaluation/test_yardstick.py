"""One yardstick for all rows of a table: what it measures, and when a result that is there already may stand."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from fewstep.errors import FewstepError
from fewstep.evaluation import yardstick
from fewstep.evaluation.images import ArrayImages
from fewstep.evaluation.prompts import read_prompts
from fewstep.evaluation.spec import Entry, Spec
from fewstep.evaluation.yardstick import Yardstick
from fewstep.vision.scores import Scorer

TEXTS = ["red", "red", "blue", "blue", "green", "grey"]


def pool_function(images):
    return torch.nn.functional.adaptive_avg_pool2d(images.permute(0, 3, 1, 2).float() / 255, 2).flatten(1)


def other_function(images):
    return pool_function(255 - images)


class Length(Scorer):
    """Of the caption, whatever the image."""

    def __init__(self, name, *_):
        self.label, self.name, self.weights_sha256 = "CLIP score", name, name

    def score(self, prepared, captions):
        return torch.tensor([float(len(caption)) for caption in captions])


def images(seed, name="array"):
    rng = np.random.default_rng(seed)
    return ArrayImages(rng.integers(0, 256, (6, 16, 16, 3)).astype(np.uint8), name)


@pytest.fixture
def made(tmp_path, monkeypatch):
    """A yardstick of these options, whose extraction of features is counted in ``made.measured``."""

    def make(texts=TEXTS, **options):
        (tmp_path / "p.txt").write_text("\n".join(texts) + "\n")
        spec = Spec(
            str(tmp_path / "p.txt"),
            (Entry("m", images="x"),),
            **{"real": images(0), "extractor": f"{__name__}:pool_function", "metrics": ("fd",), **options},
        )
        return Yardstick(spec, read_prompts(spec.prompts), "cpu")

    def evaluate(*args, **asked):
        make.measured += 1
        return real(*args, **asked)

    make.measured, real = 0, yardstick.evaluate_images
    monkeypatch.setattr(yardstick, "evaluate_images", evaluate)
    monkeypatch.setattr(yardstick, "get_scorer", Length)
    return make


CHANGES = {
    "real": {"real": images(1)},
    "none real": {"real": None, "metrics": ("fd", "vendi")},
    "extractor": {"extractor": f"{__name__}:other_function"},
    "metrics": {"metrics": ("fd", "kid")},
    "scorers": {"scorers": ("another",)},
    "protocol": {"protocol": "folder-clean"},
    "captions": {"texts": [*TEXTS[:5], "purple"]},
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_result_stands_only_where_all_that_decides_it_is_the_same(made, tmp_path, what):
    file, run = tmp_path / "r.json", {"images": "x"}
    first = made(scorers=("one",)).measure(images(2), file, run)
    assert made(scorers=("one",)).measure(images(2), file, run) == first and made.measured == 1
    again = made(**{"scorers": ("one",), **CHANGES[what]}).measure(images(2), file, run)
    assert made.measured == 2 and json.loads(json.dumps(again)) == json.loads(file.read_text()) != first


def test_a_result_is_of_these_images_and_beside_this_reference(made, tmp_path):
    file, one = tmp_path / "r.json", made()
    one.measure(images(2), file, {"images": "x"})
    one.measure(images(3), file, {"images": "y"})
    assert made.measured == 2
    one.reference = ({"seed": 1}, torch.zeros(6, 12))
    one.measure(images(3), file, {"images": "y"})
    assert made.measured == 3


def test_the_diversity_of_a_prompt_needs_two_prompts_with_several_images(made):
    assert "diversity" in made().measured
    assert "diversity" not in made(["red", "red", "blue", "green", "grey", "white"]).measured


def test_words_of_what_lies_beside_the_images_are_kept_where_nothing_is_real(made, tmp_path):
    beside = images(2)
    beside.passed_over = ("1 hidden",)
    one = made(real=None, metrics=("vendi",))
    assert one.measure(beside, tmp_path / "r.json", {})["warnings"] == ["array: passed over 1 hidden"]


def test_named_images_are_no_part_of_those_that_a_distance_needs(tmp_path, made):
    lines = [{"prompt": "a"}, {"prompt": "b"}, {"prompt": "c", "real": 1}, {"prompt": "d", "real": 0}]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    spec = Spec(str(tmp_path / "p.jsonl"), (Entry("m", images="x"),), real=images(0), metrics=("kid",))
    spec = dataclasses.replace(spec, extractor=f"{__name__}:pool_function")
    with pytest.raises(FewstepError, match="kid: it needs at least 3 images, and fake has 2"):
        Yardstick(spec, read_prompts(spec.prompts), "cpu")
    spec = dataclasses.replace(spec, metrics=("fd",))
    assert Yardstick(spec, read_prompts(spec.prompts), "cpu").named == [1, 0]
    with pytest.raises(FewstepError, match="per_prompt is 2, expected 1 where prompts name real images"):
        Yardstick(dataclasses.replace(spec, per_prompt=2), read_prompts(spec.prompts), "cpu")
