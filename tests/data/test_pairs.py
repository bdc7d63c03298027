"""Pairs of a teacher: the same whatever interrupts their making, and refused where they are of another kind."""

import json
import time

import pytest
import torch
from processes import command
from safetensors.torch import load_file

from fewstep.cli import main
from fewstep.data import pairs as module
from fewstep.data.pairs import check_pairs, load_pairs, make_pairs
from fewstep.diffusion.solvers import ddim
from fewstep.errors import FewstepError, RecipeError
from fewstep.teachers import load_teacher

PROMPTS = ["red apple", "a cat", "blue square"]


@pytest.fixture
def teacher(tiny_sd15):
    return load_teacher(str(tiny_sd15))


@pytest.fixture(autouse=True)
def small_files(monkeypatch):
    monkeypatch.setattr(module, "SHARD", 4)


def make(folder, teacher, **options):
    return make_pairs(folder, teacher, PROMPTS, **{"num": 10, "steps": 2, "guidance": 2.0, **options})


def everything(folder):
    files = sorted(folder.glob("*.safetensors"))
    return {n: torch.cat([load_file(f)[n] for f in files]) for n in ("noise", "x0")}


def test_noise_is_unit_noise_and_the_sample_is_the_teachers_own(teacher, tmp_path):
    pairs = load_pairs(str(make(tmp_path / "pairs", teacher, num=100, guidance=1.0, steps=4, batch_size=50)))
    rows = pairs.store.rows(torch.arange(100))
    assert rows["noise"].std().item() == pytest.approx(1, abs=0.01) and len(pairs.prompts) == 100
    cond = teacher.encode(pairs.prompts[:4])
    own = ddim(teacher.denoiser, rows["noise"][:4], cond, 100)
    many = load_pairs(str(make(tmp_path / "many", teacher, num=4, guidance=1.0, steps=100)))
    assert (many.store.rows(torch.arange(4))["x0"] - own).abs().mean() < 0.05 * own.abs().mean()


def test_every_solver_goes_where_ddim_goes(teacher, tmp_path):
    many = everything(make(tmp_path / "ddim", teacher, num=4, guidance=1.0, steps=150))
    for solver in ("euler", "dpm++", "unipc"):
        other = everything(make(tmp_path / solver, teacher, num=4, guidance=1.0, steps=100, solver=solver))
        assert other["noise"].equal(many["noise"]), solver  # unit noise, whatever scale the solver works in
        assert (other["x0"] - many["x0"]).abs().mean() < 0.1 * many["x0"].abs().mean(), solver


def test_pairs_do_not_depend_on_batches_or_interruptions(teacher, tmp_path):
    whole = everything(make(tmp_path / "a", teacher))
    torn = make(tmp_path / "b", teacher, batch_size=3)
    first = sorted(torn.glob("*.safetensors"))[1]
    first.unlink()
    with pytest.raises(RecipeError, match="unfinished"):
        load_pairs(str(torn))
    make(tmp_path / "b", teacher, batch_size=3)
    assert everything(torn)["noise"].equal(whole["noise"])
    assert (everything(torn)["x0"] - whole["x0"]).abs().max() < 1e-4  # the batch size changes rounding only


def test_pairs_of_another_kind_are_refused(teacher, tmp_path):
    folder = make(tmp_path / "pairs", teacher)
    with pytest.raises(FewstepError, match=r"guidance_scale is 2\.0, not 3\.0"):
        make(folder, teacher, guidance=3.0)
    with pytest.raises(RecipeError, match=r"data\.pairs: made with guidance_scale 2\.0"):
        check_pairs(load_pairs(str(folder)), teacher, 8.0)
    with torch.no_grad():
        next(teacher.net.parameters()).mul_(1.5)
    with pytest.raises(
        RecipeError, match=r"data\.pairs: made with network '\w+', but this run has '\w+'; make them"
    ):
        check_pairs(load_pairs(str(folder)), teacher, 2.0)
    with pytest.raises(FewstepError, match="holds pairs of another kind: network is"):
        make(folder, teacher)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(FewstepError, match="not empty"):
        make(tmp_path / "full", teacher)


def test_a_network_at_less_precision_is_the_same_one(tiny_sd15, teacher, tmp_path):
    pairs = load_pairs(str(make(tmp_path / "pairs", teacher)))
    check_pairs(pairs, load_teacher(str(tiny_sd15), dtype="bfloat16"), 2.0)


def test_pairs_from_before_networks_were_recorded_are_taken_and_named(teacher, tmp_path, capsys):
    folder = make(tmp_path / "pairs", teacher)
    capsys.readouterr()
    check_pairs(load_pairs(str(folder)), teacher, 2.0)
    assert not capsys.readouterr().err
    about = json.loads((folder / "pairs.json").read_text())
    del about["network"]
    (folder / "pairs.json").write_text(json.dumps(about))
    check_pairs(load_pairs(str(folder)), teacher, 2.0)
    line = f"fewstep: note: data.pairs: {folder} was made before network was recorded, so that only you know"
    assert capsys.readouterr().err.startswith(line)
    check_pairs(load_pairs(str(folder)), teacher, 2.0, quiet=True)
    assert not capsys.readouterr().err
    with pytest.raises(
        FewstepError, match="network is None, not"
    ):  # nothing of this teacher is added to them
        make(folder, teacher)


def test_missing_and_damaged_pairs_are_named_with_the_command_that_makes_them(teacher, tmp_path):
    for source in (None, str(tmp_path / "nowhere")):
        with pytest.raises(RecipeError, match="fewstep pairs my_recipe --out"):
            load_pairs(source, "my_recipe")
    folder = make(tmp_path / "pairs", teacher)
    (folder / "pairs.json").write_text('{"num": 1')
    with pytest.raises(RecipeError, match="damaged"):
        load_pairs(str(folder))


@pytest.mark.slow
def test_a_kill_loses_at_most_one_file(tiny_sd15, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SHARD", 64)
    prompts, out = tmp_path / "prompts.txt", tmp_path / "pairs"
    prompts.write_text("\n".join(PROMPTS))
    words = ["pairs", "sd15_dmd_1step", "--teacher", str(tiny_sd15),
               "--prompts", str(prompts), "--out", str(out), "--num", "256", "--steps", "4",
               "--teacher.dtype", "float32", "--teacher.autocast", "null", "--teacher.resolution", "null"]  # fmt: skip
    child = command(words)
    deadline = time.time() + 120
    while not list(out.glob("[0-9]*.safetensors")) and time.time() < deadline and child.poll() is None:
        time.sleep(0.01)
    child.kill()
    child.wait()
    kept = {p.name: p.stat().st_mtime_ns for p in out.glob("[0-9]*.safetensors")}
    assert kept and len(kept) < 4
    assert main(words) == 0
    assert (
        len(list(out.glob("[0-9]*.safetensors"))) == 4
        and json.loads((out / "pairs.json").read_text())["num"] == 256
    )
    assert all((out / name).stat().st_mtime_ns == time for name, time in kept.items())
