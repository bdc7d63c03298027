"""Every scheduler of diffusers in every kind of pipeline: a teacher, or one line that says why not."""

import contextlib
import inspect
import math

import diffusers
import pytest
import torch
from zoo import ZOO

from fewstep.diffusion.schedules import VP, noise_table
from fewstep.errors import FewstepError
from fewstep.export.scheduler import student_scheduler
from fewstep.teachers import adapters, load_pipeline, load_teacher
from fewstep.teachers.schedulers import FLOOR


def schedulers():
    """Name -> class, of those that need no library and no argument."""
    found = {}
    for name in sorted(dir(diffusers)):
        if not name.endswith("Scheduler"):
            continue
        with contextlib.suppress(Exception):  # an optional library, or arguments
            cls = getattr(diffusers, name)
            cls().set_timesteps  # noqa: B018
            found[name] = cls
    return found


ALL = schedulers()
RESCALING = [n for n, cls in ALL.items() if "rescale_betas_zero_snr" in inspect.signature(cls).parameters]
KINDS = ["SD 1.5", "SDXL", "SD 3", "FLUX.1-dev", "SANA", "PixArt-Sigma", "DiT", "UNet2D"]


@pytest.fixture(scope="module")
def pipes(teachers):
    return {name: load_pipeline(teachers(name).source) for name in KINDS}


@pytest.mark.parametrize("name", ALL)
def test_a_scheduler_in_any_pipeline_is_trained_on_or_refused(name, pipes, tally):
    for kind, pipe in pipes.items():
        before = pipe.scheduler
        pipe.scheduler = ALL[name]()
        tally("inputs tried", 1)
        try:
            teacher = adapters()[type(pipe).__name__](pipe, "here", ZOO[kind].resolution)
            schedule = teacher.denoiser.schedule
            start = schedule.at(torch.tensor([1.0]))
            x = torch.randn(1, *teacher.latent_shape)
            cond = teacher.encode([ZOO[kind].prompts[0]])
            x0 = teacher.denoiser.x0(x, start, cond)
        except FewstepError as error:
            assert "\n" not in str(error) and name in str(error), error
            tally("refused with a clear error", 1)
        else:
            assert x0.isfinite().all() and math.isfinite(start.item())
            tally("accepted, being good", 1)
        finally:
            pipe.scheduler = before


@pytest.mark.parametrize(
    "name", ["EDMEulerScheduler", "EDMDPMSolverMultistepScheduler", "CMStochasticIterativeScheduler"]
)
def test_a_folder_with_a_scheduler_without_a_table(name, tmp_path, tiny_sdxl, tally):
    pipe = load_pipeline(str(tiny_sdxl))
    pipe.scheduler = ALL[name]()
    pipe.save_pretrained(tmp_path / "t")
    tally("inputs tried", 1)
    with pytest.raises(
        FewstepError, match=f"^teacher.path: a {name} has no table of noise levels .*FlowMatch"
    ):
        load_teacher(str(tmp_path / "t"))
    tally("refused with a clear error", 1)


@pytest.mark.parametrize("name", RESCALING)
def test_a_table_of_zero_terminal_snr_ends_at_zero_in_every_class(name):
    like = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    made = ALL[name](**like, rescale_betas_zero_snr=True)
    exact = noise_table(diffusers.DDIMScheduler(**like, rescale_betas_zero_snr=True))
    table = noise_table(made)
    assert (
        table[-1] == 0
        and VP.from_scheduler(made).is_silent(999)
        and not VP.from_scheduler(made).is_silent(998)
    )
    if name.startswith("CogVideoX"):  # which shifts its table
        return
    torch.testing.assert_close(table, exact)
    # What the student's scheduler is given is the same table.
    student, _ = student_scheduler(made, [999, 749, 499, 249])
    torch.testing.assert_close(student.alphas_cumprod.double(), exact, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("options", [{}, {"beta_schedule": "squaredcos_cap_v2"}, {"beta_end": 0.08}])
def test_little_signal_is_not_none(options):
    schedule = VP.from_scheduler(diffusers.DDIMScheduler(**options))
    assert not schedule.is_silent(999)


@pytest.mark.parametrize("source", ["DDIMScheduler", "EulerDiscreteScheduler"])
@pytest.mark.parametrize("solver", FLOOR)
def test_training_free_solvers_keep_the_zero_of_a_table(source, solver):
    like = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    teacher = ALL[source](**like, rescale_betas_zero_snr=True, prediction_type="v_prediction")
    made = FLOOR[solver](teacher)
    torch.testing.assert_close(made.alphas_cumprod.double(), noise_table(teacher), rtol=1e-4, atol=2**-23)
    assert made.config.prediction_type == "v_prediction"
