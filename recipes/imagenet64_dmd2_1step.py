"""One-step ImageNet 64 from EDM's class-conditional ADM, with DMD2 (arXiv 2405.14867).

    torchrun --nproc_per_node 8 recipes/imagenet64_dmd2_1step.py --images images/
    fewstep train imagenet64_dmd2_1step --smoke     # seconds, a tiny random EDM stands in

Hardware: eight H100, 80 GB each. Batch 280, 200 k iterations, of which every fifth trains the student; 8 hours by
`fewstep plan`.
Images: those of ImageNet at 64 px, captioned by the numbers of their classes.
Paper: FID 1.51 after 200 k iterations; 1.28 with a longer run at 5e-7. Rate, batch, ratio of updates, weights of the
GAN, its tap (the last block of the encoder), start at sigma 80 and the range of times are the paper's; it has no
moving average. Not yet run at scale.
The teacher is EDM's file, converted: ``fewstep convert edm``; the page on EDM (docs/teachers/edm.md) has every
command.
"""

from fewstep.data.prompts import CLASSES
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

full = RoleConfig(kind="full", lr=2e-6, warmup=71)

recipe = Recipe(
    output="runs/imagenet64_dmd2_1step",
    teacher=TeacherConfig(
        path="models/edm-imagenet-64x64-cond-adm", pipeline_class="EDMPipeline", autocast="bfloat16"
    ),
    method=DMD2.Config(num_steps=1, gan_weight=3e-3, taps=["model.enc.8x8_block2"]),
    data=DataConfig(prompts=CLASSES, images="images"),
    roles={"student": full, "critic": full, "discriminator": full},
    train=TrainConfig(steps=200_000, batch_size=35, sample_every=1000, checkpoint_every=1000),
    samples=SampleConfig(
        prompts=[str(label) for label in range(0, 1000, 63)], teacher_steps=18, columns=16, scale=2
    ),
    export=ExportConfig(dtype="float32"),
)

if __name__ == "__main__":
    from fewstep import run

    run(recipe)
