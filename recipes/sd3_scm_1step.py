"""One-step student of Stable Diffusion 3 medium with sCM (arXiv 2410.11081).

    fewstep prepare stabilityai/stable-diffusion-3-medium-diffusers --images images --qk-norm --out runs/sd3-smooth
    torchrun --nproc_per_node 8 recipes/sd3_scm_1step.py --prompts prompts.txt --images images

Hardware: eight H100, 80 GB each. Not yet run at scale. The network sees 1000 t, so it is prepared first.
Noise law, tangent warm-up and batch are SANA-Sprint's (arXiv 2503.09641), Adam's constants those of sCM; rank, rate,
length and guidance are ours.
"""

from fewstep.methods.scm import SCM
from fewstep.recipe import DataConfig, Recipe, RoleConfig, SampleConfig, TeacherConfig, TrainConfig

recipe = Recipe(
    output="runs/sd3_scm_1step",
    teacher=TeacherConfig(
        path="runs/sd3-smooth",
        pipeline_class="StableDiffusion3Pipeline",
        dtype="float32",  # a LoRA's tangent passes through the frozen weights, in fp32
        autocast="bfloat16",
        gradient_checkpointing=True,
    ),
    method=SCM.Config(guidance_scale=5.0, time_mean=0.0, time_std=1.6, warmup=4000),
    data=DataConfig(prompts="prompts.txt", images="images"),
    roles={
        "student": RoleConfig(
            kind="lora", rank=128, alpha=128, lr=1e-5, betas=(0.9, 0.99), eps=1e-11, warmup=500, ema=0.9999
        ),
        "weighting": RoleConfig(kind="full", lr=1e-3, weight_decay=0.0),
    },
    train=TrainConfig(steps=20_000, batch_size=4, accumulate=16, sample_every=500, checkpoint_every=500),
    samples=SampleConfig(count=8, teacher_steps=28, columns=4),
)

if __name__ == "__main__":
    from fewstep import run

    run(recipe)
