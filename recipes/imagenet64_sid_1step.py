"""One-step ImageNet 64 from EDM's class-conditional ADM, with SiD, data-free (arXiv 2404.04057).

    torchrun --nproc_per_node 8 recipes/imagenet64_sid_1step.py
    fewstep train imagenet64_sid_1step --smoke     # seconds, a tiny random EDM stands in

Hardware: eight H100, 80 GB each. Batch 8,192 in parts of 16, 122 k iterations: 1,000 M samples; 228 hours by `fewstep
plan`.
Paper: FID 1.524 at alpha 1.2 after 1,000 M samples, of the moving average. Rates, betas, eps, half-life, start, laws
of time and the critic's weight are the paper's; it computes in fp16 where this does in bf16, and trains with dropout
0.1. Not yet run at scale.
The teacher is EDM's file, converted: ``fewstep convert edm``; the page on EDM (docs/teachers/edm.md) has every
command.
"""

from dataclasses import replace

from fewstep.data.prompts import CLASSES
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

# Published code scales the student's loss by 100, which only eps notices.
critic = RoleConfig(kind="full", lr=4e-6, betas=(0.0, 0.999), weight_decay=0.0, eps=1e-6)
student = replace(critic, eps=1e-8, ema_images=2_000_000)

recipe = Recipe(
    output="runs/imagenet64_sid_1step",
    teacher=TeacherConfig(
        path="models/edm-imagenet-64x64-cond-adm", pipeline_class="EDMPipeline", autocast="bfloat16"
    ),
    method=SiD.Config(alpha=1.2, critic_loss="edm"),
    data=DataConfig(prompts=CLASSES),
    roles={"student": student, "critic": critic},
    train=TrainConfig(
        steps=122_070, batch_size=16, accumulate=64, shard=8, sample_every=500, checkpoint_every=500
    ),
    samples=SampleConfig(
        prompts=[str(label) for label in range(0, 1000, 63)], teacher_steps=18, columns=16, scale=2
    ),
    export=ExportConfig(dtype="float32"),
)

if __name__ == "__main__":
    from fewstep import run

    run(recipe)
