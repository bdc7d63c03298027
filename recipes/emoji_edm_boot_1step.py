"""One-step student of the small EDM with BOOT: labels only, one network.

    python recipes/emoji_edm_boot_1step.py                       (or: fewstep train emoji_edm_boot_1step)

Hardware: two CPU cores, 4 GB of memory. Time and result: ``eval/results/emoji_edm_boot_1step.json``.
The teacher's row is Heun's 18 steps, 35 calls.
"""

from fewstep.methods.boot import BOOT
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
    output="runs/emoji_edm_boot_1step",
    teacher=TeacherConfig(path="builtin:emoji-edm", pipeline_class="EDMPipeline", autocast="auto"),
    method=BOOT.Config(intervals=18),
    data=DataConfig(prompts="builtin:emoji-groups", images="builtin:emoji-32"),
    roles={"student": RoleConfig(kind="full", lr=5e-4, weight_decay=0.0, warmup=50, decay=200, ema=0.98)},
    train=TrainConfig(steps=1000, batch_size=32, log_every=10, sample_every=500, checkpoint_every=500),
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
