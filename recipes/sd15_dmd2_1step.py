"""One-step LoRA of Stable Diffusion 1.5 at 512 px with DMD2.

    fewstep train sd15_dmd2_1step --prompts prompts.txt --images images/ --output runs/sd15
    fewstep train sd15_dmd2_1step --smoke          # seconds, a tiny random SD stands in
    fewstep train sd15_dmd2_1step --teacher PATH   # any StableDiffusionPipeline folder

Paper (64 A100, batch 2048, full weights): 40k iterations without GAN at 1e-5, then 5k with GAN weight 1e-3 at 5e-7;
COCO-30k FID 9.28, then 8.35. This recipe is the second stage's loss from the start, with LoRA. The student starts
at t = 999, where an eps network's error is multiplied by 14.6 in x0. Not yet run at scale. Hardware: one H100, 80 GB.
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

lora = RoleConfig(kind="lora", rank=64, alpha=8, lr=5e-5, warmup=500)

recipe = Recipe(
    output="runs/sd15_dmd2_1step",
    teacher=TeacherConfig(
        path="stable-diffusion-v1-5/stable-diffusion-v1-5",
        pipeline_class="StableDiffusionPipeline",
        dtype="bfloat16",
        autocast="bfloat16",
        resolution=512,
        gradient_checkpointing=True,
    ),
    method=DMD2.Config(num_steps=1, start=999, guidance_scale=1.75, critic_steps=10, gan_weight=1e-3),
    data=DataConfig(prompts="prompts.txt", images="images"),
    roles={"student": lora, "critic": lora, "discriminator": RoleConfig(kind="full", lr=5e-5, warmup=500)},
    train=TrainConfig(steps=40_000, batch_size=32, sample_every=250, checkpoint_every=500),
    samples=SampleConfig(count=8, teacher_steps=50, columns=4),
    export=ExportConfig(dtype="float16", kohya=True),
)

if __name__ == "__main__":
    from fewstep import run

    run(recipe)
