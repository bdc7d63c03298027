"""Frozen weights in fewer bits or in the host's memory: gradients are those through the weights themselves."""

import copy
import importlib.util

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

from fewstep.diffusion import frozen
from fewstep.diffusion.kernels import checkpoint_blocks
from fewstep.errors import RecipeError
from fewstep.recipe import RoleConfig
from fewstep.teachers import load_teacher
from fewstep.training.roles import build_role

HAS = {name: importlib.util.find_spec(name) is not None for name in ("bitsandbytes", "torchao")}
needs_bnb = pytest.mark.skipif(not HAS["bitsandbytes"], reason="bitsandbytes is not installed")
WAYS = [("int8", False), ("fp8", True), (None, True), pytest.param("nf4", False, marks=needs_bnb)]


def one(kind, host=False, dtype=torch.float32, inputs=96, outputs=64):
    torch.manual_seed(0)
    layer = nn.Linear(inputs, outputs).to(dtype).requires_grad_(False)
    kept = copy.deepcopy(layer)
    frozen._freeze(kept, frozen.FrozenLinear, kind, host)
    return layer, kept


# -------------------------------------------------------------------------------------------------------------- numbers
def test_int8_is_a_step_of_each_outputs_own_range():
    """Largest weight 127.5 steps: the error is at most half of one, and a whole one where 127.5 is rounded to 127."""
    layer, kept = one("int8")
    step = layer.weight.abs().amax(1, keepdim=True) / 127.5
    off = (kept.weight - layer.weight).abs() / step
    assert 0.3 < off.max() <= 0.5001 and off.mean() == pytest.approx(0.25, abs=0.02)
    assert kept.store.nbytes == 96 * 64 + 4 * 64


def test_fp8_has_three_bits_behind_the_first():
    layer, kept = one("fp8")
    off = ((kept.weight - layer.weight) / layer.weight).abs()[
        layer.weight.abs() > layer.weight.abs().max() / 100
    ]
    assert 0.05 < off.max() <= 1 / 16 + 1e-3
    torch.testing.assert_close(kept.store.parts[0].float().abs().amax(1), torch.full((64,), 448.0))
    assert kept.store.nbytes == 96 * 64 + 4 * 64


@needs_bnb
def test_nf4_is_the_nearest_of_sixteen_quantiles_in_blocks_of_64():
    code = [-1, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0]
    code = torch.tensor([*code, 0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.7230, 1])
    layer, kept = one("nf4")
    blocks = layer.weight.view(-1, 64)
    most = blocks.abs().amax(1, keepdim=True)
    nearest = code[(blocks / most).unsqueeze(-1).sub(code).abs().argmin(-1)] * most
    # On CPUs with AVX-512 its kernel rounds to bf16, whatever is asked for.
    torch.testing.assert_close(kept.weight.view(-1, 64), nearest, atol=0, rtol=2**-8)
    assert kept.store.nbytes == 96 * 64 // 2 + 4 * 96 * 64 // 64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["int8", "fp8", "nf4"])
def test_numbers_are_those_of_the_libraries_that_diffusers_configures(kind, dtype):
    if kind == "nf4":
        bnb = pytest.importorskip("bitsandbytes")
    layer, kept = one(kind, dtype=dtype, inputs=128)
    if kind == "nf4":
        theirs = bnb.nn.Linear4bit(128, 64, compute_dtype=dtype, quant_type="nf4")
        theirs.weight = bnb.nn.Params4bit(
            layer.weight.clone(), requires_grad=False, compress_statistics=False, quant_type="nf4"
        )
        weight = theirs.to("cpu").weight
        expected = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
    else:
        ao = pytest.importorskip("torchao.quantization")
        config = getattr(ao, {"int8": "Int8WeightOnlyConfig", "fp8": "Float8WeightOnlyConfig"}[kind])
        theirs = copy.deepcopy(layer)
        ao.quantize_(theirs, config())
        expected = theirs.weight.dequantize()
    assert kept.weight.dtype == dtype and torch.equal(kept.weight, expected.to(dtype))


