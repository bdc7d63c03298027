"""Four-step LoRA of FLUX.2 klein base, 4B, at 1024 px with SiD, from prompts alone.

    fewstep train flux2_klein_sid_4step --prompts prompts.txt
    fewstep train flux2_klein_sid_4step --smoke          # seconds, a tiny random FLUX.2 klein stands in

Paper (arXiv 2505.12674, K = 4 by uniform mixture; of flows arXiv 2509.25127): without images, long-short guidance, here
the stock call's 4. Adapters and their rates as in ``sdxl_sid_4step``. Teacher and critic share one frozen base, and the
activations of one network at a time are held (``lean``), so that one card is enough. Batch and steps are ours to be
tuned. Not yet run at scale. The teacher's licence is Apache 2.0.
Hardware: one H100, 80 GB.
"""

import dataclasses

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

lora = RoleConfig(
    kind="lora", rank=64, alpha=64, lr=2e-5, betas=(0.0, 0.999), weight_decay=0.0, warmup=100, ema=0.999
)

recipe = Recipe(
    output="runs/flux2_klein_sid_4step",
    teacher=TeacherConfig(
        path="black-forest-labs/FLUX.2-klein-base-4B",
        pipeline_class="Flux2KleinPipeline",
        dtype="bfloat16",
        autocast="bfloat16",
        resolution=1024,
        gradient_checkpointing=True,
    ),
    method=SiD.Config(num_steps=4, guidance_scale=4.0, lean=True),
    data=DataConfig(prompts="prompts.txt"),
    roles={"student": lora, "critic": dataclasses.replace(lora, ema=0.0)},
    train=TrainConfig(steps=10_000, batch_size=2, accumulate=8, sample_every=250, checkpoint_every=500),
    samples=SampleConfig(count=8, teacher_steps=50, columns=4),
    export=ExportConfig(dtype="bfloat16"),
)

if __name__ == "__main__":
    from fewstep import run

    run(recipe)
