"""Prompts encoded beside training: the same conditions, exact resume, the choice by size, waits that are told."""

import io
import json
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, Lock
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from PIL import Image
from processes import command, meeting, together
from test_end_to_end import tiny
from zoo import EDITS

from fewstep import recipe as recipes
from fewstep.cost.count import plan
from fewstep.data import store
from fewstep.data.batches import Ahead, Waits
from fewstep.data.cache import encode_images, encode_prompts, need_of_prompts
from fewstep.data.images import load_images
from fewstep.data.live import Live, LiveImages
from fewstep.errors import FewstepError, RecipeError
from fewstep.process import Process
from fewstep.runs import session as sessions
from fewstep.runs.checks import check_data
from fewstep.runs.disk import cached, texts_to_encode
from fewstep.runs.session import Session, execute, resume
from fewstep.teachers import load_teacher
from fewstep.teachers.base import Teacher
from fewstep.teachers.references import Edit

TEXTS = ["red apple", "a dog on a skateboard", "blue square", "a cat", "crescent moon"]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def recipe_for(teacher, folder, *words):
    folder.mkdir(exist_ok=True)
    few = ("--data.images", "null", "--method.gan_weight", "0", "--train.checkpoint_every", "2")
    return tiny("sdxl_dmd2_1step", teacher, folder, "--train.steps", "4", *few, *words)


@pytest.mark.parametrize(
    "name", ["SDXL", "Qwen-Image", "Qwen-Image-Edit", "FLUX.2-klein", "HiDream", "DiT", "Lumina 2"]
)
def test_rows_are_those_of_the_cache(name, teachers, cache):
    teacher = teachers(name)
    texts = {"DiT": ["207", "3", "4"], "Qwen-Image-Edit": EDITS}.get(name, TEXTS)
    live, kept = Live(teacher, texts), encode_prompts(teacher, texts, quiet=True)
    index = torch.tensor([len(texts) - 1, 0, len(texts) - 1])
    one, other = live.rows(index), kept.rows(index)
    assert len(live) == len(kept) and one.keys() == other.keys()
    for key, value in one.items():
        assert value.dtype == other[key].dtype
        torch.testing.assert_close(value, other[key], rtol=1e-4, atol=1e-5)


def test_all_references_are_looked_at_before_training(teachers):
    """And not when their batch comes."""
    odd = Edit("a cat", EDITS[0].references[:1], "the last edit")
    with pytest.raises(FewstepError, match=r"the last edit: references of .*expected as many in every row"):
        Live(teachers("Qwen-Image-Edit"), [*EDITS, odd])
    with pytest.raises(FewstepError, match=r"reads no reference image"):
        Live(teachers("SD 1.5"), ["a cat", odd])


def test_a_half_precision_teacher_rounds_alike(teachers, cache):
    teacher = load_teacher(teachers("SDXL").source, dtype="bfloat16")
    live, kept = Live(teacher, TEXTS), encode_prompts(teacher, TEXTS, batch_size=len(TEXTS), quiet=True)
    every = torch.arange(len(TEXTS))
    for key, value in live.rows(every).items():
        assert value.equal(kept.rows(every)[key]) and value.dtype == torch.float32


def test_prompts_and_captions_are_encoded_by_one_thread_at_a_time_and_few_at_a_time(teachers, monkeypatch):
    """The first micro-batch is read by the trainer's own thread while another reads the next one."""
    monkeypatch.setattr("fewstep.data.live.BATCH", 2)
    teacher, inside, seen = teachers("SD 1.5"), Lock(), []
    encode, both = teacher.encode, Barrier(2)

    def alone(texts):
        assert inside.acquire(blocking=False)
        time.sleep(0.02)
        seen.append(list(texts))
        inside.release()
        return encode(texts)

    monkeypatch.setattr(teacher, "encode", alone)
    prompts, captions = Live(teacher, TEXTS), Live(teacher, TEXTS[::-1])

    def read(store):
        both.wait()
        return store.rows(torch.arange(5))["embeds"]

    with ThreadPoolExecutor(2) as threads:
        one, other = threads.map(read, (prompts, captions))
    torch.testing.assert_close(one, other.flip(0), rtol=1e-4, atol=1e-5)
    assert sorted(map(len, seen)) == [1, 1, 2, 2, 2, 2]


