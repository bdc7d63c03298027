"""What a user does, on tiny random pipelines, through the code that loads the real ones."""

import importlib.util
import json
import os
import textwrap
import time
from copy import copy
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
import standin
import torch
from processes import Fork, without_fewstep
from safetensors.torch import load_file

from fewstep import files
from fewstep import recipe as recipes
from fewstep.cli import main
from fewstep.data.cache import cache_root
from fewstep.diffusion import kernels
from fewstep.errors import FewstepError
from fewstep.export import load_exported, stock_sample
from fewstep.report.grid import image_grid
from fewstep.report.report import write_report
from fewstep.runs import session
from fewstep.runs.library import load_recipe, recipe_files
from fewstep.runs.session import Session, execute, resume, settled
from fewstep.teachers import load_teacher
from fewstep.training.divergence import Divergence

PROMPTS = ["red apple", "a cat", "blue square", "crescent moon"]
PROMPTS += [
    "../../$(touch pwned) `touch pwned` <script>alert(1)</script> {{body}} {x} %s"
]  # is a prompt like any


def tiny(recipe_name: str, teacher: Path, folder: Path, *words: str):
    """A shipped recipe shrunk to four steps on a tiny pipeline of its class, with real files as input."""
    from PIL import Image

    prompts, images = folder / "prompts.txt", folder / "images"
    prompts.write_text("\n".join(PROMPTS))
    images.mkdir(exist_ok=True)
    with (images / "metadata.jsonl").open("w") as table:
        for i, prompt in enumerate(PROMPTS):
            Image.new("RGB", (40, 36), (40 * i, 99, 250 - 40 * i)).save(images / f"{i}.png")
            table.write(json.dumps({"file_name": f"{i}.png", "text": prompt}) + "\n")
    words = (
        *("--teacher", str(teacher), "--prompts", str(prompts), "--images", str(images)),
        *("--output", str(folder / "run"), "--teacher.dtype", "float32", "--teacher.autocast", "null"),
        *("--teacher.resolution", "null", "--student.rank", "4", "--train.steps", "4"),
        *("--teacher.gradient_checkpointing", "false"),  # a third of a tiny run's time; `sdxl_run` has it
        *("--student.start_from", "null"),
        *("--train.batch_size", "2", "--train.accumulate", "1"),
        *("--samples.count", "2", "--samples.teacher_steps", "2", "--train.sample_every", "2"),
        *("--train.checkpoint_every", "2", "--train.log_every", "1", "--student.warmup", "0"),
        *("--export.dtype", "float32", "--student.lr", "1e-3", "--samples.columns", "2"),
        *words,
    )
    recipe = load_recipe(recipe_name)
    if any(name.startswith("critic") for name in recipe.method_class.networks_for(recipe.method)):
        words = ("--critic.rank", "4", *words)
    if hasattr(recipe.method, "critic_steps"):
        words = ("--method.critic_steps", "2", *words)
    return recipes.override(recipe, words)


@pytest.fixture(scope="module")
def sdxl_run(tiny_sdxl, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sdxl")
    words = ["--export.kohya", "true", "--student.ema", "0.5", "--teacher.gradient_checkpointing", "true"]
    if importlib.util.find_spec("torchmetrics"):
        words += ["--samples.distance", "3", "--evaluation.extractor", "effnet-lite0@32"]
    recipe = tiny("sdxl_dmd2_4step_24gb", tiny_sdxl, folder, *words)

    def noted(run):
        with (folder / "reports.txt").open("a") as stream:
            print(len(list((run / "samples").glob("step_*.png"))), file=stream)
        return write_report(run)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "write_report", noted)
        return execute(recipe), recipe


def test_a_run_directory_holds_everything(sdxl_run):
    folder, recipe = sdxl_run
    files = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert {"recipe.yaml", "run.json", "metrics.jsonl", "report.html", "export/README.md"} <= files
    assert {"samples/teacher.png", "samples/step_000000.png", "samples/step_000004.png"} <= files
    assert recipes.load(folder / "recipe.yaml") == recipes.override(
        recipe, ["--teacher.attention=sdpa", "--data.cache_prompts=true", "--data.cache_images=true"]
    )
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if "samples/FD(effnet-lite0@32)" not in r] == [1, 2, 3, 4]
    assert not list(folder.rglob(".part-*")) and not list(folder.parent.rglob("*pwned*"))


