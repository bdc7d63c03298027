"""EDM's pipeline on its own: solvers, converted files, what is refused."""

import json
import pickle

import pytest
import torch
from safetensors.torch import save_file
from test_edm_golden import arrays, network, numbers

from fewstep.cli import main
from fewstep.diffusion.schedules import EDM
from fewstep.diffusion.solvers import ddim
from fewstep.diffusion.student import Student
from fewstep.diffusion.times import even_times
from fewstep.errors import FewstepError, RecipeError
from fewstep.export import student_scheduler
from fewstep.recipe import RoleConfig
from fewstep.teachers import load_teacher
from fewstep.teachers.edm.convert import edm2
from fewstep.teachers.edm.networks import EDM2Precond
from fewstep.teachers.edm.scheduler import EDMScheduler
from fewstep.teachers.schedulers import FLOOR, schedule_of, scheduler_sample
from fewstep.teachers.tiny import write_tiny_pipeline
from fewstep.training.roles import build_role


@pytest.mark.parametrize("name", ["edm_ddpmpp_augment", "edm_ncsnpp_cond", "edm_adm_cond"])
def test_a_converted_file_is_the_published_network(name, tmp_path, capsys):
    weights = {k: v.float() for k, v in arrays(f"{name}.weights").items()}
    save_file(weights, tmp_path / "w.safetensors")
    assert main(["convert", "edm", str(tmp_path / "w.safetensors"), "--to", str(tmp_path / "t")]) == 0
    teacher = load_teacher(str(tmp_path / "t"))
    stored, golden = teacher.net.state_dict(), network(name)
    assert stored.keys() == weights.keys()
    assert all(torch.equal(stored[k], v) for k, v in weights.items())
    io = arrays(f"{name}.io")
    given = (io["y"], io["sigma"], numbers(io["labels"]))
    assert torch.equal(teacher.net(*given)[0], golden(*given)[0])


def test_a_converted_edm2_has_its_vae_or_says_which(tmp_path):
    weights = {k: v.float() for k, v in arrays("edm2_cond.weights").items()}
    save_file(weights, tmp_path / "w.safetensors")
    with pytest.raises(FewstepError, match="is of latents: give --vae"):
        edm2(tmp_path / "w.safetensors")
    tiny = write_tiny_pipeline("StableDiffusionPipeline", tmp_path / "sd")
    pipe = edm2(tmp_path / "w.safetensors", vae=tiny / "vae", channels_per_head=16)
    assert pipe.vae.config.latents_std[1] == 4.62 and pipe.vae.config.scaling_factor == 0.5
    io = arrays("edm2_cond.io")
    given = (io["y"], io["sigma"], numbers(io["labels"]))
    assert torch.equal(pipe.unet(*given)[0], network("edm2_cond")(*given)[0])
    small = {k: v.float() for k, v in arrays("edm2_uncond.weights").items()}
    save_file(small, tmp_path / "p.safetensors")
    told = edm2(tmp_path / "p.safetensors").unet.config  # what published files do not say
    assert told.channels_per_head == 64 and told.sigma_data == 0.5
    with pytest.raises(FewstepError, match="no latents; leave it out"):
        edm2(tmp_path / "p.safetensors", vae=tiny / "vae")


@pytest.mark.parametrize("noise, emb", [(None, None), (2, 3), (2, None), (None, 3)])
def test_widths_of_an_edm2s_embedding_are_read_off_its_weights(noise, emb, tmp_path):
    given = {"sample_size": 8, "in_channels": 3, "num_class_embeds": 5, "model_channels": 16, "num_blocks": 1}
    given |= {
        "channel_mult": [1, 2],
        "attn_resolutions": [],
        "channel_mult_noise": noise,
        "channel_mult_emb": emb,
    }
    save_file(EDM2Precond(**given).state_dict(), tmp_path / "w.safetensors")
    found = edm2(tmp_path / "w.safetensors").unet.config
    assert {name: found[name] for name in given} == given


def test_a_pickle_is_refused_with_the_script_that_makes_safetensors_of_it(tmp_path, capsys):
    net, path = torch.nn.Linear(2, 3), tmp_path / "edm.pkl"
    path.write_bytes(pickle.dumps({"ema": net}))
    assert main(["convert", "edm", str(path), "--to", str(tmp_path / "t")]) == 2
    said = capsys.readouterr().err
    script = said.split('python -c "')[1].rsplit('"', 1)[0]
    exec(script, {})  # as one line of Python, it makes the file that is expected
    assert (tmp_path / "edm.safetensors").is_file() and not (tmp_path / "t").exists()
    assert main(["convert", "edm", str(tmp_path / "edm.safetensors"), "--to", str(tmp_path / "t")]) == 2
    assert "weights of another model" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words, said",
    [
        ("edm --to t", "give FILE"),
        ("edm x.pt --vae v --to t", "--vae v: is not of edm"),
        ("edm2 x.pt --tokenizer y --to t", "--tokenizer y: is not of edm2"),
        ("var x.pt --transformer a --tokenizer b --to t", "FILE x.pt: is not of var"),
        ("var --transformer a --to t", "give --tokenizer"),
    ],
)
def test_options_of_another_family_are_refused(words, said, capsys):
    assert main(["convert", *words.split()]) == 2
    assert said in capsys.readouterr().err


class Ball:
    """The posterior mean of data N(0, s^2), in closed form."""

    schedule, std = EDM(), 0.5

    def x0(self, x_t, t, cond, *, guidance=1.0):
        return (self.std**2 / (self.std**2 + t.to(x_t.dtype).reshape(-1, 1) ** 2)) * x_t

    predict = x0