@pytest.mark.slow
def test_a_run_resumes_exactly_and_is_that_of_a_cache_but_for_rounding(tiny_sdxl, tmp_path, cache):
    live = ("--data.cache_prompts", "false")
    ends = {}
    for name, words in (("live", live), ("pieces", live), ("cached", ("--data.cache_prompts", "true"))):
        recipe = recipe_for(tiny_sdxl, tmp_path / name, *words)
        if name == "pieces":
            execute(recipes.override(recipe, ["--train.steps", "2"]))
            resume(tmp_path / name / "run", ["--train.steps", "4"])
        else:
            execute(recipe)
        session = Session(recipe, *check_data(recipe), Process(), begun=True)
        session.trainer.restore()
        ends[name] = {n: w.clone() for n, w in session.roles["student"].weights.items()}
        assert bool(list(cache.glob("prompts-*"))) == (name == "cached")
    for key, value in ends["live"].items():
        assert value.equal(ends["pieces"][key])
        torch.testing.assert_close(value, ends["cached"][key], rtol=1e-3, atol=2e-5)
    assert any(not v.equal(ends["live"][n] * 0) for n, v in ends["live"].items())


def test_the_size_chooses_and_a_run_goes_on_as_it_began(tiny_sdxl, tmp_path, cache, capsys):
    recipe = recipe_for(tiny_sdxl, tmp_path, "--data.cache_gb", "1e-9", "--train.steps", "2")
    folder = execute(recipe)
    assert not list(cache.glob("prompts-*"))
    said = capsys.readouterr().err
    assert said.count("fewstep: note: prompts are encoded beside training: their cache would take 0 GB") == 1
    assert recipes.load(folder / "recipe.yaml").data.cache_prompts is False
    assert 0 <= json.loads((folder / "run.json").read_text())["waited"] <= 1
    sessions.cache(recipe)  # makes it all the same
    assert list(cache.glob("prompts-*"))
    session = Session(recipes.load(folder / "recipe.yaml"), *check_data(recipe), Process(), begun=True)
    assert isinstance(session.ahead.data.conditions, Live)
    fresh = Session(recipe, *check_data(recipe), Process())  # it is there, so nothing is left to write
    assert not isinstance(fresh.ahead.data.conditions, Live) and fresh.recipe.data.cache_prompts is True


def test_the_choice_counts_captions_and_the_prompts_of_pairs(tiny_sdxl, tmp_path, cache, monkeypatch):
    teacher = load_teacher(str(tiny_sdxl))
    recipe = tiny("sdxl_dmd2_1step", tiny_sdxl, tmp_path, "--method.gan_weight", "0.1")
    prompts, images = check_data(recipe)
    own = texts_to_encode(recipe, teacher, ["another"], images)
    assert [need.what for need in own] == ["prompts", "captions"] and own[1].size > own[0].size > 0
    assert [need.what for need in texts_to_encode(recipe, teacher, prompts, images)] == ["prompts"]
    monkeypatch.setattr("fewstep.runs.disk.load_pairs", lambda source: SimpleNamespace(prompts=TEXTS))
    recipe = tiny("sdxl_regression_1step", tiny_sdxl, tmp_path)
    needs = {need.what: need.size for need in texts_to_encode(recipe, teacher, ["a cat"], None)}
    assert needs.keys() == {"prompts", "prompts of pairs"} and needs["prompts of pairs"] > needs["prompts"]


def test_a_method_that_looks_at_all_prompts_first_has_a_cache(tiny_sdxl, tmp_path, cache):
    recipe = tiny(
        "emoji_multi_student_1step", tiny_sdxl, tmp_path, "--data.cache_gb", "0", "--train.steps", "2"
    )
    session = Session(recipe, *check_data(recipe), Process())
    assert not isinstance(session.ahead.data.conditions, Live)


