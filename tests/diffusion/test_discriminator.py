"""Heads sized by the feature map, and features tapped from a network as it is."""

from contextlib import contextmanager
from copy import copy

import pytest
import torch
from torch import nn

from fewstep.diffusion import objectives
from fewstep.diffusion.cond import Cond
from fewstep.diffusion.denoiser import EMBEDDED, NetDenoiser
from fewstep.diffusion.discriminator import (
    ConvHead,
    ConvTokenHead,
    Discriminator,
    TokenHead,
    condition_vector,
    spectral,
    tap_features,
)
from fewstep.diffusion.schedules import Flow
from fewstep.errors import RecipeError
from fewstep.recipe import RoleConfig
from fewstep.teachers import load_teacher
from fewstep.teachers.tiny import write_tiny_pipeline
from fewstep.training.roles import build_role


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


@pytest.mark.parametrize("tokens, near", [(1, 1), (4, 3), (8, 7), (9, 9), (16, 9)])
def test_a_convolutional_head_sees_each_token_and_its_neighbours_on_a_ring(tokens, near):
    """Written down token by token: one, nine around it, the mean of both ways, a line; each of spectral norm 1."""
    torch.manual_seed(0)
    head, x = ConvTokenHead(6, tokens), torch.randn(2, tokens, 6)
    for parameter in head.parameters():
        nn.init.normal_(parameter)
    logits = head(x)
    assert logits.shape == (2, tokens) and head.near.kernel_size == (near,)

    def normal(conv):
        matrix = conv.weight.flatten(1)
        return conv.weight / torch.linalg.matrix_norm(matrix, 2)

    def acted(out, norm):  # (tokens, 6)
        return nn.functional.leaky_relu(norm(out.T[None])[0].T, 0.2)

    for row, sample in zip(logits, x):
        first = acted(sample @ normal(head.one)[:, :, 0].T + head.one.bias, head.norms[0])
        reach, weight = near // 2, normal(head.near)
        around = torch.stack([
            sum(weight[:, :, k] @ first[(i + k - reach) % tokens] for k in range(near)) for i in range(tokens)
        ])  # fmt: skip
        both = (first + acted(around + head.near.bias, head.norms[1])) / 2**0.5
        expected = both @ normal(head.last)[0] + head.last.bias
        torch.testing.assert_close(row, expected, rtol=2e-2, atol=2e-2)  # eight iterations


def test_a_spectral_norm_is_one_and_its_gradient_keeps_it():
    torch.manual_seed(0)
    weight = torch.randn(12, 5, 3, requires_grad=True)
    unit = spectral(weight, 200)
    assert torch.linalg.matrix_norm(unit.flatten(1), 2).item() == pytest.approx(1, abs=1e-4)
    torch.testing.assert_close(spectral(3 * weight, 200), unit)
    (gradient,) = torch.autograd.grad((unit * torch.randn(unit.shape)).sum(), weight)
    assert gradient.abs().sum() > 0
    assert (gradient * weight).sum().item() == pytest.approx(0, abs=1e-4)  # the norm cannot change
    rough = torch.linalg.matrix_norm(spectral(weight).flatten(1), 2).item()
    assert 1 - 1e-4 < rough < 1.1


@pytest.mark.parametrize("heads, kind", [("mlp", TokenHead), ("conv", ConvTokenHead)])
def test_the_heads_of_a_transformer_are_those_asked_for(heads, kind, teachers):
    teacher = teachers("SANA")
    judge = Discriminator(teacher.denoiser, ["transformer_blocks.0"], teacher.latent_shape, True, heads)
    assert [type(head) for head in judge.heads] == [kind]
    x = torch.randn(2, *teacher.latent_shape)
    logits = judge.logits(teacher.denoiser, x, torch.full((2,), 0.5), teacher.encode(["a", "b"]))
    assert logits.shape == (2, teacher.latent_shape[1] ** 2)
    assert not torch.allclose(logits[0], logits[1])


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


@contextmanager
def calls_of(module):
    """Whether gradients were wanted at the end of each forward of a module, as a list that grows."""
    seen = []
    handle = module.register_forward_hook(lambda *_: seen.append(torch.is_grad_enabled()))
    try:
        yield seen
    finally:
        handle.remove()


