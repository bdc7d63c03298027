"""Two-step ImageNet 512 from EDM2's size S, with continuous-time consistency (sCM, arXiv 2410.11081).

    torchrun --nproc_per_node 8 recipes/imagenet512_scm_2step.py --images images/
    fewstep train imagenet512_scm_2step --smoke     # seconds, a tiny random EDM stands in

Hardware: eight H100, 80 GB each. Batch 2,048 in parts of 64, 200 k iterations; 358 hours by `fewstep plan`.
Images: those of ImageNet at 512 px, captioned by the numbers of their classes.
Paper: FID 1.88 with two steps of size XXL. Law of the noise (-0.8, 1.6), second step at 1.1, warm-up of the tangent,
betas and eps are the paper's; its angles are of data of std 0.5, so that sigma is half their tangent: 80 and 0.98.
Rate and its fall are FastGen's for ImageNet 64, length and half-life ours. The paper changes EDM2's time embedding
before, as ``fewstep prepare`` does; this network is taken as it is, and its guidance, which takes a second network,
is left out. Not yet run at scale.
The teacher is EDM2's file, converted: ``fewstep convert edm2 FILE --vae stabilityai/sd-vae-ft-mse``;
docs/teachers/edm.md.
"""

from fewstep.data.prompts import CLASSES
from fewstep.methods.scm import SCM
from fewstep.recipe import (
    DataConfig,
    ExportConfig,
    Recipe,
    RoleConfig,
    SampleConfig,
    TeacherConfig,
    TrainConfig,
)

student = RoleConfig(
    kind="full",
    lr=7e-5,
    betas=(0.9, 0.99),
    eps=1e-11,
    weight_decay=0.0,
    inverse_sqrt=35_000,
    ema_images=4_000_000,
)

recipe = Recipe(
    output="runs/imagenet512_scm_2step",
    teacher=TeacherConfig(
        path="models/edm2-img512-s",
        pipeline_class="EDMPipeline",
        autocast="bfloat16",
        gradient_checkpointing=True,
    ),
    method=SCM.Config(angles=[[1.5583, 0.7765], [1.5583]], time_mean=-0.8, time_std=1.6, sigma_data=1.0),
    data=DataConfig(prompts=CLASSES, images="images"),
    roles={"student": student, "weighting": RoleConfig(kind="full", lr=1e-3, weight_decay=0.0)},
    train=TrainConfig(
        steps=200_000, batch_size=64, accumulate=4, shard=8, sample_every=500, checkpoint_every=500
    ),
    samples=SampleConfig(prompts=[str(label) for label in range(0, 1000, 126)], teacher_steps=32),
    export=ExportConfig(dtype="float32"),
)

if __name__ == "__main__":
    from fewstep import run

    run(recipe)
