"""Guidance, and the adapters of tiny pipelines against the stock pipelines themselves."""

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch import nn

from fewstep.diffusion.cond import Cond
from fewstep.diffusion.denoiser import NetDenoiser
from fewstep.diffusion.schedules import VP, Flow
from fewstep.diffusion.solvers import ddim
from fewstep.teachers import load_teacher


class Net(nn.Module):
    """A network whose output depends on everything it is given, and that remembers how it was called."""

    def __init__(self, channels=3):
        super().__init__()
        self.mix, self.calls = nn.Conv2d(3, channels, 1), []

    def forward(self, x, t, c):
        self.calls.append((len(x), t))
        return torch.tanh(self.mix(x)) * (1 + t.view(-1, 1, 1, 1) / 1000) + c.view(-1, 1, 1, 1).float()


def denoiser(net, schedule=None, null=True):
    schedule = schedule or VP.from_scheduler(DDPMScheduler())
    cond = Cond({"c": torch.tensor([-1.0])}) if null else None
    return NetDenoiser(net, schedule, "v", lambda n, x, t, c: n(x, t.float(), c["c"]), null=cond)


def inputs(rows=4):
    torch.manual_seed(0)
    return torch.randn(rows, 3, 4, 4), torch.tensor([999.0, 500, 20, 0])[:rows], Cond({"c": torch.rand(rows)})


@pytest.mark.parametrize("g", [0.0, 1.75, 8.0])
def test_guidance_is_u_plus_g_times_c_minus_u(g):
    d, (x, t, cond) = denoiser(Net()), inputs()
    c, u = d.predict(x, t, cond), d.predict(x, t, d.null.expand(4))
    torch.testing.assert_close(d.predict(x, t, cond, guidance=g), u + g * (c - u))
    # Mixing x0 or the prediction is the same, because the conversion is linear.
    c0, u0 = d.x0(x, t, cond), d.x0(x, t, d.null.expand(4))
    torch.testing.assert_close(d.x0(x, t, cond, guidance=g), u0 + g * (c0 - u0), rtol=1e-4, atol=1e-4)


def test_guidance_one_is_one_forward_of_the_batch_and_others_one_of_twice_the_batch():
    net, (x, t, cond) = Net(), inputs()
    d = denoiser(net)
    d.x0(x, t, cond)
    d.x0(x, t, cond, guidance=8.0)
    assert [rows for rows, _ in net.calls] == [4, 8]


def test_guidance_without_a_null_condition_is_refused():
    x, t, cond = inputs()
    with pytest.raises(ValueError, match="null"):
        denoiser(Net(), null=False).predict(x, t, cond, guidance=2.0)


def test_a_learned_variance_is_left_out():
    net, (x, t, cond) = Net(channels=6), inputs()
    d = denoiser(net)
    torch.testing.assert_close(d.predict(x, t, cond), d.call(net, x, t, cond)[:, :3])


def test_the_network_sees_time_in_its_own_unit():
    net, (x, _, cond) = Net(), inputs(1)
    denoiser(net, Flow()).predict(x, torch.tensor([0.25]), cond)
    assert net.calls[0][1].item() == 250.0


def test_with_net_changes_the_network_only():
    d, other, (x, t, cond) = denoiser(Net()), Net(), inputs()
    view = d.with_net(other)
    torch.testing.assert_close(view.x0(x, t, cond), denoiser(other).x0(x, t, cond))
    assert (view.schedule, view.prediction, view.null) == (d.schedule, d.prediction, d.null)


def test_autocast_computes_in_bf16_and_returns_fp32():
    d, (x, t, cond) = denoiser(Net()), inputs()
    exact = d.x0(x, t, cond)
    d.autocast = torch.bfloat16
    rough = d.x0(x, t, cond)
    assert rough.dtype == torch.float32
    assert 0 < (rough - exact).abs().max() < 0.1


def test_the_null_of_sdxl_is_zeros_with_its_size(sdxl):
    null, cond = sdxl.denoiser.null, sdxl.encode(["a cat"])
    assert not null["embeds"].any() and not null["pooled"].any()
    assert null["time_ids"].tolist() == cond["time_ids"].tolist() == [[32, 32, 0, 0, 32, 32]]
    assert cond["embeds"].any() and cond["pooled"].any()


def test_the_null_of_sd_is_the_empty_prompt(tiny_sd15):
    teacher = load_teacher(str(tiny_sd15))
    torch.testing.assert_close(teacher.denoiser.null["embeds"], teacher.encode([""])["embeds"])


def test_a_teacher_is_frozen(sdxl):
    modules = [m for m in sdxl.pipe.components.values() if isinstance(m, nn.Module)]
    assert len(modules) == 4
    assert not any(m.training for m in modules)
    assert not any(p.requires_grad for m in modules for p in m.parameters())


@pytest.mark.parametrize("g", [1.0, 5.0])
@pytest.mark.parametrize("name", ["tiny_sdxl", "tiny_sdxl_v", "tiny_sd15"])
def test_adapter_samples_what_the_stock_pipeline_samples(name, g, request):
    teacher = load_teacher(str(request.getfixturevalue(name)))
    prompts, pipe, d = ["red apple", "a dog on a skateboard"], teacher.pipe, teacher.denoiser
    noise = torch.randn(2, *teacher.latent_shape, generator=torch.Generator().manual_seed(0))
    options = {"timestep_spacing": "trailing", "clip_sample": False, "set_alpha_to_one": True}
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, **options)
    stock = pipe(
        prompts, num_inference_steps=2, guidance_scale=g, latents=noise.clone(), output_type="latent"
    ).images

    assert pipe.scheduler.timesteps.tolist() == [999, 499]
    cond, (t, s) = teacher.encode(prompts), (torch.full((2,), time) for time in (999.0, 499.0))
    with torch.no_grad():
        x = d.schedule.ddim_step(noise, d.x0(noise, t, cond, guidance=g), t, s)
        own = d.x0(x, s, cond, guidance=g)
    assert (own - stock).norm() / stock.norm() < 1e-3


def test_ddim_of_a_gaussian_reaches_its_moments():
    from fewstep.teachers.analytic import GaussianMixture

    vp = VP.from_scheduler(DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"))
    teacher = GaussianMixture(vp, torch.tensor([[0.5, -1.0]]), torch.tensor([[0.25, 1.0]]))
    noise = torch.randn(2000, 2, generator=torch.Generator().manual_seed(0))
    x = ddim(teacher, noise, Cond({}), 100)
    torch.testing.assert_close(x.mean(0), torch.tensor([0.5, -1.0]), atol=0.08, rtol=0)
    torch.testing.assert_close(x.std(0), torch.tensor([0.5, 1.0]), atol=0.05, rtol=0)
