"""Four-step student of the built-in flow teacher with DMD2 and backward simulation.

    python recipes/emoji_flow_dmd2_4step.py                       (or: fewstep train emoji_flow_dmd2_4step)

The flow has no shift, so the four times are 1, 0.75, 0.5 and 0.25.
Hardware: two CPU cores, 4 GB of memory. Time and result: ``eval/results/emoji_flow_dmd2_4step.json``.
"""

from fewstep.methods.dmd2 import DMD2
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
    output="runs/emoji_flow_dmd2_4step",
    teacher=TeacherConfig(
        path="builtin:emoji-flow",
        pipeline_class="SanaPipeline",
        autocast="auto",
    ),
    method=DMD2.Config(
        num_steps=4,
        guidance_scale=2.0,
        critic_steps=4,
        gan_weight=5e-3,
        taps=["transformer_blocks.3"],
    ),
    data=DataConfig(prompts="builtin:emoji", images="builtin:emoji"),
    roles={
        "student": RoleConfig(kind="lora", rank=64, alpha=64, lr=5e-4, warmup=50, decay=200, ema=0.98),
        "critic": RoleConfig(kind="full", lr=3e-4, warmup=50),
        "discriminator": RoleConfig(kind="full", lr=3e-4, warmup=50),
    },
    train=TrainConfig(steps=600, batch_size=24, log_every=10, sample_every=250, checkpoint_every=500),
    samples=SampleConfig(count=24, teacher_steps=50, columns=12, scale=2),
    evaluation=EvalConfig(
        num=500,
        prompts="builtin:emoji-groups",
        named=500,
        floor_steps=[2, 4],
        floor_solvers=["euler", "dpm++", "unipc"],
        teacher_steps=50,
        teacher_guidance=2.0,
        extractor="effnet-lite0@96",
    ),
)

if __name__ == "__main__":
    from fewstep import run

    run(recipe)
