"""LoRA shells share one frozen base; gradients are right whatever happens between forward and backward."""

import diffusers
import pytest
import torch
from torch import nn

from fewstep.diffusion.schedules import VP
from fewstep.errors import RecipeError
from fewstep.methods.dmd2 import DMD2
from fewstep.process import Process
from fewstep.recipe import DataConfig, Recipe, RoleConfig, TeacherConfig, TrainConfig
from fewstep.runs.build import build
from fewstep.teachers import load_teacher
from fewstep.training.roles import Role, averaged, build_role, lora_targets, shell


def pointers(module):
    return {p.data_ptr() for p in module.parameters()}


def wake(role, seed=0):
    """LoRA starts as the identity; give it a random effect, so that every weight gets gradient."""
    g = torch.Generator().manual_seed(seed)
    for weight in role.weights.values():
        weight.data = 0.2 * torch.randn(weight.shape, generator=g)


@pytest.fixture
def batch(sdxl):
    torch.manual_seed(0)
    x = torch.randn(2, *sdxl.latent_shape)
    return x, torch.tensor([100.0, 800.0]), sdxl.encode(["a cat", "a dog"])


def test_a_shell_is_another_tree_over_the_same_tensors(sdxl):
    copy = shell(sdxl.net)
    assert copy is not sdxl.net and copy.mid_block is not sdxl.net.mid_block
    assert dict(copy.state_dict()).keys() == dict(sdxl.net.state_dict()).keys()
    for (name, a), (_, b) in zip(copy.state_dict().items(), sdxl.net.state_dict().items()):
        assert a.data_ptr() == b.data_ptr(), name


def test_a_lora_role_adds_only_its_adapter_and_trains_only_that(sdxl):
    before = set(dict(sdxl.net.named_modules()))
    student, critic = (build_role(n, sdxl.net, RoleConfig(rank=2)) for n in ("student", "critic"))
    assert set(dict(sdxl.net.named_modules())) == before  # the base got no adapter
    assert pointers(sdxl.net) <= pointers(student.module) & pointers(critic.module)
    own = {w.data_ptr() for w in student.weights.values()}
    assert pointers(student.module) - pointers(sdxl.net) == own
    assert not own & pointers(critic.module)
    assert all("lora_" in name for name in student.weights)
    assert len(student.weights) == 2 * len(lora_targets(sdxl.net, RoleConfig().targets))


def test_roles_start_as_the_teacher(sdxl, batch):
    with torch.no_grad():
        expected = sdxl.denoiser.x0(*batch)
        for kind in ("lora", "full"):
            role = build_role("student", sdxl.net, RoleConfig(kind=kind, rank=2))
            assert torch.equal(sdxl.denoiser.with_net(role.module).x0(*batch), expected)


def test_the_base_stays_bit_identical_after_an_update(sdxl, batch):
    before = {n: v.clone() for n, v in sdxl.net.state_dict().items()}
    role = build_role("student", sdxl.net, RoleConfig(rank=2))
    wake(role)
    start = {n: w.detach().clone() for n, w in role.weights.items()}
    optimizer = torch.optim.AdamW(role.weights.values(), lr=0.1)
    sdxl.denoiser.with_net(role.module).x0(*batch).square().mean().backward()
    optimizer.step()
    assert all(not torch.equal(w, start[n]) for n, w in role.weights.items())
    assert all(torch.equal(v, before[n]) for n, v in sdxl.net.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in sdxl.net.parameters())


def test_gradient_checkpointing_reaches_student_critic_and_teacher_and_leaves_the_gradient(tiny_sdxl, batch):
    """The teacher's activations are the largest part where the gradient passes through it (SiD, SIM)."""
    x, t, cond = batch
    gradients, forwards = [], []
    for checkpointing in (False, True):
        teacher = load_teacher(str(tiny_sdxl))
        if checkpointing:
            teacher.net.enable_gradient_checkpointing()
        roles = [build_role(n, teacher.net, RoleConfig(rank=2)) for n in ("student", "critic")]
        calls = [0, 0, 0]
        for seed, role in enumerate(roles):
            wake(role, seed)
        for i, net in enumerate((*(role.module for role in roles), teacher.net)):
            assert not net.training  # a network with dropout has none in any turn

            def count(*_, i=i, calls=calls):
                calls[i] += 1

            net.down_blocks[0].resnets[0].register_forward_pre_hook(count)
        student, critic = (teacher.denoiser.with_net(r.module) for r in roles)
        # The critic, the other adapter and the bare base all run between the student's forward and its backward.
        x0 = student.x0(x, t, cond)
        loss = critic.x0(x0, t, cond).square().mean() + teacher.denoiser.x0(x0, t, cond).square().mean()
        loss.backward()
        gradients.append([w.grad for role in roles for w in role.weights.values()])
        forwards.append(calls)
    assert forwards == [[1, 1, 1], [2, 2, 2]]  # recomputed in all three
    assert all(g.abs().sum() > 0 for g in gradients[0])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-6)


