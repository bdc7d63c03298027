"""Four-step student of SDXL at 1024 px with Phased DMD: two LoRA experts.

    fewstep train sdxl_phased_dmd_4step --prompts prompts.txt --output runs/sdxl_phased
    fewstep train sdxl_phased_dmd_4step --smoke          # seconds, a tiny random SDXL stands in
    fewstep train sdxl_phased_dmd_4step --teacher PATH   # any StableDiffusionXLPipeline folder

Data-free: prompts only. Ratio, batch (64) and the students' LoRA (rank 64, alpha 8, 5e-5; betas 0 and 0.999) are the
paper's, which distilled flow models with guidance 4 to 5, trained its critics in full at 4e-7 and showed experts of 100
and 400 updates. Here guidance 8 is DMD2's for SDXL, and the critic is an adapter on the shared base, so that one card
is enough; with alpha equal to its rank, for at the students' 8 it learns as slowly as all weights at 5e-7
(``eval/results/lora_critic/README.md``). On SDXL, whose network predicts eps, treat this as an experiment.
Not yet run at scale. Hardware: one H100, 80 GB.
"""

import dataclasses

from fewstep.methods.phased_dmd import PhasedDMD
from fewstep.recipe import (
    DataConfig,
    ExportConfig,
    Recipe,
    RoleConfig,
    SampleConfig,
    TeacherConfig,
    TrainConfig,
)

lora = RoleConfig(kind="lora", rank=64, alpha=8, lr=5e-5, betas=(0.0, 0.999), warmup=500)
critic = dataclasses.replace(lora, alpha=64)

recipe = Recipe(
    output="runs/sdxl_phased_dmd_4step",
    teacher=TeacherConfig(
        path="stabilityai/stable-diffusion-xl-base-1.0",
        pipeline_class="StableDiffusionXLPipeline",
        dtype="bfloat16",
        autocast="bfloat16",
        resolution=1024,
        gradient_checkpointing=True,
    ),
    method=PhasedDMD.Config(num_steps=4, phases=2, start=999, guidance_scale=8.0, critic_steps=5),
    data=DataConfig(prompts="prompts.txt"),
    roles={"student": lora, "critic": critic},
    train=TrainConfig(steps=4_000, batch_size=2, accumulate=32, sample_every=250, checkpoint_every=500),
    samples=SampleConfig(count=8, teacher_steps=50, columns=4),
    export=ExportConfig(dtype="float16", kohya=True),
)

if __name__ == "__main__":
    from fewstep import run

    run(recipe)
