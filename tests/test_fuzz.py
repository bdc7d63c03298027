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
from tries import nothing_lost, refused_or_good, tried

from fewstep import recipe as recipes
from fewstep.data.images import load_images
from fewstep.evaluation.evaluate import evaluate_images
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


# ------------------------------------------------------------------------------------------------------ the evaluator
def mean_colour(pixels):
    return pixels.float().mean((1, 2))


def not_an_extractor(pixels):
    raise ZeroDivisionError("a fault of its own")


OWN = ("--extractor", f"{__name__}:mean_colour")
MEASURED = ("--kid", "--prdc", "--vendi", "--is", "--fd-inf", "--patch-fd")


def pictures(count, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, 20, 16, 3)).astype(np.uint8)


def picture_folder(folder, count, seed=0):
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(pictures(count, seed)):
        Image.fromarray(image).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Folders of 1 to 6 images and their captions, and what else there may be of images."""
    place = tmp_path_factory.mktemp("sets")
    for n in range(1, 7):
        picture_folder(place / f"real{n}", n)
        picture_folder(place / f"fake{n}", n, seed=1)
        (place / f"{n}.txt").write_text("\n".join(f"thing {i}" for i in range(n)))
    np.savez(place / "images.npz", images=pictures(5))
    good = {"extractor": OWN[1], "weights_sha256": "undeclared", "resize": "undeclared", "n": 9}
    for name, meta in {
        "own": good,
        "other": {**good, "resize": "r"},
        "lying": {**good, "dim": 7},
        "none": None,
    }.items():
        described = {} if meta is None else {"meta": np.array(json.dumps(meta))}
        np.savez(place / f"{name}.npz", mu=np.zeros(3), sigma=np.eye(3), **described)
    np.savez(place / "wide.npz", mu=np.zeros(4), sigma=np.eye(4))
    np.savez(place / "both.npz", mu=np.zeros(3), sigma=np.eye(3), arr_0=pictures(2))
    with zipfile.ZipFile(place / "images.zip", "w") as archive:
        for file in (place / "fake6").iterdir():
            archive.write(file, f"a/{file.name}")
    (place / "text.yaml").write_text("hello")
    return place


@pytest.mark.parametrize("n", range(1, 7))
@pytest.mark.parametrize("flag", [*MEASURED, "all"])
def test_a_few_images_have_a_distance_whatever_else_they_lack(tally, sets, n, flag):
    """What cannot be had of them is named, before the network runs, and never costs the distance."""
    flags = MEASURED if flag == "all" else (flag,)
    for real, fake in ((n, 6), (6, n)):
        code, said = tried(tally, "eval", "fid", sets / f"real{real}", sets / f"fake{fake}", *OWN, *flags)
        assert code == (2 if n == 1 and flag != "--vendi" and flag != "all" else 0), said
        assert ("FD(" in said) == (n > 1)
        least = {"--kid": 3, "--prdc": 6, "--fd-inf": 8, "--patch-fd": 99}
        for name in (name for name in flags if name in least and min(n, 6) < least[name]):
            assert f"{name[2:].replace('fd-inf', 'fd_inf')}: it " in said


@pytest.mark.parametrize("n", range(1, 7))
def test_a_few_images_and_their_prompts(tally, sets, n):
    for per_prompt in range(5):
        words = ("--per-prompt", per_prompt)
        code, said = tried(tally, "eval", "diversity", sets / f"fake{n}", *words, *OWN)
        assert (code == 0) == (per_prompt > 1 and n % per_prompt == 0 and n >= 2 * per_prompt), said
        code, _ = tried(
            tally, "eval", "diversity", sets / f"fake{n}", *words, *OWN, "--against", sets / "real6"
        )
        assert code == 2 or n == 6
    for lines in range(1, 7):
        code, said = tried(
            tally,
            "eval",
            "scores",
            sets / f"fake{n}",
            "--prompts",
            sets / f"{lines}.txt",
            "--scorer",
            "clip:no/where",
        )
        assert code == 2 and ("as many" in said or f"expected {lines}" in said) == (lines != n), said


STATISTICS = ("own", "other", "lying", "none", "wide", "both")


@pytest.mark.parametrize("name", STATISTICS)
@pytest.mark.parametrize("flag", ["--kid", "--is", "--fd-inf", "--patch-fd", "--declared"])
def test_statistics_of_every_origin(tally, sets, name, flag, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "fewstep.evaluation.measures.extract", lambda *a, **k: seen.append(a) or pytest.fail("ran")
    )
    if (name, flag) in (("none", "--declared"), ("both", "--declared")) or name == "own":
        monkeypatch.undo()
    code, said = tried(tally, "eval", "fid", sets / f"{name}.npz", sets / "fake6", *OWN, flag)
    good = (name == "own" and flag != "--declared") or (name in ("none", "both") and flag == "--declared")
    assert code == (0 if good else 2) and not seen, said
    assert tried(tally, "eval", "stats", sets / f"{name}.npz", "-o", sets / "new.npz", *OWN)[0] == 2


def test_two_statistics_are_called_what_made_them(tally, sets):
    code, said = tried(tally, "eval", "fid", sets / "own.npz", sets / "own.npz/../own.npz")
    assert code == 2  # one file twice
    (sets / "copy.npz").write_bytes((sets / "own.npz").read_bytes())
    code, said = tried(tally, "eval", "fid", sets / "own.npz", sets / "copy.npz")
    assert code == 0 and f"FD({OWN[1]})" in said and "effnet" not in said
    code, said = tried(tally, "eval", "fid", sets / "own.npz", sets / "other.npz")
    assert code == 2 and "resize" in said


DEVICES = (
    "gpu", "cuda", "cuda:0", "cuda:7", "cuda:-1", "cuda:" + "9" * 20, "cuda:", "cuda:x", "CUDA", "mps", "xpu", "hip",
    "xla", "meta", "tpu", "", " ", "0", "cpu,cuda", "../x", "privateuseone", "vulkan",
)  # fmt: skip


@pytest.mark.parametrize("name", DEVICES)
def test_devices_that_are_none_or_not_here(tally, sets, name, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: None)
    for words in (("fid", sets / "real6", sets / "fake6"), ("stats", sets / "real6", "-o", sets / "d.npz")):
        code, said = tried(tally, "eval", *words, *OWN, "--device", name)
        assert code == 2 and "--device" in said and len(said.splitlines()) == 1, said
    with refused_or_good(tally) as message:
        evaluate_images(pictures(4), pictures(4, 1), extractor=OWN[1], device=name)
    assert message and message[0].startswith("device: ")


NUMBERS = st.one_of(
    st.integers(-3, 9), st.sampled_from(["x", "", "1e3", "0.5", 2**70, -(2**70), "NaN", "1,2"])
)
WORDS = {
    "--num": NUMBERS,
    "--skip-bad": NUMBERS,
    "--workers": st.sampled_from([-1, 0, 10**9, "x"]),
    "--device": st.sampled_from(["cpu", "cpu:0", "auto", *DEVICES[:6]]),
    "--weights": st.sampled_from(["nowhere", "{sets}", "{sets}/own.npz", "{sets}/text.yaml"]),
    "--protocol": st.sampled_from(
        ["folder-clean", "imagenet64-edm", "nothing", "", "../x", "{sets}/text.yaml", "{sets}/none.yaml", "{sets}"]
    ),
    "--extractor": st.sampled_from(
        [OWN[1], f"{__name__}:not_an_extractor", "math:pi", "os:getcwd", ":", "..x:f", "a:", "", "clip:", "clip:{sets}",
         "dinov2:{sets}", "open_clip:a", "open_clip:a:b", "inception-2015@x", "effnet-lite0@9", "effnet-lite0@x", "@"]
    ),
}  # fmt: skip
SIDES = st.sampled_from(
    [
        "real2",
        "fake1",
        "fake6",
        "images.npz",
        "images.zip",
        "own.npz",
        "none.npz",
        "both.npz",
        "text.yaml",
        "1.txt",
        "no",
    ]
)


@fuzz(120)
@given(st.data(), SIDES, SIDES, st.sets(st.sampled_from(["--declared", *MEASURED]), max_size=3))
def test_options_of_a_distance_of_any_value(tally, sets, data, real, fake, flags):
    words = {"--extractor": OWN[1]}
    for option in data.draw(st.sets(st.sampled_from(sorted(WORDS)), max_size=2)):
        words[option] = str(data.draw(WORDS[option])).format(sets=sets)
    with nothing_lost(tally, sets):
        tried(
            tally,
            "eval",
            "fid",
            sets / real,
            sets / fake,
            *(w for pair in words.items() for w in pair),
            *sorted(flags),
        )


DRAWN = {
    "--steps": st.one_of(NUMBERS, st.sampled_from(["1,2", "1,1", "2,", ","])),
    "--num": NUMBERS,
    "--per-prompt": NUMBERS,
    "--seed": NUMBERS,
    "--size": NUMBERS,
    "--batch-size": NUMBERS,
    "--speed-runs": NUMBERS,
    "--guidance": NUMBERS,
    "--timesteps": st.sampled_from(["399", "x", "399,199", "0", ""]),
    "--solver": st.sampled_from(["ddim", "nothing", "{sets}", "", "../.."]),
    "--layout": st.sampled_from(["flat", "geneval", "tree", ""]),
    "--rounding": st.sampled_from(["nearest", "truncate", "up", ""]),
    "--dtype": st.sampled_from(["float32", "int8"]),
    "--lora": st.sampled_from(["nowhere", "{sets}", "{sets}/own.npz"]),
    "--prompts": st.sampled_from(["{sets}/3.txt", "{sets}/own.npz", "{sets}", "nowhere", ""]),
    "--out": st.sampled_from(
        ["{sets}/real2", "{sets}/own.npz", "{sets}/3.txt", "{sets}", "{sets}/fake6/1.png/x"]
    ),
}


@fuzz(100)
@given(st.data(), st.sets(st.sampled_from(sorted(DRAWN)), max_size=4))
def test_options_of_generating_of_any_value(tally, sets, data, options):
    """Of a pipeline that is nowhere, so that nothing is ever drawn."""
    words = {"--steps": "1", "--prompts": "{sets}/6.txt", "--out": "{sets}/made"}
    words |= {option: str(data.draw(DRAWN[option])) for option in sorted(options)}
    words = [word.format(sets=sets) for pair in words.items() for word in pair]
    with nothing_lost(tally, sets):
        assert tried(tally, "eval", "generate", "builtin:nothing", *words)[0] == 2


SPEC = {
    "prompts": "{sets}/6.txt", "title": "x", "num": 4, "per_prompt": 1, "seed": 0, "size": 32, "rounding": "nearest",
    "real": "{sets}/real6", "protocol": None, "extractor": OWN[1], "weights": None, "metrics": ["fd"], "scorers": [],
    "results": {}, "dtype": "float32", "batch_size": 2, "speed_runs": 0,
    "models": [{"name": "a", "pipeline": "builtin:nothing", "steps": [1, 2], "solver": ["ddim"], "guidance": [1.0]}],
}  # fmt: skip


@fuzz(100)
@given(st.data(), JUNK)
def test_a_table_of_any_specification(tally, sets, data, value):
    spec = json.loads(json.dumps(SPEC).replace("{sets}", str(sets)))
    inner = spec["models"][0] if data.draw(st.booleans()) else spec
    inner[data.draw(st.one_of(st.sampled_from(sorted(inner)), st.text(max_size=5)))] = value
    (sets / "spec.yaml").write_text(yaml.safe_dump(spec))
    with nothing_lost(tally, sets):
        assert tried(tally, "eval", "run", sets / "spec.yaml", "--out", sets / "table")[0] == 2


@pytest.fixture(scope="module")
def result(sets):
    return evaluate_images(pictures(6), pictures(6, 1), extractor=OWN[1], metrics=("fd", "kid"))


@fuzz(80)
@given(st.data(), JUNK)
def test_results_of_any_content_side_by_side(tally, sets, result, data, value):
    (sets / "a.json").write_text(json.dumps(result))
    changed = json.loads(json.dumps(result))
    path = data.draw(st.sampled_from(sorted(places(changed), key=str)))
    inner = changed
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    (sets / "b.json").write_text(json.dumps(changed))
    tried(tally, "eval", "compare", sets / "a.json", sets / "b.json")


NAMES = st.sampled_from(
    [
        "a.png",
        "1.png",
        "10.png",
        "2.tif",
        "b.gif",
        ".x.png",
        "t.txt",
        "manifest.json",
        "a.JPG",
        "1.heic",
        "ä 3.png",
    ]
)
FOLDER = st.sampled_from(["", "", "c1/", "c10/", ".hidden/", "__MACOSX/", "c1/deep/"])


@fuzz(80)
@given(st.sets(st.tuples(FOLDER, NAMES), min_size=1, max_size=6))
def test_a_folder_and_its_archive_are_one_set(tally, tmp_path, entries):
    """The same images in the same order, the same words of what is passed over, or the same refusal."""
    shutil.rmtree(tmp_path / "set", ignore_errors=True)
    manifest = b'{"schema": 1, "run": {}, "num": 1}'
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for i, (folder, name) in enumerate(sorted(entries)):
            content = manifest if name == "manifest.json" else encoded("PNG") if i % 2 else FORMATS["png"]
            (tmp_path / "set" / folder).mkdir(parents=True, exist_ok=True)
            (tmp_path / "set" / folder / name).write_bytes(content)
            archive.writestr(folder + name, content)
    found = []
    for source in (tmp_path / "set", tmp_path / "set.zip"):
        with refused_or_good(tally) as message:
            images = open_images(source)
            found.append((images.names, images.passed_over, images.sha256))
        found += [text.replace(str(source), "") for text in message]
    assert found[0] == found[1]
