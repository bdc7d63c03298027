"""One-step student of Stable Diffusion 1.5 at 512 px with BOOT.

    torchrun --nproc_per_node 8 recipes/sd15_boot_1step.py --prompts prompts.txt --output runs/boot
    fewstep train sd15_boot_1step --smoke          # seconds, a tiny random SD stands in
    fewstep train sd15_boot_1step --teacher PATH   # any StableDiffusionPipeline folder

Data-free: prompts only. The paper (arXiv 2306.05544) trained on prompts of diffusiondb with guidance and gives no table
of its values, and there is no public code: rate, batch and intervals here are ours. A network that predicts eps
multiplies its error by 15 at the noisiest level, where BOOT has to call it. Not yet run at scale.
Hardware: eight H100, 80 GB each.
"""

from fewstep.methods.boot import BOOT
from fewstep.recipe import (
    DataConfig,
    ExportConfig,
    Recipe,
    RoleConfig,
    SampleConfig,
    TeacherConfig,
    TrainConfig,
)

recipe = Recipe(
    output="runs/sd15_boot_1step",
    teacher=TeacherConfig(
        path="stable-diffusion-v1-5/stable-diffusion-v1-5",
        pipeline_class="StableDiffusionPipeline",
        dtype="float32",
        autocast="bfloat16",
        resolution=512,
    ),
    method=BOOT.Config(intervals=50, guidance_scale=7.5, guidance_range=(1.0, 8.0)),
    data=DataConfig(prompts="prompts.txt"),
    roles={
        "student": RoleConfig(
            kind="full", lr=2e-5, betas=(0.9, 0.999), weight_decay=0.0, warmup=500, ema=0.9999
        ),
    },
    train=TrainConfig(steps=50_000, batch_size=16, accumulate=2, sample_every=500, checkpoint_every=1000),
    samples=SampleConfig(count=8, teacher_steps=50, columns=4),
    export=ExportConfig(dtype="float16"),
)

if __name__ == "__main__":
    from fewstep import run

    run(recipe)