def test_the_report_is_written_after_every_grid_and_at_the_end(sdxl_run):
    folder, _ = sdxl_run
    grids = [int(line) for line in (folder.parent / "reports.txt").read_text().split()]
    assert grids == [1, 2, 3, 3, 3]  # after three grids, after training, after the export


def test_the_distance_to_real_images_is_logged_beside_the_grids(sdxl_run):
    pytest.importorskip("torchmetrics")
    folder, _ = sdxl_run
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    measured = {
        r["step"]: r["samples/FD(effnet-lite0@32)"] for r in records if "samples/FD(effnet-lite0@32)" in r
    }
    assert list(measured) == [0, 2, 4] and all(value > 0 for value in measured.values())
    assert "FD(effnet-lite0@32)" in (folder / "report.html").read_text()


REFUSE = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "fewstep":
            raise ImportError("fewstep must not be needed here")
sys.meta_path.insert(0, Refuse())
"""
STOCK = f"""{REFUSE}
import torch
from diffusers import DiffusionPipeline, LCMScheduler
teacher, export, out, steps = sys.argv[1:]
pipe = DiffusionPipeline.from_pretrained(teacher)
pipe.load_lora_weights(export, weight_name="pytorch_lora_weights.safetensors")
pipe.scheduler = LCMScheduler.from_pretrained(export, subfolder="scheduler")
pipe.set_progress_bar_config(disable=True)
generator = torch.Generator().manual_seed(0)
noise = torch.randn(2, 4, 16, 16, generator=generator)
latents = pipe(["red apple", "a cat"], num_inference_steps=int(steps), guidance_scale=0, latents=noise,
               generator=generator, output_type="latent", height=32, width=32).images
