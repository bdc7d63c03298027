"""One-step student of the built-in flow teacher with SiD and long-short guidance, without images, on two CPU cores.

    python recipes/emoji_flow_sid_1step.py    (or: fewstep train emoji_flow_sid_1step)

Hardware: two CPU cores, 4 GB of memory. Its result is not stored yet.
Teacher and critic are guided alike (SiD-LSG, arXiv 2406.01561); the student starts from pure noise; learning rates
are those that suit a small teacher and a short run.
"""

from fewstep.methods.sid import SiD
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
    output="runs/emoji_flow_sid_1step",
    teacher=TeacherConfig(
        path="builtin:emoji-flow",
        pipeline_class="SanaPipeline",
        autocast="auto",
    ),
    method=SiD.Config(guidance_scale=2.0),
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
        floor_solvers=["euler", "dpm++", "unipc"],
        teacher_steps=50,
        teacher_guidance=2.0,
        extractor="effnet-lite0@96",
    ),
)

if __name__ == "__main__":
    from fewstep import run

    run(recipe)
