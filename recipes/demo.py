"""The demo: a one-step student of the built-in teacher with DMD2, in five minutes.

    make demo                                                (or: fewstep train demo)

Hardware: two CPU cores, 4 GB of memory, with or without units for bf16. ``emoji_dmd2_1step`` in a fifth of the time:
fewer and smaller iterations at higher rates, and fewer images measured, in three rows; the teacher's have 20 steps.
What that costs is in the report, beside the teacher.
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
    output="runs/demo",
    teacher=TeacherConfig(
        path="builtin:emoji-xl",
        pipeline_class="StableDiffusionXLPipeline",
        autocast="auto",
    ),
    method=DMD2.Config(
        num_steps=1,
        start=799,
        guidance_scale=2.0,
        critic_steps=2,
        gan_weight=5e-3,
        gan_time_range=(0.02, 0.98),
        one_noise=True,
    ),
    data=DataConfig(prompts="builtin:emoji", images="builtin:emoji"),
    roles={
        "student": RoleConfig(kind="lora", rank=64, alpha=64, lr=1e-3, warmup=20, decay=80, ema=0.95),
        "critic": RoleConfig(kind="full", lr=5e-4, warmup=20),
        "discriminator": RoleConfig(kind="full", lr=5e-4, warmup=20),
    },
    train=TrainConfig(steps=200, batch_size=12, log_every=5, sample_every=50, checkpoint_every=100),
    samples=SampleConfig(count=24, teacher_steps=20, columns=12, scale=2),
    evaluation=EvalConfig(
        num=100,
        prompts="builtin:emoji-groups",
        named=50,
        floor_steps=[1],
        floor_solvers=["ddim"],
        teacher_steps=20,
        teacher_guidance=2.0,
        extractor="effnet-lite0@96",
    ),
)

if __name__ == "__main__":
    from fewstep import run

    run(recipe)
