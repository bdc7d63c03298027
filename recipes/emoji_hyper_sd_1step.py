"""One-step student of the built-in teacher with one segment of Hyper-SD: consistency distillation in discrete steps.

    python recipes/emoji_hyper_sd_1step.py                 (or: fewstep train emoji_hyper_sd_1step)

It is what ``emoji_scm_1step`` starts from. Hardware: two CPU cores, 4 GB of memory. What came out:
``eval/results/emoji_hyper_sd_1step.json``.
"""

from fewstep.methods.hyper_sd import HyperSD
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
    output="runs/emoji_hyper_sd_1step",
    teacher=TeacherConfig(
        path="builtin:emoji-xl",
        pipeline_class="StableDiffusionXLPipeline",
        autocast="auto",
    ),
    method=HyperSD.Config(segments=[1], guidance_scale=2.0),
    data=DataConfig(prompts="builtin:emoji", images="builtin:emoji"),
    roles={"student": RoleConfig(kind="lora", rank=64, alpha=64, lr=1e-3, warmup=20, decay=300, ema=0.98)},
    train=TrainConfig(steps=900, batch_size=24, log_every=10, sample_every=450, checkpoint_every=300),
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
