"""One-step student of the built-in teacher with DMD2, on two CPU cores.

    python recipes/emoji_dmd2_1step.py                       (or: fewstep train emoji_dmd2_1step)

Hardware: two CPU cores, 4 GB of memory. Time and result: ``eval/results/emoji_dmd2_1step.json``.
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
    output="runs/emoji_dmd2_1step",
    teacher=TeacherConfig(
        path="builtin:emoji-xl",
        pipeline_class="StableDiffusionXLPipeline",
        autocast="auto",
    ),
    method=DMD2.Config(
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
