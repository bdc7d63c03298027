"""One-step student of the built-in teacher with DisBack, without images, on two CPU cores.

    python recipes/emoji_disback_1step.py       (or: fewstep train emoji_disback_1step)

Hardware: two CPU cores, 4 GB of memory. Result: ``eval/results/emoji_disback_1step.json``.
Of 1000 iterations 100 record four nodes, 180 lead back
to the teacher, 720 stay with it.
"""

from fewstep.methods.disback import DisBack
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
    output="runs/emoji_disback_1step",
    teacher=TeacherConfig(
        path="builtin:emoji-xl",
        pipeline_class="StableDiffusionXLPipeline",
        autocast="auto",
    ),
    method=DisBack.Config(
        nodes=4,
        record_steps=25,
        backtrack_steps=60,
        start=799,
        guidance_scale=2.0,
        critic_steps=2,
    ),
    data=DataConfig(prompts="builtin:emoji", images="builtin:emoji"),
    roles={
        "student": RoleConfig(kind="lora", rank=64, alpha=64, lr=5e-4, warmup=50, decay=300, ema=0.98),
        # Weights go from node to node and into the critic, so they are alike.
        "critic": RoleConfig(kind="lora", rank=64, alpha=64, lr=1e-3),
        "node": RoleConfig(kind="lora", rank=64, alpha=64, lr=1e-3),
    },
    train=TrainConfig(steps=1000, batch_size=24, log_every=10, sample_every=250, checkpoint_every=500),
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
