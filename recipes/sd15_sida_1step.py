"""One-step Stable Diffusion 1.5 at 512 px with adversarial SiD, from a student that SiD has finished (SiD2A).

    fewstep train sd15_sid_1step --prompts prompts.txt       # first
    fewstep train sd15_sida_1step --prompts prompts.txt --images images/
    fewstep train sd15_sida_1step --smoke          # seconds, a tiny random SD stands in

The student starts from the export of sd15_sid_1step, the critic from the teacher: critic and discriminator, which is
the critic's middle block, learn alone for 100 k images, and the GAN joins after 200 k.
Images: captioned, at least 512 px.
Hardware: one H100, 80 GB. Batch 512 in 32 parts of 16, 10k iterations: 5 M samples; 49 hours by `fewstep plan`, and
less on several cards: divide ``train.accumulate`` by their number.
Papers (arXiv 2410.14919, 2505.12674): COCO-30k FID 7.89 for one-step SiDA of SD 1.5. Schedule and weight of the GAN are
those of the first, on EDM's networks; batch, rates and guidance those of sd15_sid_1step. Not yet run at scale.
"""

from dataclasses import replace

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

# As sd15_sid_1step.
full = RoleConfig(kind="full", lr=1e-6, betas=(0.0, 0.999), weight_decay=0.0)
student = replace(full, ema=0.993, start_from="runs/sd15_sid_1step/export")

recipe = Recipe(
    output="runs/sd15_sida_1step",
    teacher=TeacherConfig(
        path="stable-diffusion-v1-5/stable-diffusion-v1-5",
        pipeline_class="StableDiffusionPipeline",
        dtype="bfloat16",
        autocast="bfloat16",
        resolution=512,
        gradient_checkpointing=True,
    ),
    method=SiD.Config(guidance_scale=1.5, gan_weight=1e-4),
    data=DataConfig(prompts="prompts.txt", images="images"),
    roles={"student": student, "critic": full},
    train=TrainConfig(steps=10_000, batch_size=16, accumulate=32, sample_every=250, checkpoint_every=500),
    samples=SampleConfig(count=8, teacher_steps=50, columns=4),
    export=ExportConfig(dtype="float16"),
)

if __name__ == "__main__":
    from fewstep import run

    run(recipe)
