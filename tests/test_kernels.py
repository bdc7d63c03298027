"""Attention kernels, memory format and compiled blocks: chosen in one place, refused where they would do nothing."""

import pytest
import torch
from torch import nn

from fewstep import kernels
from fewstep.cli import main
from fewstep.errors import RecipeError
from fewstep.roles import RoleConfig, build_role
from fewstep.teachers import load_teacher


@pytest.mark.parametrize(
    "name, told",
    [
        ("flsh", "did you mean flash?"),
        ("xformers", r"pip install 'fewstep\[xformers\]'"),
        ("sage", "sageattention"),
        ("flash_hub", "kernels"),
    ],
)
def test_a_kernel_that_is_unknown_or_not_installed_is_refused_by_name(name, told, monkeypatch):
    find = kernels.importlib.util.find_spec
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda n: None if n == "xformers" else find(n))
    with pytest.raises(RecipeError, match=f"teacher.attention: .*{told}"):
        kernels.check_attention(name)


def test_a_kernel_that_the_network_would_ignore_is_refused(sdxl):
    with pytest.raises(RecipeError, match="does not go through diffusers' dispatcher"):
        kernels.set_attention(sdxl.net, "native")
    for name in kernels.ATTENTION:
        kernels.set_attention(sdxl.net, name)


def test_a_network_that_asks_the_dispatcher_is_given_the_kernel(monkeypatch):
    class Processor:
        _attention_backend = None

    net = nn.Module()
    net.attention = nn.Module()
    net.attention.processor, net.set = Processor(), []
    net.set_attention_backend = net.set.append
    kernels.set_attention(net, "native")
    assert net.set == ["native"]


def test_a_run_with_an_unknown_kernel_ends_before_anything_is_loaded(tmp_path, capsys):
    words = ["--teacher.attention", "flsh", "--output", str(tmp_path / "run")]
    with pytest.raises(SystemExit) as stop:
        main(["train", "emoji_dmd2_4step", *words])
    assert stop.value.code == 2 and "did you mean flash?" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_channels_last_keeps_the_numbers_and_what_shells_share(tiny_sdxl):
    torch.manual_seed(0)
    teacher = load_teacher(str(tiny_sdxl))
    x, t, cond = torch.randn(2, *teacher.latent_shape), torch.tensor([100.0, 800.0]), teacher.blank(2)
    plain = teacher.denoiser.x0(x, t, cond)
    kernels.use_channels_last(teacher.net)
    role = build_role("student", teacher.net, RoleConfig(rank=2))
    kernels.use_channels_last(role.module)
    base = {id(p) for p in teacher.net.parameters()}
    frozen = [p for p in role.module.parameters() if not p.requires_grad]
    assert all(id(p) in base for p in frozen)
    assert teacher.net.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    student = teacher.denoiser.with_net(role.module)
    for denoiser in (teacher.denoiser, student):
        torch.testing.assert_close(denoiser.x0(x, t, cond), plain, rtol=1e-3, atol=1e-3)
    with pytest.raises(RecipeError, match=r"teacher.channels_last: true: Linear is no UNet"):
        kernels.use_channels_last(nn.Linear(2, 2))


@pytest.mark.slow
def test_compiled_blocks_give_the_gradients_of_eager_ones(tiny_sdxl):
    """By dynamo without code generation, which would take minutes of a CPU."""
    torch.manual_seed(0)
    teacher = load_teacher(str(tiny_sdxl))
    x, t, cond = torch.randn(2, *teacher.latent_shape), torch.tensor([100.0, 800.0]), teacher.blank(2)
    role = build_role("student", teacher.net, RoleConfig(rank=2))
    student, gradients = teacher.denoiser.with_net(role.module), []
    for weight in role.weights.values():
        nn.init.normal_(weight, std=0.2)
    for compiled in (False, True):
        if compiled:
            kernels.compile_blocks(role.module, backend="eager", fullgraph=True)
        student.x0(x, t, cond).square().mean().backward()
        gradients.append({name: w.grad.clone() for name, w in role.weights.items()})
        for weight in role.weights.values():
            weight.grad = None
    blocks = [m for m in role.module.modules() if type(m).__name__ == "BasicTransformerBlock"]
    assert blocks and all(block._compiled_call_impl is not None for block in blocks)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def test_compiling_what_names_no_blocks_is_refused():
    with pytest.raises(RecipeError, match=r"teacher.compile: true: Linear"):
        kernels.compile_blocks(nn.Linear(2, 2))


def test_exact_products_restore_the_policy():
    torch.set_float32_matmul_precision("high")
    try:
        with kernels.exact_products():
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
