"""One-step student of VAR-d16 (ImageNet, 256 px) with Distilled Decoding 2.

    fewstep convert var --transformer var_d16.pth --tokenizer vae_ch160v4096z32.pth --to models/var-d16
    fewstep pairs var_d16_dd2_1step --num 200000            # only their tokens are used, in stage 1
    torchrun --nproc_per_node 8 recipes/var_d16_dd2_1step.py

Published: FID 6.21, 116 hours of 8 A800 (arXiv 2510.21003): 330k iterations of stage 1, 300k of them of the head alone
(all weights here), then 40k of the critic with 8k of the generator (FID 8.35), 8k of the critic alone with the average
of the generator, and 15k with 7.5k, all at a rate of 2e-4 and batch 512, as here. Prefixes are the embeddings that the
generator makes, which VAR reads as they are. Not yet run at scale.
Hardware: eight H100, 80 GB each.
"""

from fewstep.methods.dd2 import DD2
from fewstep.recipe import DataConfig, Recipe, RoleConfig, SampleConfig, TeacherConfig, TrainConfig

STEPS = 330_000 + 40_000 + 8_000 + 15_000
ROLE = {"kind": "full", "lr": 2e-4, "betas": (0.9, 0.95), "weight_decay": 0.0}

recipe = Recipe(
    output="runs/var_d16_dd2_1step",
    teacher=TeacherConfig(path="models/var-d16", pipeline_class="VARPipeline"),
    method=DD2.Config(
        guidance_scale=3.0,
        critic_steps=5,
        initial_share=330_000 / STEPS,
        alignment_share=8_000 / STEPS,
        second_share=15_000 / STEPS,
        prefix="continuous",
    ),
    data=DataConfig(prompts="builtin:imagenet-classes", pairs="pairs/var-d16"),
    roles={
        "student": RoleConfig(warmup=40_000, ema=0.9999, **ROLE),
        "critic": RoleConfig(warmup=1000, **ROLE),
    },
    train=TrainConfig(
        steps=STEPS, batch_size=32, accumulate=2, log_every=100, sample_every=10_000, checkpoint_every=5000
    ),
    samples=SampleConfig(count=8, columns=8),
)

if __name__ == "__main__":
    from fewstep import run

    run(recipe)
