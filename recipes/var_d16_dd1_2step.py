"""Two-step student of VAR-d16 (ImageNet, 256 px) with Distilled Decoding 1.

    fewstep convert var --transformer var_d16.pth --tokenizer vae_ch160v4096z32.pth --to models/var-d16
    fewstep pairs var_d16_dd1_2step --num 1000000           # an ordinary generation each, resumable, many processes
    torchrun --nproc_per_node 8 recipes/var_d16_dd1_2step.py

Published: FID 9.94 in one step and 7.82 in two (arXiv 2412.17153), 297 hours of 8 A800. The second step begins at
scale 5 (token 55), as released; VAR's "cfg 2", which grows with the scale, is a guidance of 3 at the last one. Batch
size, learning rate and loss weights are not published: these are ours. Not yet run at scale.
Hardware: eight H100, 80 GB each.
"""

from fewstep.methods.dd1 import DD1
from fewstep.recipe import DataConfig, Recipe, RoleConfig, SampleConfig, TeacherConfig, TrainConfig

recipe = Recipe(
    output="runs/var_d16_dd1_2step",
    teacher=TeacherConfig(path="models/var-d16", pipeline_class="VARPipeline"),
    method=DD1.Config(entries=[0, 55], split=55, guidance_scale=3.0, regression="lpips"),
    data=DataConfig(prompts="builtin:imagenet-classes", pairs="pairs/var-d16"),
    roles={
        "student": RoleConfig(
            kind="full", lr=1e-4, betas=(0.9, 0.95), weight_decay=0.01, warmup=1000, ema=0.9999
        )
    },
    train=TrainConfig(
        steps=300_000,
        batch_size=16,
        accumulate=4,
        clip_norm=1.0,
        log_every=100,
        sample_every=10_000,
        checkpoint_every=5000,
    ),
    samples=SampleConfig(count=8, columns=8),
)

if __name__ == "__main__":
    from fewstep import run

    run(recipe)
