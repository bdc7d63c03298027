"""Four-step LoRA of Krea 2 Raw at 1024 px with DMD2's score difference alone.

    torchrun --nproc_per_node 8 recipes/krea2_dmd2_4step.py --prompts prompts.txt
    fewstep train krea2_dmd2_4step --smoke          # seconds, a tiny random Krea 2 stands in

Guidance is the stock call's 4.5, which is 5.5 here: the pipeline adds 4.5 (c - u) to the conditional prediction. All
else is ours: rank and learning rates as in ``flux_dmd2_4step``, and no discriminator, so that no images are needed. Not
yet run at scale. The teacher is Raw, not Turbo; its licence is the Krea 2 Community License, which what is distilled
from it falls under too. An encoded prompt takes 31 MB on disk at most, twelve layers of 512 tokens.
Hardware: eight H100, 80 GB each.
"""

from fewstep.methods.dmd2 import DMD2
from fewstep.recipe import (
    DataConfig,
    ExportConfig,
    Recipe,
    RoleConfig,
    SampleConfig,
    TeacherConfig,
    TrainConfig,
)

lora = RoleConfig(kind="lora", rank=64, alpha=64, lr=2e-5, warmup=200)

recipe = Recipe(
    output="runs/krea2_dmd2_4step",
    teacher=TeacherConfig(
        path="krea/Krea-2-Raw",
        pipeline_class="Krea2Pipeline",
        dtype="bfloat16",
        autocast="bfloat16",
        resolution=1024,
        gradient_checkpointing=True,
    ),
    method=DMD2.Config(num_steps=4, guidance_scale=5.5, critic_steps=5, gan_weight=0.0),
    data=DataConfig(prompts="prompts.txt"),
    roles={"student": lora, "critic": lora},
    train=TrainConfig(steps=10_000, batch_size=1, accumulate=4, sample_every=250, checkpoint_every=500),
    samples=SampleConfig(count=8, teacher_steps=28, columns=4),
    export=ExportConfig(dtype="bfloat16"),
)

if __name__ == "__main__":
    from fewstep import run

    run(recipe)
