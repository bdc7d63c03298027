"""Two-step student of the small EDM with sCM, which one step samples too, on two CPU cores.

    python recipes/emoji_edm_scm_2step.py                       (or: fewstep train emoji_edm_scm_2step)

Hardware: two CPU cores, 4 GB of memory. Time and result: ``eval/results/emoji_edm_scm_2step.json``.
The teacher's row is Heun's 18 steps, 35 calls.
The second step is the paper's 1.1 of data of std 0.5, sigma 0.98, and the law of the noise that of its CIFAR-10
(arXiv 2410.11081).
"""

from fewstep.methods.scm import SCM
from fewstep.recipe import (
    DataConfig,
    EvalConfig,
    Recipe,
    RoleConfig,
    SampleConfig,
    TeacherConfig,
    TrainConfig,
)

recipe = Recipe(
    output="runs/emoji_edm_scm_2step",
    teacher=TeacherConfig(path="builtin:emoji-edm", pipeline_class="EDMPipeline", autocast="auto"),
    method=SCM.Config(
        angles=[[1.5583, 0.7765], [1.5583]], time_mean=-1.0, time_std=1.4, sigma_data=1.0, warmup=200
    ),
    data=DataConfig(prompts="builtin:emoji-groups", images="builtin:emoji-32"),
    roles={
        "student": RoleConfig(
            kind="full", lr=3e-4, betas=(0.9, 0.99), weight_decay=0.0, warmup=50, decay=200, ema=0.98
        ),
        "weighting": RoleConfig(kind="full", lr=1e-3, weight_decay=0.0),
    },
    train=TrainConfig(
        steps=600, batch_size=32, clip_norm=1.0, log_every=10, sample_every=200, checkpoint_every=200
    ),
    samples=SampleConfig(count=24, teacher_steps=18, columns=12, scale=2),
    evaluation=EvalConfig(
        num=500,
        floor_steps=[1, 2, 4],
        floor_solvers=["ddim", "heun", "dpm++", "search"],
        teacher_steps=18,
        extractor="effnet-lite0@96",
    ),
)

if __name__ == "__main__":
    from fewstep import run

    run(recipe)
