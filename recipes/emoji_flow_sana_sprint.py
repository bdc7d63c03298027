"""SANA-Sprint on the small SANA teacher: one student for 1, 2 and 4 steps, sCM and LADD together.

    python recipes/emoji_flow_sana_sprint.py                (or: fewstep train emoji_flow_sana_sprint)

Hardware: two CPU cores, 4 GB of memory. The teacher sees t in [0, 1] and normalises queries and keys, so nothing is
prepared.
"""

import math

from fewstep.methods.sana_sprint import SanaSprint
from fewstep.recipe import (
    DataConfig,
    EvalConfig,
    Recipe,
    RoleConfig,
    SampleConfig,
    TeacherConfig,
    TrainConfig,
)

recipe = Recipe(
    output="runs/emoji_flow_sana_sprint",
    teacher=TeacherConfig(path="builtin:emoji-flow", pipeline_class="SanaPipeline", autocast="auto"),
    method=SanaSprint.Config(
        angles=[[math.pi / 2], [math.pi / 2, 1.3], [math.pi * k / 8 for k in (4, 3, 2, 1)]],
        guidance_scales=[1.5, 2.0, 2.5],
        guidance_scale=2.0,
        taps=[f"transformer_blocks.{i}" for i in (1, 3, 5)],
        heads="mlp",
        warmup=150,
    ),
    data=DataConfig(prompts="builtin:emoji", images="builtin:emoji"),
    roles={
        "student": RoleConfig(kind="full", lr=1e-4, weight_decay=0.0, warmup=50, decay=400, ema=0.98),
        "weighting": RoleConfig(kind="full", lr=1e-3, weight_decay=0.0),
        "discriminator": RoleConfig(kind="full", lr=3e-4, weight_decay=0.0, warmup=50),
    },
    train=TrainConfig(
        steps=800, batch_size=16, clip_norm=1.0, log_every=10, sample_every=200, checkpoint_every=200
    ),
    samples=SampleConfig(count=24, teacher_steps=50, columns=12, scale=2),
    evaluation=EvalConfig(
        num=500,
        prompts="builtin:emoji-groups",
        named=500,
        floor_steps=[1, 2, 4],
        floor_solvers=["euler", "dpm++"],
        teacher_steps=50,
        teacher_guidance=2.0,
        extractor="effnet-lite0@96",
    ),
)

if __name__ == "__main__":
    from fewstep import run

    run(recipe)
