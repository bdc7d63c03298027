"""Four-step LoRA of FLUX.1-dev at 1024 px with DMD2's score difference alone.

    torchrun --nproc_per_node 8 recipes/flux_dmd2_4step.py --prompts prompts.txt
    fewstep train flux_dmd2_4step --smoke          # seconds, a tiny random Flux stands in

Teacher, critic and student are told guidance_scale, 3.5 as users call it, and so is the exported student: all three
start as the same guided model. Without a discriminator no images are needed. Not yet run at scale; the learning rates
are ours. A LoRA critic with alpha equal to its rank follows at ten times the rate of a whole one on the small built-in
teacher (``eval/results/lora_critic/README.md``).
Hardware: eight H100, 80 GB each.
"""

from fewstep.methods.dmd2 import DMD2
from fewstep.recipe import (
    DataConfig,
    ExportConfig,
    Recipe,
    RoleConfig,
    SampleConfig,
    TeacherConfig,
    TrainConfig,
)

lora = RoleConfig(kind="lora", rank=64, alpha=64, lr=2e-5, warmup=200)

recipe = Recipe(
    output="runs/flux_dmd2_4step",
    teacher=TeacherConfig(
        path="black-forest-labs/FLUX.1-dev",
        pipeline_class="FluxPipeline",
        dtype="bfloat16",
        autocast="bfloat16",
        resolution=1024,
        gradient_checkpointing=True,
    ),
    method=DMD2.Config(num_steps=4, guidance_scale=3.5, critic_steps=5, gan_weight=0.0),
    data=DataConfig(prompts="prompts.txt"),
    roles={"student": lora, "critic": lora},
    train=TrainConfig(steps=10_000, batch_size=1, accumulate=4, sample_every=250, checkpoint_every=500),
    samples=SampleConfig(count=8, teacher_steps=28, columns=4),
    export=ExportConfig(dtype="bfloat16"),
)

if __name__ == "__main__":
    from fewstep import run

    run(recipe)
