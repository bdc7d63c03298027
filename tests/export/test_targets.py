"""One way out for every student: which it is, who refuses, and experts that were trained each in their own way."""

import json

import pytest
import torch
from routing import Encoded
from safetensors.torch import load_file

from fewstep.diffusion.denoiser import Scalar
from fewstep.diffusion.embedding import with_scalar
from fewstep.diffusion.student import Student
from fewstep.diffusion.times import chosen_times
from fewstep.errors import FewstepError, RecipeError
from fewstep.export import (
    check_exportable,
    export_student,
    load_exported,
    stock_sample,
    trainer_sample,
    verify,
)
from fewstep.export.write import target_of
from fewstep.methods.router import RoutedStudent, Router
from fewstep.recipe import RoleConfig
from fewstep.teachers import load_teacher
from fewstep.teachers.pipelines import network_of
from fewstep.teachers.tiny import write_tiny_pipeline
from fewstep.training.roles import build_role

LORA, FULL = RoleConfig(rank=4, alpha=2), RoleConfig(kind="full")
PROMPTS = ["red apple", "a cat"]


@pytest.fixture(scope="module")
def sd15(tmp_path_factory):
    return load_teacher(str(write_tiny_pipeline("StableDiffusionPipeline", tmp_path_factory.mktemp("sd15"))))


def way(teacher, student, *roles):
    return type(target_of(teacher, student, roles)).__name__


def test_every_student_has_a_way_out(sd15, tmp_path):
    def other(pipeline_class):
        return load_teacher(str(write_tiny_pipeline(pipeline_class, tmp_path / pipeline_class)))

    one, two = Student(sd15.denoiser, [999]), Student(sd15.denoiser, [999, 499], roles=["a", "b"])
    assert way(sd15, one, LORA) == "Lora" and way(sd15, one, FULL) == "Whole"
    assert way(sd15, two, LORA, LORA) == "Lora" and way(sd15, two, FULL, FULL) == "Whole"
    parts = RoutedStudent([Student(sd15.denoiser, [999], roles=[name]) for name in "ab"], Router(2))
    assert way(sd15, parts, LORA, LORA) == way(sd15, parts, FULL, FULL) == "Routed"
    pixart, sana = other("PixArtAlphaPipeline"), other("SanaPipeline")
    assert way(pixart, Student(pixart.denoiser, [999]), LORA) == "Merged"
    net = build_role("student", sana.net, FULL).module
    told = with_scalar(sana.denoiser.with_net(net), "guidance", Scalar(4.5))
    assert way(sana, Student(told, [1.0]), FULL) == "Sprint"
    assert way(sana, Student(sana.denoiser, [1.0]), FULL) == "Whole"
    var = other("VARPipeline")
    assert way(var, Student(var.denoiser, [1.0]), FULL) == "Tokens"
    with pytest.raises(
        RecipeError, match="layers that the teacher lacks, so it is no adapter of it; use full"
    ):
        check_exportable(Student(var.denoiser, [1.0]), [LORA], var)
    with pytest.raises(RecipeError, match="expected the same kind for every student"):
        check_exportable(two, [LORA, FULL], sd15)
    assert way(pixart, Student(pixart.denoiser, [999, 499], roles=["a", "b"]), LORA, LORA) == "Merged"


def experts_of(teacher, configs, std=0.05, turns="ab"):
    """Roles whose weights are of sizes that no two share, and the student of one step each, or of these turns."""
    roles = [build_role(name, teacher.net, config) for name, config in zip("abc", configs)]
    g = torch.Generator().manual_seed(1)
    for role in roles:
        for weight in role.weights.values():
            weight.data = weight.data + std * torch.randn(weight.shape, generator=g)
    nets = {role.name: teacher.denoiser.with_net(role.module) for role in roles}
    times = chosen_times(teacher.denoiser.schedule, len(turns))
    return roles, Student([nets[name] for name in turns], times, "ddim", list(turns))


def exported(teacher, roles, student, folder, **edition):
    weights = {role.name: role.final_weights() for role in roles}
    about, configs = {"method": "x", "prompt": "0"}, [role.config for role in roles]
    check_exportable(student, configs, teacher)
    return export_student(folder / "e", teacher, student, weights, configs, about=about, **edition)


