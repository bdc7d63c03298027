"""SANA-Sprint's method on Stable Diffusion 3 medium: one student for 1, 2 and 4 steps (arXiv 2503.09641).

    fewstep prepare stabilityai/stable-diffusion-3-medium-diffusers --images images --qk-norm --out runs/sd3-smooth
    torchrun --nproc_per_node 8 recipes/sd3_sana_sprint.py --prompts prompts.txt --images images

Hardware: eight H100, 80 GB each. Not yet run at scale. The student is told its guidance scale while it learns; exported
is the network of Stable Diffusion 3's own class at one scale, since stock pipelines of that class have no such input.
"""

from fewstep.methods.sana_sprint import SanaSprint
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
    output="runs/sd3_sana_sprint",
    teacher=TeacherConfig(
        path="runs/sd3-smooth",
        pipeline_class="StableDiffusion3Pipeline",
        dtype="bfloat16",
        autocast="bfloat16",
        gradient_checkpointing=True,
    ),
    method=SanaSprint.Config(
        guidance_scales=[4.0, 5.0, 6.0, 7.0],
        guidance_scale=5.0,
        taps=[f"transformer_blocks.{i}" for i in (4, 10, 16, 22)],
    ),
    data=DataConfig(prompts="prompts.txt", images="images"),
    roles={
        "student": RoleConfig(kind="full", lr=2e-6, weight_decay=0.0, warmup=2500, ema=0.9999),
        "weighting": RoleConfig(kind="full", lr=1e-3, weight_decay=0.0),
        "discriminator": RoleConfig(kind="full", lr=2e-6, weight_decay=0.0, warmup=2500),
    },
    train=TrainConfig(
        steps=10_000, batch_size=2, accumulate=32, clip_norm=0.1, sample_every=500, checkpoint_every=500
    ),
    samples=SampleConfig(count=8, teacher_steps=28, columns=4),
    export=ExportConfig(dtype="bfloat16"),
)

if __name__ == "__main__":
    from fewstep import run

    run(recipe)
