"""One-step student of the small EDM with SiD, without images, on two CPU cores.

    python recipes/emoji_edm_sid_1step.py                       (or: fewstep train emoji_edm_sid_1step)

Hardware: two CPU cores, 4 GB of memory. Time and result: ``eval/results/emoji_edm_sid_1step.json``.
The teacher's row is Heun's 18 steps, 35 calls.
The student starts at sigma 2.5 and alpha is 1.2, as the paper has them (arXiv 2404.04057); rates are those of a
small network and a short run.
"""

from fewstep.methods.sid import SiD
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
    output="runs/emoji_edm_sid_1step",
    teacher=TeacherConfig(path="builtin:emoji-edm", pipeline_class="EDMPipeline", autocast="auto"),
    method=SiD.Config(alpha=1.2, critic_loss="edm"),
    data=DataConfig(prompts="builtin:emoji-groups", images="builtin:emoji-32"),
    roles={
        "student": RoleConfig(
            kind="full", lr=2e-4, betas=(0.0, 0.999), weight_decay=0.0, warmup=50, decay=200, ema=0.98
        ),
        "critic": RoleConfig(kind="full", lr=5e-4, betas=(0.0, 0.999), weight_decay=0.0, warmup=50),
    },
    train=TrainConfig(steps=500, batch_size=32, log_every=10, sample_every=250, checkpoint_every=250),
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
