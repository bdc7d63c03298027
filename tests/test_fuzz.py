"""Input that nobody would write by hand: it is read, or refused by name, and never ends in a traceback."""

import io
import json
import shutil
import zipfile

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from tries import refused_or_good

from fewstep import recipe as recipes
from fewstep.data.images import load_images
from fewstep.evaluation.images import open_images
from fewstep.evaluation.models import _attach_lora
from fewstep.evaluation.statistics import Statistics
from fewstep.export.load import read_record
from fewstep.runs.library import load_recipe, recipe_files


def fuzz(examples=60):
    """The same inputs every time."""
    checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    return settings(deadline=None, derandomize=True, max_examples=examples, suppress_health_check=checks)


JUNK = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=9), st.just([]), st.just({}),
    st.lists(st.integers(), max_size=3), st.dictionaries(st.text(max_size=5), st.integers(), max_size=2),
    st.sampled_from([-1, 0, 10**30, "1e-4", "../../etc/passwd", "$(id)", "{{", "!!python/object:os.system", [[[]]]]),
)  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- recipes
PLAIN = {name: recipes.to_dict(load_recipe(name)) for name in recipe_files()}


def places(data, path=()):
    """Every field of a recipe as a path, the inner ones too."""
    for key, value in data.items():
        yield (*path, key)
        if isinstance(value, dict):
            yield from places(value, (*path, key))


@st.composite
def changed(draw):
    """A shipped recipe in which a field has another value, is missing, or is new."""
    data = json.loads(json.dumps(PLAIN[draw(st.sampled_from(sorted(PLAIN)))]))
    path = draw(st.sampled_from(sorted(places(data), key=str)))
    inner = data
    for key in path[:-1]:
        inner = inner[key]
    how = draw(st.sampled_from(["value", "value", "value", "gone", "new"]))
    if how == "gone":
        del inner[path[-1]]
    elif how == "new":
        path = (*path[:-1], draw(st.text(min_size=1, max_size=9)))
        inner[path[-1]] = draw(JUNK)
    else:
        inner[path[-1]] = draw(JUNK)
    return path, data


@fuzz(150)
@given(changed())
def test_a_recipe_is_valid_or_refused_by_name(tally, case):
    path, data = case
    with refused_or_good(tally) as message:
        made = recipes.from_dict(data)
        # What is accepted can be written, read back and described.
        assert recipes.from_dict(yaml.safe_load(recipes.dump(made))) == made or "nan" in recipes.dump(made)
        assert recipes.digest(made)
    if message:
        assert any(str(key) in message[0] for key in path), message


@fuzz()
@given(st.one_of(st.binary(max_size=200), st.text(max_size=200).map(lambda t: t.encode("utf-8", "ignore"))))
@example(b"!!python/object/apply:os.system ['touch /tmp/pwned']")
@example(b"a: &a [*a, *a]")
@example(b"\xff\xfe")
@example(b"")
def test_a_recipe_file_of_any_bytes(tally, tmp_path, content):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    with refused_or_good(tally) as message:
        recipes.load(path)
    assert message


@fuzz()
@given(
    st.lists(
        st.one_of(
            st.text(max_size=12), st.sampled_from(["--train.steps", "--student.lr", "--x=", "--=", "--"])
        )
    )
)
def test_any_words_on_the_command_line(tally, words):
    with refused_or_good(tally):
        recipes.override(load_recipe("emoji_dmd2_1step"), words)


@pytest.mark.parametrize("name", recipe_files())
def test_every_shipped_recipe_is_valid(name, tally):
    with refused_or_good(tally) as message:
        recipes.from_dict(PLAIN[name])
    assert not message


# -------------------------------------------------------------------------------------------------------------- images
def encoded(format, mode="RGB"):
    buffer = io.BytesIO()
    Image.effect_noise((24, 20), 80).convert(mode).save(buffer, format)
    return buffer.getvalue()


FORMATS = {"png": encoded("PNG"), "jpg": encoded("JPEG"), "webp": encoded("WEBP"), "bmp": encoded("BMP")}


@st.composite
def broken_file(draw, contents):
    """(suffix, bytes): cut short, with flipped bytes, of another kind than its name says, empty, or noise."""
    suffix, other = draw(st.sampled_from(sorted(contents))), draw(st.sampled_from(sorted(contents)))
    data = bytearray(contents[other if draw(st.booleans()) else suffix])
    how = draw(st.sampled_from(["cut", "flip", "as it is", "empty", "noise", "longer"]))
    if how == "cut":
        del data[draw(st.integers(0, len(data))) :]
    elif how == "flip":
        for place in draw(st.lists(st.integers(0, len(data) - 1), min_size=1, max_size=8)):
            data[place] ^= 1 << draw(st.integers(0, 7))
    elif how == "empty":
        data.clear()
    elif how == "noise":
        data = bytearray(draw(st.binary(max_size=99)))
    elif how == "longer":
        data += draw(st.binary(max_size=99))
    return suffix, bytes(data)


