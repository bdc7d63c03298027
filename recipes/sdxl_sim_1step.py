"""One-step LoRA of SDXL at 1024 px with SIM, from prompts alone.

    fewstep train sdxl_sim_1step --prompts prompts.txt --output runs/sdxl_sim1
    fewstep train sdxl_sim_1step --smoke          # seconds, a tiny random SDXL stands in
    fewstep train sdxl_sim_1step --teacher PATH   # any StableDiffusionXLPipeline folder

Paper (arXiv 2410.16794, one-step PixArt-alpha at 512 px): aesthetic score 6.42, data-free, start at sigma /
alpha = 2.5 (t = 625 here). Its constant, batch and learning rate are not published; those below, and the
guidance of the teacher, are ours to be tuned. The activations of one network at a time are held (``lean``). Adapters
have alpha equal to their rank and ten times the rate of all weights and more, at which a LoRA critic follows
(``eval/results/lora_critic/README.md``). Not yet run at scale. Hardware: one H100, 80 GB.
"""

import dataclasses

from fewstep.methods.sim import SIM
from fewstep.recipe import (
    DataConfig,
    ExportConfig,
    Recipe,
    RoleConfig,
    SampleConfig,
    TeacherConfig,
    TrainConfig,
)

# Adam without first moment, as in SiD, whose setting the paper shares.
lora = RoleConfig(
    kind="lora", rank=64, alpha=64, lr=2e-5, betas=(0.0, 0.999), weight_decay=0.0, warmup=100, ema=0.999
)

recipe = Recipe(
    output="runs/sdxl_sim_1step",
    teacher=TeacherConfig(
        path="stabilityai/stable-diffusion-xl-base-1.0",
        pipeline_class="StableDiffusionXLPipeline",
        dtype="bfloat16",
        autocast="bfloat16",
        resolution=1024,
        gradient_checkpointing=True,
    ),
    method=SIM.Config(guidance_scale=4.5, lean=True),
    data=DataConfig(prompts="prompts.txt"),
    roles={"student": lora, "critic": dataclasses.replace(lora, ema=0.0)},
    train=TrainConfig(steps=10_000, batch_size=4, accumulate=16, sample_every=250, checkpoint_every=500),
    samples=SampleConfig(count=8, teacher_steps=50, columns=4),
    export=ExportConfig(dtype="float16", kohya=True),
)

if __name__ == "__main__":
    from fewstep import run

    run(recipe)
