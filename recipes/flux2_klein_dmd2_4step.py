"""Four-step LoRA of FLUX.2 klein base, 4B, at 1024 px with DMD2's score difference alone.

    torchrun --nproc_per_node 8 recipes/flux2_klein_dmd2_4step.py --prompts prompts.txt
    fewstep train flux2_klein_dmd2_4step --smoke          # seconds, a tiny random FLUX.2 klein stands in

Guidance is the stock call's 4 against the empty prompt. All else is ours: rank and learning rates as in
``flux_dmd2_4step``, and no discriminator, so that no images are needed. Not yet run at scale. The teacher is the base
model, not the distilled klein; its licence is Apache 2.0. The 9B base has another, and takes --teacher.path.
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
    output="runs/flux2_klein_dmd2_4step",
    teacher=TeacherConfig(
        path="black-forest-labs/FLUX.2-klein-base-4B",
        pipeline_class="Flux2KleinPipeline",
        dtype="bfloat16",
        autocast="bfloat16",
        resolution=1024,
        gradient_checkpointing=True,
    ),
    method=DMD2.Config(num_steps=4, guidance_scale=4.0, critic_steps=5, gan_weight=0.0),
    data=DataConfig(prompts="prompts.txt"),
    roles={"student": lora, "critic": lora},
    train=TrainConfig(steps=10_000, batch_size=1, accumulate=4, sample_every=250, checkpoint_every=500),
    samples=SampleConfig(count=8, teacher_steps=50, columns=4),
    export=ExportConfig(dtype="bfloat16"),
)

if __name__ == "__main__":
    from fewstep import run

    run(recipe)