@pytest.mark.parametrize("solver, order", [("euler", 1), ("dpm++", 2), ("heun", 2)])
def test_solvers_converge_to_the_ode_with_their_order(solver, order):
    """x(sigma) = x(80) sqrt((s^2 + sigma^2) / (s^2 + 80^2)), at sigma 0."""
    exact = 80 * 0.5 / (0.25 + 80**2) ** 0.5

    def error(steps):
        made = scheduler_sample(Ball(), FLOOR[solver](EDMScheduler()), torch.ones(1, 3), None, steps)
        return abs(made.mean().item() - exact)

    assert error(128) < 0.02 and error(64) / error(128) == pytest.approx(2**order, rel=0.15)


def test_our_ddim_begins_at_sigma_times_the_noise():
    made = ddim(Ball(), torch.ones(1, 3), None, 400)  # of the first order
    assert made.mean().item() == pytest.approx(0.5, rel=0.02)


def test_a_students_scheduler_has_its_levels_and_no_others():
    schedule = EDM()
    grids = [even_times(schedule, 2, 80.0), [2.5]]
    assert grids[0][0] == 80.0 and grids[0][1] == pytest.approx(schedule.draw_times(torch.tensor(0.5)).item())
    made, call = student_scheduler(EDMScheduler(), grids[0], "fresh", grids=[grids[1]])
    assert call["num_inference_steps"] == 2 and isinstance(schedule_of(made), EDM)
    for grid in grids:
        made.set_timesteps(len(grid))
        assert made.timesteps.tolist() == grid and made.init_noise_sigma == grid[0]
    with pytest.raises(ValueError, match="this student has 2, 1"):
        made.set_timesteps(3)
    made.set_timesteps(1)
    assert made.default_steps == 2 and EDMScheduler().default_steps == 18
    with pytest.raises(RecipeError, match=r"method\.noise: tcd"):
        student_scheduler(EDMScheduler(), grids[0], "tcd")


@pytest.mark.parametrize(
    "levels", [[], [1.0, 1.0], [1.0, 2.0], [2.0, 0.0], [float("inf"), 1.0], [float("nan")]]
)
def test_levels_that_are_none_are_refused(levels):
    made = EDMScheduler()
    with pytest.raises(ValueError, match="expected at least one, falling, finite and above 0"):
        made.set_timesteps(sigmas=levels)
    for steps in (0, -1, None):
        with pytest.raises(ValueError, match=f"num_inference_steps {steps}: expected 1 or more"):
            made.set_timesteps(steps)


def test_a_student_begins_at_its_first_level():
    seen = []

    class Watched(Ball):
        def x0(self, x_t, t, cond, *, guidance=1.0):
            seen.append((x_t.clone(), t))
            return super().x0(x_t, t, cond)

    noise = torch.ones(1, 3)
    Student(Watched(), [2.5, 0.5]).sample(noise, None, torch.zeros_like)
    assert torch.equal(seen[0][0], 2.5 * noise) and seen[1][1].item() == 0.5


def test_without_classes_a_prompt_is_only_counted_and_edm2_takes_no_lora(tmp_path):
    teacher = load_teacher(str(write_tiny_pipeline("EDMPipeline", tmp_path / "t")))
    assert teacher.null() is None and not teacher.encode(["anything"]).tensors
    images = teacher.pipe(["", ""], num_inference_steps=2, output_type="pt").images
    assert images.shape == (2, 3, 16, 16) and 0 <= images.min() <= images.max() <= 1
    two = load_teacher(str(write_tiny_pipeline("EDMPipeline", tmp_path / "t2", model_type="edm2")))
    with pytest.raises(RecipeError, match="kind: lora: a EDM2Precond takes no adapters; expected full"):
        build_role("student", two.net, RoleConfig(rank=2))
    index = json.loads((tmp_path / "t2" / "model_index.json").read_text())
    assert index["unet"] == ["fewstep.teachers.edm.networks", "EDM2Precond"]


def test_a_fresh_step_has_the_noise_of_the_next_level_and_the_last_has_none():
    made = EDMScheduler(solver="fresh", sigmas=[[80.0, 2.5]])
    x0, spread = torch.full((4, 3, 16, 16), 0.3), []
    for t in made.timesteps:
        x = made.step(x0, t, torch.zeros_like(x0), torch.Generator().manual_seed(0), return_dict=False)[0]
        spread.append((x - x0).std().item())
    assert spread[0] == pytest.approx(2.5, rel=0.05) and spread[1] == 0


def test_latents_of_edm2_are_the_vaes_with_each_channel_at_mean_0_and_half_its_spread(tmp_path):
    weights = {k: v.float() for k, v in arrays("edm2_cond.weights").items()}
    save_file(weights, tmp_path / "w.safetensors")
    tiny = write_tiny_pipeline("StableDiffusionPipeline", tmp_path / "sd")
    pipe = edm2(tmp_path / "w.safetensors", vae=tiny / "vae", channels_per_head=16)
    config, raw = pipe.vae.config, torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(v)[:, None, None] for v in (config.latents_mean, config.latents_std))
    with torch.no_grad():
        expected = (pipe.vae.decode(raw).sample / 2 + 0.5).clamp(0, 1)
        found = pipe._images((raw - mean) / std / 2, "pt")
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert expected.std() > 1e-3
