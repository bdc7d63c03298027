"""One student of 1 to 8 steps of SDXL at 1024 px with Hyper-SD: one LoRA.

    torchrun --nproc_per_node 8 recipes/sdxl_hyper_sd.py --prompts prompts.txt --images images --output runs/hyper_sd
    fewstep train sdxl_hyper_sd --smoke          # seconds, a tiny random SDXL stands in
    fewstep train sdxl_hyper_sd --teacher PATH   # any StableDiffusionXLPipeline folder

Captioned images train it, prompts alone the score stage. Batch 512, rate 1e-6 and stages 8-4-2-1 with an average as
target are the paper's (arXiv 2404.13686, section 4.1), rank 64 and the layers are those of its published files. It took
about 200 A100-hours a stage; iterations, the weights of the adversarial term and guidance are unpublished, so those
here are ours; guidance of 7 to 8 and the Huber distance are PCM's (arXiv 2405.18407): a squared one is for the most
part of the four noisiest of 40 times, where an eps network multiplies its error most. For feedback set
method.feedback_length and method.reward. Not yet run at scale. Hardware: eight H100, 80 GB each.
"""

from fewstep.methods.hyper_sd import HyperSD
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
    output="runs/sdxl_hyper_sd",
    teacher=TeacherConfig(
        path="stabilityai/stable-diffusion-xl-base-1.0",
        pipeline_class="StableDiffusionXLPipeline",
        dtype="bfloat16",
        autocast="bfloat16",
        resolution=1024,
        gradient_checkpointing=True,
    ),
    method=HyperSD.Config(
        segments=[8, 4, 2, 1],
        distance="huber",
        gan_weight=[0.05, 0.05, 0.5, 0.5],
        guidance_range=(7.0, 8.0),
        guidance_scale=7.5,
        score_length=0.5,
    ),
    data=DataConfig(prompts="prompts.txt", images="images"),
    roles={
        "student": RoleConfig(
            kind="lora", rank=64, alpha=64, lr=1e-6, weight_decay=0.0, warmup=500, ema=0.999
        ),
        "critic": RoleConfig(kind="lora", rank=64, alpha=64, lr=1e-5, warmup=100),
        "discriminator": RoleConfig(kind="full", lr=1e-5, betas=(0.0, 0.999)),
    },
    train=TrainConfig(steps=20_000, batch_size=2, accumulate=32, sample_every=250, checkpoint_every=500),
    samples=SampleConfig(count=8, teacher_steps=50, columns=4),
    export=ExportConfig(dtype="float16", kohya=True),
)

if __name__ == "__main__":
    from fewstep import run

    run(recipe)
