"""Four one-step students of ImageNet 64, a quarter of its classes each (arXiv 2410.23274).

    torchrun --nproc_per_node 8 recipes/imagenet64_multi_student_1step.py --images images/
    fewstep train imagenet64_multi_student_1step --smoke     # seconds, a tiny random EDM stands in

Hardware: eight H100, 80 GB each, over which weights, gradients and moments are split. Batch 280 per student on
average, 200 k iterations, of which every fifth trains the students; 41 hours by `fewstep plan`.
Images: those of ImageNet at 64 px, captioned by the numbers of their classes.
Paper: FID 1.20 with four students, where one has 1.28. Its rates and batch are not known to us: they are DMD2's
(imagenet64_dmd2_1step). Not yet run at scale.
The teacher is EDM's file, converted: ``fewstep convert edm``; the page on EDM (docs/teachers/edm.md) has every
command.
"""

from fewstep.data.prompts import CLASSES
from fewstep.methods.multi_student import MultiStudent
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
    output="runs/imagenet64_multi_student_1step",
    teacher=TeacherConfig(
        path="models/edm-imagenet-64x64-cond-adm", pipeline_class="EDMPipeline", autocast="bfloat16"
    ),
    method=MultiStudent.Config(parts=4, gan_weight=3e-3, taps=["model.enc.8x8_block2"]),
    data=DataConfig(prompts=CLASSES, images="images"),
    roles={"student": full, "critic": full, "discriminator": full},
    train=TrainConfig(
        steps=200_000, batch_size=35, accumulate=4, shard=8, sample_every=1000, checkpoint_every=1000
    ),
    samples=SampleConfig(
        prompts=[str(label) for label in range(0, 1000, 63)], teacher_steps=18, columns=16, scale=2
    ),
    export=ExportConfig(dtype="float32"),
)

if __name__ == "__main__":
    from fewstep import run

    run(recipe)
