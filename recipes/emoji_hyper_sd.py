"""One student of 1, 2, 4 and 8 steps of the built-in teacher with Hyper-SD: segments 8-4-2-1, one LoRA.

    python recipes/emoji_hyper_sd.py                       (or: fewstep train emoji_hyper_sd)

Hardware: two CPU cores, 4 GB of memory. What came out: ``eval/results/emoji_hyper_sd.json``.
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
    output="runs/emoji_hyper_sd",
    teacher=TeacherConfig(
        path="builtin:emoji-xl",
        pipeline_class="StableDiffusionXLPipeline",
        autocast="auto",
    ),
    method=HyperSD.Config(
        segments=[8, 4, 2, 1],
        lengths=[1, 1, 1, 3],
        guidance_scale=2.0,
    ),
    data=DataConfig(prompts="builtin:emoji", images="builtin:emoji"),
    roles={"student": RoleConfig(kind="lora", rank=64, alpha=64, lr=1e-3, warmup=20, decay=200, ema=0.98)},
    train=TrainConfig(steps=1500, batch_size=24, log_every=10, sample_every=500, checkpoint_every=300),
    samples=SampleConfig(count=24, teacher_steps=50, columns=12, scale=2),
    evaluation=EvalConfig(
        num=500,
        prompts="builtin:emoji-groups",
        named=500,
        floor_steps=[1, 2, 4],
        floor_solvers=["ddim", "dpm++", "unipc"],
        teacher_steps=50,
        teacher_guidance=2.0,
        extractor="effnet-lite0@96",
    ),
)

if __name__ == "__main__":
    from fewstep import run

    run(recipe)
