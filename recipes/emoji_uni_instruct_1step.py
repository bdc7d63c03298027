"""One-step student of the built-in teacher with Uni-Instruct (arXiv 2505.20755), on two CPU cores.

    python recipes/emoji_uni_instruct_1step.py    (or: fewstep train emoji_uni_instruct_1step)

Hardware: two CPU cores, 4 GB of memory. Not yet run: the options of ``emoji_sida_1step``, whose discriminator stays
at chance on this teacher.
"""

from fewstep.methods.uni_instruct import UniInstruct
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
    output="runs/emoji_uni_instruct_1step",
    teacher=TeacherConfig(
        path="builtin:emoji-xl",
        pipeline_class="StableDiffusionXLPipeline",
        autocast="auto",
    ),
    method=UniInstruct.Config(guidance_scale=2.0, gan_schedule=(1200, 4800)),
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
