"""Two-step student of LlamaGen-L (ImageNet, 256 px) with Distilled Decoding 1.

    fewstep convert llamagen --transformer c2i_L_256.pt --tokenizer vq_ds16_c2i.pt --to models/llamagen-l
    fewstep pairs llamagen_l_dd1_2step --num 1000000        # an ordinary generation each, resumable, many processes
    torchrun --nproc_per_node 8 recipes/llamagen_l_dd1_2step.py

Published: FID 11.35 in one step and 7.58 in two (arXiv 2412.17153), 648 hours of 8 A800. Entry points, split and
guidance are the paper's; batch size, learning rate and loss weights are not published: these are ours. Not yet run at
scale. Hardware: eight H100, 80 GB each.
"""

from fewstep.methods.dd1 import DD1
from fewstep.recipe import DataConfig, Recipe, RoleConfig, SampleConfig, TeacherConfig, TrainConfig

recipe = Recipe(
    output="runs/llamagen_l_dd1_2step",
    teacher=TeacherConfig(path="models/llamagen-l", pipeline_class="LlamaGenPipeline"),
    method=DD1.Config(entries=[0, 80], split=130, guidance_scale=2.0, regression="lpips"),
    data=DataConfig(prompts="builtin:imagenet-classes", pairs="pairs/llamagen-l"),
    roles={
        "student": RoleConfig(
            kind="full", lr=1e-4, betas=(0.9, 0.95), weight_decay=0.01, warmup=1000, ema=0.9999
        )
    },
    train=TrainConfig(
        steps=300_000,
        batch_size=32,
        accumulate=2,
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