@pytest.mark.parametrize("guidance", [1.0, 3.0, 0.0, "of each"])
@pytest.mark.parametrize("conditional", [False, True])
def test_one_forward_gives_what_two_give_and_no_graph_after_the_last_tap(sdxl, batch, guidance, conditional):
    x, t, cond = batch
    x = x.requires_grad_()
    guidance = torch.linspace(1, 3, len(x)) if guidance == "of each" else guidance
    judge = Discriminator(sdxl.denoiser, ["mid_block", "down_blocks.0"], sdxl.latent_shape, conditional)
    apart = judge.logits(sdxl.denoiser, x, t, cond)
    (wanted,) = torch.autograd.grad(apart.square().sum(), x)
    with torch.no_grad():
        x0 = sdxl.denoiser.x0(x, t, cond, guidance=guidance)
    last = sdxl.net.get_submodule("conv_out")
    with calls_of(sdxl.net) as network, calls_of(last) as ends:
        logits, seen = judge.judged(sdxl.denoiser, x, t, cond, guidance)
    assert len(network) == (1 if not torch.is_tensor(guidance) and guidance == 1 else 2) and ends == [
        False
    ] * len(network)
    assert torch.is_grad_enabled() and not seen.requires_grad
    assert torch.equal(logits, apart)
    torch.testing.assert_close(seen, x0, rtol=1e-4, atol=1e-5)
    (found,) = torch.autograd.grad(logits.square().sum(), x)
    assert wanted.abs().sum() > 0 and torch.equal(found, wanted)
    assert not any(m._forward_hooks for m in sdxl.net.modules())


def test_a_network_that_is_told_its_guidance_is_asked_again_for_another(sdxl, batch):
    """Its features at scale 1 are not those that its guided prediction passes through."""
    told, scales = copy(sdxl.denoiser), []
    told.embeds_guidance = True
    told.call = lambda net, x, t, cond: (
        scales.append(cond[EMBEDDED][0].item()) or sdxl.denoiser.call(net, x, t, cond)
    )
    judge = Discriminator(told, ["mid_block"], sdxl.latent_shape)
    scales.clear()
    judge.judged(told, *batch, 3.5)
    assert scales == [1.0, 3.5]


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


# ------------------------------------------------------------------------------------------------ conditional heads
def perturbed(judge):
    """Its projections away from zero."""
    torch.manual_seed(1)
    for projection in judge.projections:
        nn.init.normal_(projection.weight)
    return judge


def test_conditional_heads_start_as_the_others(sdxl, batch):
    for taps in (["mid_block"], ["down_blocks.0", "mid_block"]):
        plain, told = (
            Discriminator(sdxl.denoiser, taps, sdxl.latent_shape, conditional)
            for conditional in (False, True)
        )
        told.heads.load_state_dict(plain.heads.state_dict())
        assert told.logits(sdxl.denoiser, *batch).equal(plain.logits(sdxl.denoiser, *batch))
        told.logits(sdxl.denoiser, *batch).sum().backward()
        assert all(p.weight.grad.abs().sum() > 0 for p in told.projections)
        assert plain.projections is None


def test_conditional_heads_are_told_the_level_and_the_pooled_text_and_nothing_else(sdxl, batch):
    """With the features held, so that only the heads can know."""
    x, t, cond = batch
    judge = perturbed(Discriminator(sdxl.denoiser, ["mid_block"], sdxl.latent_shape, conditional=True))
    with torch.no_grad():
        features = tap_features(sdxl.denoiser, ["mid_block"], x, t, cond)

        def logits(t, cond):
            return judge(features, condition_vector(sdxl.denoiser, t, cond))

        first, swapped = logits(t, cond), cond.rows(torch.tensor([1, 0]))
        assert ((logits(t + 50, cond) - first).abs() > 1e-3).all()
        assert ((logits(t, Cond({**cond.tensors, "pooled": swapped["pooled"]})) - first).abs() > 1e-3).all()
        assert logits(t, Cond({**cond.tensors, "embeds": swapped["embeds"]})).equal(first)
        louder = Cond({**cond.tensors, "pooled": 3 * cond["pooled"]})
        torch.testing.assert_close(logits(t, louder), first)  # its direction counts
        plain = Discriminator(sdxl.denoiser, ["mid_block"], sdxl.latent_shape)
        assert plain(features, condition_vector(sdxl.denoiser, t + 50, swapped)).equal(plain(features))


