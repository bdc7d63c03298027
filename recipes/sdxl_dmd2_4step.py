"""Four-step LoRA of SDXL at 1024 px with DMD2.

    fewstep train sdxl_dmd2_4step --prompts prompts.txt --images images/ --output runs/sdxl4
    fewstep train sdxl_dmd2_4step --smoke          # seconds, a tiny random SDXL stands in
    fewstep train sdxl_dmd2_4step --teacher PATH   # any StableDiffusionXLPipeline folder

Prompts: one per line (the paper used 3 M of LAION-Aesthetic 6.25+); images: captioned, at least 1024 px.
Paper (64 A100, batch 128, 16k iterations, full critic): FID 19.68 on COCO-10k for the LoRA student. This recipe
shares one frozen base between student and critic LoRAs, so that one card holds it. Not yet run at scale.
Hardware: one H100, 80 GB.
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

# DMD2's LoRA: rank 64, alpha 8, both learning rates 5e-5.
lora = RoleConfig(kind="lora", rank=64, alpha=8, lr=5e-5, warmup=500)

recipe = Recipe(
    output="runs/sdxl_dmd2_4step",
    teacher=TeacherConfig(
        path="stabilityai/stable-diffusion-xl-base-1.0",
        pipeline_class="StableDiffusionXLPipeline",
        dtype="bfloat16",
        autocast="bfloat16",
        resolution=1024,
        gradient_checkpointing=True,
    ),
    method=DMD2.Config(num_steps=4, start=999, guidance_scale=8.0, critic_steps=5, gan_weight=5e-3),
    data=DataConfig(prompts="prompts.txt", images="images"),
    roles={"student": lora, "critic": lora, "discriminator": RoleConfig(kind="full", lr=5e-5, warmup=500)},
    train=TrainConfig(steps=16_000, batch_size=2, accumulate=4, sample_every=250, checkpoint_every=500),
    samples=SampleConfig(count=8, teacher_steps=50, columns=4),
    export=ExportConfig(dtype="float16", kohya=True),
)

if __name__ == "__main__":
    from fewstep import run

    run(recipe)
