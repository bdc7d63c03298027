"""Four-step LoRA of SDXL at 1024 px with DMD2 on a card of 24 GB: the critic is a LoRA, too.

    fewstep train sdxl_dmd2_4step_24gb --prompts prompts.txt --images images/ --output runs/sdxl4
    fewstep train sdxl_dmd2_4step_24gb --smoke          # seconds, a tiny random SDXL stands in
    fewstep train sdxl_dmd2_4step_24gb --teacher PATH   # any StableDiffusionXLPipeline folder

Prompts: one per line (the paper used 3 M of LAION-Aesthetic 6.25+); images: captioned, at least 1024 px.
Hardware: one RTX 4090, 24 GB. Batch 16 in 4 parts of 4, 16k iterations: the critic sees 0.26 M samples, the student
learns from 51 k; 77 hours by `fewstep plan`.
What it costs: an eighth of the paper's samples, and of each layer of the critic 64 directions. A LoRA critic with alpha
equal to its rank and ten times the rate of a whole one learns as fast on the small built-in teacher: 64 and 5e-4, as
here, by its held-out loss; 8 and 1e-3 in a short training, FD 639 against 637 (``eval/results/lora_critic/README.md``).
At the rate and alpha of the student's LoRA it hardly moves.
Paper: sdxl_dmd2_4step, with all weights of the critic and batch 128; FID 19.68 on COCO-10k. Not yet run at scale.
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

recipe = Recipe(
    output="runs/sdxl_dmd2_4step_24gb",
    teacher=TeacherConfig(
        path="stabilityai/stable-diffusion-xl-base-1.0",
        pipeline_class="StableDiffusionXLPipeline",
        dtype="bfloat16",
        autocast="bfloat16",
        resolution=1024,
        gradient_checkpointing=True,
    ),
    method=DMD2.Config(num_steps=4, start=999, guidance_scale=8.0, critic_steps=5, gan_weight=5e-3),
    data=DataConfig(prompts="prompts.txt", images="images"),
    roles={
        "student": student,
        # Ten times the rate of a whole critic, alpha its rank: eval/results/lora_critic/README.md.
        "critic": RoleConfig(kind="lora", rank=64, alpha=64, lr=5e-4, warmup=500),
        "discriminator": RoleConfig(kind="full", lr=5e-5, warmup=500),
    },
    train=TrainConfig(steps=16_000, batch_size=4, accumulate=4, sample_every=250, checkpoint_every=500),
    samples=SampleConfig(count=8, teacher_steps=50, columns=4),
    export=ExportConfig(dtype="float16", kohya=True),
)

if __name__ == "__main__":
    from fewstep import run

    run(recipe)
