"""One-step CIFAR-10 from EDM's unconditional DDPM++, with Uni-Instruct (arXiv 2505.20755).

    torchrun --nproc_per_node 8 recipes/cifar10_uni_instruct_1step.py --images images/
    fewstep train cifar10_uni_instruct_1step --smoke     # seconds, a tiny random EDM stands in

Hardware: eight H100, 80 GB each, on TF32, which published code leaves off. Batch 256, 300 M samples; 29 hours by
`fewstep plan`.
Images: those of CIFAR-10, captioned by anything.
Paper: FID 1.46, forward KL, after a long training from a finished SiD student (set roles.student.start_from to its
export). Rates, batch, half-life, schedule and weights are those of its published script, which are SiDA's. Dropout
and augmentation are left out. Not yet run at scale.
The teacher is EDM's file, converted: ``fewstep convert edm``; the page on EDM (docs/teachers/edm.md) has every
command.
"""

from dataclasses import replace

from fewstep.data.prompts import UNCONDITIONAL
from fewstep.methods.uni_instruct import UniInstruct
from fewstep.recipe import (
    DataConfig,
    ExportConfig,
    Recipe,
    RoleConfig,
    SampleConfig,
    TeacherConfig,
    TrainConfig,
)

# Published code scales the student's loss by 100, which only eps notices.
critic = RoleConfig(kind="full", lr=1e-5, betas=(0.0, 0.999), weight_decay=0.0, eps=1e-8)
student = replace(critic, eps=1e-10, ema_images=500_000)

recipe = Recipe(
    output="runs/cifar10_uni_instruct_1step",
    teacher=TeacherConfig(path="models/edm-cifar10-32x32-uncond-vp", pipeline_class="EDMPipeline"),
    method=UniInstruct.Config(divergence="kl", critic_loss="edm", taps=["model.enc.8x8_block3"]),
    data=DataConfig(prompts=UNCONDITIONAL, images="images"),
    roles={"student": student, "critic": critic},
    train=TrainConfig(steps=1_171_875, batch_size=32, sample_every=2000, checkpoint_every=2000),
    samples=SampleConfig(count=32, teacher_steps=18, columns=16, scale=2),
    export=ExportConfig(dtype="float32"),
)

if __name__ == "__main__":
    from fewstep import run

    run(recipe)