def test_experts_are_exported_each_with_its_own_strength(sd15, tmp_path):
    roles, student = experts_of(sd15, [RoleConfig(rank=4, alpha=2), RoleConfig(rank=2, alpha=8)])
    folder = exported(sd15, roles, student, tmp_path)
    own = trainer_sample(student, sd15, PROMPTS)
    scale = own.abs().max().item()
    assert verify(folder, own, sd15, PROMPTS, 1e-4 * scale, "float32") < 1e-4 * scale


@pytest.mark.parametrize("name", ["SD 1.5", "PixArt-alpha", "DiT", "UNet2D", "UNet2D by class", "EDM"])
def test_experts_that_are_networks_follow_one_another(name, teachers, tmp_path, monkeypatch):
    teacher = teachers(name)
    prompts = PROMPTS if hasattr(teacher.pipe, "encode_prompt") else ["0", "1"]
    roles, student = experts_of(teacher, [FULL if name == "SD 1.5" else LORA] * 2)
    folder = exported(teacher, roles, student, tmp_path)
    record = json.loads((folder / "fewstep.json").read_text())
    assert record["experts"] == ["a", "b"] and sorted(p.name for p in folder.iterdir() if p.is_dir()) == [
        *("b", "pipeline", "scheduler")
    ]
    own = trainer_sample(student, teacher, prompts)
    other = Student(student.denoisers[::-1], student.times, "ddim", student.roles[::-1])
    wrong, scale = trainer_sample(other, teacher, prompts), own.abs().max().item()
    assert (own - wrong).abs().max() > 1e-3 * scale  # otherwise nothing would be proved
    assert verify(folder, own, teacher, prompts, 1e-4 * scale, "float32") < 1e-4 * scale
    pipe, _ = load_exported(folder)
    stock_sample(pipe, record, teacher, prompts)
    next(network_of(pipe).turns)  # a call that was interrupted
    again, decoded = (
        stock_sample(pipe, record, teacher, prompts[:1], 3),
        trainer_sample(student, teacher, prompts[:1], 3),
    )
    if not teacher.draws_latents:
        decoded = teacher.pixels(decoded).cpu()
    assert (again - decoded).abs().max() < 1e-4 * scale
    monkeypatch.chdir(folder)
    code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    names: dict = {}
    exec(code.rpartition("image = ")[0], names)
    if teacher.pipeline_class == "DDPMPipeline":  # whose call says no label: the program has bound one
        g = torch.Generator().manual_seed(3)
        images = names["pipe"](batch_size=1, generator=g, output_type="np", **record["call"]).images
        made = torch.from_numpy(images).permute(0, 3, 1, 2) * 2 - 1
    else:
        made = stock_sample(names["pipe"], {**record, "experts": None}, teacher, prompts[:1], 3)
    assert (made - decoded).abs().max() < 1e-4 * scale


def card_of(folder):
    return (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]


@pytest.mark.parametrize("turns", ["aabb", "abbc"])
def test_experts_that_are_networks_keep_their_turns_and_each_its_strength(
    turns, teachers, tmp_path, monkeypatch
):
    teacher = teachers("PixArt-alpha")
    configs = [RoleConfig(rank=4, alpha=2), RoleConfig(rank=4, alpha=8), RoleConfig(rank=4, alpha=4)]
    roles, student = experts_of(teacher, configs[: len(set(turns))], 0.2, turns)
    folder = exported(teacher, roles, student, tmp_path)
    own = trainer_sample(student, teacher, PROMPTS)
    scale = own.abs().max().item()
    assert verify(folder, own, teacher, PROMPTS, 1e-4 * scale, "float32") < 1e-4 * scale
    _, record = load_exported(folder)
    monkeypatch.chdir(folder)
    names: dict = {}
    exec(card_of(folder).rpartition("image = ")[0], names)
    made = stock_sample(names["pipe"], {**record, "experts": None}, teacher, PROMPTS)
    assert (made - own).abs().max() < 1e-4 * scale