def test_encoders_stay_where_they_are_wanted(tiny_sdxl, tmp_path, cache):
    moved = []

    class Heard(torch.nn.Module):
        def to(self, device):
            moved.append(str(device))

    for words, expected in (
        (("--data.cache_prompts", "true"), ["cpu"]),  # they leave
        (("--data.cache_prompts", "false"), []),
    ):
        moved.clear()
        recipe = recipe_for(tiny_sdxl, tmp_path, *words)
        session = Session(recipe, *check_data(recipe), Process())
        session.teacher.pipe.text_encoder = Heard()
        session.teacher.drop_encoders(texts=session.recipe.data.cache_prompts)
        assert moved == expected
    with pytest.raises(RecipeError, match=r"^data\.encoder_device: cuda:9: "):
        execute(recipe_for(tiny_sdxl, tmp_path / "other", "--data.encoder_device", "cuda:9"))


def test_encoders_go_apart_after_the_stock_call_that_wants_them_together(
    tiny_sdxl, tmp_path, cache, monkeypatch
):
    """And have never been on the device before."""
    order = []
    for owner, name in (
        (sessions, "load_teacher"),
        (sessions.export, "rehearse_export"),
        (Session, "_encoders_to"),
        (sessions, "encode"),
    ):
        function = getattr(owner, name)

        def noted(*a, name=name, function=function, **k):
            order.append((name, k.get("encoder_device") or (a[1] if name == "_encoders_to" else None)))
            return function(*a, **k)

        monkeypatch.setattr(owner, name, noted)
    for kept in ("true", "false"):
        words = ("--data.cache_prompts", kept, "--data.encoder_device", "cpu")
        recipe = recipe_for(tiny_sdxl, tmp_path, *words)
        Session(recipe, *check_data(recipe), process := Process())
        beside, apart = ("_encoders_to", process.device), ("_encoders_to", "cpu")
        expected = [("load_teacher", "cpu"), beside, ("rehearse_export", None), apart, ("encode", None)]
        assert order == expected and process.device is not order[3][1]
        order.clear()


def test_the_vae_stays_where_references_are_encoded_beside_training(teachers, tmp_path, cache, monkeypatch):
    rows = [{"prompt": str(one), "reference": [str(path) for path in one.references]} for one in EDITS]
    (tmp_path / "edits.jsonl").write_text("\n".join(map(json.dumps, rows)))
    dropped = []
    monkeypatch.setattr(Teacher, "drop_encoders", lambda self, vae, texts: dropped.append((vae, texts)))
    words = (
        "--data.prompts",
        str(tmp_path / "edits.jsonl"),
        "--train.batch_size",
        "1",
        "--train.accumulate",
        "1",
    )
    words += ("--teacher.resolution", str(teachers("Qwen-Image-Edit").resolution))
    for kept, expected in (("false", (False, False)), ("true", (True, True))):
        recipe = tiny(
            "qwen_edit_dmd2_4step",
            teachers("Qwen-Image-Edit").source,
            tmp_path,
            *words,
            "--data.cache_prompts",
            kept,
        )
        Session(recipe, *check_data(recipe), Process())
        assert dropped.pop() == expected and not dropped


def test_the_hash_does_not_know_how_prompts_are_encoded(tiny_sdxl, tmp_path):
    words = ("--data.cache_prompts", "false", "--data.cache_gb", "3", "--data.encoder_device", "cpu")
    words = (*words, "--data.cache_images", "false")
    one, other = recipe_for(tiny_sdxl, tmp_path), recipe_for(tiny_sdxl, tmp_path, *words)
    assert recipes.digest(one) == recipes.digest(other)


# --------------------------------------------------------------------------------------------------------------- images
@pytest.fixture
def shards(tmp_path):
    """Two shards of eight pictures, the third of each of which is none; captions beside them."""
    folder = tmp_path / "shards"
    folder.mkdir()
    for number in range(2):
        with tarfile.open(folder / f"{number}.tar", "w") as file:
            for i in range(8):
                picture = io.BytesIO()
                Image.new("RGB", (40, 32), (30 * i, 90 * number, 200 - 20 * i)).save(picture, "PNG")
                content = b"none" if i == 2 else picture.getvalue()
                for suffix, data in (("png", content), ("txt", f"{i} of {number}".encode())):
                    member = tarfile.TarInfo(f"{i}.{suffix}")
                    member.size = len(data)
                    file.addfile(member, io.BytesIO(data))
    return folder


