"""Student of one and two steps of the built-in autoregressive teacher with Distilled Decoding 1, on two CPU cores.

    fewstep pairs emoji_ar_dd1_2step --num 22872     # once, some minutes
    fewstep train emoji_ar_dd1_2step

Hardware: two CPU cores, 4 GB of memory. Time and result: ``eval/results/emoji_ar_dd1_2step.json``. The second step
begins at token 24 of 64, a third as in the paper; it has a fifth of the samples, half of which know what the student
itself made of the first tokens. Logits decide all tokens: codes here stand for drawings, in which a mean of two is
neither. Two thirds of the pairs are names, of which there are 1,906 for 98 kinds: the more of them, the more is
named, and the more alike are drawings of a kind. Rates are those of a small teacher and a short run.
"""

from fewstep.methods.dd1 import DD1
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
    output="runs/emoji_ar_dd1_2step",
    teacher=TeacherConfig(path="builtin:emoji-ar", pipeline_class="LlamaGenPipeline", autocast="auto"),
    method=DD1.Config(entries=[0, 24], entry_shares=[0.8, 0.2], own_share=0.5, split=64, guidance_scale=1.0),
    data=DataConfig(prompts="builtin:emoji-mostly-names", images="builtin:emoji", pairs="pairs/emoji-ar"),
    roles={
        "student": RoleConfig(
            kind="full", lr=2e-3, betas=(0.9, 0.99), weight_decay=1e-3, warmup=100, decay=6000, ema=0.995
        )
    },
    train=TrainConfig(
        steps=7000, batch_size=32, clip_norm=1.0, log_every=25, sample_every=3500, checkpoint_every=250
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
