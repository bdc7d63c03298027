"""LADD on Stable Diffusion 3 medium: one to four steps from a discriminator alone (arXiv 2403.12015).

    fewstep pairs sd3_ladd_4step --solver euler --steps 50 --num 100000      (teacher's own images; then:)
    torchrun --nproc_per_node 8 recipes/sd3_ladd_4step.py --prompts prompts.txt

Hardware: eight H100, 80 GB each. Not yet run at scale. Learning rates are FastGen's; the paper does not give any.
Levels are the paper's four under the pipeline's shift of 3, as Stable Diffusion 3.5's turbo has them; the paper's own
are those of a flow without a shift. Heads are those of SANA-Sprint's published code.
"""

from fewstep.methods.ladd import LADD
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
    output="runs/sd3_ladd_4step",
    teacher=TeacherConfig(
        path="stabilityai/stable-diffusion-3-medium-diffusers",
        pipeline_class="StableDiffusion3Pipeline",
        dtype="bfloat16",
        autocast="bfloat16",
        gradient_checkpointing=True,
    ),
    method=LADD.Config(
        taps=[f"transformer_blocks.{i}" for i in range(3, 24, 4)],
        heads="conv",
        levels=[1.0, 0.9, 0.75, 0.5],
        num_steps=[4, 2, 1],
        guidance_scale=5.0,
        synthetic=True,
    ),
    data=DataConfig(prompts="prompts.txt", pairs="runs/sd3_pairs"),
    roles={
        "student": RoleConfig(kind="full", lr=2e-6, weight_decay=0.0, warmup=500, ema=0.999),
        "discriminator": RoleConfig(kind="full", lr=4e-6, weight_decay=0.0, warmup=500),
    },
    train=TrainConfig(steps=10_000, batch_size=4, accumulate=16, sample_every=500, checkpoint_every=500),
    samples=SampleConfig(count=8, teacher_steps=28, columns=4),
    export=ExportConfig(dtype="bfloat16"),
)

if __name__ == "__main__":
    from fewstep import run

    run(recipe)