def images_of(shards):
    return load_images(str(shards), max_bad=0.2)


def test_latents_are_those_of_the_cache_but_for_the_draw(sdxl, shards, cache):
    live, kept = LiveImages(sdxl, images_of(shards)), encode_images(sdxl, images_of(shards), quiet=True)
    index = torch.tensor([1, 2, 9])
    one, other = live.rows(index), kept.rows(index)
    assert one["row"].tolist() == other["row"].tolist() == [1, 3, 9]  # the next one stands in
    assert one["latents"].shape == other["latents"].shape and len(live) == 16
    posterior = sdxl.pipe.vae.encode(pixels_of(sdxl, images_of(shards), [1, 3, 9])).latent_dist
    scale = sdxl.pipe.vae.config.scaling_factor
    for drawn in (one["latents"], other["latents"]):
        assert ((drawn / scale - posterior.mean) / posterior.std).abs().max() < 5
    assert live.rows(index)["latents"].equal(one["latents"])
    assert not live.rows(index.flip(0))["latents"].flip(0).equal(one["latents"])  # another draw
    (file,) = cache.rglob("left_out.jsonl")
    assert [json.loads(line)["record"] for line in file.read_text().splitlines()] == [2, 10]


def pixels_of(teacher, images, rows):
    pictures = torch.stack([torch.tensor(images.load(row, teacher.resolution)) for row in rows])
    return pictures.permute(0, 3, 1, 2) / 127.5 - 1


@pytest.mark.slow
@pytest.mark.parametrize("kept", [pytest.param("true", marks=pytest.mark.long), "false"])
def test_killed_in_the_middle_of_a_shard_a_run_ends_alike(tiny_sdxl, tmp_path, shards, cache, kept):
    ends = {}
    for name in ("straight", "killed"):
        folder = tmp_path / name
        folder.mkdir()
        words = ("--data.images", str(shards), "--data.max_bad", "0.2", "--train.batch_size", "3")
        words += ("--data.cache_images", kept, "--data.cache_prompts", kept, "--train.steps", "8")
        words += ("--train.checkpoint_every", "3", "--method.gan_time_range", "[0.02, 0.98]")
        recipe = tiny("sdxl_dmd2_4step", tiny_sdxl, folder, *words)
        if name == "killed":
            path = folder / "recipe.yaml"
            path.write_text(recipes.dump(recipe))
            run = command(["train", path], said=folder / "said.txt")
            end = time.monotonic() + 240
            while not (folder / "run" / "checkpoints" / "step_00000003").is_dir():
                assert run.poll() is None and time.monotonic() < end, (folder / "said.txt").read_text()
                time.sleep(0.01)
            run.kill()
            assert run.wait() == -9
            resume(folder / "run", [])
        else:
            execute(recipe)
        session = Session(recipe, *check_data(recipe), Process(), begun=True)
        assert isinstance(session.ahead.data.buckets[0].latents, LiveImages) == (kept == "false")
        assert session.trainer.restore() and session.trainer.progress.iteration == 8
        ends[name] = {n: w.clone() for n, w in session.roles["student"].weights.items()}
    assert all(value.equal(ends["killed"][name]) for name, value in ends["straight"].items())


def test_the_size_of_images_chooses_too_and_the_vae_stays_with_them(
    tiny_sdxl, tmp_path, shards, cache, capsys
):
    words = ("--data.images", str(shards), "--data.max_bad", "0.2", "--method.gan_time_range", "[0.02, 0.98]")
    recipe = tiny("sdxl_dmd2_4step", tiny_sdxl, tmp_path, *words, "--data.cache_gb", "0")
    session = Session(recipe, *check_data(recipe), Process())
    assert (
        isinstance(session.ahead.data.buckets[0].latents, LiveImages)
        and session.recipe.data.cache_images is False
    )
    assert "fewstep: note: images are encoded beside training" in capsys.readouterr().err
    assert not list(cache.rglob("*.safetensors"))
    batch = session.ahead.batch(0, 0)
    assert batch.real.shape[1:] == torch.Size(session.teacher.latent_shape)
    held = [plan(recipes.override(recipe, ["--data.cache_images", word])).held for word in ("false", "true")]
    vae = session.teacher.pipe.vae
    assert held[0] - held[1] == sum(4 * p.numel() for p in vae.parameters())


