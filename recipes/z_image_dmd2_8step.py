"""Eight-step LoRA of Z-Image at 1024 px with DMD2's score difference alone.

    torchrun --nproc_per_node 8 recipes/z_image_dmd2_8step.py --prompts prompts.txt
    fewstep train z_image_dmd2_8step --smoke          # seconds, a tiny random Z-Image stands in

Guidance is the model card's 4, which is 5 here: the pipeline adds 4 (c - u) to the conditional prediction. Eight steps
are those of the published Turbo. All else is ours: rank and learning rates as in ``flux_dmd2_4step``, and no
discriminator, so that no images are needed. Not yet run at scale. The teacher is the base model, not its Turbo; its
licence is Apache 2.0.
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
    output="runs/z_image_dmd2_8step",
    teacher=TeacherConfig(
        path="Tongyi-MAI/Z-Image",
        pipeline_class="ZImagePipeline",
        dtype="bfloat16",
        autocast="bfloat16",
        resolution=1024,
        gradient_checkpointing=True,
    ),
    method=DMD2.Config(num_steps=8, guidance_scale=5.0, critic_steps=5, gan_weight=0.0),
    data=DataConfig(prompts="prompts.txt"),
    roles={"student": lora, "critic": lora},
    train=TrainConfig(steps=10_000, batch_size=1, accumulate=4, sample_every=250, checkpoint_every=500),
    samples=SampleConfig(count=8, teacher_steps=50, columns=4),
    export=ExportConfig(dtype="bfloat16"),
)

if __name__ == "__main__":
    from fewstep import run

    run(recipe)
