"""Heads sized by the feature map, and features tapped from a network as it is."""

import pytest
import torch
from torch import nn

from fewstep.discriminator import ConvHead, Discriminator, TokenHead, tap_features
from fewstep.errors import RecipeError
from fewstep.roles import RoleConfig, build_role


def halving(head):
    return [m for m in head.modules() if isinstance(m, nn.Conv2d) and m.stride == (2, 2)]


@pytest.mark.parametrize("size, stages", [(64, 4), (32, 3), (16, 2), (8, 1), (4, 0)])
def test_head_has_log2_of_a_quarter_of_the_map_stages(size, stages):
    head = ConvHead(8, size, size)
    assert len(halving(head)) == stages
    assert not any(isinstance(m, nn.AdaptiveAvgPool2d) for m in head.modules())
    assert head(torch.randn(3, 8, size, size)).shape == (3, 1)


@pytest.mark.parametrize("height, width", [(12, 20), (13, 13), (32, 24), (7, 5), (2, 3), (1, 1)])
def test_maps_that_do_not_halve_to_four_are_pooled(height, width):
    head = ConvHead(8, height, width)
    assert any(isinstance(m, nn.AdaptiveAvgPool2d) for m in head.modules())
    assert head(torch.randn(3, 8, height, width)).shape == (3, 1)


@pytest.mark.parametrize("channels, size, millions", [(768, 8, 18.9), (1280, 8, 52.4), (1280, 32, 104.9)])
def test_head_has_the_published_number_of_parameters(channels, size, millions):
    with torch.device("meta"):
        head = ConvHead(channels, size, size)
    assert sum(p.numel() for p in head.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)


@pytest.mark.parametrize("channels", [4, 6, 8, 16, 32, 64, 160])
def test_logits_of_a_narrow_network_depend_on_its_features(channels):
    torch.manual_seed(0)
    logits = ConvHead(channels, 8, 8)(torch.randn(4, channels, 8, 8))
    assert logits.std() > 1e-3


def test_token_head_gives_a_logit_per_token():
    head = TokenHead(16)
    assert head(torch.randn(3, 7, 16)).shape == (3, 7)
    assert head(torch.randn(3, 16)).shape == (3, 1)


@pytest.fixture
def batch(sdxl):
    torch.manual_seed(0)
    x = torch.randn(2, *sdxl.latent_shape)
    return x, torch.tensor([100.0, 800.0]), sdxl.encode(["a cat", "a dog"])


def test_an_early_stop_gives_the_features_of_a_full_forward(sdxl, batch):
    names, seen = ["down_blocks.0", "mid_block"], {}
    hooks = [
        sdxl.net.get_submodule(n).register_forward_hook(lambda _m, _i, out, n=n: seen.update({n: out}))
        for n in [*names, "up_blocks.0"]
    ]
    with torch.no_grad():
        sdxl.denoiser.predict(*batch)
        full = [seen["down_blocks.0"][0], seen["mid_block"]]  # a down block also returns its skips
        seen.clear()
        tapped = tap_features(sdxl.denoiser, names, *batch)
    for hook in hooks:
        hook.remove()
    assert "up_blocks.0" not in seen  # the decoder did not run
    assert all(torch.equal(a, b) for a, b in zip(tapped, full))
    assert not any(m._forward_hooks for m in sdxl.net.modules())  # and no hook stays behind


def test_features_come_in_the_order_of_the_names(sdxl, batch):
    with torch.no_grad():
        a, b = tap_features(sdxl.denoiser, ["down_blocks.0", "mid_block"], *batch)
        c, d = tap_features(sdxl.denoiser, ["mid_block", "down_blocks.0"], *batch)
    assert torch.equal(a, d) and torch.equal(b, c)


def test_generator_gradient_reaches_the_image_and_no_parameter_of_the_critic(sdxl, batch):
    x, t, cond = batch
    critic = build_role("critic", sdxl.net, RoleConfig(rank=2))
    denoiser = sdxl.denoiser.with_net(critic.module)
    judge = Discriminator(denoiser, ["mid_block"], sdxl.latent_shape)
    critic.requires_grad_(False)
    judge.requires_grad_(False)
    x = x.requires_grad_()
    judge.logits(denoiser, x, t, cond).sum().backward()
    assert x.grad.abs().sum() > 0
    assert all(p.grad is None for m in (critic.module, judge, sdxl.net) for p in m.parameters())


def test_discriminator_gradient_reaches_the_critic(sdxl, batch):
    critic = build_role("critic", sdxl.net, RoleConfig(rank=2))
    denoiser = sdxl.denoiser.with_net(critic.module)
    judge = Discriminator(denoiser, ["mid_block"], sdxl.latent_shape)
    judge.logits(denoiser, *batch).sum().backward()
    up = [w for n, w in critic.weights.items() if "mid_block" in n and "lora_B" in n]
    assert up and all(w.grad.abs().sum() > 0 for w in up)
    assert all(p.grad is not None for p in judge.parameters())


def test_logits_depend_on_time_and_on_the_condition(sdxl, batch):
    x, t, cond = batch
    judge = Discriminator(sdxl.denoiser, ["mid_block"], sdxl.latent_shape)
    with torch.no_grad():
        logits = judge.logits(sdxl.denoiser, x, t, cond)
        assert not torch.allclose(logits, judge.logits(sdxl.denoiser, x, t + 100, cond))
        swapped = cond.rows(torch.tensor([1, 0]))
        assert not torch.allclose(logits, judge.logits(sdxl.denoiser, x, t, swapped))


def test_several_taps_give_logits_side_by_side(sdxl, batch):
    judge = Discriminator(sdxl.denoiser, ["down_blocks.0", "mid_block"], sdxl.latent_shape)
    assert judge.logits(sdxl.denoiser, *batch).shape == (2, 2)


def test_head_stays_in_fp32_under_autocast(sdxl):
    judge = Discriminator(sdxl.denoiser, ["mid_block"], sdxl.latent_shape)
    features = [torch.randn(2, 16, 8, 8)]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(judge(features), judge.heads[0](features[0])) is False
        logits = judge(features)
    assert logits.dtype == torch.float32 and torch.equal(logits, judge(features))


def test_a_tap_that_is_no_block_is_refused_with_the_known_ones(sdxl):
    with pytest.raises(RecipeError, match=r"'middle' is no block.*mid_block"):
        Discriminator(sdxl.denoiser, ["middle"], sdxl.latent_shape)
