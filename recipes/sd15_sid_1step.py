"""One-step Stable Diffusion 1.5 at 512 px with SiD-LSG, from prompts alone.

    fewstep train sd15_sid_1step --prompts prompts.txt --output runs/sd15_sid
    fewstep train sd15_sid_1step --smoke          # seconds, a tiny random SD stands in
    fewstep train sd15_sid_1step --teacher PATH   # any StableDiffusionPipeline folder

Paper (arXiv 2406.01561, batch 512, 10 M images, prompts of LAION-Aesthetics 6+): COCO-30k FID 8.71 and CLIP
score 0.302 at guidance 1.5; 16.59 and 0.317 at 4.5. These are its hyper-parameters: all weights at 1e-6 and no
first moment for both networks, start at t = 625, times 20 to 980, moving average with a half-life of 50 k
images. Captions are dropped in the critic's turn only. Not yet run at scale; on several cards divide
``train.accumulate`` by their number. Hardware: one H100, 80 GB, or several.
"""

import dataclasses

from fewstep.methods.sid import SiD
from fewstep.recipe import (
    DataConfig,
    ExportConfig,
    Recipe,
    RoleConfig,
    SampleConfig,
    TeacherConfig,
    TrainConfig,
)

# Half-life of 50 k images at batch 512: 0.5 ** (512 / 50_000).
full = RoleConfig(kind="full", lr=1e-6, betas=(0.0, 0.999), weight_decay=0.0, ema=0.993)

recipe = Recipe(
    output="runs/sd15_sid_1step",
    teacher=TeacherConfig(
        path="stable-diffusion-v1-5/stable-diffusion-v1-5",
        pipeline_class="StableDiffusionPipeline",
        dtype="bfloat16",
        autocast="bfloat16",
        resolution=512,
        gradient_checkpointing=True,
    ),
    method=SiD.Config(guidance_scale=1.5),
    data=DataConfig(prompts="prompts.txt"),
    roles={"student": full, "critic": dataclasses.replace(full, ema=0.0)},
    train=TrainConfig(steps=20_000, batch_size=16, accumulate=32, sample_every=250, checkpoint_every=500),
    samples=SampleConfig(count=8, teacher_steps=50, columns=4),
    export=ExportConfig(dtype="float16"),
)

if __name__ == "__main__":
    from fewstep import run

    run(recipe)