def test_experts_that_are_networks_run_in_half_precision(teachers, tmp_path, monkeypatch):
    teacher = teachers("PixArt-alpha")
    roles, student = experts_of(teacher, [LORA, LORA])
    folder = exported(teacher, roles, student, tmp_path)
    pipe, record = load_exported(folder, dtype="bfloat16")
    assert {p.dtype for p in network_of(pipe).parameters()} == {torch.bfloat16}
    monkeypatch.chdir(folder)
    code = card_of(folder).rpartition("image = ")[0]
    names = {"torch": torch}
    exec(code.replace("'./pipeline'", "'./pipeline', torch_dtype=torch.bfloat16"), names)
    made = stock_sample(names["pipe"], {**record, "experts": None}, teacher, PROMPTS)
    assert made.equal(stock_sample(pipe, record, teacher, PROMPTS))
    assert names["pipe"].transformer.b is not None  # part of what the pipeline moves


def test_parts_that_are_networks_run_in_half_precision(teachers, tmp_path, monkeypatch):
    """Three of them, each for a prompt of its own: none has another's place."""
    teacher, prompts = teachers("PixArt-alpha"), ["red apple", "a dog on a skateboard", "blue square"]
    roles, experts = experts_of(teacher, [LORA] * 3, 0.5, "abca")
    times = experts.times[::2]  # two steps each
    parts = [Student([d, d], times, "ddim", [n, n]) for d, n in zip(experts.denoisers, "abc")]
    router = Router(3)
    router.fit(Encoded(teacher.encode(prompts)))
    student = RoutedStudent(parts, router)
    folder = exported(teacher, roles, student, tmp_path)
    own = trainer_sample(student, teacher, prompts)
    scale = own.abs().max().item()
    assert len(set(router(teacher.encode(prompts)).tolist())) == 3
    assert verify(folder, own, teacher, prompts, 2e-6 * scale, "float32") < 2e-6 * scale
    pipe, record = load_exported(folder, dtype="bfloat16")
    assert {p.dtype for p in network_of(pipe.pipe).parameters()} == {torch.bfloat16}
    made = stock_sample(pipe, record, teacher, prompts)
    assert (made - own).abs().max() < 0.1 * scale
    monkeypatch.chdir(folder)
    code = card_of(folder).replace("/pipeline')\n", "/pipeline', torch_dtype=torch.bfloat16)\n", 1)
    exec(code, {"torch": torch})
    assert (folder / "image.png").is_file()


def test_a_teacher_that_is_gone_is_asked_for(tmp_path):
    record = {"kind": "lora", "num_steps": 1, "scheduler": "DDIMScheduler", "teacher": str(tmp_path / "gone")}
    (tmp_path / "fewstep.json").write_text(json.dumps(record))
    with pytest.raises(
        FewstepError, match=r"its teacher, .*gone, is not there; say where it is with --teacher"
    ):
        load_exported(tmp_path)


@pytest.mark.parametrize("config", [LORA, FULL])
def test_experts_that_are_networks_are_written_in_the_dtype_that_is_asked_for(
    config, teachers, tmp_path, capfd
):
    teacher = teachers("PixArt-alpha")
    roles, student = experts_of(teacher, [config] * 2)
    folder = exported(teacher, roles, student, tmp_path, dtype="float16")
    assert "Writing" not in capfd.readouterr().err  # a bar of a library's
    for place in ("pipeline/transformer", "b"):
        held = load_file(folder / place / "diffusion_pytorch_model.safetensors")
        assert {value.dtype for value in held.values()} == {torch.float16}, place


def test_experts_of_a_pipeline_that_keeps_the_text_of_its_first_step_make_it_anew(teachers, tmp_path):
    teacher = teachers("Qwen-Image-2.1")
    roles, student = experts_of(teacher, [LORA, LORA], 0.1)
    folder = exported(teacher, roles, student, tmp_path)
    own = trainer_sample(student, teacher, PROMPTS[:1])
    scale = own.abs().max().item()
    assert verify(folder, own, teacher, PROMPTS[:1], 1e-3 * scale, "float32") < 1e-3 * scale
    assert "use_kv_cache=False" in (folder / "README.md").read_text()
