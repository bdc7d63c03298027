"""Students that are told their guidance, and students of several numbers of steps, in stock diffusers."""

import math

import pytest
import torch

from fewstep import export
from fewstep.diffusion.denoiser import Scalar
from fewstep.diffusion.embedding import with_scalar
from fewstep.diffusion.schedules import Flow
from fewstep.diffusion.times import times_at
from fewstep.errors import FewstepError, RecipeError
from fewstep.export.fold import folded
from fewstep.export.sprint import scm_scheduler
from fewstep.methods.scm import student_of
from fewstep.recipe import RoleConfig
from fewstep.teachers import load_teacher
from fewstep.teachers.tiny import write_tiny_pipeline
from fewstep.training.roles import build_role

PROMPTS = ["red apple", "a cat"]
ANGLES = [[math.pi / 2], [math.pi / 2, 1.3], [math.pi * k / 8 for k in (4, 3, 2, 1)]]
ABOUT = {"title": "x", "method": "sana_sprint", "recipe": "0", "guidance_scale": 4.5, "trained_steps": 0}


SCALAR = Scalar(4.5, scale=0.25)  # not the default, so that an export which forgets it is found out


@pytest.fixture(
    scope="module", params=["SanaPipeline", "StableDiffusion3Pipeline", "StableDiffusionXLPipeline"]
)
def told(request, tmp_path_factory):
    """A teacher, and a student of it that listens to its guidance scale."""
    teacher = load_teacher(str(write_tiny_pipeline(request.param, tmp_path_factory.mktemp("tiny"))))
    role = build_role("student", teacher.net, RoleConfig(kind="full"))
    denoiser = with_scalar(teacher.denoiser.with_net(role.module), "guidance", SCALAR)
    torch.manual_seed(0)
    return teacher, role, denoiser


def speak(role):
    for parameter in role.module.guidance_embedding.parameters():
        parameter.data.normal_(0, 0.3)
    role.collect()
    return {name: weight.detach() for name, weight in role.weights.items()}


def test_the_student_starts_as_the_teacher_and_then_listens_to_its_scale(told):
    teacher, role, denoiser = told
    x, cond = torch.randn(2, *teacher.latent_shape), teacher.encode(PROMPTS)
    t = torch.full((2,), 0.7 * teacher.denoiser.schedule.t_max)
    at = [type(cond)({**cond.tensors, "guidance": torch.full((2,), w)}) for w in (4.0, 5.0)]
    torch.testing.assert_close(denoiser.predict(x, t, at[0]), teacher.denoiser.predict(x, t, cond))
    speak(role)
    low, high = (denoiser.predict(x, t, c) for c in at)
    assert (low - high).abs().max() > 1e-5 and denoiser.predict(x, t, cond).isfinite().all()


def test_stock_diffusers_samples_it_at_every_number_of_steps(told, tmp_path):
    teacher, role, denoiser = told
    weights, student = speak(role), student_of(denoiser, ANGLES)
    own = {s.num_steps: export.trainer_sample(s, teacher, PROMPTS) for s in student.variants()}
    folder = export.export_student(
        tmp_path / "e", teacher, student, {"student": weights}, [role.config], about=ABOUT
    )
    for steps, sample in own.items():
        assert export.verify(folder, sample, teacher, PROMPTS, 1e-4, "float32", steps=steps) < 1e-4
    pipe, record = export.load_exported(folder, teacher.source)
    sprint = teacher.pipeline_class == "SanaPipeline"
    assert type(pipe).__name__ == ("SanaSprintPipeline" if sprint else teacher.pipeline_class)
    assert list(record["steps"]) == ["1", "2", "4"]
    with pytest.raises(FewstepError, match="trained for 1, 2, 4"):
        export.at_steps(record, 3)


def test_folding_the_scale_into_a_bias_is_exact(told):
    teacher, role, denoiser = told
    weights = folded(speak(role), teacher.net, "guidance", SCALAR)
    assert weights.keys() == dict(teacher.net.named_parameters()).keys()
    plain = build_role("student", teacher.net, RoleConfig(kind="full")).module
    plain.load_state_dict({**plain.state_dict(), **weights})
    x, cond = torch.randn(2, *teacher.latent_shape), teacher.encode(PROMPTS)
    t = torch.full((2,), 0.4 * teacher.denoiser.schedule.t_max)
    with torch.no_grad():
        difference = denoiser.predict(x, t, cond) - teacher.denoiser.with_net(plain).predict(x, t, cond)
    assert difference.abs().max() < 1e-5


def test_a_lora_carries_the_scale_only_where_it_folds_into_the_time_embedding(told):
    teacher, _, denoiser = told
    student = student_of(denoiser, ANGLES)
    if teacher.pipeline_class == "SanaPipeline":  # SanaSprintPipeline's network is told the scale
        with pytest.raises(RecipeError, match=r"roles.student.kind: lora: .*use full"):
            export.check_exportable(student, [RoleConfig(kind="lora")], teacher)
        return
    export.check_exportable(student, [RoleConfig(kind="lora")], teacher)
    with pytest.raises(RecipeError, match=r"roles.student.targets: .*linear_1 must stay as it is"):
        export.check_exportable(student, [RoleConfig(kind="lora", targets=["linear_1"])], teacher)


@pytest.mark.parametrize("angles", ANGLES)
def test_scm_scheduler_takes_the_trained_angles_and_its_output_is_the_x0_prediction(angles):
    scheduler, call = scm_scheduler(times_at(Flow(), angles), 4.5)
    names = ("num_inference_steps", "max_timesteps", "intermediate_timesteps")
    scheduler.set_timesteps(**{name: call[name] for name in names})
    torch.testing.assert_close(scheduler.timesteps, torch.tensor([*angles, 0.0]), rtol=0, atol=1e-6)
    assert (call["intermediate_timesteps"] is None) == (len(angles) != 2)
    x, F = torch.randn(2, 1, 4, 4, 4)
    scheduler.set_begin_index(0)
    x0 = scheduler.step(F, scheduler.timesteps[0], x, return_dict=False)[1]
    torch.testing.assert_close(x0, math.cos(angles[0]) * x - math.sin(angles[0]) * F, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "angles, message", [([1.5683, 1.3], "first time of 1.5683"), ([math.pi / 2, 1.3, 1.1, 0.6], "even grid only")]
)  # fmt: skip
def test_angles_that_the_stock_pipeline_cannot_take_are_refused(angles, message):
    with pytest.raises(RecipeError, match=message):
        scm_scheduler(times_at(Flow(), angles), 4.5)