# ------------------------------------------------------------------------------------------------------------ gradients
def trained(teacher, autocast, recomputed):
    """x0 of an adapter that is not the identity, and the gradients of its weights and of the input."""
    if recomputed:
        checkpoint_blocks(teacher.net)
    role = build_role("student", teacher.net, RoleConfig(rank=2))
    torch.manual_seed(1)
    for weight in role.weights.values():
        weight.data.copy_(0.05 * torch.randn_like(weight))
    denoiser = teacher.denoiser.with_net(role.module)
    denoiser.autocast = autocast
    x = torch.randn(2, *teacher.latent_shape, requires_grad=True)
    out = denoiser.x0(x, torch.tensor([300.0, 800.0]), teacher.encode(["red apple", "a dog"]))
    out.square().mean().backward()
    return [out.detach(), x.grad, *(weight.grad for weight in role.weights.values())]


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize(("kind", "host"), WAYS)
def test_gradients_of_an_adapter_are_those_through_the_whole_weights_bit_for_bit(
    tiny_sdxl, kind, host, autocast
):
    teacher, whole = (load_teacher(str(tiny_sdxl), quantization=kind, offload=host) for _ in range(2))
    frozen.plain(whole.net)
    assert len(frozen.stored(teacher.net)) > 20 and not frozen.stored(whole.net)
    found = trained(teacher, autocast, recomputed=autocast is not None)
    expected = trained(whole, autocast, recomputed=autocast is not None)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert all(gradient.abs().max() > 0 for gradient in found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lower", [torch.bfloat16, torch.float16])
def test_autocast_rounds_what_a_kept_weight_is_multiplied_with_as_it_does_elsewhere(dtype, lower):
    """Inputs in fp32 too, which a tiny network has nowhere."""
    layer, kept = one(None, host=True, dtype=dtype)
    found = []
    for one_of in (layer, kept):
        torch.manual_seed(1)
        x = torch.randn(2, 5, 96, requires_grad=True)
        with torch.autocast("cpu", lower):
            out = one_of(x)
        out.float().square().mean().backward()
        found.append((out, x.grad))
    assert found[0][0].dtype == found[1][0].dtype == lower and found[1][1].dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_what_is_kept_goes_where_its_layer_goes_and_of_the_host_it_stays():
    for kind, host, place in (("int8", False, "meta"), ("int8", True, "cpu"), (None, True, "cpu")):
        kept = one(kind, host)[1].to("meta")
        assert {part.device.type for part in kept.store.parts} == {place} and kept.place.type == "meta"


def test_between_forward_and_backward_no_copy_of_a_weight_is_kept():
    """What autograd of an ordinary layer keeps of it is its weight, on the device."""
    layer, kept = one(None, host=True)
    x, saved = torch.randn(2, 5, 96, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x)
        assert [t.numel() for t in saved] == [96 * 64]
        saved.clear()
        kept(x)
        assert not saved


def test_hooks_that_move_a_weight_back_after_the_forward_would_change_gradients():
    """Of convolutions, by ``param.data``, as diffusers' group offloading does; of linear layers the copy is kept."""
    layer = nn.Conv2d(4, 4, 3).requires_grad_(False)
    kept = copy.deepcopy(layer)
    frozen._freeze(kept, frozen.FrozenConv2d, None, True)
    gradients = []
    for one_of in (layer, kept):
        x = torch.zeros(1, 4, 3, 3, requires_grad=True)
        out = one_of(x)
        if one_of is layer:
            expected = layer.weight.sum(0)
            layer.weight.data = torch.zeros_like(layer.weight)  # on a GPU: on the CPU
        out.sum().backward()
        gradients.append(x.grad[0])
    assert not gradients[0].any()
    torch.testing.assert_close(gradients[1], expected)


def test_a_derivative_goes_forward_too():
    layer, kept = one("int8")
    frozen_weight = kept.weight
    x, direction = torch.randn(2, 3, 96), torch.randn(2, 3, 96)
    with forward_ad.dual_level():
        out, slope = forward_ad.unpack_dual(kept(forward_ad.make_dual(x, direction)))
    torch.testing.assert_close(out, x @ frozen_weight.T + layer.bias)
    torch.testing.assert_close(slope, direction @ frozen_weight.T)


@pytest.mark.parametrize(("width", "how"), [(8, {"stride": 2, "groups": 2}), (32, {})])
def test_convolutions_of_channels_last_have_autograds_own_gradient(width, how):
    torch.manual_seed(0)
    layer = nn.Conv2d(width, width, 3, padding=1, **how).requires_grad_(False)
    kept = copy.deepcopy(layer)
    frozen._freeze(kept, frozen.FrozenConv2d, None, True)
    for layout in (torch.contiguous_format, torch.channels_last):
        gradients = []
        for one_of in (layer, kept):
            torch.manual_seed(1)
            x = torch.randn(2, width, 16, 16).to(memory_format=layout).requires_grad_()
            one_of(x).square().sum().backward()
            gradients.append(x.grad)
        assert torch.equal(*gradients)


# --------------------------------------------------------------------------------------------------------------- copies
def test_shells_share_what_is_kept_and_a_whole_copy_has_weights_of_its_own(tiny_sdxl):
    teacher = load_teacher(str(tiny_sdxl), offload=True)
    before = {name: value.clone() for name, value in load_teacher(str(tiny_sdxl)).net.named_parameters()}
    lora, full = (
        build_role("student", teacher.net, RoleConfig(kind=kind, rank=2)) for kind in ("lora", "full")
    )
    stores = [{id(layer.store) for layer in frozen.stored(net)} for net in (teacher.net, lora.module)]
    assert stores[0] == stores[1] and not frozen.stored(full.module)
    assert full.weights.keys() == before.keys()
    assert all(torch.equal(full.weights[name], value) for name, value in before.items())
    for weight in full.weights.values():
        weight.data.add_(1)
    whole = frozen.whole_weights(teacher.net)
    assert all(torch.equal(whole[name], value) for name, value in before.items())
    full.restart()
    assert all(torch.equal(full.weights[name], value) for name, value in before.items())
    assert teacher.net.state_dict().keys() == load_teacher(str(tiny_sdxl)).net.state_dict().keys()
    assert frozen.numel(teacher.net) == sum(value.numel() for value in before.values())


def test_whole_weights_of_a_base_in_fewer_bits_are_refused(tiny_sdxl):
    teacher = load_teacher(str(tiny_sdxl), quantization="int8")
    with pytest.raises(RecipeError, match=r"^critic\.kind: full: .*expected lora"):
        build_role("critic", teacher.net, RoleConfig(kind="full"))


def test_a_network_without_linear_layers_in_blocks_has_nothing_to_round():
    with pytest.raises(
        RecipeError, match=r"^teacher\.quantization: int8: Linear has no linear layers in blocks"
    ):
        frozen.keep(nn.Linear(2, 2), "int8", False)


def test_nf4_without_its_package_is_refused_by_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r"teacher\.quantization: nf4: .*pip install 'fewstep\[4bit\]'"):
        frozen.check_quantization("nf4")
    frozen.check_quantization("int8")
