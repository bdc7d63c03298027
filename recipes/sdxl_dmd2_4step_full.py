"""Four-step SDXL at 1024 px with DMD2, all weights of student and critic.

    torchrun --nproc_per_node 8 recipes/sdxl_dmd2_4step_full.py --prompts prompts.txt --images images
    fewstep train sdxl_dmd2_4step_full --smoke     # seconds, a tiny random SDXL stands in

Prompts: one per line (the paper used 3 M of LAION-Aesthetic 6.25+); images: captioned, at least 1024 px.
Hardware: eight H100, 80 GB each, over which weights, gradients and moments are split. Batch 128, 16 per card at once
(smaller parts would keep whole gradients from one to the next), 20k iterations: the critic sees 2.6 M samples, the
student learns from 0.5 M; 19 hours by `fewstep plan`.
Paper: the same weights, rates (5e-7), batch and iterations on 64 A100 in 57 hours; FID 19.32 on COCO-10k, by the
checkpoint of 19k iterations. What differs: forward passes without gradient run in bf16 too. Not yet run at scale.
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

full = RoleConfig(kind="full", lr=5e-7, warmup=500)

recipe = Recipe(
    output="runs/sdxl_dmd2_4step_full",
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
    roles={"student": full, "critic": full, "discriminator": full},
    train=TrainConfig(steps=20_000, batch_size=16, shard=8, sample_every=250, checkpoint_every=500),
    samples=SampleConfig(count=8, teacher_steps=50, columns=4),
    export=ExportConfig(dtype="float16"),
)

if __name__ == "__main__":
    from fewstep import run

    run(recipe)
