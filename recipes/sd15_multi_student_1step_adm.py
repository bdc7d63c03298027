"""Four one-step students of Stable Diffusion 1.5 at 512 px, the second of two stages (ADM): with a GAN each.

    torchrun --nproc_per_node 8 recipes/sd15_multi_student_1step_dm.py --prompts prompts.txt
    torchrun --nproc_per_node 8 recipes/sd15_multi_student_1step_adm.py --prompts prompts.txt --images images
    fewstep train sd15_multi_student_1step_adm --smoke   # seconds, a tiny random SD stands in

Students and critics start from the run of the first stage, with the same prompts, which tell them apart.
Hardware: eight H100, 80 GB each, over which weights, gradients and moments are split. Batch 512, a quarter per
student, 64 per card at once, 20k iterations: each critic sees 2.6 M samples, each student learns from 0.3 M; 7 hours
by `fewstep plan`.
Paper (arXiv 2410.23274): COCO-30k FID 8.20 (8.80 before), where one student has 8.35. Its rates, batch and iterations
are not known to us: rates and samples are DMD2's second stage for one student, sd15_dmd2_1step_stage2, in smaller
batches. Not yet run at scale.
"""

from dataclasses import replace

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

full = RoleConfig(kind="full", lr=5e-7, warmup=500)
started = replace(full, start_from="runs/sd15_multi_student_1step_dm")

recipe = Recipe(
    output="runs/sd15_multi_student_1step_adm",
    teacher=TeacherConfig(
        path="stable-diffusion-v1-5/stable-diffusion-v1-5",
        pipeline_class="StableDiffusionPipeline",
        dtype="bfloat16",
        autocast="bfloat16",
        resolution=512,
        gradient_checkpointing=True,
    ),
    method=MultiStudent.Config(parts=4, start=999, guidance_scale=1.75, critic_steps=10, gan_weight=1e-3),
    data=DataConfig(prompts="prompts.txt", images="images"),
    roles={"student": started, "critic": started, "discriminator": full},
    train=TrainConfig(steps=20_000, batch_size=64, shard=8, sample_every=250, checkpoint_every=500),
    samples=SampleConfig(count=8, teacher_steps=50, columns=4),
    export=ExportConfig(dtype="float16"),
)

if __name__ == "__main__":
    from fewstep import run

    run(recipe)
