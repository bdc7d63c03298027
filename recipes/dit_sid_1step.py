"""One-step class-conditional DiT-XL/2 at 256 px with SiD, data-free.

    torchrun --nproc_per_node 8 recipes/dit_sid_1step.py
    fewstep train dit_sid_1step --smoke            # seconds, a tiny random DiT stands in

Prompts are class labels. Both networks are trained whole, in shards over all processes. Not yet run at scale; the
guidance is that of DiT's best FID (arXiv 2212.09748), the learning rates are ours. Hardware: eight H100, 80 GB each.
"""

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

full = RoleConfig(kind="full", lr=1e-5, betas=(0.0, 0.999), weight_decay=0.0)

recipe = Recipe(
    output="runs/dit_sid_1step",
    teacher=TeacherConfig(
        path="facebook/DiT-XL-2-256",
        pipeline_class="DiTPipeline",
        autocast="bfloat16",
        gradient_checkpointing=True,
    ),
    method=SiD.Config(guidance_scale=1.5),
    data=DataConfig(prompts=CLASSES),
    roles={"student": full, "critic": full},
    train=TrainConfig(steps=50_000, batch_size=16, accumulate=2, shard=8),
    samples=SampleConfig(prompts=[str(label) for label in range(0, 1000, 63)], teacher_steps=50),
    export=ExportConfig(dtype="float32"),
)

if __name__ == "__main__":
    from fewstep import run

    run(recipe)
