"""The study of what a discriminator can see: what is stored is what its script makes."""

import copy
import json
import math
import sys
from pathlib import Path

import pytest
import torch

from fewstep import recipe as recipes
from fewstep.errors import FewstepError
from fewstep.runs.library import load_recipe

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


@pytest.fixture
def finished(tmp_path):
    """A training with other options, as it leaves its folder."""
    run, words = tmp_path / "run", ["--method.gan_weight=0.02", "--train.seed=3", "--train.log_every=7"]
    recipe = recipes.override(load_recipe("emoji_dmd2_1step"), words)
    (run / "eval").mkdir(parents=True)
    (run / "recipe.yaml").write_text(recipes.dump(recipe))
    logged = [{"step": i, "health/discriminator_accuracy_1": i / 10} for i in range(1, 8)]
    logged[-1]["health/discriminator_accuracy_2"] = 0.5
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, [*logged, {"step": 8}])))
    (run / "run.json").write_text('{"cpu_seconds": 5.0}')
    metrics = {
        f"{name}(e)": {"value": 0.5, "error": 0.01, "n_fake": 4} for name in ("FD", "KID", "diversity")
    }
    rows = [{"kind": "teacher", "metrics": {}}, {"kind": "student", "metrics": metrics}]
    (run / "eval" / "table.json").write_text(json.dumps({"rows": rows}))
    return run


def test_a_training_is_kept_with_its_options_and_takes_the_place_of_the_same_one(
    finished, tmp_path, monkeypatch
):
    out = tmp_path / "out"
    out.mkdir()
    older = {
        "recipe": "emoji_dmd2_1step",
        "steps": 1000,
        "options": {"method.gan_weight": 0.02, "train.seed": 3},
    }
    other = {**older, "options": {}, "right": None, "metrics": STORED["trainings"][0]["metrics"]}
    kept = {**STORED, "trainings": [older, other]}
    (out / "heads.json").write_text(json.dumps(kept, indent=1))
    words = ["--keep", str(finished), "--of", "emoji_dmd2_1step", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["discriminator.py", *words])
    assert discriminator.main() == 0
    first, row = json.loads((out / "heads.json").read_text())["trainings"]
    assert first == other and row["options"] == older["options"] and row["cpu_seconds"] == 5.0
    assert row["right"] == [0.5, 0.5] and row["metrics"]["FD"] == {"value": 0.5, "error": 0.01}
    cells = "method.gan_weight 0.02, train.seed 3 | 0.50 0.50 | " + "0.500 \u00b1 0.010 | " * 3 + " |"
    assert f"| `emoji_dmd2_1step` | 1,000 | {cells}" in (out / "README.md").read_text()
    (finished / "eval" / "table.json").unlink()
    with pytest.raises(FewstepError, match=r"^--keep: .*table\.json; let it end, with evaluation\.num"):
        discriminator.main()


def test_files_of_others_are_left_alone(tmp_path, monkeypatch):
    (tmp_path / "README.md").write_text("mine")
    monkeypatch.setattr(sys, "argv", ["discriminator.py", "--run", "none", "--out", str(tmp_path)])
    with pytest.raises(FewstepError, match="is not what this command writes there"):
        discriminator.main()
    assert (tmp_path / "README.md").read_text() == "mine"


def test_what_is_said_of_images_is_what_was_measured():
    folder = EVAL / "results" / "images"
    said, stored = (folder / "README.md").read_text(), json.loads((folder / "images.json").read_text())
    for row in stored["rows"]:
        cells = next(line for line in said.splitlines() if line.startswith(f"| {row['name']} |")).split(" | ")
        found = [metric["value"] for metric in row["metrics"].values()]
        assert [float(cell.split(" ±")[0]) for cell in cells[2:]] == pytest.approx(found, abs=0.51, rel=1e-2)
    values = {row["name"]: row["metrics"]["FD"] for row in stored["rows"]}
    for pair in ("goes on {} images", "{} images, seed 1"):
        without, images = (values[pair.format(word)] for word in ("without", "with"))
        gain, error = without["value"] - images["value"], math.hypot(without["error"], images["error"])
        assert f"by {gain:.0f} with an error of {error:.0f}" in said
