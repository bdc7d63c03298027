"""One-step unconditional generator of CIFAR-10 from a DDPM in pixels, with SiD, data-free.

    fewstep train ddpm_sid_1step
    fewstep train ddpm_sid_1step --teacher PATH    # any DDPMPipeline or DDIMPipeline folder
    fewstep train ddpm_sid_1step --smoke           # seconds, a tiny random UNet2DModel stands in

A network with class labels takes them as prompts (--prompts labels.txt). Not yet run at scale; the learning rates are
ours. Hardware: one H100, 80 GB.
"""

from fewstep.data.prompts import UNCONDITIONAL
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

full = RoleConfig(kind="full", lr=1e-5, betas=(0.0, 0.999), weight_decay=0.0)

recipe = Recipe(
    output="runs/ddpm_sid_1step",
    teacher=TeacherConfig(path="google/ddpm-cifar10-32", pipeline_class="DDPMPipeline"),
    method=SiD.Config(),
    data=DataConfig(prompts=UNCONDITIONAL),
    roles={"student": full, "critic": full},
    train=TrainConfig(steps=100_000, batch_size=256),
    samples=SampleConfig(count=32, teacher_steps=50, scale=2),
    export=ExportConfig(dtype="float32"),
)

if __name__ == "__main__":
    from fewstep import run

    run(recipe)
