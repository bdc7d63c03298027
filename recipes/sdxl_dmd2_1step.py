"""One-step LoRA of SDXL at 1024 px with DMD2, from a student warmed up by regression.

    fewstep train sdxl_regression_1step --prompts prompts.txt        # first; its script says how
    fewstep train sdxl_dmd2_1step --prompts prompts.txt --images images/
    fewstep train sdxl_dmd2_1step --smoke          # seconds, a tiny random SDXL stands in
    fewstep train sdxl_dmd2_1step --student.start_from null --prompts prompts.txt --images images/   # no warm-up

Prompts: one per line (the paper used 3 M of LAION-Aesthetic 6.25+); images: captioned, at least 1024 px.
The student is conditioned on t = 399, the paper's remedy against block artefacts.
Hardware: one H100, 80 GB. Batch 128 in 32 parts of 4, 24k iterations: the critic sees 3.1 M samples, the student
learns from 0.6 M; 139 hours by `fewstep plan`.
Paper: the same batch and iterations on 64 A100 in 57 hours, all weights at 5e-7; FID 19.01 on COCO-10k. What
differs: the student is a LoRA at 5e-5, beside it the critic's weights at 5e-5, as in the paper's LoRA of four steps;
forward passes without gradient run in bf16 too. Not yet run at scale.
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

student = RoleConfig(
    kind="lora", rank=64, alpha=8, lr=5e-5, warmup=500, start_from="runs/sdxl_regression_1step/export"
)
full = RoleConfig(kind="full", lr=5e-5, warmup=500)

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
    roles={"student": student, "critic": full, "discriminator": full},
    train=TrainConfig(steps=24_000, batch_size=4, accumulate=32, sample_every=250, checkpoint_every=500),
    samples=SampleConfig(count=8, teacher_steps=50, columns=4),
    export=ExportConfig(dtype="float16", kohya=True),
)

if __name__ == "__main__":
    from fewstep import run

    run(recipe)