def test_a_full_copy_shares_nothing_and_is_fp32():
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)).to(torch.bfloat16).requires_grad_(False)
    role = build_role("critic", net, RoleConfig(kind="full"))
    assert not pointers(role.module) & pointers(net)
    assert {w.dtype for w in role.weights.values()} == {torch.float32}
    assert len(role.weights) == 4 and all(w.requires_grad for w in role.weights.values())
    assert not any(p.requires_grad for p in net.parameters())


def test_lora_of_a_bf16_base_is_fp32():
    net = nn.Sequential(nn.Linear(8, 8)).to(torch.bfloat16).requires_grad_(False)
    role = build_role("student", net, RoleConfig(rank=2, targets=["0"]))
    assert {w.dtype for w in role.weights.values()} == {torch.float32}
    assert net[0].weight.dtype == torch.bfloat16


def test_adapters_depend_on_the_seed_alone():
    net = nn.Sequential(nn.Linear(8, 8)).requires_grad_(False)
    config = RoleConfig(rank=2, targets=["0"])
    state = torch.random.get_rng_state()
    a, b, c = (list(build_role("student", net, config, seed).weights.values()) for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(a[0], b[0]) and not torch.equal(a[0], c[0])


def test_a_rank_larger_than_a_layer_is_refused_by_the_name_of_the_layer(sdxl):
    with pytest.raises(RecipeError, match=r"student\.rank: 64 is larger than layer \S+.*at most \d+"):
        build_role("student", sdxl.net, RoleConfig(rank=64))


@pytest.mark.parametrize(
    "targets, message",
    [(["to_z"], r"to_z.*match no layer of UNet2DConditionModel"), (["norm1"], r"norm1 is a \w+Norm")],
)
def test_wrong_targets_are_refused_by_name(sdxl, targets, message):
    with pytest.raises(RecipeError, match=r"critic\.targets.*" + message):
        build_role("critic", sdxl.net, RoleConfig(rank=2, targets=targets))


@pytest.mark.parametrize("options", [{"rank": 0}, {"ema": 1.0}, {"ema": -0.1}, {"lr": 0.0}])
def test_impossible_options_are_refused_by_field(options):
    with pytest.raises(RecipeError, match=next(iter(options))):
        RoleConfig(**options)


def test_averaged_swaps_and_restores():
    role = Role("student", nn.Linear(2, 2), RoleConfig(kind="full", ema=0.9))
    start = {n: w.detach().clone() for n, w in role.weights.items()}
    with torch.no_grad():
        for weight in role.weights.values():
            weight += 1
    with averaged(role):
        assert all(torch.equal(w, start[n]) for n, w in role.weights.items())
    torch.testing.assert_close(dict(role.weights), {n: v + 1 for n, v in start.items()})
    torch.testing.assert_close(role.average, start)
    torch.testing.assert_close(role.final_weights(), start)


def test_averaged_restores_after_an_error_and_does_nothing_without_an_average():
    role = Role("student", nn.Linear(2, 2), RoleConfig(kind="full", ema=0.9))
    weight = role.weights["weight"]
    weight.data += 1
    after = weight.detach().clone()
    with pytest.raises(KeyError), averaged(role):
        raise KeyError
    assert torch.equal(weight, after)
    plain = Role("student", nn.Linear(2, 2), RoleConfig(kind="full"))
    with averaged(plain):
        assert plain.final_weights()["weight"] is plain.weights["weight"]


def test_moving_average_forgets_its_start_and_then_decays_as_told():
    role = Role("student", nn.Linear(1, 1, bias=False), RoleConfig(kind="full", ema=0.5))
    expected = role.average["weight"].clone()
    for update, value in enumerate([1.0, 3.0, -2.0, 5.0, 0.0, 1.0, 4.0, 2.0, 2.0], start=1):
        role.weights["weight"].data.fill_(value)
        role.update_average(update)
        decay = min(0.5, (1 + update) / (10 + update))
        expected = decay * expected + (1 - decay) * value
        torch.testing.assert_close(role.average["weight"], expected)


def test_a_half_life_is_in_images_whatever_the_batch_and_short_at_first():
    config = RoleConfig(kind="full", ema_images=500)
    assert config.memory(1, 10, 0) == 0.0  # nothing has been seen: the average is the weights
    assert config.memory(9, 10, 2000) == pytest.approx(0.5**0.1)  # a twentieth, 100
    one, other = config.memory(9, 10, 10**6), config.memory(9, 40, 10**6)
    assert one**50 == pytest.approx(0.5) and other == pytest.approx(one**4)
    assert RoleConfig().memory(9, 10, 2000) is None
    role = Role("student", nn.Linear(1, 1, bias=False), config)
    for value, seen in ((3.0, 0), (5.0, 2000)):
        role.weights["weight"].data.fill_(value)
        role.update_average(1, 10, seen)
    assert role.average["weight"].item() == pytest.approx(5 - 2 * 0.5**0.1)
    with pytest.raises(RecipeError, match=r"^ema_images: 500: expected 0 beside an ema of 0\.9"):
        RoleConfig(ema=0.9, ema_images=500)


def test_whole_networks_of_edm2_keep_rows_of_unit_magnitude(teachers):
    role = build_role("student", teachers("EDM2").net, RoleConfig(kind="full"))
    layer = next(m for m in role.module.modules() if type(m).__name__ == "Weighted")

    def size():
        return layer.weight.square().mean(tuple(range(1, layer.weight.ndim))).sqrt()

    with torch.no_grad():
        layer.weight.mul_(3.0)
    role.config = RoleConfig(kind="lora")
    role.settle_weights()
    assert size().min() > 1.5  # whose frozen weights are others' too
    role.config = RoleConfig(kind="full")
    role.settle_weights()
    torch.testing.assert_close(size(), torch.ones_like(size()), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "scheduler", ["DDPMScheduler", "DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"]
)
@pytest.mark.parametrize(
    ("start", "prediction", "fine"), [(999, "eps", False), (899, "eps", True), (999, "v", True)]
)
def test_an_eps_student_at_zero_terminal_snr_is_refused(tiny_sdxl, scheduler, start, prediction, fine):
    teacher = load_teacher(str(tiny_sdxl))
    made = getattr(diffusers, scheduler)(rescale_betas_zero_snr=True)
    teacher.denoiser.schedule = VP.from_scheduler(made)
    teacher.denoiser.prediction = prediction
    recipe = Recipe(
        output="",
        teacher=TeacherConfig(path=""),
        method=DMD2.Config(num_steps=1, start=start, gan_weight=0.0),
        data=DataConfig(prompts=""),
        train=TrainConfig(steps=1),
        roles={name: RoleConfig(rank=2) for name in ("student", "critic")},
    )
    if fine:
        assert build(recipe, teacher, Process())[1].student.times == [start]
    else:
        with pytest.raises(RecipeError, match=r"method\.start: 999: there is no signal"):
            build(recipe, teacher, Process())


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_role_that_starts_again_is_the_teacher_again_and_so_is_its_average(sdxl, batch, kind):
    role = build_role("critic", sdxl.net, RoleConfig(kind=kind, rank=2, ema=0.9))
    with torch.no_grad():
        expected = sdxl.denoiser.x0(*batch)
        wake(role)
        role.update_average(100)
        assert not torch.allclose(sdxl.denoiser.with_net(role.module).x0(*batch), expected)
        role.restart()
        torch.testing.assert_close(sdxl.denoiser.with_net(role.module).x0(*batch), expected)
        with averaged(role):
            torch.testing.assert_close(sdxl.denoiser.with_net(role.module).x0(*batch), expected)
