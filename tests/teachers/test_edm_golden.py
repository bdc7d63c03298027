"""EDM's and EDM2's networks and Heun's sampler against the authors' own modules, see tests/golden."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from fewstep.teachers.edm.convert import as_stored
from fewstep.teachers.edm.edm2 import normalise_weights
from fewstep.teachers.edm.networks import EDM2Precond, EDMPrecond
from fewstep.teachers.edm.scheduler import EDMScheduler

GOLDEN = Path(__file__).parents[1] / "golden"
SLACK = 5  # times what the authors' module itself is off in fp32, as the README of the numbers says
EDM = (
    "ddpmpp_uncond",
    "ddpmpp_cond",
    "ddpmpp_augment",
    "ncsnpp_uncond",
    "ncsnpp_cond",
    "ncsnpp_augment",
    "adm_cond",
)
EDM2 = ("edm2_uncond", "edm2_cond", "edm2_knobs")


def arrays(name):
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as file:
        return {key: torch.from_numpy(file[key]) for key in file}


def about(name):
    return json.loads((GOLDEN / f"{name}.json").read_text())


def network(name):
    given = about(name)["config"]
    words = {"img_resolution": "sample_size", "img_channels": "in_channels", "label_dim": "num_class_embeds"}
    config = {words.get(k, k): v for k, v in given.items()}
    if name.startswith("edm2"):
        config.pop("use_fp16")
        made = EDM2Precond(**config)
    else:
        kinds = {"positional": "ddpm++", "fourier": "ncsn++", None: "adm"}
        config["model_type"] = kinds[config.pop("embedding_type", None)]
        known = EDMPrecond().config
        made = EDMPrecond(**{k: v for k, v in config.items() if k in known})
    made.load_state_dict(as_stored({k: v.float() for k, v in arrays(f"{name}.weights").items()}))
    return made.eval()


def numbers(one_hot):
    """Rows of labels -> their numbers, of which the last is the zero row."""
    return torch.where(one_hot.sum(1) > 0, one_hot.argmax(1), one_hot.shape[1])


@torch.no_grad()
@pytest.mark.parametrize("name", [*(f"edm_{name}" for name in EDM), *EDM2])
def test_a_network_is_the_authors_own(name):
    net, io, off = network(name), arrays(f"{name}.io"), about(name)["max_diff_official_fp32"]
    labels, zeros = io.get("labels"), net.one_hot(None, len(io["x"]))
    extra = {"augment": io["augment"]} if "augment" in io else {}

    def denoised(label):
        """With augmentation, of which the call itself knows nothing, by the coefficients."""
        if not extra:
            return net(io["y"], io["sigma"], None if label is zeros or label is None else numbers(label))[0]
        sigma, data = io["sigma"].reshape(-1, 1, 1, 1), net.config.sigma_data
        size = torch.hypot(sigma, torch.tensor(data))
        raw = net.raw(io["y"] / size, io["sigma"].log() / 4, label, **extra)
        return (data / size) ** 2 * io["y"] + sigma * data / size * raw

    ours = {"F": net.raw(io["x"], io["c_noise"], labels, **extra), "D": denoised(labels)}
    if extra:
        ours["F_no_augment"] = net.raw(io["x"], io["c_noise"], labels)
    if "D_no_label" in io:
        ours["D_no_label"] = denoised(zeros)
    if "logvar" in io:
        ours["logvar"] = net.logvar(io["sigma"]).reshape(io["logvar"].shape)
    for key, value in ours.items():
        assert (value - io[key]).abs().max() <= SLACK * off[key], key


@torch.no_grad()
def test_stored_weights_are_normalised_as_a_forward_in_training_does():
    net, io = network("edm2_cond"), arrays("edm2_cond.io")
    normalise_weights(net)
    stored = net.state_dict()
    kept = {k.split("/")[1]: v for k, v in io.items() if k.startswith("after_train_forward/")}
    for key, value in kept.items():
        assert (stored[key] - value).abs().max() <= 1e-6, key
    after = net(io["y"], io["sigma"], numbers(io["labels"]))[0]
    assert (after - io["D_after_train_forward"]).abs().max() <= 4e-6
    assert (after - io["D"]).abs().max() > 1e-4


@torch.no_grad()
def test_heuns_sampler_is_the_authors_own():
    net, io, off = (
        network("edm_ddpmpp_uncond"),
        arrays("edm_heun.io"),
        about("edm_heun")["max_diff_official_fp32"],
    )
    scheduler = EDMScheduler()
    scheduler.set_timesteps(18)
    assert torch.allclose(scheduler.timesteps, io["call_sigmas_f64"], rtol=1e-12, atol=0)
    assert torch.allclose(scheduler.sigmas, io["t_steps_f64"], rtol=1e-12, atol=0)
    made, inputs = io["latents"].double() * scheduler.init_noise_sigma, []
    for sigma in scheduler.timesteps:
        inputs.append(made)
        made = scheduler.step(net(made, sigma)[0], sigma, made).prev_sample
    states = [inputs[0], *inputs[2::2], made]  # the start of each step, and the end
    for ours, theirs in zip(states, io["states"], strict=True):
        assert (ours - theirs).abs().max() <= SLACK * off["states"]
    assert (states[-1] - io["images"]).abs().max() <= SLACK * off["images"]
