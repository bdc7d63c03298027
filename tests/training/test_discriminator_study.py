"""The study of what a discriminator can see: what is stored is what its script makes."""

import json
import sys
from pathlib import Path

import pytest
import torch

from fewstep.errors import FewstepError

EVAL = Path(__file__).parents[2] / "eval"
sys.path.insert(0, str(EVAL))

import discriminator  # noqa: E402

STORED = json.loads((EVAL / "results" / "discriminator" / "heads.json").read_text())


def test_the_table_is_that_of_the_rows():
    assert (EVAL / "results" / "discriminator" / "README.md").read_text() == discriminator.table(STORED)
    assert set(STORED["heads"]) == set(discriminator.HEADS)


def test_a_drawing_is_on_one_side_with_both_of_its_captions():
    class Data:
        def __init__(self, **tensors):
            self.tensors = tensors

        def __len__(self):
            return len(next(iter(self.tensors.values())))

        def rows(self, index):
            return {name: value[index] for name, value in self.tensors.items()}

    latents = torch.arange(8.0).repeat_interleave(2)[:, None, None, None].expand(16, 2, 1, 1)
    captions = Data(text=torch.arange(16))
    bucket = type("Bucket", (), {"latents": Data(latents=latents)})
    data = type("Batches", (), {"buckets": [bucket], "captions": captions})
    session = type("Session", (), {"trainer": type("Trainer", (), {"data": data})})
    drawings = discriminator.Drawings(session)
    assert drawings.held.view(8, 2).sum(1).tolist() == [2, 0, 0, 0, 2, 0, 0, 0]
    for held in (True, False):
        real, cond = drawings.some(held, discriminator.Rng("x"))
        assert set(real[:, 0, 0, 0].tolist()) <= ({0.0, 4.0} if held else {1.0, 2.0, 3.0, 5.0, 6.0, 7.0})
        assert torch.equal(cond["text"] // 2, real[:, 0, 0, 0].long())


def test_files_of_others_are_left_alone(tmp_path, monkeypatch):
    (tmp_path / "README.md").write_text("mine")
    monkeypatch.setattr(sys, "argv", ["discriminator.py", "--run", "none", "--out", str(tmp_path)])
    with pytest.raises(FewstepError, match="is not what this command writes there"):
        discriminator.main()
    assert (tmp_path / "README.md").read_text() == "mine"
