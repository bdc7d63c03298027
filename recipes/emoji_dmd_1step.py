"""One-step student of the built-in teacher with DMD: score difference and regression on the teacher's pairs.

    fewstep pairs emoji_dmd_1step --num 2048 --steps 25       # once, some minutes
    fewstep train emoji_dmd_1step

Hardware: two CPU cores, 4 GB of memory. Time and result: ``eval/results/emoji_dmd_1step.json``.
"""

from fewstep.methods.dmd import DMD
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
    output="runs/emoji_dmd_1step",
    teacher=TeacherConfig(
        path="builtin:emoji-xl",
        pipeline_class="StableDiffusionXLPipeline",
        autocast="auto",
    ),
    method=DMD.Config(start=799, guidance_scale=2.0, regression_weight=0.25),
    data=DataConfig(prompts="builtin:emoji", images="builtin:emoji", pairs="pairs/emoji"),
    roles={
        "student": RoleConfig(kind="lora", rank=64, alpha=64, lr=5e-4, warmup=50, decay=300, ema=0.98),
        "critic": RoleConfig(kind="full", lr=3e-4, warmup=50),
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
