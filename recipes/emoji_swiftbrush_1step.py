"""One-step student of the built-in teacher with SwiftBrush, without images, on two CPU cores.

    python recipes/emoji_swiftbrush_1step.py    (or: fewstep train emoji_swiftbrush_1step)

Hardware: two CPU cores, 4 GB of memory. Result: ``eval/results/emoji_swiftbrush_1step.json``.
The critic is a
full copy, not the paper's adapter; learning rates are those that suit a small teacher and a short run.
"""

from fewstep.methods.score_difference import SwiftBrush
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
    output="runs/emoji_swiftbrush_1step",
    teacher=TeacherConfig(
        path="builtin:emoji-xl",
        pipeline_class="StableDiffusionXLPipeline",
        autocast="auto",
    ),
    method=SwiftBrush.Config(start=799, guidance_scale=2.0),
    data=DataConfig(prompts="builtin:emoji", images="builtin:emoji"),
    roles={
        "student": RoleConfig(kind="lora", rank=64, alpha=64, lr=5e-4, warmup=50, decay=300, ema=0.98),
        # The published LoRA critic (rank 64 on to_q and to_v, 1e-3) cannot follow the student here, which collapses.
        "critic": RoleConfig(kind="full", lr=3e-4, warmup=50),
    },
    train=TrainConfig(steps=800, batch_size=24, log_every=10, sample_every=250, checkpoint_every=500),
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
