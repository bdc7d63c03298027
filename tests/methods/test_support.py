"""Which method distills which teacher: two real iterations of each pair, an export that stock diffusers samples as the
trainer does, and the table that they make.

``PYTHONPATH=tests/support python tests/methods/test_support.py`` writes the table anew.
"""

import math
from pathlib import Path

import pytest
import torch
from zoo import ZOO

from fewstep.diffusion.embedding import told_at
from fewstep.diffusion.rng import Rng
from fewstep.errors import RecipeError
from fewstep.export import check_exportable, export_student, trainer_sample, verify
from fewstep.export.weights import has_lora_files
from fewstep.methods.base import Batch
from fewstep.methods.boot import BOOT
from fewstep.methods.dmd2 import DMD2
from fewstep.methods.hyper_sd import HyperSD
from fewstep.methods.phased_dmd import PhasedDMD
from fewstep.methods.sana_sprint import SanaSprint
from fewstep.methods.sid import SiD
from fewstep.process import Process
from fewstep.recipe import DataConfig, Recipe, RoleConfig, TeacherConfig, TrainConfig
from fewstep.runs.build import build
from fewstep.training.trainer import Trainer

DOCUMENT = Path(__file__).parents[2] / "docs" / "teachers" / "index.md"
BEGIN, END = "<!-- table of tests/methods/test_support.py -->\n", "<!-- end of table -->\n"


def has_one_time_embedding(teacher) -> bool:
    try:
        return bool(told_at(teacher.net))
    except RecipeError:  # DiT has one in each block
        return False


def names_times(teacher) -> bool:
    """Whether a stock call can be given uneven times."""
    return teacher.pipeline_class not in ("DiTPipeline", "DDPMPipeline")


def dmd2(teacher, kind):
    scale = 3.0 if kind.guided else 1.0
    return DMD2.Config(num_steps=4, guidance_scale=scale, critic_steps=1, taps=list(kind.taps))


def sid(teacher, kind):
    return SiD.Config(num_steps=2, guidance_scale=1.5 if kind.guided else 1.0)


def sana_sprint(teacher, kind):
    options = {"taps": list(kind.taps), "warmup": 1}
    options["angles"] = [[math.pi / 2], *([[math.pi / 2, 1.3]] if names_times(teacher) else [])]
    if not (kind.guided and has_one_time_embedding(teacher)):
        options |= {"guidance_embedding": False, "guidance_scale": 4.5 if kind.guided else 1.0}
    return SanaSprint.Config(**options)


def tscd(teacher, kind):
    noise = None if names_times(teacher) else "fresh"  # else its call takes no eta
    return HyperSD.Config(segments=[4, 1], guidance_scale=3.0 if kind.guided else 1.0, noise=noise)


def phased_dmd(teacher, kind):
    return PhasedDMD.Config(num_steps=2, guidance_scale=3.0 if kind.guided else 1.0, critic_steps=1)


def boot(teacher, kind):
    if not kind.guided:
        return BOOT.Config(intervals=4)
    return BOOT.Config(intervals=4, guidance_range=(1.0, 3.0), guidance_scale=2.0)


METHODS = {"DMD2": dmd2, "SiD": sid, "Phased DMD": phased_dmd, "SANA-Sprint": sana_sprint, "TSCD": tscd}


class Data:
    """The same prompts and random latents in every iteration."""

    def __init__(self, teacher, prompts):
        self.rows = {}
        self.cond, self.shape = teacher.encode(prompts), (len(prompts), *teacher.latent_shape)

    def batch(self, iteration, micro):
        rng = Rng(0, "support", iteration, micro)
        real = rng.normal(*self.shape)
        shared = Rng(0, "shared", iteration)
        return Batch(self.cond, self.shape, rng, shared, real=real, real_cond=self.cond)