# ---------------------------------------------------------------------------------------------------- several processes
def test_each_process_encodes_its_share_and_all_find_the_whole(tiny_sd15, tmp_path, cache, monkeypatch):
    monkeypatch.setattr(store, "SHARD", 2)
    teacher, prompts = load_teacher(str(tiny_sd15)), [f"{i} cats" for i in range(7)]

    def work(process):
        seen = []
        encode = teacher.encode
        time.sleep(0.5 * process.rank)  # whose share is waited for, and not taken over
        teacher.encode = lambda texts: seen.extend(texts) or encode(texts)
        found = encode_prompts(teacher, prompts, quiet=True, process=process)
        return seen, found.rows(torch.arange(7))["embeds"].sum((1, 2)).tolist()

    (one, rows), (other, again) = together(2, work, tmp_path)
    assert sorted(one + other) == prompts and one == [*prompts[:2], *prompts[4:6]]
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "alone"))
    alone = encode_prompts(teacher, prompts, quiet=True)
    assert rows == again == alone.rows(torch.arange(7))["embeds"].sum((1, 2)).tolist()


def test_each_process_encodes_its_share_of_images_and_all_know_what_is_left_out(
    sdxl, shards, tmp_path, cache, monkeypatch
):
    monkeypatch.setattr(store, "SHARD", 4)

    def work(process):
        images, seen = images_of(shards), []
        encode = sdxl.latents
        monkeypatch.setattr(sdxl, "latents", lambda x, g: seen.append(len(x)) or encode(x, g))
        images.left_out.reasons.clear()  # what the look at some of them has found
        found = encode_images(sdxl, images, quiet=True, process=process)
        rows = found.rows(torch.arange(16))
        return seen, sorted(images.left_out.reasons), rows["row"].tolist(), rows["latents"].sum().item()

    (one, *rest), (other, *same) = together(2, work, tmp_path)
    assert one == other == [4, 4] and rest == same
    assert rest[0] == [2, 10] and rest[1] == [0, 1, 3, 3, *range(4, 10), 11, *range(11, 16)]
    (file,) = cache.rglob("left_out.jsonl")
    assert [json.loads(line)["record"] for line in file.read_text().splitlines()] in ([2, 10], [10, 2])
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "alone"))
    alone = encode_images(sdxl, images_of(shards), quiet=True).rows(torch.arange(16))
    assert alone["latents"].sum().item() == rest[2]


def test_nodes_with_disks_of_their_own_encode_what_they_lack(tiny_sd15, tmp_path, monkeypatch):
    monkeypatch.setattr(store, "SHARD", 2)
    teacher, prompts = load_teacher(str(tiny_sd15)), [f"{i} cats" for i in range(5)]

    def work(process):
        monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / f"node_{process.rank}"))
        return len(encode_prompts(teacher, prompts, quiet=True, process=process).rows(torch.arange(5)))

    assert together(2, work, tmp_path) == [1, 1]
    assert all(len(list((tmp_path / f"node_{n}").rglob("*.safetensors"))) == 3 for n in (0, 1))


def test_who_cannot_write_its_share_says_so_and_the_other_that_it_has_ended(tiny_sdxl, tmp_path, cache):
    """One line each, before anything of the run is there."""
    recipe = recipe_for(tiny_sdxl, tmp_path, "--data.cache_prompts", "true", "--train.device", "cpu")
    (tmp_path / "recipe.yaml").write_text(recipes.dump(recipe))
    (tmp_path / "taken").write_text("")
    said = [tmp_path / f"said_{n}.txt" for n in (0, 1)]
    with meeting(2) as places:
        places[1]["FEWSTEP_CACHE"] = str(tmp_path / "taken" / "cache")  # no folder can be there
        words = ["train", tmp_path / "recipe.yaml"]
        ranks = [command(words, said=one, env=env) for one, env in zip(said, places)]
        codes = [rank.wait(200) for rank in ranks]
    assert not (tmp_path / "run").exists()
    one, other = (text.read_text().splitlines()[-1] for text in said)
    assert codes == [5, 4] and "Traceback" not in "".join(text.read_text() for text in said)
    assert "another of the 2 processes has ended" in one and one.endswith("has not begun: start it again")
    assert "taken" in other


