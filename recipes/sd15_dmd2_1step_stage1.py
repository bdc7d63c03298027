"""One-step Stable Diffusion 1.5 at 512 px with DMD2, the first of two stages: no GAN, from prompts alone.

    torchrun --nproc_per_node 8 recipes/sd15_dmd2_1step_stage1.py --prompts prompts.txt
    torchrun --nproc_per_node 8 recipes/sd15_dmd2_1step_stage2.py --prompts prompts.txt --images images
    fewstep train sd15_dmd2_1step_stage1 --smoke   # seconds, a tiny random SD stands in

Prompts: one per line (the paper used 3 M of LAION-Aesthetic 6.25+). The student starts at t = 999, where an eps
network's error is multiplied by 14.6 in x0.
Hardware: eight H100, 80 GB each. Batch 2048 in 4 parts of 64 per card, 40k iterations: the critic sees 82 M samples,
the student learns from 8 M; 31 hours by `fewstep plan`.
Paper: the same weights, rates, batch and iterations on 64 A100 in 25 hours; COCO-30k FID 9.28. What differs: forward
passes without gradient run in bf16 too. Not yet run at scale.
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

full = RoleConfig(kind="full", lr=1e-5, warmup=500)

recipe = Recipe(
    output="runs/sd15_dmd2_1step_stage1",
    teacher=TeacherConfig(
        path="stable-diffusion-v1-5/stable-diffusion-v1-5",
        pipeline_class="StableDiffusionPipeline",
        dtype="bfloat16",
        autocast="bfloat16",
        resolution=512,
        gradient_checkpointing=True,
    ),
    method=DMD2.Config(num_steps=1, start=999, guidance_scale=1.75, critic_steps=10, gan_weight=0.0),
    data=DataConfig(prompts="prompts.txt"),
    roles={"student": full, "critic": full},
    train=TrainConfig(steps=40_000, batch_size=64, accumulate=4, sample_every=250, checkpoint_every=500),
    samples=SampleConfig(count=8, teacher_steps=50, columns=4),
    export=ExportConfig(dtype="float16"),
)

if __name__ == "__main__":
    from fewstep import run

    run(recipe)
