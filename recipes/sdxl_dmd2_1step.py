"""One-step LoRA of SDXL at 1024 px with DMD2.

    fewstep train sdxl_dmd2_1step --prompts prompts.txt --images images/ --output runs/sdxl1
    fewstep train sdxl_dmd2_1step --smoke          # seconds, a tiny random SDXL stands in
    fewstep train sdxl_dmd2_1step --teacher PATH   # any StableDiffusionXLPipeline folder

Prompts: one per line (the paper used 3 M of LAION-Aesthetic 6.25+); images: captioned, at least 1024 px.
The student is conditioned on t = 399, the paper's remedy against block artefacts. Paper (64 A100, batch 128, 24k
iterations, full weights, after a short regression warm-up on 10k teacher pairs): FID 19.01 on COCO-10k. This recipe
shares one frozen base between student and critic LoRAs and has no warm-up. Not yet run at scale.
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
    output="runs/sdxl_dmd2_1step",
    teacher=TeacherConfig(
        path="stabilityai/stable-diffusion-xl-base-1.0",
        pipeline_class="StableDiffusionXLPipeline",
        dtype="bfloat16",
        autocast="bfloat16",
        resolution=1024,
        gradient_checkpointing=True,
    ),
    method=DMD2.Config(num_steps=1, start=399, guidance_scale=8.0, critic_steps=5, gan_weight=5e-3),
    data=DataConfig(prompts="prompts.txt", images="images"),
    roles={"student": lora, "critic": lora, "discriminator": RoleConfig(kind="full", lr=5e-5, warmup=500)},
    train=TrainConfig(steps=24_000, batch_size=2, accumulate=4, sample_every=250, checkpoint_every=500),
    samples=SampleConfig(count=8, teacher_steps=50, columns=4),
    export=ExportConfig(dtype="float16", kohya=True),
)

if __name__ == "__main__":
    from fewstep import run

    run(recipe)
