"""Prompts beyond a text encoder's tokens: one line with how many, the longest and where, whatever the pipeline."""

import logging

import pytest
from zoo import ZOO

from fewstep.data.cache import encode_prompts
from fewstep.evaluation.models import open_model
from fewstep.evaluation.prompts import Prompts
from fewstep.evaluation.sampling import Job, sample_folder
from fewstep.teachers import load_teacher
from fewstep.teachers.lengths import limits, too_long

LIMITS = {
    "SD 1.5": {"tokenizer": 77},
    "SDXL": {"tokenizer": 77, "tokenizer_2": 77},
    "SD 3": {"tokenizer": 77, "tokenizer_2": 77},
    "FLUX.1-dev": {"tokenizer": 77, "tokenizer_2": 512},
    "Qwen-Image-Edit": {},  # reads all of it
    "Qwen-Image-2.1": {},  # as well
    "Qwen-Image": {"tokenizer": 512 - 5},  # the rest is the template's
    "Z-Image": {"tokenizer": 512 - 8},
    "Chroma": {"tokenizer": 512},
    "Lumina 2": {"tokenizer": 256 - 164},  # the rest is the system prompt
    "FLUX.2-klein": {"tokenizer": 512 - 8},
    "FLUX.2-dev": {"tokenizer": 512 - 177},  # the system's message letter by letter
    "Krea-2": {"tokenizer": 512 - 5},
    "HiDream": dict.fromkeys(("tokenizer", "tokenizer_2", "tokenizer_3", "tokenizer_4"), 128),
    "SANA": {"tokenizer": 300},
    "PixArt-Sigma": {"tokenizer": 300},
    "PixArt-alpha": {"tokenizer": 120},
    "DiT": {},
    "UNet2D": {},
}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def heard():
    """What the libraries say of the ends of prompts."""
    lines, handler = [], logging.Handler()
    handler.emit = lambda record: (
        lines.append(record.getMessage()) if "token" in record.getMessage() else None
    )
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers")]
    for logger in loggers:
        logger.addHandler(handler)
    yield lines
    for logger in loggers:
        logger.removeHandler(handler)


def test_the_libraries_do_say_it(teachers, heard):
    teachers("SDXL").encode(["long " * 40])
    assert heard  # else what follows would hold of anything


@pytest.mark.parametrize("name", LIMITS)
def test_limits_are_those_at_which_conditions_stop_to_change(name, teachers, capfd):
    teacher = teachers(name)
    assert limits(teacher.pipe) == LIMITS[name]
    if not LIMITS[name]:
        assert too_long(teacher.pipe, [*ZOO[name].prompts]) is None
        return
    most = max(LIMITS[name].values())
    counting = [getattr(teacher.pipe, n) for n, limit in LIMITS[name].items() if limit == most]
    counting = [getattr(one, "tokenizer", one) for one in counting]
    # Special tokens; one more letter is one more token.
    extra = max(len(one("b", truncation=False)["input_ids"]) - 1 for one in counting)
    fits, cut = "b" * (most - extra), "b" * (most - extra + 1)
    assert f"the {most} tokens" not in (too_long(teacher.pipe, [fits]) or "")
    assert f"1 of 3 prompts are longer than the {most} tokens" in too_long(teacher.pipe, ["a", cut, fits])
    if name in ("Qwen-Image", "Z-Image", "Krea-2", "Lumina 2"):  # all tokens are taken, and no more
        taken = teacher.encode([cut])["mask"].shape[1]
        counts = [int(teacher.encode([text])["mask"].sum()) for text in (fits[:-1], fits, cut)]
        assert counts == [taken - 1, taken, taken] and taken in (256, 512)
    if name in ("SD 1.5", "SDXL", "SD 3", "HiDream"):  # what is beyond the limit is not seen by the network
        one, other = teacher.encode([cut + "x"]), teacher.encode([cut + "yyy"])
        assert one["embeds"].equal(other["embeds"])
        assert not teacher.encode([fits[:-1] + "x"])["embeds"].equal(teacher.encode([fits])["embeds"])
    capfd.readouterr()


def test_tokenizers_of_one_limit_that_count_otherwise_are_named_apart(teachers):
    """A letter of two bytes is one token of T5, which knows none such, and two of CLIP's and Llama's."""
    said = too_long(teachers("HiDream").pipe, ["\u00e9" * 100])
    assert "tokenizer and tokenizer_2 take, " in said and "tokenizer_4 takes, " in said
    assert "tokenizer_3" not in said and "has 202: " in said and "has 201: " in said


@pytest.mark.parametrize("name", ["SD 1.5", "SDXL", "SD 3", "FLUX.1-dev", "SANA", "PixArt-Sigma"])
def test_many_long_prompts_are_one_line(name, teachers, cache, capfd, heard):
    teacher = load_teacher(teachers(name).source, resolution=ZOO[name].resolution)
    prompts = [f"{i} " + "long " * 200 for i in range(40)] + ["x" * 2000, "short"]
    capfd.readouterr()
    encode_prompts(teacher, prompts)
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("fewstep: note: ")]
    assert len(said) == 1 and len(said[0]) < 700 and not heard, said
    assert "41 of 42 prompts" in said[0] and "number 41, has 20" in said[0] and "xxx..." in said[0]
    encode_prompts(teacher, prompts)  # they are there
    assert "longer" not in capfd.readouterr().err


def test_prompts_that_fit_are_not_spoken_of(teachers, cache, capfd):
    encode_prompts(teachers("SDXL"), ["a cat"])
    assert "prompts are" not in capfd.readouterr().err


def test_generation_says_it_once_too(tiny_sd15, tmp_path, capfd, heard):
    model = open_model(str(tiny_sd15))
    capfd.readouterr()
    prompts = Prompts(tuple(f"{i} " + "long " * 40 for i in range(4)))
    job = Job(1, "ddim")
    sample_folder(model, prompts, job, tmp_path / "out", batch_size=1, speed_runs=0)
    said = capfd.readouterr().err
    assert not heard and said.count("4 of 4 prompts are longer than the 77 tokens") == 1
    sample_folder(model, prompts, job, tmp_path / "two", batch_size=1, speed_runs=0, rank=1, world=2)
    assert "prompts are" not in capfd.readouterr().err  # the first process says it for all
