"""What an export would fail at is found before training, and a failed one leaves nothing that looks whole."""

import inspect
import json
import shutil

import diffusers
import pytest
import torch
from test_end_to_end import tiny
from test_fuzz import refused_or_good
from zoo import ZOO

from fewstep import export
from fewstep.diffusion.student import Student
from fewstep.diffusion.times import student_times
from fewstep.errors import FewstepError, RecipeError
from fewstep.export import (
    ExportError,
    check_exportable,
    export_student,
    rehearse_export,
    trainer_sample,
    verify,
)
from fewstep.export import lora as lora_export
from fewstep.files import WriteError
from fewstep.recipe import RoleConfig
from fewstep.runs.session import execute, reexport, resume
from fewstep.teachers import load_teacher
from fewstep.teachers.tiny import write_tiny_pipeline
from fewstep.training.roles import build_role

LORA = [RoleConfig(rank=2)]


def with_scheduler(source, folder, scheduler):
    """The pipeline of a folder with another scheduler, in a folder of its own."""
    shutil.copytree(source, folder)
    scheduler.save_pretrained(folder / "scheduler")
    index = json.loads((folder / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", type(scheduler).__name__]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def student_of(teacher, steps=2):
    return Student(teacher.denoiser, student_times(teacher.denoiser.schedule, steps))


# ---------------------------------------------------------------------------------------------------- the rehearsal
@pytest.mark.parametrize("name", ZOO)
def test_every_family_is_sampled_as_it_is_trained(name, teachers):
    teacher = teachers(name)
    state, forward = torch.get_rng_state(), vars(teacher.net).get("forward")
    for role in LORA, [RoleConfig(kind="full")]:
        difference = rehearse_export(student_of(teacher), role, teacher, ZOO[name].prompts[0])
        assert difference is not None and difference < 1e-3
    assert torch.equal(torch.get_rng_state(), state) and vars(teacher.net).get("forward") is forward


def test_half_precision_comes_back_bit_for_bit_where_students_share_it(tiny_sdxl):
    teacher = load_teacher(str(tiny_sdxl), dtype="bfloat16", autocast="bfloat16")
    role = build_role("student", teacher.net, LORA[0])
    held = {n: p.clone() for n, p in role.module.named_parameters()}
    autocast = teacher.denoiser.autocast
    assert rehearse_export(student_of(teacher), LORA, teacher, "a cat") < 1e-3
    after = dict(role.module.named_parameters())
    assert all(after[n].dtype == p.dtype and torch.equal(after[n], p) for n, p in held.items())
    assert teacher.net.dtype == torch.bfloat16 and teacher.denoiser.autocast == autocast
    assert teacher.pipe.vae.dtype == torch.float32


def test_a_scheduler_that_the_pipeline_cannot_run_ends_before_anything_is_written(tiny_sdxl, tmp_path):
    flow = with_scheduler(tiny_sdxl, tmp_path / "flow", diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0))
    recipe = tiny("sdxl_dmd2_4step", flow, tmp_path, "--method.start", "null")
    with pytest.raises(
        RecipeError, match=r"teacher\.path: .*StableDiffusionXLPipeline.*init_noise_sigma"
    ) as said:
        execute(recipe)
    assert "\n" not in str(said.value) and not (tmp_path / "run").exists()


def test_a_network_with_an_option_that_fewstep_does_not_know_ends_there_too(tmp_path):
    folder = write_tiny_pipeline("StableDiffusionXLPipeline", tmp_path / "odd", time_cond_proj_dim=8)
    recipe = tiny("sdxl_dmd2_4step", folder, tmp_path)
    with pytest.raises(
        RecipeError, match=r"teacher\.path: .*untrained student.*UNet2DConditionModel.*option"
    ):
        execute(recipe)
    assert not (tmp_path / "run").exists()


def test_it_is_said_in_a_line_and_only_once(tiny_sd15, tmp_path, capsys):
    recipe = tiny("sd15_dmd2_1step", tiny_sd15, tmp_path, "--train.steps", "2")
    run = execute(recipe)
    line = "fewstep: stock StableDiffusionPipeline samples the untrained student as it is trained"
    assert capsys.readouterr().err.count(line) == 1
    card = (run / "export" / "README.md").read_text()
    reexport(run)
    assert line not in capsys.readouterr().err
    assert (run / "export" / "README.md").read_text() == card


def test_too_little_memory_for_a_rehearsal_is_no_reason_to_refuse(sdxl, monkeypatch):
    def full(*_args, **_options):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr("fewstep.export.rehearsal.stock_sample", full)
    assert rehearse_export(student_of(sdxl), LORA, sdxl, "a cat") is None


def test_names_for_comfyui_of_a_whole_student_end_before_training(tiny_sd15, tmp_path):
    words = ("--student.kind", "full", "--critic.kind", "full", "--export.kohya", "true")
    with pytest.raises(RecipeError, match=r"export\.kohya: true"):
        execute(tiny("sd15_dmd2_1step", tiny_sd15, tmp_path, *words))
    assert not (tmp_path / "run").exists()


# ----------------------------------------------------------------------------- every scheduler in every pipeline class
def schedulers():
    """One of each class in diffusers that numbers alone can make."""
    for name in sorted(n for n in dir(diffusers) if n.endswith("Scheduler")):
        cls = getattr(diffusers, name)
        if not inspect.isclass(cls) or not hasattr(cls, "from_config"):
            continue
        needed = [p.name for p in inspect.signature(cls).parameters.values() if p.default is p.empty]
        try:
            yield cls(**dict.fromkeys(set(needed) - {"args", "kwargs"}, 8))
        except (ValueError, TypeError, ImportError):  # of words, or with packages that are not here
            continue


ALIKE = ("Chroma", "Lumina 2", "FLUX.2-dev", "Krea-2")  # handed a grid as others are, by the same lines


@pytest.mark.parametrize("name", [name for name in ZOO if name not in ALIKE])
def test_any_scheduler_in_any_pipeline_can_be_exported_or_is_refused(name, teachers, tally):
    own = teachers(name)
    teacher = load_teacher(own.source, resolution=ZOO[name].resolution)
    known, made = {}, set()  # the same exported scheduler again is sampled alike

    def rehearse(student, built, scheduler):
        exported = export.student_scheduler(scheduler, student.times)[0]
        key = (type(exported).__name__, str(sorted(exported.config.items(), key=str)))
        if key not in known:
            known[key] = None
            try:
                assert rehearse_export(student, LORA, built, ZOO[name].prompts[0]) is not None
            except FewstepError as error:
                known[key] = error
        if known[key]:
            raise known[key]

    for scheduler in schedulers():
        teacher.pipe.scheduler = scheduler
        with refused_or_good(tally) as message:
            built = type(teacher)(teacher.pipe, own.source, ZOO[name].resolution)
            student = student_of(built)
            check_exportable(student, LORA, built)
            rehearse(student, built, scheduler)
        assert not message or (len(message[0]) < 900 and "\n" not in message[0])
        made |= set() if message else {type(scheduler).__name__}
    flows = {"FlowMatchEulerDiscreteScheduler", "FlowMatchLCMScheduler", "FlowMapEulerDiscreteScheduler"}
    tables = {
        "DDIMScheduler",
        "DDPMScheduler",
        "EulerDiscreteScheduler",
        "LCMScheduler",
        "UniPCMultistepScheduler",
    }
    flux = ("FLUX.1-dev", "FLUX.1-schnell", "FLUX.2-dev", "FLUX.2-klein")
    handed = (*flux, "HiDream", "Krea-2", "Qwen-Image", "Qwen-Image-Edit", "Qwen-Image-2.1", "Z-Image")
    families = {"SD 3": flows | tables, "SANA": flows | tables, **dict.fromkeys(handed, flows)}
    assert families.get(name, tables) <= made
    assert (
        not {"EDMEulerScheduler", "EDMDPMSolverMultistepScheduler", "CMStochasticIterativeScheduler"} & made
    )


# ------------------------------------------------------------------------------------------------------ failed exports
def trained(teacher):
    role = build_role("student", teacher.net, LORA[0])
    student = Student(teacher.denoiser.with_net(role.module), [999, 499])
    return student, {"student": role.final_weights()}, [role.config]


@pytest.mark.parametrize("place", ["save_lora", "save_kohya", "scheduler", "card", "record", "check"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, OSError])
def test_an_export_that_fails_anywhere_leaves_what_was_there(sdxl, tmp_path, monkeypatch, place, error):
    def fail(*_args, **_options):
        raise error("in the middle")

    arguments = (sdxl, *trained(sdxl))
    options = {"about": {"method": "x"}, "kohya": True}
    places = {
        "save_lora": (lora_export, "save_lora"),
        "save_kohya": (lora_export, "save_kohya"),
        "scheduler": (diffusers.LCMScheduler, "save_pretrained"),
        "card": (export.target, "model_card"),
        "record": (export.target, "write_json"),
    }
    for older in (False, True):
        with monkeypatch.context() as patch:
            if place in places:
                patch.setattr(*places[place], fail)
            check = fail if place == "check" else None
            with pytest.raises((error, FewstepError)):
                export_student(tmp_path / "export", *arguments, check=check, **options)
        assert {p.name for p in tmp_path.iterdir()} == ({"export"} if older else set())
        if older:
            assert (tmp_path / "export" / "mark").is_file()
        else:
            export_student(tmp_path / "export", *arguments, **options)
            (tmp_path / "export" / "mark").touch()


def test_a_place_that_the_export_could_not_take_is_found_before_anything_is_loaded(
    tiny_sd15, tmp_path, monkeypatch
):
    run = execute(tiny("sd15_dmd2_1step", tiny_sd15, tmp_path, "--train.steps", "2", "--evaluation.num", "0"))
    with pytest.raises(RecipeError, match=r"train\.steps: 1: this run is at step 2 already"):
        resume(run, ["--train.steps", "1"])
    assert "steps: 2" in (run / "recipe.yaml").read_text()  # and still says what it is
    monkeypatch.setattr("fewstep.runs.session.Session", lambda *_args, **_options: pytest.fail("loaded"))
    shutil.move(run / "export", tmp_path / "kept")
    (run / "export").write_text("mine")
    for again in (reexport, resume):
        with pytest.raises(FewstepError, match=r"output: .*export is a file; give the name of a folder"):
            again(run)
    assert (run / "export").read_text() == "mine"
    (run / "export").unlink()

    def refused(*_args, **_options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.touch", refused)
    with pytest.raises(
        WriteError, match=r"output: .*export cannot be written: .*Permission denied|no permission"
    ):
        reexport(run)


def test_a_run_whose_export_is_not_what_was_trained_has_none(tiny_sd15, tmp_path, monkeypatch):
    real = lora_export.lora_state_dict
    monkeypatch.setattr(
        lora_export, "lora_state_dict", lambda *args: {n: v + 0.1 for n, v in real(*args).items()}
    )
    recipe = tiny("sd15_dmd2_1step", tiny_sd15, tmp_path, "--train.steps", "2")
    with pytest.raises(ExportError, match="do not mean what was trained"):
        execute(recipe)
    assert not (tmp_path / "run" / "export").exists() and not list((tmp_path / "run").glob(".part-*"))
    monkeypatch.undo()
    assert (reexport(tmp_path / "run") / "fewstep.json").is_file()


# ----------------------------------------------------------------------------------- what verification looks at, too
def test_a_card_that_calls_otherwise_is_found(sdxl, tmp_path):
    student, weights, roles = trained(sdxl)
    folder = export_student(tmp_path / "e", sdxl, student, weights, roles, about={"method": "x"})
    own = trainer_sample(student, sdxl, ["a cat"])
    assert verify(folder, own, sdxl, ["a cat"], 1e-3, "float32") < 1e-3
    card = (folder / "README.md").read_text()
    (folder / "README.md").write_text(card.replace("num_inference_steps=2", "num_inference_steps=1"))
    with pytest.raises(ExportError, match=r"README\.md: its program does not call the pipeline by"):
        verify(folder, own, sdxl, ["a cat"], 1e-3, "float32")
