"""Four one-step students of Stable Diffusion 1.5 at 512 px, the first of two stages (DM): no GAN, prompts alone.

    torchrun --nproc_per_node 8 recipes/sd15_multi_student_1step_dm.py --prompts prompts.txt
    torchrun --nproc_per_node 8 recipes/sd15_multi_student_1step_adm.py --prompts prompts.txt --images images
    fewstep train sd15_multi_student_1step_dm --smoke   # seconds, a tiny random SD stands in

Each student has a critic of its own and a quarter of the prompts, by their embedding.
Hardware: eight H100, 80 GB each, over which weights, gradients and moments are split. Batch 2048, a quarter per
student, in 2 parts of 128 per card, 40k iterations: each critic sees 20 M samples, each student learns from 2 M;
32 hours by `fewstep plan`.
Paper (arXiv 2410.23274): COCO-30k FID 8.80 after this stage, 8.20 after the second, where one student has 8.35. It
regresses on pairs here, or trains the critic more often, as this recipe does. Its rates, batch and iterations are not
known to us: these are DMD2's two stages for one student, sd15_dmd2_1step_stage1. Not yet run at scale.
"""

from fewstep.methods.multi_student import MultiStudent
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
    output="runs/sd15_multi_student_1step_dm",
    teacher=TeacherConfig(
        path="stable-diffusion-v1-5/stable-diffusion-v1-5",
        pipeline_class="StableDiffusionPipeline",
        dtype="bfloat16",
        autocast="bfloat16",
        resolution=512,
        gradient_checkpointing=True,
    ),
    method=MultiStudent.Config(parts=4, start=999, guidance_scale=1.75, critic_steps=10, gan_weight=0.0),
    data=DataConfig(prompts="prompts.txt"),
    roles={"student": full, "critic": full},
    train=TrainConfig(
        steps=40_000, batch_size=128, accumulate=2, shard=8, sample_every=250, checkpoint_every=500
    ),
    samples=SampleConfig(count=8, teacher_steps=50, columns=4),
    export=ExportConfig(dtype="float16"),
)

if __name__ == "__main__":
    from fewstep import run

    run(recipe)
