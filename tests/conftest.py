"""Options, a private cache, and tiny pipelines on disk that go through the loading code of the real ones."""

import importlib
import os
import sys
from collections import Counter, defaultdict
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub
# Tests compare runs bit for bit, some in child processes, and several workers share the cores: one thread each,
# before anything imports torch.
os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"

import pytest
import standin
import torch

os.fsync = lambda handle: None  # a killed process loses nothing that it has written, and no test pulls a plug


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run tests that take more than ten seconds")
    parser.addoption("--long", action="store_true", help="also run those that take half a minute and more")
    parser.addoption("--weights", action="store_true", help="also run tests that need published weights")
    parser.addoption(
        "--standin", action="store_true", help="run these tests on a stand-in accelerator, standin.py"
    )


def pytest_configure(config):
    if config.getoption("--standin"):
        standin.install()


# Files of half a minute and more, longest first, so that several workers end at about the same time.
LONG = [
    "test_distributed", "test_standin", "test_end_to_end", "test_plan", "test_gpu_check",
    "test_contract", "test_dd1_dd2", "test_siblings", "test_family", "test_routed", "test_notebooks",
    "test_bench", "test_kills", "test_runs", "test_lost_data", "test_sid", "test_teachers", "test_dmd2",
    "test_starts", "test_interruption", "test_sim", "test_trajectory_export", "test_faults",
    "test_autoregressive", "test_sana_sprint", "test_phased_dmd", "test_pairs", "test_support",
    "test_prepare", "test_site", "test_wheel", "test_fuzz",
]  # fmt: skip


def pytest_collection_modifyitems(config, items):
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))
    by_marker = "weights" in config.getoption("-m")  # `-m weights` is asking for them
    reasons = {
        "slow": None if config.getoption("--slow") else "needs --slow",
        "long": None if config.getoption("--long") else "needs --long",
        "weights": None if config.getoption("--weights") or by_marker else "needs -m weights or --weights",
        "gpu": None if torch.cuda.is_available() else "needs a CUDA device",
        "standin": None if config.getoption("--standin") else "needs --standin",
    }
    for item in items:
        for marker, reason in reasons.items():
            if reason and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


# ------------------------------------------------------------------------------------------ what the tests have tried
@pytest.fixture
def tally(request):
    """Counts for the table at the end: ``tally("faults injected", 1)`` before the fault, "survived" after the proof."""

    def add(what, count):
        request.node.user_properties.append(("tally", [what, count]))

    return add


def tallies(reports):
    """What the tests of these reports have counted; numbers are added, names are collected."""
    numbers, names = Counter(), defaultdict(set)
    for report in reports:
        for key, value in report.user_properties:
            if key == "tally" and isinstance(value[1], str):
                names[value[0]].add(value[1])
            elif key == "tally":
                numbers[value[0]] += value[1]
    return numbers, names


def pytest_terminal_summary(terminalreporter):
    kinds = ("passed", "failed")
    numbers, names = tallies(
        r for k in kinds for r in terminalreporter.stats.get(k, []) if getattr(r, "when", "") == "call"
    )
    rows = []
    if faults := numbers["faults injected"]:
        survived = numbers["survived"]
        rows.append(f"faults injected {faults} | survived {survived} | data lost {faults - survived}")
    if tried := numbers["inputs tried"]:
        refused, good = numbers["refused with a clear error"], numbers["accepted, being good"]
        lost = tried - refused - good
        rows.append(
            f"inputs tried {tried} | refused with a clear error {refused} | good {good} | tracebacks {lost} | "
            f"originals lost {numbers['originals lost']} of {numbers['originals watched']}"
        )
    if methods := names["resume tried"]:
        inexact = {variant.split("/")[0] for variant in methods - names["resumed bit-exact"]}
        every = {variant.split("/")[0] for variant in methods}
        rows.append(f"methods {len(every)} | bit-exact resume {len(every - inexact)} | not {sorted(inexact)}")
    if rows:
        terminalreporter.section("nothing lost, nothing silent")
        for row in rows:
            terminalreporter.write_line(f"| {row} |")


