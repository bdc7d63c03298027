"""Autocast, attention kernels, memory format, compiled blocks: chosen in one place, refused where they do nothing."""

import os
import platform
import subprocess
import sys

import pytest
import torch
from torch import nn

from fewstep.cli import main
from fewstep.diffusion import kernels
from fewstep.errors import RecipeError
from fewstep.recipe import RoleConfig
from fewstep.teachers import load_teacher
from fewstep.training.roles import build_role


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


@pytest.mark.parametrize("name", ["efficient", "cudnn"])
def test_a_kernel_that_the_device_has_not_is_refused_before_anything_is_loaded(name, capsys):
    with pytest.raises(
        RecipeError, match=f"teacher.attention: {name}: torch has no such kernel for cpu in bfloat16"
    ):
        kernels.check_attention(name, "cpu", "bfloat16")
    for fine in ("auto", "sdpa", "math"):
        kernels.check_attention(fine, "cpu", None)
    words = ["--teacher.attention", name, "--train.device", "cpu", "--smoke"]
    with pytest.raises(SystemExit) as stop:
        main(["train", "emoji_dmd2_1step", *words])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and f"teacher.attention: {name}" in said and len(said.splitlines()) == 1


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


@pytest.mark.parametrize(
    "kind, units, dtype, told",
    [
        ("cpu", True, "bfloat16", "it has units"),
        ("cpu", False, None, "fp32 is faster"),
        ("cuda", True, "bfloat16", "it has units"),
        ("cuda", False, "float16", "losses are scaled"),
        ("mps", None, None, "torch does not say"),
    ],
)
def test_auto_means_bf16_where_there_are_units_for_it_and_says_why(kind, units, dtype, told):
    assert (
        kernels.choose_autocast(kind, units)[0] == dtype and told in kernels.choose_autocast(kind, units)[1]
    )


@pytest.mark.parametrize(
    "kind, autocast, positions, name",
    [
        ("cpu", "bfloat16", 64, "math"),
        ("cpu", "bfloat16", kernels.FEW + 1, "sdpa"),
        ("cpu", None, 64, "sdpa"),
        ("cuda", "bfloat16", 64, "sdpa"),
    ],
)
def test_only_few_tokens_in_bf16_on_a_cpu_are_not_left_to_torch(kind, autocast, positions, name):
    assert kernels.choose_attention(kind, autocast, positions)[0] == name
    assert kernels.attention_for("flash", kind, autocast, positions) == "flash"


@pytest.mark.parametrize("units, dtype, attention", [(True, torch.bfloat16, "math"), (False, None, "sdpa")])
def test_a_teacher_and_all_that_is_made_from_it_compute_as_auto_was_decided(
    units, dtype, attention, tiny_sdxl, teachers, monkeypatch
):
    monkeypatch.setattr(kernels, "bf16_units", lambda device: units)
    small = load_teacher(str(tiny_sdxl), resolution=16, autocast="auto")  # 8 x 8 latents
    large = load_teacher(str(tiny_sdxl), resolution=32, autocast="auto")  # 16 x 16
    tokens = load_teacher("builtin:emoji-ar", autocast="auto").to("cpu")
    for teacher, kernel in ((small, attention), (large, "sdpa"), (tokens, attention)):
        seen = [teacher.denoiser, teacher.denoiser.with_net(nn.Linear(2, 2))]
        assert [(d.autocast, d.attention) for d in seen] == [(dtype, kernel)] * 2
    asked = load_teacher(str(tiny_sdxl), resolution=16, autocast="bfloat16", attention="flash")
    assert (asked.denoiser.autocast, asked.denoiser.attention) == (torch.bfloat16, "flash")


def test_another_limit_of_the_instructions_is_another_choice():
    """In a process of its own, since oneDNN reads it once; an older processor is one with fewer instructions."""
    script = "from fewstep.diffusion.kernels import autocast_for; print(autocast_for('auto', 'cpu'))"
    words = [sys.executable, "-c", script]
    done = subprocess.run(
        words, capture_output=True, text=True, env={**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}
    )
    if platform.machine() in ("x86_64", "AMD64"):
        assert done.stdout == "None\n"


@pytest.mark.parametrize("kernel", ["math", "flash"])
def test_recomputed_activations_are_those_of_the_forwards_kernel(kernel, tiny_sdxl):
    """Each keeps other tensors for its backward, so another one there is an error at best."""
    torch.manual_seed(0)
    teacher = load_teacher(str(tiny_sdxl), attention=kernel)
    x, t, cond = torch.randn(2, *teacher.latent_shape), torch.tensor([100.0, 800.0]), teacher.blank(2)
    gradients = []
    for recompute in (False, True):
        if recompute:
            teacher.net.train()
            kernels.checkpoint_blocks(teacher.net)
        x = x.detach().requires_grad_()
        teacher.denoiser.x0(x, t, cond).square().mean().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients)


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
