"""Encoded prompts are kept without their padding, and come back with it."""

import os
import time
from types import SimpleNamespace

import pytest
import torch
from processes import Fork
from safetensors.torch import load_file
from zoo import EDITS, ZOO

from fewstep.data import cache, store
from fewstep.data.batches import Batches
from fewstep.data.cache import encode_prompts, identity, need_of_prompts, prompts_folder
from fewstep.data.store import Store
from fewstep.diffusion.cond import Cond
from fewstep.teachers.origin import Origin

TEXTS = ["a cat", "a much longer prompt about a dog on a skateboard", "", "x" * 900, "a red apple"]
PADDED = ["Qwen-Image", "Z-Image", "Krea-2", "Qwen-Image-Edit", "Qwen-Image-2.1"]


@pytest.fixture(autouse=True)
def small_files(tmp_path, monkeypatch):
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path))
    monkeypatch.setattr(store, "SHARD", 3)


def written(folder):
    return sum(value.nbytes for path in folder.iterdir() for value in load_file(path).values())


def bits(value):
    return value.contiguous().view(-1).view(torch.uint8)


@pytest.mark.parametrize("name", PADDED)
def test_batches_of_mixed_lengths_are_those_of_padded_rows(name, teachers, monkeypatch):
    teacher = teachers(name)
    prompts = list(EDITS) if ZOO[name].prompts is EDITS else TEXTS
    together = [prompts[0:2], prompts[2:3], prompts[3:5]]  # by files of three and batches of two, see below
    whole = Cond.cat(*(teacher.encode(texts) for texts in together if texts))
    needed = need_of_prompts(teacher, prompts, "prompts").size
    one = encode_prompts(teacher, prompts, batch_size=2, quiet=True)
    assert need_of_prompts(teacher, prompts, "prompts").size == 0
    monkeypatch.setattr(store, "IN_MEMORY", 0)
    two = encode_prompts(teacher, prompts, quiet=True)
    assert one.in_memory and not two.in_memory
    for kept in (one, two):
        data = Batches(kept, teacher.latent_shape, batch_size=len(prompts))
        batch = data.batch(0, 0)
        assert batch.cond.tensors.keys() == whole.tensors.keys()
        for key, value in batch.cond.tensors.items():
            assert bits(value).equal(bits(whole[key][batch.index])), key
    padded = sum(value.nbytes for value in whole.tensors.values())
    assert written(one.folder) <= needed
    assert needed < (padded if prompts is TEXTS else 1.1 * padded)
    if prompts is TEXTS:
        assert written(one.folder) > 0.98 * needed  # not far above, or runs would be refused that have room
        assert written(one.folder) < 0.5 * padded


def test_a_cut_goes_on_to_the_same_bytes(teachers):
    teacher = teachers("Z-Image")
    folder = encode_prompts(teacher, TEXTS, quiet=True).folder
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert len(before) == 2
    store.shard_path(folder, 3).unlink()
    needed = need_of_prompts(teacher, TEXTS, "prompts").size
    encode_prompts(teacher, TEXTS, quiet=True)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert sum(v.nbytes for v in load_file(store.shard_path(folder, 3)).values()) <= needed


def test_another_layout_lies_elsewhere_and_is_made_anew(teachers, monkeypatch):
    teacher = teachers("Z-Image")
    with monkeypatch.context() as patch:
        patch.setattr(cache, "LAYOUT", "as it once was")
        old = prompts_folder(teacher, TEXTS)
    encoded = encode_prompts(teacher, TEXTS, quiet=True)
    assert encoded.folder != old and not old.exists()


def test_what_ends_in_no_zeros_is_kept_as_it_is_and_minus_zero_is_none():
    rows = {
        "whole": torch.ones(2, 3, 2),
        "minus": torch.tensor([[[1.0], [-0.0]], [[0.0], [0.0]]]),
        "inner": torch.tensor([[0, 1, 0], [0, 0, 0]]),
        "numbers": torch.zeros(2),
    }
    found = store.joined([store.without_padding({n: v[i : i + 1] for n, v in rows.items()}) for i in (0, 1)])
    assert found["whole"].equal(rows["whole"]) and found["numbers"].equal(rows["numbers"])
    assert found["minus"].shape == (2, 1) and found["minus" + store.KEPT].tolist() == [[2, 2], [0, 2]]
    assert found["inner"].tolist() == [0, 1] and found["inner" + store.KEPT].tolist() == [[2, 3], [0, 3]]
    assert found.keys() == {*rows, "minus" + store.KEPT, "inner" + store.KEPT}


def test_runs_that_encode_the_same_at_once_and_one_that_is_killed_leave_whole_files(teachers, tmp_path):
    """Independent commands on one folder, as on a file system that nodes share: none waits for another."""
    teacher, texts = teachers("SD 1.5"), [f"{i} cats" for i in range(12)]
    folder, encode = prompts_folder(teacher, texts), teacher.encode

    def slow(prompts):
        time.sleep(0.05)
        return encode(prompts)

    def write():
        teacher.encode = slow
        found = encode_prompts(teacher, texts, batch_size=1, quiet=True)
        (tmp_path / f"{os.getpid()}.sum").write_text(str(found.rows(torch.arange(12))["embeds"].sum().item()))

    def read():
        """Whatever is there is whole at every moment; done when all of it is."""
        while len(files := sorted(folder.glob("[!.]*.safetensors"))) < 4:
            for file in files:
                assert len(load_file(file)) > 0
        assert len(Store(folder, 12).rows(torch.arange(12))["embeds"]) == 12

    folder.mkdir(parents=True)
    readers, writers = [Fork(read) for _ in range(2)], [Fork(write) for _ in range(3)]
    while not list(folder.glob("[!.]*.safetensors")):
        time.sleep(0.002)
    writers[0].kill()
    assert [one.wait(120) for one in writers] == [-9, 0, 0] and [one.wait(60) for one in readers] == [0, 0]
    sums = {path.read_text() for path in tmp_path.glob("*.sum")}
    alone = torch.cat([encode([text])["embeds"] for text in texts]).sum().item()
    assert len(sums) == 1 and float(sums.pop()) == pytest.approx(alone, rel=1e-4)
    encode_prompts(teacher, texts, quiet=True)  # which sweeps what the killed one left
    assert len(list(folder.iterdir())) == 4


def test_a_cache_is_of_a_variant_and_of_a_configuration_where_its_files_lie(tmp_path):
    for place in ("teacher", "one/unet", "one/vae", "other/unet", "other/vae"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "config.json").write_text("{}")
        os.utime(tmp_path / place / "config.json", (0, 0))  # files that differ in nothing but their place
    (tmp_path / "teacher" / "model_index.json").write_text("{}")
    source = str(tmp_path / "teacher")

    def known(**options):
        return identity(SimpleNamespace(source=source, origin=Origin.of(source, **options)))

    kinds = [known(), known(variant="fp16")]
    kinds += [known(config=str(tmp_path / name)) for name in ("one", "other")]
    (tmp_path / "one" / "vae").rename(tmp_path / "one" / "vae_2")
    kinds.append(known(config=str(tmp_path / "one")))
    assert all(one not in kinds[:k] for k, one in enumerate(kinds))
    assert known(variant="fp16") == kinds[1]
