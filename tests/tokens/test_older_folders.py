"""Pipelines that were saved when modules of fewstep had other names load all the same."""

import json

import pytest

from fewstep.cost.shapes import Shapeless
from fewstep.cost.skeleton import skeleton_teacher
from fewstep.teachers import load_pipeline
from fewstep.teachers.tiny import write_tiny_pipeline
from fewstep.tokens.pipeline import MOVED, LlamaGenPipeline
from fewstep.tokens.students import ParallelStudent

BEFORE = {now: before for before, now in MOVED.items()}


def age(folder):
    """Writes the old names into a pipeline's index; returns how many there are."""
    path = folder / "model_index.json"
    index = json.loads(path.read_text())
    old = [value for value in index.values() if isinstance(value, list) and value[0] in BEFORE]
    for value in old:
        value[0] = BEFORE[value[0]]
    path.write_text(json.dumps(index))
    return len(old)


@pytest.mark.parametrize("name", ["LlamaGenPipeline", "VARPipeline"])
def test_a_teacher(name, tmp_path):
    folder = write_tiny_pipeline(name, tmp_path)
    wanted = load_pipeline(str(folder)).transformer
    assert age(folder) == 2
    found = load_pipeline(str(folder)).transformer
    assert type(found) is type(wanted)
    assert all(found.state_dict()[key].equal(value) for key, value in wanted.state_dict().items())
    with Shapeless():
        assert type(skeleton_teacher(str(folder)).net) is type(wanted)


def test_a_student(tmp_path):
    teacher = load_pipeline(str(write_tiny_pipeline("LlamaGenPipeline", tmp_path / "teacher")))
    student = ParallelStudent.of(teacher.transformer, teacher.codes, split=8)
    LlamaGenPipeline(student, teacher.vqvae).save_pretrained(tmp_path / "student")
    assert age(tmp_path / "student") == 2
    again = LlamaGenPipeline.from_pretrained(tmp_path / "student")
    assert isinstance(again.transformer, ParallelStudent) and again.transformer.codes.equal(student.codes)