print([int(t) for t in pipe.scheduler.timesteps])
torch.save(latents, out)
"""


def stock_latents(teacher: Path, export: Path, out: Path, steps: int) -> tuple[torch.Tensor, str]:
    script = out.with_suffix(".py")
    script.write_text(STOCK)
    printed = without_fewstep(script, out.parent, str(teacher), str(export), str(out), str(steps))
    return torch.load(out, weights_only=True), printed


def test_stock_diffusers_samples_the_student_without_fewstep(sdxl_run, tiny_sdxl, tmp_path):
    folder, recipe = sdxl_run
    latents, printed = stock_latents(tiny_sdxl, folder / "export", tmp_path / "latents.pt", 4)
    assert "[999, 749, 499, 249]" in printed
    # The trainer's own sample, from the checkpoint's moving average.
    from fewstep.export import trainer_sample
    from fewstep.process import Process
    from fewstep.runs.checks import check_data
    from fewstep.training.roles import averaged

    session = Session(recipe, *check_data(recipe), Process())
    assert session.trainer.restore()
    with averaged(session.roles["student"]):
        own = trainer_sample(session.method.student, session.teacher, ["red apple", "a cat"])
    untrained = trainer_sample(Session(recipe, *check_data(recipe), Process()).method.student, session.teacher,
                               ["red apple", "a cat"])  # fmt: skip
    assert (latents - own).abs().max() < 1e-4
    assert (own - untrained).abs().max() > 1e-3  # otherwise the comparison would prove nothing


@pytest.mark.parametrize(
    "name, words, parts",
    [
        ("sdxl_phased_dmd_4step", (), ("DDIMScheduler", "student_2", "set_adapter(")),
        ("sdxl_sid_4step", ("--method.noise", "ddim", "--method.start", "999"), ("DDIMScheduler",)),
        ("sdxl_sid_4step", ("--method.noise", "fixed", "--method.start", "999"), ("manual_seed", "again")),
    ],
)
def test_experts_and_other_noise_are_verified_and_their_snippet_runs_in_stock_diffusers(
    name, words, parts, tiny_sdxl, tmp_path
):
    folder = execute(tiny(name, tiny_sdxl, tmp_path, *words)) / "export"
    card = (folder / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0]
    assert all(part in code for part in parts)
    script = tmp_path / "use.py"
    script.write_text(REFUSE + code)
    without_fewstep(script, folder)
    assert (folder / "image.png").is_file()
    # Another order of experts, or fresh noise, is another sample: verification would see it.
    from fewstep.export import ExportError, verify

    record = json.loads((folder / "fewstep.json").read_text())
    wrong = {**record, "noise": "fresh", "scheduler": "LCMScheduler"}
    if "experts" in record:
        wrong = {**record, "experts": record["experts"][::-1]}
    elif record["noise"] == "ddim":
        return
    teacher = load_teacher(str(tiny_sdxl))
    pipe, _ = load_exported(folder)
    prompts = PROMPTS[:2]
    own = stock_sample(pipe, record, teacher, prompts)
    (folder / "fewstep.json").write_text(json.dumps(wrong))
    with pytest.raises(ExportError):
        verify(folder, own, teacher, prompts, 1e-4, "float32")


def test_fused_weights_equal_unfused_and_kohya_keys_mean_the_same(sdxl_run, tiny_sdxl, tmp_path):
    folder, _ = sdxl_run
    teacher = load_teacher(str(tiny_sdxl))
    pipe, record = load_exported(folder / "export")
    plain = stock_sample(pipe, record, teacher, PROMPTS[:2])
    pipe.fuse_lora()
    assert (stock_sample(pipe, record, teacher, PROMPTS[:2]) - plain).abs().max() < 1e-3
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    base = stock_sample(pipe, record, teacher, PROMPTS[:2])
    pipe.load_lora_weights(folder / "export" / "kohya", weight_name="run.safetensors")
    kohya = stock_sample(pipe, record, teacher, PROMPTS[:2])
    assert (kohya - plain).abs().max() < 1e-4 < (base - plain).abs().max()


def test_export_is_refused_when_it_means_something_else(sdxl_run, tiny_sdxl):
    from fewstep.export import ExportError, verify

    folder, _ = sdxl_run
    teacher = load_teacher(str(tiny_sdxl))
    wrong = torch.zeros(2, *teacher.latent_shape)
    with pytest.raises(ExportError, match="stock diffusers"):
        verify(folder / "export", wrong, teacher, PROMPTS[:2], 1e-4, "float32")


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_one_step_sd15_exports_and_resumes_exactly(tiny_sd15, tmp_path, kind):
    words = ("--student.kind", kind, "--critic.kind", kind, "--student.ema", "0.9", "--train.accumulate", "2")
    words += ("--export.kohya", str(kind == "lora").lower())
    for name in ("straight", "broken"):
        (tmp_path / name).mkdir()
    straight = execute(tiny("sd15_dmd2_1step", tiny_sd15, tmp_path / "straight", *words))
    recipe = tiny("sd15_dmd2_1step", tiny_sd15, tmp_path / "broken", *words)
    half = replace(recipe, train=replace(recipe.train, steps=2))
    execute(half)
    resolved = tmp_path / "broken" / "run" / "recipe.yaml"
    resolved.write_text(recipes.dump(recipe))
    broken = resume(resolved.parent)
    a, b = (folder / "checkpoints" / "step_00000004" / "state.safetensors" for folder in (straight, broken))

    first, second = load_file(a), load_file(b)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_run_goes_on_elsewhere_with_the_arithmetic_it_began_with(tiny_sd15, tmp_path, monkeypatch, capsys):
    """Its own recipe holds what auto became; another processor says what it thinks of that, and may be told."""
    units = [True]
    monkeypatch.setattr(kernels, "bf16_units", lambda device: units[0])
    folders = [tmp_path / name for name in ("straight", "moved")]
    for folder, steps in zip(folders, ("4", "2")):
        folder.mkdir()
        words = ("--teacher.autocast=auto", "--teacher.resolution=16", "--train.steps", steps)
        execute(tiny("sd15_dmd2_1step", tiny_sd15, folder, *words))
    assert "teacher.autocast" not in capsys.readouterr().err
    units[0] = False
    moved = resume(folders[1] / "run", ["--train.steps=4"])
    assert "note: teacher.autocast: bfloat16 on cpu: it has no matrix units" in capsys.readouterr().err
    a, b = (load_file(f / "run" / "checkpoints" / "step_00000004" / "state.safetensors") for f in folders)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    used = {"autocast": "bfloat16", "attention": "math"}
    assert json.loads((moved / "run.json").read_text())["arithmetic"] == used
    resume(moved, ["--train.steps=6", "--teacher.autocast=auto", "--teacher.attention=auto"])
    teacher = recipes.load(moved / "recipe.yaml").teacher
    assert (teacher.autocast, teacher.attention) == (None, "sdpa")
    assert "teacher.autocast" not in capsys.readouterr().err


def test_all_ranks_compute_as_the_first_one_does(sdxl):
    """One of them may have a processor without units for bf16."""
    teacher, recipe = copy(sdxl), load_recipe("emoji_dmd2_1step")
    teacher.denoiser = copy(sdxl.denoiser)
    first = SimpleNamespace(collect=lambda own: [(torch.bfloat16, "math"), own])
    told = settled(recipe, teacher, first).teacher
    assert (told.autocast, told.attention) == ("bfloat16", "math")
    assert (teacher.denoiser.autocast, teacher.denoiser.attention) == (torch.bfloat16, "math")


def test_a_half_precision_teacher_and_export_are_verified_too(tiny_sdxl, tmp_path, capsys):
    words = ("--teacher.dtype", "bfloat16", "--teacher.autocast", "bfloat16", "--export.dtype", "float16")
    execute(tiny("sdxl_dmd2_1step", tiny_sdxl, tmp_path, *words))
    assert "verified in stock diffusers" in capsys.readouterr().out


def test_an_exported_student_is_sampled_from_the_command_line(sdxl_run, tmp_path):
    folder, _ = sdxl_run
    out = tmp_path / "grid.png"
    assert main(["sample", str(folder), "--prompt", "a cat", "--num", "2", "--out", str(out)]) == 0
    assert out.stat().st_size > 0
    assert main(["sample", str(folder), "--prompt", "a cat", "--steps", "1", "--out", str(out)]) == 2


def test_one_process_at_a_time_works_on_a_run(sdxl_run, tmp_path):
    folder, _ = sdxl_run

    def work():
        with files.held(folder):
            (tmp_path / "begun").touch()
            time.sleep(600)

    other = Fork(work, tmp_path / "said.txt")
    try:
        while not (tmp_path / "begun").exists():
            assert other.poll() is None
            time.sleep(0.01)
        before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
        with pytest.raises(FewstepError, match=f"process {other.pid} of .* is at work"):
            resume(folder)
        assert {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()} == before
    finally:
        other.kill()
        other.wait()
    with files.held(folder):  # let go by the system
        assert (folder / files.LOCK).read_text().startswith(f"process {os.getpid()} of ")


def test_a_run_that_another_has_begun_meanwhile_is_left_alone(tiny_sdxl, tmp_path, monkeypatch):
    recipe, load = tiny("sdxl_dmd2_4step_24gb", tiny_sdxl, tmp_path), Session.__init__

    def slow(self, *args, **options):
        load(self, *args, **options)
        self.folder.mkdir(exist_ok=True)
        (self.folder / "recipe.yaml").write_text("another's")

    monkeypatch.setattr(Session, "__init__", slow)
    with pytest.raises(FewstepError, match="holds a run already"):
        execute(recipe)
    assert (Path(recipe.output) / "recipe.yaml").read_text() == "another's"


def test_a_picture_of_teacher_and_student_counts_their_network_calls(
    sdxl_run, tiny_sdxl, tmp_path, monkeypatch
):
    folder, _ = sdxl_run
    spec = importlib.util.spec_from_file_location(
        "picture", Path(__file__).parents[2] / "eval" / "picture.py"
    )
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    drawn = []
    monkeypatch.setattr(
        script, "image_grid", lambda *args, **said: drawn.append(said) or image_grid(*args, **said)
    )
    words = [
        "--student",
        str(folder),
        "--teacher",
        str(tiny_sdxl),
        "--teacher-steps",
        "2",
        "--prompt",
        "a cat",
    ]
    assert script.main([*words, "--scale", "1", "--out", str(tmp_path / "p.png")]) == 0
    assert drawn[0]["row_labels"] == (
        "teacher, 2 steps: 4 network calls",
        "student, 4 steps: 4 network calls",
    )
    assert drawn[0]["labels"] == ["", "a cat"] and (tmp_path / "p.png").stat().st_size > 0
    assert script.main([*words, "--out", str(tmp_path)]) == 2  # a folder, which is kept


def test_a_damaged_checkpoint_is_passed_over(sdxl_run, capsys):
    from fewstep.training.checkpoint import newest

    checkpoints = sdxl_run[0] / "checkpoints"
    damaged = checkpoints / "step_00000009"
    damaged.mkdir()
    (damaged / "state.json").write_text('{"sha256": "0"}')
    (damaged / "state.safetensors").write_bytes(b"torn")
    assert newest(checkpoints).name == "step_00000004"
    assert (
        "checkpoint" in (told := capsys.readouterr().err)
        and "step_00000009" in told
        and "the one before" in told
    )
    damaged.joinpath("state.json").unlink()
    damaged.joinpath("state.safetensors").unlink()
    damaged.rmdir()


READERS = ("stock diffusers", "LlamaGenPipeline", "VARPipeline")
# Every recipe runs on the stand-in (test_standin.py); here one of each teacher, or all where that cannot be compiled.
SMOKES = [
    "ddpm_sid_1step",
    "dit_sid_1step",
    "emoji_ar_dd1_2step",
    "sana_sprint",
    "sd15_dmd_1step",
    "sd3_ladd_4step",
]
SMOKES += ["sdxl_sim_1step"]
LARGER = [
    "emoji_flow_sid_1step",
    "emoji_hyper_sd",
    "flux_dmd2_4step",
    "llamagen_l_dd2_1step",
    "var_d16_dd1_2step",
]
SMOKES += [pytest.param(name, marks=pytest.mark.long) for name in LARGER]


@pytest.mark.parametrize("name", SMOKES if standin.compiler() else sorted(recipe_files()))
def test_a_recipe_smokes(name, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("FEWSTEP_CACHE", str(cache_root()))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    if name.startswith("emoji_flow") and version("transformers") < "5":
        with pytest.raises(SystemExit):
            main(["train", name, "--smoke"])
        assert "builtin:emoji-flow needs transformers 5" in capsys.readouterr().err
        return
    assert main(["train", name, "--smoke"]) == 0
    printed = capsys.readouterr().out
    assert any(f"verified in {reader}" in printed for reader in READERS) and "report.html" in printed


def test_what_stands_in_lies_beside_the_output_that_is_given(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "system"))
    (tmp_path / "system").mkdir()
    words = ["train", "sd15_dmd2_1step", "--smoke", f"--output={tmp_path / 'here' / 'run'}"]

    def left():
        assert not list((tmp_path / "system").glob("fewstep*"))
        return sorted(path.name.rpartition("-")[0] or path.name for path in (tmp_path / "here").iterdir())

    assert main(words) == 0 and left() == ["run", "run-smoke"]
    with pytest.raises(SystemExit):  # nothing is made for what is refused
        main(words)
    assert left() == ["run", "run-smoke"]
    assert "give another --output" in capsys.readouterr().err


def test_the_model_card_runs_as_it_stands(sdxl_run, tmp_path):
    folder, _ = sdxl_run
    card = (folder / "export" / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0]
    code = textwrap.dedent(code).replace("image.save('image.png')", "print(image.size)")
    script = tmp_path / "card.py"
    script.write_text(code)
    assert "(32, 32)" in without_fewstep(script, folder / "export")


def test_a_student_that_is_never_finite_ends_the_run(tiny_sd15, tmp_path, monkeypatch):
    from fewstep.diffusion import objectives

    real = objectives.distribution_matching
    monkeypatch.setattr(objectives, "distribution_matching", lambda *args: real(*args) * float("nan"))
    monkeypatch.setattr(Divergence, "MAX_SKIPPED", 3)
    words = ("--train.steps", "60", "--train.sample_every", "0", "--train.checkpoint_every", "0")
    with pytest.raises(FewstepError, match="student was not finite 3 times in a row"):
        execute(tiny("sd15_dmd2_1step", tiny_sd15, tmp_path, *words))


def test_the_builtin_teacher_runs_in_stock_diffusers_as_it_stands():
    from diffusers import DiffusionPipeline

    from fewstep.teachers import resolve

    folder = Path(resolve("builtin:emoji-xl"))
    assert sum(p.stat().st_size for p in folder.rglob("*.safetensors")) < 24e6
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    assert pipe("red apple", num_inference_steps=2).images[0].size == (64, 64)