@fuzz(100)
@given(broken_file(FORMATS))
def test_an_image_file_of_any_bytes(tally, tmp_path, case):
    suffix, data = case
    folder = tmp_path / "images"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / "good.png").write_bytes(FORMATS["png"])
    (folder / f"odd.{suffix}").write_bytes(data)
    for name in ("good", "odd"):
        (folder / f"{name}.txt").write_text("a caption")
    with refused_or_good(tally) as message:
        images = load_images(str(folder))
        assert all(images.load(i, 16).shape == (16, 16, 3) for i in range(2))
    assert not message or "odd" in message[0]
    with refused_or_good(tally) as message:
        assert all(batch.dtype == torch.uint8 for batch in open_images(folder).batches(8))
    assert not message or "odd" in message[0]


def test_an_image_bomb_is_refused_before_it_is_decoded(tmp_path, tally, monkeypatch):
    Image.new("1", (20_000, 20_000)).save(tmp_path / "bomb.png")
    (tmp_path / "bomb.txt").write_text("boom")
    monkeypatch.setattr(Image.Image, "convert", lambda *_: pytest.fail("decoded"))
    for read in (load_images, open_images):
        with refused_or_good(tally) as message:
            read(str(tmp_path))
        assert "bomb.png" in message[0]


# ---------------------------------------------------------------------------------------------- statistics and weights
def statistics():
    buffer = io.BytesIO()
    meta = np.array(json.dumps({"extractor": "x", "n": 9}))
    np.savez(buffer, mu=np.zeros(3), sigma=np.eye(3), meta=meta)
    return buffer.getvalue()


@fuzz(120)
@given(broken_file({"npz": statistics(), "zip": FORMATS["png"]}))
def test_a_statistics_file_of_any_bytes(tally, tmp_path, case):
    path = tmp_path / "s.npz"
    path.write_bytes(case[1])
    with refused_or_good(tally) as message:
        found = Statistics.load(path)
        assert found.mu.isfinite().all() and found.sigma.shape == (len(found.mu),) * 2
    assert not message or str(path) in message[0]


@pytest.mark.parametrize("meta", ['"text"', "[1]", "{", '{"n": "many"}', "null", '{"n": 1e999}'])
def test_statistics_with_odd_descriptions(tally, tmp_path, meta):
    np.savez(tmp_path / "s.npz", mu=np.zeros(2), sigma=np.eye(2), meta=np.array(meta))
    with refused_or_good(tally) as message:
        Statistics.load(tmp_path / "s.npz")
    assert message


def test_statistics_that_would_run_code_or_leave_their_folder(tally, tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "pwned"), "w"))

    np.savez(tmp_path / "p.npz", mu=np.array([Evil()], dtype=object), sigma=np.eye(1))
    with zipfile.ZipFile(tmp_path / "z.npz", "w") as archive:
        archive.writestr("../../pwned", b"x")
    for name in ("p.npz", "z.npz"):
        with refused_or_good(tally) as message:
            Statistics.load(tmp_path / name)
        assert message and not (tmp_path / "pwned").exists()


RECORD = {
    "kind": "lora", "num_steps": 1, "call": {"num_inference_steps": 1}, "scheduler": "LCMScheduler", "noise": "fresh",
    "teacher": "builtin:emoji-xl", "timesteps": [799], "latent_shape": [4, 8, 8],
}  # fmt: skip


@fuzz()
@given(st.sampled_from(sorted(RECORD)), JUNK)
@example("scheduler", "utils.export_to_gif")
def test_a_record_of_an_export_with_any_value(tally, tmp_path, key, value):
    (tmp_path / "fewstep.json").write_text(json.dumps({**RECORD, key: value}))
    with refused_or_good(tally) as message:
        assert read_record(tmp_path)["scheduler"].endswith("Scheduler")
    assert not message or "fewstep.json" in message[0]


@pytest.mark.parametrize("name", ["../../secret", "/etc", "a/b", "..", ""])
def test_an_export_cannot_name_folders_outside_of_it(tally, tmp_path, name):
    (tmp_path / "fewstep.json").write_text(json.dumps({**RECORD, "experts": [name]}))
    with refused_or_good(tally) as message:
        read_record(tmp_path)
    assert message


@pytest.fixture(scope="module")
def pipe(tiny_sd15):
    from fewstep.teachers import load_pipeline

    return load_pipeline(str(tiny_sd15))


LAYER = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"


@fuzz(40)
@given(data=st.data())
def test_a_lora_file_of_any_bytes(tally, tmp_path, pipe, data):
    from safetensors.torch import save

    size, rank = pipe.unet.get_submodule(LAYER).weight.shape, 2
    good = {"lora_A": torch.ones(rank, size[1]), "lora_B": torch.ones(size[0], rank)}
    good = save({f"unet.{LAYER}.{name}.weight": value for name, value in good.items()})
    path = tmp_path / "lora.safetensors"
    path.write_bytes(data.draw(broken_file({"safetensors": good}))[1])
    with refused_or_good(tally) as message:
        _attach_lora(pipe, path)
        pipe.unload_lora_weights()
    assert not message or str(path) in message[0]
    path.with_suffix(".bin").write_bytes(good)
    with refused_or_good(tally) as message:
        _attach_lora(pipe, path.with_suffix(".bin"))
    assert "pickled files can run code" in message[0]
