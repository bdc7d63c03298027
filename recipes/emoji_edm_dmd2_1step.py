"""One-step student of the small EDM with DMD2, on two CPU cores.

    python recipes/emoji_edm_dmd2_1step.py                       (or: fewstep train emoji_edm_dmd2_1step)

Hardware: two CPU cores, 4 GB of memory. Time and result: ``eval/results/emoji_edm_dmd2_1step.json``.
The teacher's row is Heun's 18 steps, 35 calls.
The student starts at sigma 80, as the paper's on ImageNet 64 does (arXiv 2405.14867). The discriminator sees first
blocks behind little noise, which tell more of such small pictures than the middle one.
"""

from fewstep.methods.dmd2 import DMD2
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
    output="runs/emoji_edm_dmd2_1step",
    teacher=TeacherConfig(path="builtin:emoji-edm", pipeline_class="EDMPipeline", autocast="auto"),
    method=DMD2.Config(
        num_steps=1,
        critic_steps=3,
        gan_weight=3e-3,
        gan_time_range=(0.0, 0.5),
        taps=["model.enc.32x32_block0", "model.enc.8x8_block0"],
    ),
    data=DataConfig(prompts="builtin:emoji-groups", images="builtin:emoji-32"),
    roles={
        "student": RoleConfig(kind="full", lr=3e-4, weight_decay=0.0, warmup=50, decay=200, ema=0.98),
        "critic": RoleConfig(kind="full", lr=5e-4, weight_decay=0.0, warmup=50),
        "discriminator": RoleConfig(kind="full", lr=5e-4, weight_decay=0.0, warmup=50),
    },
    train=TrainConfig(steps=800, batch_size=32, log_every=10, sample_every=400, checkpoint_every=400),
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
