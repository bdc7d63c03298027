"""Four-step LoRA of Qwen-Image-2.1 at 1024 px with DMD2's score difference alone.

    torchrun --nproc_per_node 8 recipes/qwen_image21_dmd2_4step.py --prompts prompts.txt
    fewstep train qwen_image21_dmd2_4step --smoke          # seconds, a tiny random Qwen-Image-2.1 stands in

No guidance: the stock call's default is true_cfg_scale 1, as the teacher is meant to be sampled. All settings are ours:
rank and learning rates as in ``flux_dmd2_4step``, and no discriminator, so that no images are needed. Not yet run at
scale. The teacher's licence is a research licence, which what is distilled from it falls under too.
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
    output="runs/qwen_image21_dmd2_4step",
    teacher=TeacherConfig(
        path="Qwen/Qwen-Image-2.1",
        pipeline_class="QwenImage21Pipeline",
        dtype="bfloat16",
        autocast="bfloat16",
        resolution=1024,
        gradient_checkpointing=True,
    ),
    method=DMD2.Config(num_steps=4, guidance_scale=1.0, critic_steps=5, gan_weight=0.0),
    data=DataConfig(prompts="prompts.txt"),
    roles={"student": lora, "critic": lora},
    train=TrainConfig(steps=10_000, batch_size=1, accumulate=4, sample_every=250, checkpoint_every=500),
    samples=SampleConfig(count=8, teacher_steps=40, columns=4),
    export=ExportConfig(dtype="bfloat16"),
)

if __name__ == "__main__":
    from fewstep import run

    run(recipe)