def test_each_logit_is_one_linear_layer_whose_weights_the_condition_moves():
    torch.manual_seed(0)
    maps = torch.randn(3, 5, 6), torch.randn(3, 8, 8, 8)
    for head, x in ((TokenHead(6), maps[0]), (ConvHead(8, 8, 8), maps[1])):
        told = torch.randn(3, x.shape[2] if x.ndim == 3 else x.shape[1])
        last = head.layers[-1] if x.ndim == 3 else head.layers[-2]
        plain, moved = head(x), head(x, told)
        weight = last.weight.clone()
        for i in range(3):
            with torch.no_grad():
                last.weight.copy_(weight + told[i].view_as(last.weight))
            torch.testing.assert_close(head(x[i : i + 1])[0], moved[i])
        assert not torch.allclose(plain, moved)


@pytest.mark.parametrize(
    "name, more",
    [
        ("StableDiffusionPipeline", 0),  # no pooled embedding: the level alone
        ("StableDiffusion3Pipeline", "pooled"),
        ("SanaPipeline", 0),
        ("DiTPipeline", "classes"),
    ],
)
def test_every_teacher_tells_what_it_has(name, more, tmp_path):
    teacher = load_teacher(str(write_tiny_pipeline(name, tmp_path)))
    cond = teacher.encode(["0", "1"] if more == "classes" else ["a cat", "a dog"])
    told = condition_vector(
        teacher.denoiser, torch.tensor([300.0, 300.0]) / teacher.denoiser.schedule.time_scale, cond
    )
    null = condition_vector(teacher.denoiser, torch.full((1,), 0.3), teacher.denoiser.null)
    widths = {
        "pooled": lambda: cond["pooled"].shape[1],
        "classes": lambda: teacher.net.config.num_embeds_ada_norm + 1,
    }
    assert told.shape[1] == null.shape[1] == 16 + (widths[more]() if more else 0)
    assert told[0].equal(told[1]) == (not more)
    assert told.isfinite().all() and (told.norm(dim=1) <= 2**0.5 + 1e-5).all()


class Blind(nn.Module):
    """A network whose features know the image only."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, 16), nn.SiLU(), nn.Linear(16, 2))

    def forward(self, x):
        return self.layers(x)


@pytest.mark.parametrize("conditional, bound", [(True, (0.0, 0.3)), (False, (1.9, 2.1))])
@pytest.mark.parametrize("what", ["caption", "level"])
def test_only_conditional_heads_tell_a_right_image_from_one_of_another_caption_or_level(
    what, conditional, bound
):
    """Each image is seen as often real as fake, so without the condition the hinge loss stays at 2."""
    torch.manual_seed(0)
    example = Cond({"pooled": torch.ones(1, 4)})
    call = lambda net, x, t, cond: net(x)  # noqa: E731
    denoiser = NetDenoiser(Blind().requires_grad_(False), Flow(), "flow", call, example=example)
    judge = Discriminator(denoiser, ["layers.1"], (2,), conditional)
    side = torch.tensor([-1.0, 1.0]).repeat(64)
    images = torch.stack([side, 0 * side], 1) + 0.1 * torch.randn(128, 2)
    told = side if what == "caption" else torch.ones(128)
    cond = Cond({"pooled": told[:, None] * torch.tensor([5.0, -3.0, 1.0, 2.0])})
    t = 0.5 + 0.4 * side if what == "level" else torch.full((128,), 0.5)
    optimizer = torch.optim.Adam(judge.parameters(), 1e-2)
    for _ in range(150):
        real = judge.logits(denoiser, images, t, cond)
        fake = judge.logits(denoiser, images.roll(1, 0), t, cond)
        loss = objectives.hinge_discriminator(real, fake)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert bound[0] <= loss.item() <= bound[1]


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
