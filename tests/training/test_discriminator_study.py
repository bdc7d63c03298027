"""The study of what a discriminator can see: what is stored is what its script makes."""

import copy
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


@pytest.mark.parametrize("whole", [True, False])
def test_a_head_that_is_taught_whole_leaves_the_runs_network_as_it_is(sdxl, whole):
    critic = sdxl.denoiser.with_net(copy.deepcopy(sdxl.denoiser.net))
    method = type("Method", (), {"critic": critic, "latent_shape": sdxl.latent_shape})
    before = {name: weight.clone() for name, weight in critic.net.state_dict().items()}
    head = discriminator.Head(("mid_block",), whole=whole)
    judge = discriminator.Judge(type("Session", (), {"method": method, "teacher": None}), head)
    x_t, t = torch.randn(2, *sdxl.latent_shape), torch.full((2,), 0.5)
    judge.logits(x_t, t, sdxl.denoiser.null.expand(2)).sum().backward()
    torch.optim.SGD(judge.taught, lr=0.1).step()
    assert all(torch.equal(weight, before[name]) for name, weight in critic.net.state_dict().items())
    names = {name for name, weight in judge.denoiser.net.named_parameters() if weight.grad is not None}
    changed = {name for name in names if not torch.equal(judge.denoiser.net.state_dict()[name], before[name])}
    assert bool(changed) is whole and any("down_blocks" in name for name in changed) is whole


def test_a_network_of_its_own_sees_latents_alone_and_all_of_it_is_taught():
    method = type("Method", (), {"critic": None, "latent_shape": (16, 8, 8)})
    session = type("Session", (), {"method": method, "teacher": None})
    judge = discriminator.Judge(session, discriminator.HEADS["network of its own"])
    latents = torch.randn(3, 16, 8, 8)
    logits = judge.logits(latents, None, None)
    logits.sum().backward()
    assert logits.shape == (3, 1) and all(weight.grad.abs().sum() > 0 for weight in judge.taught)
    assert 0.5e6 < sum(weight.numel() for weight in judge.taught) < 0.7e6
    assert torch.allclose(judge.logits(latents[1:2], None, None), logits[1:2], atol=1e-5)


def test_files_of_others_are_left_alone(tmp_path, monkeypatch):
    (tmp_path / "README.md").write_text("mine")
    monkeypatch.setattr(sys, "argv", ["discriminator.py", "--run", "none", "--out", str(tmp_path)])
    with pytest.raises(FewstepError, match="is not what this command writes there"):
        discriminator.main()
    assert (tmp_path / "README.md").read_text() == "mine"
