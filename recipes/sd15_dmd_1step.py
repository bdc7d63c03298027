"""One-step Stable Diffusion 1.5 at 512 px with DMD.

    fewstep pairs sd15_dmd_1step --prompts prompts.txt --num 100000 --steps 50 --solver dpm++ --out pairs/sd15
    fewstep train sd15_dmd_1step --prompts prompts.txt --output runs/sd15_dmd
    fewstep train sd15_dmd_1step --smoke          # seconds, a tiny random SD stands in

Paper (72 A100, batch 2304, 500k pairs at guidance 3): COCO-30k FID 11.49. These are its hyper-parameters: all weights
at 1e-5, 20k iterations, regression weight 0.25, the score difference on paired samples too. Here a batch is 32 per card
(72 cards make the paper's), and the regression is that of latents: the paper's is LPIPS on decoded images (set
method.regression lpips where its weights are on disk). The student starts at t = 999, where an eps network's error is
multiplied by 14.6 in x0. Not yet run at scale. Hardware: one H100, 80 GB, or several.
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

full = RoleConfig(kind="full", lr=1e-5, warmup=500)

recipe = Recipe(
    output="runs/sd15_dmd_1step",
    teacher=TeacherConfig(
        path="stable-diffusion-v1-5/stable-diffusion-v1-5",
        pipeline_class="StableDiffusionPipeline",
        dtype="bfloat16",
        autocast="bfloat16",
        resolution=512,
        gradient_checkpointing=True,
    ),
    method=DMD.Config(guidance_scale=3.0, regression_weight=0.25, match_pairs=True),
    data=DataConfig(prompts="prompts.txt", pairs="pairs/sd15"),
    roles={"student": full, "critic": full},
    train=TrainConfig(steps=20_000, batch_size=32, sample_every=250, checkpoint_every=500),
    samples=SampleConfig(count=8, teacher_steps=50, columns=4),
    export=ExportConfig(dtype="float16"),
)

if __name__ == "__main__":
    from fewstep import run

    run(recipe)
