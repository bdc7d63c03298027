"""Runs on a frozen base in fewer bits or in the host's memory: they end as others, and say what they stand on."""

import importlib.util
import json

import pytest
from safetensors.torch import load_file
from test_end_to_end import tiny

from fewstep import device
from fewstep.errors import RecipeError, TrainingError
from fewstep.export import verify
from fewstep.runs import session as sessions
from fewstep.runs.session import execute, reexport, resume
from fewstep.teachers import load_teacher

KIND = "nf4" if importlib.util.find_spec("bitsandbytes") else "int8"


def weights(folder):
    return load_file(folder / "export" / "pytorch_lora_weights.safetensors")


@pytest.mark.slow
def test_a_run_with_its_blocks_in_the_hosts_memory_ends_with_the_same_bits(tiny_sdxl, tmp_path):
    for name in ("plain", "off"):
        (tmp_path / name).mkdir()
    words = ("--teacher.gradient_checkpointing", "true")
    plain = execute(tiny("sdxl_dmd2_4step_24gb", tiny_sdxl, tmp_path / "plain", *words))
    off = tiny("sdxl_dmd2_4step_24gb", tiny_sdxl, tmp_path / "off", *words, "--teacher.offload", "true",
               "--data.encoder_device", "cpu")  # fmt: skip
    one, other = weights(plain), weights(execute(off))
    assert one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)
    record = json.loads((tmp_path / "off" / "run" / "export" / "fewstep.json").read_text())
    assert "trained_on" not in record


@pytest.fixture(scope="module")
def rounded(tiny_sdxl, tmp_path_factory):
    folder = tmp_path_factory.mktemp("rounded")
    return execute(tiny("sdxl_dmd2_4step_24gb", tiny_sdxl, folder, "--teacher.quantization", KIND))


@pytest.mark.slow
def test_a_student_of_a_base_in_fewer_bits_says_so_and_how_far_it_is_on_the_whole_one(rounded, tiny_sdxl):
    record = json.loads((rounded / "export" / "fewstep.json").read_text())
    told = record["trained_on"]
    assert told["quantization"] == KIND and 1e-3 < told["difference"] < 1
    card = (rounded / "export" / "README.md").read_text()
    assert (
        f"The base was in {KIND} while it was trained" in card
        and f"{told['difference']:.2g} of their spread" in card
    )


@pytest.mark.slow
def test_the_comparison_of_an_export_is_on_the_base_that_it_was_trained_on(rounded, tiny_sdxl, monkeypatch):
    """On the whole base it would see the rounding of the base."""
    monkeypatch.setattr(sessions.export, "verify", lambda *args: verify(*args[:-1]))  # without the bits
    with pytest.raises(TrainingError, match="stock diffusers is off the trainer's own sample"):
        reexport(rounded)
    monkeypatch.undo()
    before = weights(rounded)
    reexport(rounded)
    assert all(before[name].equal(value) for name, value in weights(rounded).items())


@pytest.mark.slow
def test_a_run_on_a_base_in_fewer_bits_goes_on_exactly(rounded, tiny_sdxl, tmp_path):
    half = tiny("sdxl_dmd2_4step_24gb", tiny_sdxl, tmp_path, "--teacher.quantization", KIND)
    half.train.steps = 2
    folder = execute(half)
    resume(folder, ["--train.steps", "4"])
    again = weights(folder)
    assert all(again[name].equal(value) for name, value in weights(rounded).items())


@pytest.mark.slow
def test_where_a_card_has_no_room_for_two_pipelines_the_export_is_compared_on_the_cpu(
    rounded, monkeypatch, capsys
):
    monkeypatch.setattr(sessions, "total", lambda _: 1000)
    reexport(rounded)
    assert "compared on the CPU" in capsys.readouterr().out
    assert device.total(device.choose("cpu")) is None


def test_what_has_no_use_for_such_a_base_is_refused_before_anything_is_loaded(
    tiny_sdxl, tmp_path, monkeypatch
):
    monkeypatch.setattr(sessions, "load_teacher", lambda *_, **__: pytest.fail("loaded"))
    for words, told in (
        (("--critic.kind", "full"), r"^roles\.critic\.kind: full: .*expected lora"),
        (("--teacher.compile", "true"), r"^teacher\.compile: true: .*teacher\.quantization: int8"),
    ):
        recipe = tiny("sdxl_dmd2_4step_24gb", tiny_sdxl, tmp_path, "--teacher.quantization", "int8", *words)
        with pytest.raises(RecipeError, match=told):
            execute(recipe)
    with pytest.raises(
        RecipeError, match=r"^teacher\.quantization: 'int3': input should be 'int8', 'fp8' or 'nf4'"
    ):
        tiny("sdxl_dmd2_4step_24gb", tiny_sdxl, tmp_path, "--teacher.quantization", "int3")


def test_pairs_of_a_teacher_are_those_of_its_rounded_self(tiny_sdxl):
    from fewstep.data.pairs import made_by

    whole, fewer = load_teacher(str(tiny_sdxl)), load_teacher(str(tiny_sdxl), quantization="int8")
    assert made_by(whole, 1.0) == made_by(fewer, 1.0)