def test_who_is_slow_at_the_start_is_waited_for(tmp_path, monkeypatch):
    """By a group that waits for days, where that of the devices gives up after ten minutes or thirty."""
    wait = torch.distributed.barrier

    def work(process):
        seen = []
        monkeypatch.setattr(
            torch.distributed, "barrier", lambda group=None: seen.append(group) or wait(group=group)
        )
        process.barrier()
        (group,) = seen
        return group._get_backend(torch.device("cpu")).options._timeout.days

    assert together(2, work, tmp_path) == [7, 7]


# ------------------------------------------------------------------------------------------------------ what it takes
def test_the_space_of_very_many_is_told_by_a_part_of_them(teachers, cache, monkeypatch):
    teacher = teachers("Qwen-Image")
    prompts = [
        f"number {i} " + "word " * (i // 10) for i in range(70)
    ]  # the first ones say little of the rest
    whole = need_of_prompts(teacher, prompts, "prompts").size
    monkeypatch.setattr("fewstep.data.cache.TOLD_BY", 20)
    assert need_of_prompts(teacher, prompts, "prompts").size == pytest.approx(whole, rel=0.2)
    monkeypatch.setattr("fewstep.data.cache.TOLD_BY", 70)
    assert need_of_prompts(teacher, prompts, "prompts").size == whole


def test_a_plan_holds_the_encoders_that_stay(tiny_sdxl, tmp_path):
    kept, live, apart = (
        plan(recipe_for(tiny_sdxl, tmp_path, *words))
        for words in (
            (),
            ("--data.cache_prompts", "false"),
            ("--data.cache_prompts", "false", "--data.encoder_device", "cpu"),
        )
    )
    (encoders,) = [part for part in live.parts if part.name == "text encoders"]
    assert encoders.total == kept.leaving > 0 and live.leaving == apart.leaving == 0
    assert live.held == kept.held + kept.leaving and apart.held == kept.held
    assert "gone once prompts are encoded" in kept.text("h100-80gb")
    assert "gone once" not in live.text("h100-80gb") and "text encoders" in live.text("h100-80gb")
    count = {"prompts": {"bytes": 1_000_000_001}, "images": {"bytes": None}}
    for gb, whole in (("1", False), ("1.1", True)):
        recipe = recipe_for(tiny_sdxl, tmp_path, "--data.cache_gb", gb)
        assert cached(recipe, count) == whole and cached(recipe, count, "images")


def test_waits_are_counted_and_told_once():
    class Slow:
        waited = 5.0

    data = Slow()
    waits = Waits(data)
    assert waits.read(100.0) is None and waits.share == 0
    data.waited = 20.0
    assert waits.read(150.0) is None and waits.share == pytest.approx(0.3)  # too soon to tell
    assert waits.read(200.0) is None and waits.share == pytest.approx(0.15)  # not much
    data.waited = 45.0
    assert "warning: 40% of the time training waits for its data" in waits.read(200.0)
    assert waits.read(300.0) is None and waits.share == pytest.approx(0.2)
    data.waited = 200.0
    assert waits.read(400.0) is None  # said already


def test_what_is_ahead_is_waited_for_where_it_is_not_there():
    class Data:
        rows: ClassVar = {}

        def batch(self, iteration, micro):
            time.sleep(0.05)
            return iteration, micro

    ahead = Ahead(Data())
    assert ahead.batch(0, 0) == (0, 0) and ahead.waited >= 0.05
    ahead.settle()
    before = ahead.waited
    assert ahead.batch(1, 0) == (1, 0) and ahead.waited - before < 0.03


def test_prompts_that_lose_their_end_are_told_of(teachers, capfd, monkeypatch):
    monkeypatch.setattr("fewstep.data.cache.TOLD_BY", 3)
    Live(teachers("SD 1.5"), ["long " * 200] * 9, quiet=False)
    assert "fewstep: note: 3 of 3 prompts are longer than the 77 tokens" in capfd.readouterr().err
    Live(teachers("SD 1.5"), ["long " * 200] * 9)
    assert not capfd.readouterr().err
