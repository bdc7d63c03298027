"""Four-step student of the built-in teacher with Phased DMD: two experts, each a LoRA.

    python recipes/emoji_phased_dmd_4step.py                       (or: fewstep train emoji_phased_dmd_4step)

Hardware: two CPU cores, 4 GB of memory. Time and result: ``eval/results/emoji_phased_dmd_4step.json``.
"""

from fewstep.methods.phased_dmd import PhasedDMD
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
    output="runs/emoji_phased_dmd_4step",
    teacher=TeacherConfig(
        path="builtin:emoji-xl",
        pipeline_class="StableDiffusionXLPipeline",
        autocast="auto",
    ),
    method=PhasedDMD.Config(num_steps=4, phases=2, guidance_scale=2.0, critic_steps=4),
    data=DataConfig(prompts="builtin:emoji", images="builtin:emoji"),
    roles={
        "student": RoleConfig(kind="lora", rank=64, alpha=64, lr=5e-4, warmup=50, decay=200, ema=0.98),
        "critic": RoleConfig(kind="full", lr=3e-4, warmup=50),
    },
    train=TrainConfig(steps=1400, batch_size=24, log_every=10, sample_every=250, checkpoint_every=500),
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
