"""Four-step student of the built-in teacher with PCM: four fixed segments, steps without new noise.

    python recipes/emoji_pcm_4step.py                       (or: fewstep train emoji_pcm_4step)

Hardware: two CPU cores, 4 GB of memory. Result: ``eval/results/emoji_pcm_4step.json``. The options are the paper's
(arXiv 2405.18407) but for its adversarial term, whose heads need a larger teacher's features.
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
    output="runs/emoji_pcm_4step",
    teacher=TeacherConfig(
        path="builtin:emoji-xl",
        pipeline_class="StableDiffusionXLPipeline",
        autocast="auto",
    ),
    method=HyperSD.Config(
        segments=[4],
        end="segment",
        target="live",
        distance="huber",
        noise="ddim",
        guidance_scale=2.0,
    ),
    data=DataConfig(prompts="builtin:emoji", images="builtin:emoji"),
    roles={"student": RoleConfig(kind="lora", rank=64, alpha=64, lr=5e-4, warmup=20, decay=200, ema=0.98)},
    train=TrainConfig(steps=1000, batch_size=24, log_every=10, sample_every=250, checkpoint_every=500),
    samples=SampleConfig(count=24, teacher_steps=50, columns=12, scale=2),
    evaluation=EvalConfig(
        num=500,
        prompts="builtin:emoji-groups",
        named=500,
        floor_steps=[4],
        floor_solvers=["ddim", "dpm++", "unipc"],
        teacher_steps=50,
        teacher_guidance=2.0,
        extractor="effnet-lite0@96",
    ),
)

if __name__ == "__main__":
    from fewstep import run

    run(recipe)
