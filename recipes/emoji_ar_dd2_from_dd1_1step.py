"""Student of the built-in autoregressive teacher in one step: Distilled Decoding 2 from DD1's, on two CPU cores.

    fewstep pairs emoji_ar_dd1_2step --num 22872     # once, some minutes
    fewstep train emoji_ar_dd1_2step
    fewstep train emoji_ar_dd2_from_dd1_1step

Hardware: two CPU cores, 4 GB of memory. Time and result: ``eval/results/emoji_ar_dd2_from_dd1_1step.json``. As
emoji_ar_dd2_1step, but the generator starts from a student that DD1 has finished, and DD1's loss stays beside the
distillation, which otherwise forgets names.
"""

from fewstep.methods.dd2 import DD2
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
    output="runs/emoji_ar_dd2_from_dd1_1step",
    teacher=TeacherConfig(path="builtin:emoji-ar", pipeline_class="LlamaGenPipeline", autocast="auto"),
    method=DD2.Config(
        guidance_scale=1.0,
        generator="codes",
        critic_steps=2,
        matching="dmd",
        copies=2,
        critic_copies=4,
        initial_share=0.1,
        regression_weight=0.5,
        alignment_share=0.1,
        head_width=128,
    ),
    data=DataConfig(prompts="builtin:emoji", images="builtin:emoji", pairs="pairs/emoji-ar"),
    roles={
        "student": RoleConfig(
            kind="full",
            lr=2e-4,
            betas=(0.9, 0.99),
            weight_decay=1e-3,
            warmup=50,
            decay=300,
            ema=0.99,
            start_from="runs/emoji_ar_dd1_2step/export",
        ),
        "critic": RoleConfig(kind="full", lr=1e-3, betas=(0.9, 0.99), weight_decay=1e-3, warmup=100),
    },
    train=TrainConfig(
        steps=1200, batch_size=32, clip_norm=1.0, log_every=25, sample_every=0, checkpoint_every=250
    ),
    samples=SampleConfig(count=24, columns=12, scale=2),
    evaluation=EvalConfig(
        num=500,
        prompts="builtin:emoji-groups",
        named=500,
        floor_steps=[],
        teacher_steps=64,
        teacher_guidance=1.0,
        extractor="effnet-lite0@96",
    ),
)

if __name__ == "__main__":
    from fewstep import run

    run(recipe)
