"""Two-step student of SANA 1.6B with sCM alone (arXiv 2410.11081).

    fewstep prepare Efficient-Large-Model/Sana_1600M_1024px_diffusers --images images --qk-norm --out runs/sana-smooth
    torchrun --nproc_per_node 8 recipes/sana_scm_2step.py --prompts prompts.txt --images images

Hardware: eight H100, 80 GB each. Not yet run at scale. Guidance is distilled in at one scale, so a LoRA suffices.
Noise law, tangent warm-up and batch are SANA-Sprint's (arXiv 2503.09641), Adam's constants and the second step's 1.1
those of sCM; rank, rate and length are ours.
"""

from fewstep.methods.scm import SCM
from fewstep.recipe import DataConfig, Recipe, RoleConfig, SampleConfig, TeacherConfig, TrainConfig

recipe = Recipe(
    output="runs/sana_scm_2step",
    teacher=TeacherConfig(
        path="runs/sana-smooth",
        pipeline_class="SanaPipeline",
        dtype="float32",  # a LoRA's tangent passes through the frozen weights, in fp32
        autocast="bfloat16",
        gradient_checkpointing=True,
    ),
    method=SCM.Config(
        angles=[[1.5708, 1.1], [1.5708]], guidance_scale=4.5, time_mean=0.0, time_std=1.6, warmup=4000
    ),
    data=DataConfig(prompts="prompts.txt", images="images"),
    roles={
        "student": RoleConfig(
            kind="lora", rank=128, alpha=128, lr=1e-5, betas=(0.9, 0.99), eps=1e-11, warmup=500, ema=0.9999
        ),
        "weighting": RoleConfig(kind="full", lr=1e-3, weight_decay=0.0),
    },
    train=TrainConfig(steps=20_000, batch_size=4, accumulate=16, sample_every=500, checkpoint_every=500),
    samples=SampleConfig(count=8, teacher_steps=20, columns=4),
)

if __name__ == "__main__":
    from fewstep import run

    run(recipe)
