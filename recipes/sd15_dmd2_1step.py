"""One-step LoRA of Stable Diffusion 1.5 at 512 px with DMD2.

    fewstep train sd15_dmd2_1step --prompts prompts.txt --images images/ --output runs/sd15
    fewstep train sd15_dmd2_1step --smoke          # seconds, a tiny random SD stands in
    fewstep train sd15_dmd2_1step --teacher PATH   # any StableDiffusionPipeline folder

Hardware: one H100, 80 GB. Batch 512 in 8 parts of 64, 20k iterations: the critic sees 10 M samples, the student learns
from 1 M; 47 hours by `fewstep plan`.
Paper (64 A100, batch 2048, all weights): 40k iterations without GAN at 1e-5, then 5k with GAN weight 1e-3 at 5e-7;
COCO-30k FID 9.28, then 8.35: sd15_dmd2_1step_stage1 and _stage2. This recipe is the second stage's loss from the start;
the student is a LoRA, beside the whole weights of a critic, with the rates of the paper's LoRA of SDXL. The student
starts at t = 999, where an eps network's error is multiplied by 14.6 in x0. Not yet run at scale.
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

student = RoleConfig(kind="lora", rank=64, alpha=8, lr=5e-5, warmup=500)
full = RoleConfig(kind="full", lr=5e-5, warmup=500)

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
    roles={"student": student, "critic": full, "discriminator": full},
    train=TrainConfig(steps=20_000, batch_size=64, accumulate=8, sample_every=250, checkpoint_every=500),
    samples=SampleConfig(count=8, teacher_steps=50, columns=4),
    export=ExportConfig(dtype="float16", kohya=True),
)

if __name__ == "__main__":
    from fewstep import run

    run(recipe)
