"""One-step student of LlamaGen-L (ImageNet, 256 px) with Distilled Decoding 2.

    fewstep convert llamagen --transformer c2i_L_256.pt --tokenizer vq_ds16_c2i.pt --to models/llamagen-l
    fewstep pairs llamagen_l_dd2_1step --num 200000         # only their tokens are used, in stage 1
    torchrun --nproc_per_node 8 recipes/llamagen_l_dd2_1step.py

Published: FID 8.59, 53 hours of 8 A800 (arXiv 2510.21003): 100k iterations of stage 1 at a rate of 1e-4 and batch 512,
then 60k of the critic with 12k of the generator at 2e-4 and 1e-4 and batch 1024; there was no alignment. Iterations,
rates and batches are the paper's; its teacher was fine-tuned to read embeddings, ours reads the nearest codes of what
the generator makes. Not yet run at scale.
Hardware: eight H100, 80 GB each.
"""

from fewstep.methods.dd2 import DD2
from fewstep.recipe import DataConfig, Recipe, RoleConfig, SampleConfig, TeacherConfig, TrainConfig

ROLE = {"kind": "full", "betas": (0.9, 0.95), "weight_decay": 0.0}

recipe = Recipe(
    output="runs/llamagen_l_dd2_1step",
    teacher=TeacherConfig(path="models/llamagen-l", pipeline_class="LlamaGenPipeline"),
    method=DD2.Config(
        guidance_scale=2.0,
        critic_steps=5,
        initial_share=100_000 / 160_000,
        initial_rate=0.5,
        initial_rows=0.5,
    ),
    data=DataConfig(prompts="builtin:imagenet-classes", pairs="pairs/llamagen-l"),
    roles={
        "student": RoleConfig(lr=1e-4, warmup=40_000, ema=0.9999, **ROLE),
        "critic": RoleConfig(lr=2e-4, warmup=1000, **ROLE),
    },
    train=TrainConfig(
        steps=160_000, batch_size=64, accumulate=2, log_every=100, sample_every=10_000, checkpoint_every=5000
    ),
    samples=SampleConfig(count=8, columns=8),
)

if __name__ == "__main__":
    from fewstep import run

    run(recipe)
