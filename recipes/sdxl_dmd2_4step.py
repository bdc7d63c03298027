"""Four-step LoRA of SDXL at 1024 px with DMD2.

    fewstep train sdxl_dmd2_4step --prompts prompts.txt --images images/ --output runs/sdxl4
    fewstep train sdxl_dmd2_4step --smoke          # seconds, a tiny random SDXL stands in
    fewstep train sdxl_dmd2_4step --teacher PATH   # any StableDiffusionXLPipeline folder
    torchrun --nproc_per_node 8 recipes/sdxl_dmd2_4step.py --train.accumulate 4   # an eighth of the time

Prompts: one per line (the paper used 3 M of LAION-Aesthetic 6.25+); images: captioned, at least 1024 px.
Hardware: one H100, 80 GB. Batch 128 in 32 parts of 4, 16k iterations: the critic sees 2.0 M samples, the student
learns from 0.4 M; 109 hours by `fewstep plan`.
Paper: the same weights, rates, batch and iterations on 64 A100 in 63 hours, of which most is fp32; FID 19.68 on
COCO-10k. What differs: forward passes without gradient run in bf16 too. Not yet run at scale.
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

# As published: DMD2's LoRA has rank 64 and alpha 8, its critic full weights, both at 5e-5.
student = RoleConfig(kind="lora", rank=64, alpha=8, lr=5e-5, warmup=500)
full = RoleConfig(kind="full", lr=5e-5, warmup=500)

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
    roles={"student": student, "critic": full, "discriminator": full},
    train=TrainConfig(steps=16_000, batch_size=4, accumulate=32, sample_every=250, checkpoint_every=500),
    samples=SampleConfig(count=8, teacher_steps=50, columns=4),
    export=ExportConfig(dtype="float16", kohya=True),
)

if __name__ == "__main__":
    from fewstep import run

    run(recipe)
