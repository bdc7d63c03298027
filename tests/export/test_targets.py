"""One way out for every student: which it is, who refuses, and experts that were trained each in their own way."""

import pytest
import torch

from fewstep.diffusion.denoiser import Scalar
from fewstep.diffusion.embedding import with_scalar
from fewstep.diffusion.student import Student
from fewstep.errors import RecipeError
from fewstep.export import check_exportable, export_student, trainer_sample, verify
from fewstep.export.write import target_of
from fewstep.methods.router import RoutedStudent, Router
from fewstep.recipe import RoleConfig
from fewstep.teachers import load_teacher
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
    assert way(sd15, two, LORA, LORA) == "Switched"
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
    with pytest.raises(RecipeError, match="LoRAs that are switched; use lora"):
        check_exportable(two, [FULL, FULL], sd15)
    both = Student(pixart.denoiser, [999, 499], roles=["a", "b"])
    with pytest.raises(RecipeError, match="PixArtAlphaPipeline loads none; choose a method with one student"):
        check_exportable(both, [LORA, LORA], pixart)


def test_experts_are_exported_each_with_its_own_strength(sd15, tmp_path):
    configs = [RoleConfig(rank=4, alpha=2), RoleConfig(rank=2, alpha=8)]
    roles = [build_role(name, sd15.net, config) for name, config in zip("ab", configs)]
    g = torch.Generator().manual_seed(1)
    for role in roles:
        for weight in role.weights.values():
            weight.data = weight.data + 0.05 * torch.randn(weight.shape, generator=g)
    denoisers = [sd15.denoiser.with_net(role.module) for role in roles]
    student = Student(denoisers, [999, 499], roles=["a", "b"])
    weights = {role.name: role.final_weights() for role in roles}
    folder = export_student(tmp_path / "e", sd15, student, weights, configs, about={"method": "x"})
    own = trainer_sample(student, sd15, PROMPTS)
    scale = own.abs().max().item()
    assert verify(folder, own, sd15, PROMPTS, 1e-4 * scale, "float32") < 1e-4 * scale
