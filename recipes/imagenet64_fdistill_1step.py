"""One-step ImageNet 64 from EDM's class-conditional ADM, with f-distill (arXiv 2502.15681).

    torchrun --nproc_per_node 8 recipes/imagenet64_fdistill_1step.py --images images/
    fewstep train imagenet64_fdistill_1step --smoke     # seconds, a tiny random EDM stands in

Hardware: eight H100, 80 GB each. Batch 512, 600 k iterations, of which every fifth trains the student; 41 hours by
`fewstep plan`.
Images: those of ImageNet at 64 px, captioned by the numbers of their classes.
Published: FID 1.11 by NVIDIA's FastGen, whose batch, rate and length these are; it averages the bins' ratios over
iterations, which is not done here. Not yet run at scale.
The teacher is EDM's file, converted: ``fewstep convert edm``; the page on EDM (docs/teachers/edm.md) has every
command.
"""

from dataclasses import replace

from fewstep.data.prompts import CLASSES
from fewstep.methods.fdistill import FDistill
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
    output="runs/imagenet64_fdistill_1step",
    teacher=TeacherConfig(
        path="models/edm-imagenet-64x64-cond-adm", pipeline_class="EDMPipeline", autocast="bfloat16"
    ),
    method=FDistill.Config(num_steps=1, gan_weight=3e-3, taps=["model.enc.8x8_block2"]),
    data=DataConfig(prompts=CLASSES, images="images"),
    roles={"student": replace(full, ema=0.9999), "critic": full, "discriminator": full},
    train=TrainConfig(steps=600_000, batch_size=32, accumulate=2, sample_every=1000, checkpoint_every=1000),
    samples=SampleConfig(
        prompts=[str(label) for label in range(0, 1000, 63)], teacher_steps=18, columns=16, scale=2
    ),
    export=ExportConfig(dtype="float32"),
)

if __name__ == "__main__":
    from fewstep import run

    run(recipe)
