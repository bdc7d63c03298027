"""One-step CIFAR-10 from EDM's unconditional DDPM++, with SIM, data-free (arXiv 2410.16794).

    torchrun --nproc_per_node 8 recipes/cifar10_sim_1step.py
    fewstep train cifar10_sim_1step --smoke     # seconds, a tiny random EDM stands in

Hardware: eight H100, 80 GB each, on TF32, which published code leaves off. Batch 256, 500 M samples; 41 hours by
`fewstep plan`.
Paper: FID 2.06. Its constant c, rate and batch are not known to us: they are SiD's (cifar10_sid_1step), whose start,
laws of time and critic it shares; the distance is its pseudo-Huber one. Not yet run at scale.
The teacher is EDM's file, converted: ``fewstep convert edm``; the page on EDM (docs/teachers/edm.md) has every
command.
"""

from dataclasses import replace

from fewstep.data.prompts import UNCONDITIONAL
from fewstep.methods.sim import SIM
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
    output="runs/cifar10_sim_1step",
    teacher=TeacherConfig(path="models/edm-cifar10-32x32-uncond-vp", pipeline_class="EDMPipeline"),
    method=SIM.Config(critic_loss="edm"),
    data=DataConfig(prompts=UNCONDITIONAL),
    roles={"student": student, "critic": critic},
    train=TrainConfig(steps=1_953_125, batch_size=32, sample_every=2000, checkpoint_every=2000),
    samples=SampleConfig(count=32, teacher_steps=18, columns=16, scale=2),
    export=ExportConfig(dtype="float32"),
)

if __name__ == "__main__":
    from fewstep import run

    run(recipe)
