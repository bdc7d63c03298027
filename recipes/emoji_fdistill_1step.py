"""One-step student of the built-in teacher with f-distill, DMD2 under another divergence, on two CPU cores.

    python recipes/emoji_fdistill_1step.py      (or: fewstep train emoji_fdistill_1step)

Hardware: two CPU cores, 4 GB of memory. Result: ``eval/results/emoji_fdistill_1step.json``.
Two time bins instead of ten, for 24 samples.
"""

from fewstep.methods.fdistill import FDistill
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
    output="runs/emoji_fdistill_1step",
    teacher=TeacherConfig(
        path="builtin:emoji-xl",
        pipeline_class="StableDiffusionXLPipeline",
        autocast="auto",
    ),
    method=FDistill.Config(
        divergence="js",
        time_bins=2,
        num_steps=1,
        start=799,
        guidance_scale=2.0,
        critic_steps=4,
        gan_weight=5e-3,
    ),
    data=DataConfig(prompts="builtin:emoji", images="builtin:emoji"),
    roles={
        "student": RoleConfig(kind="lora", rank=64, alpha=64, lr=5e-4, warmup=50, decay=300, ema=0.98),
        "critic": RoleConfig(kind="full", lr=3e-4, warmup=50),
        "discriminator": RoleConfig(kind="full", lr=3e-4, warmup=50),
    },
    train=TrainConfig(steps=1000, batch_size=24, log_every=10, sample_every=250, checkpoint_every=500),
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
