"""One-step student of the built-in teacher with BOOT: prompts only, one network.

    python recipes/emoji_boot_1step.py                       (or: fewstep train emoji_boot_1step)

Hardware: two CPU cores, 4 GB of memory. Time and result: ``eval/results/emoji_boot_1step.json``.
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
    output="runs/emoji_boot_1step",
    teacher=TeacherConfig(
        path="builtin:emoji-xl",
        pipeline_class="StableDiffusionXLPipeline",
        autocast="auto",
    ),
    method=BOOT.Config(intervals=25, guidance_scale=2.0),
    data=DataConfig(prompts="builtin:emoji", images="builtin:emoji"),
    roles={"student": RoleConfig(kind="lora", rank=64, alpha=64, lr=1e-3, warmup=50, decay=200, ema=0.99)},
    train=TrainConfig(steps=800, batch_size=24, log_every=10, sample_every=500, checkpoint_every=200),
    samples=SampleConfig(count=24, teacher_steps=50, columns=12, scale=2),
    evaluation=EvalConfig(
        num=500,
        prompts="builtin:emoji-groups",
        named=500,
        floor_steps=[1],
        floor_solvers=["ddim", "dpm++", "unipc"],
        teacher_steps=50,
        teacher_guidance=2.0,
        extractor="effnet-lite0@96",
    ),
)

if __name__ == "__main__":
    from fewstep import run

    run(recipe)
