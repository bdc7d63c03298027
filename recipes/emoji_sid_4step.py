"""Four-step student of the built-in teacher with SiD, without images, on two CPU cores.

    python recipes/emoji_sid_4step.py    (or: fewstep train emoji_sid_4step)

Hardware: two CPU cores, 4 GB of memory. Result: ``eval/results/emoji_sid_4step.json``. One of the four steps is
trained in each iteration, on the student's own earlier ones (arXiv 2505.12674); learning rates are those that suit a
small teacher and a short run.
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
    output="runs/emoji_sid_4step",
    teacher=TeacherConfig(
        path="builtin:emoji-xl",
        pipeline_class="StableDiffusionXLPipeline",
        autocast="auto",
    ),
    method=SiD.Config(num_steps=4, guidance_scale=2.0),
    data=DataConfig(prompts="builtin:emoji", images="builtin:emoji"),
    roles={
        "student": RoleConfig(
            kind="lora", rank=64, alpha=64, lr=5e-4, betas=(0.0, 0.999), warmup=50, decay=200, ema=0.98
        ),
        "critic": RoleConfig(kind="full", lr=3e-4, betas=(0.0, 0.999), warmup=50),
    },
    train=TrainConfig(steps=600, batch_size=24, log_every=10, sample_every=200, checkpoint_every=200),
    samples=SampleConfig(count=24, teacher_steps=50, columns=12, scale=2),
    evaluation=EvalConfig(
        num=500,
        prompts="builtin:emoji-groups",
        named=500,
        floor_steps=[4],
        floor_solvers=["ddim", "dpm++", "unipc", "ays", "search"],
        teacher_steps=50,
        teacher_guidance=2.0,
        extractor="effnet-lite0@96",
    ),
)

if __name__ == "__main__":
    from fewstep import run

    run(recipe)
