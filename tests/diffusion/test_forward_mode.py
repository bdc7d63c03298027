"""Forward-mode derivatives on the networks that are distilled: exact against differences, and refused where absent."""

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_map
from zoo import RESOLUTION, ZOO

from fewstep.diffusion.consistency import central_difference, forward_mode
from fewstep.diffusion.denoiser import ScheduleView
from fewstep.diffusion.schedules import TrigFlow
from fewstep.errors import RecipeError
from fewstep.methods.scm import SCM, Consistency
from fewstep.recipe import RoleConfig
from fewstep.runs.prepare import check_stiffness
from fewstep.teachers import load_teacher
from fewstep.teachers.tiny import write_tiny_pipeline
from fewstep.training.roles import build_role

KINDS = [
    name for name in ZOO if name not in ("SD 2.1, v", "FLUX.1-schnell", "PixArt-alpha", "Qwen-Image-Edit")
]  # others' networks


@pytest.fixture(scope="module", params=KINDS)
def teacher(request, teachers):
    return teachers(request.param)


def inputs(teacher):
    torch.manual_seed(0)
    x, ode = torch.randn(2, 2, *teacher.latent_shape)
    t = torch.tensor([0.6, 1.2], dtype=torch.float64)
    return x, t, ode, teacher.encode(["0", "1"])  # texts or labels


def velocity_of(denoiser, cond):
    seen = ScheduleView(denoiser, TrigFlow())
    return lambda x, t: seen.predict("v", x, t, cond)


@torch.no_grad()
def test_forward_mode_agrees_with_the_difference_and_with_the_plain_forward(teacher):
    x, t, ode, cond = inputs(teacher)
    velocity = velocity_of(teacher.denoiser.exact(), cond)
    primal, exact = forward_mode(velocity, x, t, ode)
    mean, estimate = central_difference(velocity, x, t, ode, 1e-4)
    plain = velocity_of(teacher.denoiser, cond)(x, t)
    assert (primal - plain).abs().max() < 1e-5 * plain.abs().max()
    if (
        teacher.pipeline_class == "HiDreamImagePipeline"
    ):  # tokens jump where they change experts: test_hidream.py
        return
    assert (mean - plain).abs().max() < 1e-3 * plain.abs().max()
    assert (estimate - exact).norm() < 1e-2 * exact.norm() and exact.norm() > 1e-3


@torch.no_grad()
def test_tangents_are_the_same_in_train_mode_with_recomputation_and_through_an_adapter(teacher):
    x, t, ode, cond = inputs(teacher)
    plain = forward_mode(velocity_of(teacher.denoiser.exact(), cond), x, t, ode)
    adapts = getattr(teacher.net, "lora_targets", None) != []  # EDM2 takes none
    role = build_role("student", teacher.net, RoleConfig(kind="lora" if adapts else "full", rank=2, alpha=2))
    role.module.train()
    role.module.enable_gradient_checkpointing()
    shell = teacher.denoiser.with_net(role.module).exact()
    try:
        through = forward_mode(velocity_of(shell, cond), x, t, ode)
    finally:
        role.module.disable_gradient_checkpointing()
    for a, b in zip(plain, through):  # the adapter starts as the identity
        assert (a - b).norm() < 1e-4 * a.norm()


@torch.no_grad()
@pytest.mark.parametrize("pipeline_class", ["QwenImagePipeline", "ZImagePipeline"])
def test_a_network_keeps_nothing_of_a_derivative(pipeline_class, tmp_path):
    """They make tables of positions in their first call and keep them; here it is the one that is differentiated."""
    teacher = load_teacher(
        str(write_tiny_pipeline(pipeline_class, tmp_path)), resolution=RESOLUTION[pipeline_class]
    )
    x, t, ode, cond = inputs(teacher)
    forward_mode(velocity_of(teacher.denoiser.exact(), cond), x, t, ode)
    full = build_role("student", teacher.net, RoleConfig(kind="full"))
    seen = velocity_of(teacher.denoiser.with_net(full.module), cond)(x, t)
    assert torch.equal(seen, velocity_of(teacher.denoiser, cond)(x, t))


def test_autocast_around_the_loss_does_not_reach_the_tangent(teacher):
    """Convolutions raise an error, attention a silent rounding, if it does."""
    x, t, ode, cond = inputs(teacher)
    term = Consistency(SCM.Config(), teacher.denoiser, teacher.denoiser)
    expected = term.derivative(x, t, ode, cond)
    with torch.autocast("cpu", torch.bfloat16):
        inside = term.derivative(x, t, ode, cond)
    assert all(a.equal(b) for a, b in zip(expected, inside))


def test_the_teachers_autocast_is_off_for_the_tangent_and_on_for_the_rest(teacher):
    from copy import copy

    rounded = copy(teacher.denoiser)
    rounded.autocast = torch.bfloat16
    term = Consistency(SCM.Config(), rounded, rounded)
    x, t, ode, cond = inputs(teacher)
    exact = velocity_of(teacher.denoiser, cond)(x, t)
    assert (term.derivative(x, t, ode, cond)[0] - exact).abs().max() < 1e-4
    assert (term.student.predict("v", x, t, cond) - exact).abs().max() > 1e-4


class Opaque(torch.autograd.Function):
    """An operation with a backward and no forward-mode derivative, as fused kernels are."""

    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 2


class WithOpaque(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net, self.config = net, net.config

    def forward(self, x, *args, **options):
        return self.net(tree_map(Opaque.apply, x), *args, **options)


def test_a_network_without_forward_mode_is_refused_with_the_remedy(teacher):
    denoiser = teacher.denoiser.with_net(WithOpaque(teacher.net))
    shape = teacher.latent_shape
    with pytest.raises(
        RecipeError, match=r"method.tangent: forward: WithOpaque .*set method.tangent difference"
    ):
        SCM(SCM.Config(), teacher.denoiser, shape, student=denoiser)
    SCM(SCM.Config(tangent="difference"), teacher.denoiser, shape, student=denoiser)
    with pytest.raises(RecipeError, match=r"prepare: stiffness: WithOpaque .*method.tangent difference"):
        check_stiffness(denoiser, shape)
    check_stiffness(teacher.denoiser, shape)


def test_half_precision_weights_are_refused_with_the_remedy(tmp_path):
    path = write_tiny_pipeline("StableDiffusionPipeline", tmp_path)
    teacher = load_teacher(str(path), dtype="bfloat16")
    with pytest.raises(RecipeError, match=r"teacher.dtype: bfloat16: .*roles.student.kind full"):
        SCM(SCM.Config(), teacher.denoiser, teacher.latent_shape, student=teacher.denoiser)
