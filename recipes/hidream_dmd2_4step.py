"""Four-step LoRA of HiDream-I1-Full at 1024 px with DMD2's score difference alone.

    torchrun --nproc_per_node 8 recipes/hidream_dmd2_4step.py --teacher.path FOLDER --prompts prompts.txt
    fewstep train hidream_dmd2_4step --smoke          # seconds, a tiny random HiDream stands in

FOLDER is the published pipeline with Llama 3.1 8B Instruct as its fourth encoder, which the hub has apart; without it
the run says how it is put there. Guidance is the stock call's 5. All else is ours: rank and learning rates as in
``flux_dmd2_4step``, adapters on attention and on what every token passes, not on the experts that it chooses, and no
discriminator, so that no images are needed. Not yet run at scale. The teacher is Full; Dev and Fast are students
already. An encoded prompt takes 35 MB on disk, 32 layers of 128 tokens; of two thousand it is 69 GB.
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
    output="runs/hidream_dmd2_4step",
    teacher=TeacherConfig(
        path="HiDream-ai/HiDream-I1-Full",
        pipeline_class="HiDreamImagePipeline",
        dtype="bfloat16",
        autocast="bfloat16",
        gradient_checkpointing=True,
    ),
    method=DMD2.Config(num_steps=4, guidance_scale=5.0, critic_steps=5, gan_weight=0.0),
    data=DataConfig(prompts="prompts.txt"),
    roles={"student": lora, "critic": lora},
    train=TrainConfig(steps=10_000, batch_size=1, accumulate=4, sample_every=250, checkpoint_every=500),
    samples=SampleConfig(count=8, teacher_steps=50, columns=4),
    export=ExportConfig(dtype="bfloat16"),
)

if __name__ == "__main__":
    from fewstep import run

    run(recipe)
