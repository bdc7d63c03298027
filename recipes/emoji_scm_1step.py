"""One-step student of the built-in teacher with sCM.

    fewstep train emoji_hyper_sd_1step
    fewstep train emoji_scm_1step

The student starts from one that a discrete consistency loss has made: from the teacher itself, whose image of noise is
a mean of all images, sCM's transport takes some ten times the updates (FD 1,078 after 800). The teacher is smooth
enough as it is: ``fewstep prepare`` measures 1.4 for |dF/dt| against |J_x v|. Where it measures more than about 3,
prepare the teacher first.

The learning rate matters: at three times this one the tangent grew to twice what it is here, and half of the samples
collapsed to one texture (FD 1610). Hardware: two CPU cores, 4 GB of memory. Result:
``eval/results/emoji_scm_1step.json``.
"""

from fewstep.methods.scm import SCM
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
    output="runs/emoji_scm_1step",
    teacher=TeacherConfig(
        path="builtin:emoji-xl",
        pipeline_class="StableDiffusionXLPipeline",
        autocast="auto",
    ),
    method=SCM.Config(guidance_scale=2.0, time_mean=0.2, time_std=1.6, warmup=0),
    data=DataConfig(prompts="builtin:emoji", images="builtin:emoji"),
    roles={
        "student": RoleConfig(
            kind="lora",
            rank=64,
            alpha=64,
            lr=1e-4,
            betas=(0.9, 0.99),
            weight_decay=0.0,
            warmup=50,
            decay=300,
            ema=0.98,
            start_from="runs/emoji_hyper_sd_1step/export",
        ),
        "weighting": RoleConfig(kind="full", lr=1e-3, weight_decay=0.0),
    },
    train=TrainConfig(
        steps=600, batch_size=16, clip_norm=1.0, log_every=10, sample_every=300, checkpoint_every=200
    ),
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