@pytest.fixture(scope="session", autouse=True)
def session_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEWSTEP_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def no_reads(request, monkeypatch):
    """On the stand-in, an iteration whose host waits for the device fails the test; a rescue has to look closer."""
    if not request.config.getoption("--standin"):
        return
    from fewstep.training.trainer import Trainer

    iterate, rescue = Trainer.iterate, Trainer.rescue

    def watched(self):
        with standin.waits() as found:
            iterate(self)
        assert not found, f"{len(found)} waits in an iteration: {found[0]}"

    def unwatched(self, phase):
        with standin.deaf():
            return rescue(self, phase)

    monkeypatch.setattr(Trainer, "iterate", watched)
    monkeypatch.setattr(Trainer, "rescue", unwatched)


def _tiny(tmp_path_factory, pipeline_class, **options):
    from fewstep.teachers.tiny import write_tiny_pipeline

    if (
        pipeline_class == "QwenImageEditPlusPipeline"
    ):  # to whose VAE a reference has a megapixel, whatever its own size
        from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as stock

        stock.VAE_IMAGE_SIZE, stock.CONDITION_IMAGE_SIZE = 128 * 128, 64 * 64
    return write_tiny_pipeline(pipeline_class, tmp_path_factory.mktemp("tiny"), **options)


@pytest.fixture(scope="session")
def tiny_sdxl(tmp_path_factory):
    return _tiny(tmp_path_factory, "StableDiffusionXLPipeline")


@pytest.fixture(scope="session")
def tiny_sdxl_v(tmp_path_factory):
    return _tiny(tmp_path_factory, "StableDiffusionXLPipeline", prediction_type="v_prediction")


@pytest.fixture(scope="session")
def tiny_sd15(tmp_path_factory):
    return _tiny(tmp_path_factory, "StableDiffusionPipeline")


@pytest.fixture(scope="session")
def sdxl(tiny_sdxl):
    """The tiny SDXL as a loaded teacher; it is frozen, so tests may share it."""
    from fewstep.teachers import load_teacher

    return load_teacher(str(tiny_sdxl))


@pytest.fixture(scope="session")
def teachers(tmp_path_factory):
    """Name in the zoo -> a frozen tiny teacher of that kind, loaded once; ``teacher.source`` is its folder. "wide" and
    "tall" ones make images half as long again as they are high, or as they are wide, SANA's twice as long."""
    from zoo import ZOO

    from fewstep.errors import FewstepError
    from fewstep.teachers import load_teacher

    made = {}

    def get(name, form="square"):
        if form != "square":
            if (name, form) not in made:
                square = get(name)
                sides = [square.shape.height, square.shape.width * (4 if name == "SANA" else 3) // 2]
                size = sides if form == "wide" else sides[::-1]
                made[name, form] = load_teacher(square.source, resolution=size)
            return made[name, form]
        if name not in made:
            kind = ZOO[name]
            try:
                folder = _tiny(tmp_path_factory, kind.pipeline_class, **kind.options)
            except FewstepError as error:  # the oldest libraries have not all classes
                if "is too old" not in str(error):
                    raise
                pytest.skip(str(error))
            made[name] = load_teacher(str(folder), resolution=kind.resolution)
        return made[name]

    return get


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory):
    """A tiny random CLIP as transformers writes it."""
    from transformers import CLIPConfig, CLIPModel

    from fewstep.teachers.tiny.texts import clip_tokenizer

    folder = tmp_path_factory.mktemp("clip") / "tiny-clip"
    tokenizer = clip_tokenizer(folder)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    special = {f"{n}_token_id": getattr(tokenizer, f"{n}_token_id") for n in ("bos", "eos", "pad")}
    text = {**size, **special, "vocab_size": len(tokenizer)}
    vision = {**size, "image_size": 32, "patch_size": 8}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = CLIPModel(config)
        for parameter in model.parameters():
            parameter.data += 0.3 * torch.randn_like(parameter)  # far from its symmetric initial state
    model.logit_scale.data.fill_(2.0)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def training_recipe():
    """The module of a recipe that trains a built-in teacher, by name; such recipes import one another."""
    folder = str(Path(__file__).parents[1] / "recipes")
    sys.path.insert(0, folder)
    yield importlib.import_module
    sys.path.remove(folder)
