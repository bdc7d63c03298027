"""SANA-Sprint: one student of SANA 1.6B for 1, 2 and 4 steps, sCM and LADD together (arXiv 2503.09641).

    fewstep prepare Efficient-Large-Model/Sana_1600M_1024px_diffusers --images images --qk-norm --out runs/sana-smooth
    torchrun --nproc_per_node 8 recipes/sana_sprint.py --prompts prompts.txt --images images

Hardware: eight H100, 80 GB each. Not yet run at scale. The paper: 20,000 iterations of 512 on 32 A100, where iterations
count both turns, so 10,000 of ours, and 5,000 of warm-up 2,500; rate, batch and clipping are its own. The weight of the
noise levels has a rate of its own: the paper's head is 2,240 numbers wide, ours 17, which do not move at 2e-6. The
paper's optimiser is CAME, ours AdamW, and the average of the weights is ours: its code has none. Instead of running
``prepare``, `Efficient-Large-Model/SANA_Sprint_1.6B_1024px_teacher` is the authors' own prepared teacher.
"""

import math

from fewstep.methods.sana_sprint import SanaSprint
from fewstep.recipe import (
    DataConfig,
    ExportConfig,
    Recipe,
    RoleConfig,
    SampleConfig,
    TeacherConfig,
    TrainConfig,
)

recipe = Recipe(
    output="runs/sana_sprint",
    teacher=TeacherConfig(
        path="runs/sana-smooth",
        pipeline_class="SanaPipeline",
        dtype="bfloat16",
        autocast="bfloat16",
        gradient_checkpointing=True,
    ),
    # The paper's times for four steps, pi/2, 1.3, 1.1 and 0.6, are none that the stock pipeline's call can name.
    method=SanaSprint.Config(
        angles=[[math.pi / 2], [math.pi / 2, 1.3], [math.pi * k / 8 for k in (4, 3, 2, 1)]]
    ),
    data=DataConfig(prompts="prompts.txt", images="images"),
    roles={
        "student": RoleConfig(kind="full", lr=2e-6, weight_decay=0.0, warmup=2500, ema=0.9999),
        "weighting": RoleConfig(kind="full", lr=1e-3, weight_decay=0.0),
        "discriminator": RoleConfig(kind="full", lr=2e-6, weight_decay=0.0, warmup=2500),
    },
    train=TrainConfig(
        steps=10_000, batch_size=4, accumulate=16, clip_norm=0.1, sample_every=500, checkpoint_every=500
    ),
    samples=SampleConfig(count=8, teacher_steps=20, columns=4),
    export=ExportConfig(dtype="bfloat16"),
)

if __name__ == "__main__":
    from fewstep import run

    run(recipe)
