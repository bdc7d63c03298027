"""One-step LoRA of SDXL at 1024 px by regression on the teacher's own pairs: the warm-up of sdxl_dmd2_1step.

    fewstep pairs sdxl_regression_1step --prompts prompts.txt --num 10000 --solver euler --out pairs/sdxl
    fewstep train sdxl_regression_1step --prompts prompts.txt
    fewstep train sdxl_regression_1step --smoke    # seconds, a tiny random SDXL stands in

The student is conditioned on t = 399, as it will be in sdxl_dmd2_1step, which starts from the export of this run.
Hardware: one H100, 80 GB. Batch 256 in 64 parts of 4, 2k iterations: 51 passes over 10k pairs; 8 hours by
`fewstep plan`, beside those of the pairs.
Paper: 10k pairs of the teacher (Euler, 50 steps, guidance 8), batch 256, 2k iterations of all weights at 1e-5 under
LPIPS of images that a small decoder made. What differs: a LoRA at 5e-5, and the regression is that of
latents (set method.regression lpips where its weights are on disk, with a smaller micro-batch: the whole decoder then
has a gradient). Not yet run at scale.
"""

from fewstep.methods.dmd import DMD
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
    output="runs/sdxl_regression_1step",
    teacher=TeacherConfig(
        path="stabilityai/stable-diffusion-xl-base-1.0",
        pipeline_class="StableDiffusionXLPipeline",
        dtype="bfloat16",
        autocast="bfloat16",
        resolution=1024,
        gradient_checkpointing=True,
    ),
    method=DMD.Config(start=399, guidance_scale=8.0, matching_weight=0.0, regression_weight=1.0),
    data=DataConfig(prompts="prompts.txt", pairs="pairs/sdxl"),
    roles={"student": RoleConfig(kind="lora", rank=64, alpha=8, lr=5e-5, warmup=100)},
    train=TrainConfig(steps=2_000, batch_size=4, accumulate=64, sample_every=250, checkpoint_every=500),
    samples=SampleConfig(count=8, teacher_steps=50, columns=4),
    export=ExportConfig(dtype="float16", kohya=True),
)

if __name__ == "__main__":
    from fewstep import run

    run(recipe)