def two_steps(
    teacher, kind, method: str, folder: Path | None = None, whole: bool = False
) -> tuple[str, Trainer]:
    """The cell of the table, after two iterations in which everything was finite and the student has changed.

    Args:
        folder: where the student is exported to, to be sampled by stock diffusers.
    """
    told = (
        method == "SANA-Sprint" and teacher.pipeline_class == "SanaPipeline"
    )  # exported whole, see check_exportable
    whole = whole or told or not kind.adapts
    role = RoleConfig(kind="full" if whole else "lora", rank=2, lr=1e-3)
    config = (METHODS | {"BOOT": boot})[method](teacher, kind)
    recipe = Recipe(
        output="none",
        teacher=TeacherConfig(path=teacher.source),
        method=config,
        data=DataConfig(prompts="none"),
        train=TrainConfig(steps=2, batch_size=len(kind.prompts), device="cpu"),
        roles=dict.fromkeys(("student", "critic", "target", "node_1"), role),
    )
    before = {name: weight.clone() for name, weight in teacher.net.named_parameters()}
    roles, built = build(recipe, teacher, Process())
    experts = [roles[name] for name in dict.fromkeys(built.student.roles)]
    configs = [expert.config for expert in experts]
    check_exportable(built.student, configs, teacher)
    trainer = Trainer(built, roles, Data(teacher, kind.prompts), recipe.train, quiet=True)
    trainer.train()  # refuses to end with a student that has not changed
    assert trainer.progress.iteration == 2 and not any(trainer.divergence.skipped.values())
    for name, weight in teacher.net.named_parameters():
        assert torch.equal(weight, before[name]) and weight.grad is None, name
    if folder is not None:
        leave(folder, teacher, built.student, experts, list(kind.prompts))
    steps = ", ".join(map(str, sorted(built.student.grids)))
    file = "LoRA" if role.kind == "lora" and has_lora_files(teacher) else "pipeline"
    return f"{steps}: {file}", trainer


def leave(folder, teacher, student, experts, prompts):
    """Exports a student; stock diffusers makes the trainer's own samples of it at each of its numbers of steps."""
    own = {one.num_steps: trainer_sample(one, teacher, prompts) for one in student.variants()}
    weights = {expert.name: expert.final_weights() for expert in experts}
    configs, about = (
        [expert.config for expert in experts],
        {"title": "two", "method": "x", "prompt": prompts[0]},
    )
    export_student(folder / "export", teacher, student, weights, configs, about=about)
    for steps, sample in own.items():
        verify(folder / "export", sample, teacher, prompts, 1e-3, "float32", steps=steps)


CELLS: dict[tuple[str, str], str] = {}


def cells():
    """All pairs; in the ordinary suite a method of each teacher, in turn, whose student is exported."""
    for place, name in enumerate(ZOO):
        for turn, method in enumerate(METHODS):
            marks = [] if (turn - place) % len(METHODS) == 0 else [pytest.mark.long]
            yield pytest.param(name, method, (turn - place) % len(METHODS) == 0, marks=marks)


@pytest.mark.parametrize("name, method, leaves", cells())
def test_two_iterations(name, method, leaves, teachers, request, tmp_path):
    folder = tmp_path if leaves or request.config.getoption("--long") else None
    CELLS[name, method], _ = two_steps(teachers(name), ZOO[name], method, folder)
    (row,) = [line for line in DOCUMENT.read_text().splitlines() if line.startswith(f"| {name} | `")]
    assert row.split(" | ")[2 + list(METHODS).index(method)].removesuffix(" |") == CELLS[name, method]


@pytest.mark.parametrize("whole", [False, True])
def test_boot_on_edm_is_told_its_level_and_guidance_and_leaves_without_them(whole, teachers, tmp_path):
    found, trainer = two_steps(teachers("EDM"), ZOO["EDM"], "BOOT", tmp_path, whole)
    assert found == "1: pipeline" and set(trainer.method.student.denoisers[0].scalars) == {
        "level",
        "guidance",
    }
    with pytest.raises(RecipeError, match="EDM2Precond has no time embedding"):
        two_steps(teachers("EDM2"), ZOO["EDM2"], "BOOT")


def table(cells: dict[tuple[str, str], str]) -> str:
    rows = [["teacher", "`pipeline_class`", *METHODS], ["---"] * (2 + len(METHODS))]
    rows += [[name, f"`{ZOO[name].pipeline_class}`", *(cells[name, m] for m in METHODS)] for name in ZOO]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def test_the_table_is_what_these_tests_found():
    if len(CELLS) < len(ZOO) * len(METHODS):
        pytest.skip("the table needs all tests of this file")
    assert BEGIN + table(CELLS) + END in DOCUMENT.read_text()


if __name__ == "__main__":
    import tempfile

    from fewstep.teachers import load_teacher
    from fewstep.teachers.tiny import write_tiny_pipeline

    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, kind in ZOO.items():
            path = write_tiny_pipeline(kind.pipeline_class, Path(folder, name), **kind.options)
            loaded = load_teacher(str(path), resolution=kind.resolution)
            for method in METHODS:
                found[name, method], _ = two_steps(loaded, kind, method, Path(folder, name, method))
    before, _, rest = DOCUMENT.read_text().partition(BEGIN)
    DOCUMENT.write_text(before + BEGIN + table(found) + END + rest.partition(END)[2])
