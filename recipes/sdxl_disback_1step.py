"""One-step LoRA of SDXL at 1024 px with DisBack, from a student that DMD2 has finished; prompts alone.

    fewstep train sdxl_dmd2_1step --prompts prompts.txt --images images/     # first; its script says how
    fewstep train sdxl_disback_1step --prompts prompts.txt
    fewstep train sdxl_disback_1step --smoke       # seconds, a tiny random SDXL stands in

Ten nodes record in 100 iterations each how the teacher degrades into that student, which then follows them back to the
teacher, 1000 iterations per node.
Hardware: one H100, 80 GB. Batch 16 in 4 parts of 4, 20k iterations, half of them with the original teacher: the student
learns from 0.3 M samples; 13 hours by `fewstep plan`.
Published (arXiv 2408.15991 and its code): the same nodes, intervals, guidance and start, from DMD2's one-step student;
batch 1, all weights at 5e-7 or a critic as LoRA, 100k iterations; no number for SDXL is known to us. What differs:
student, critic and nodes are LoRAs, which eleven whole networks would not be on one card; their rates are those of
sdxl_dmd2_4step_24gb. Not yet run at scale.
"""

from fewstep.methods.disback import DisBack
from fewstep.recipe import (
    DataConfig,
    ExportConfig,
    Recipe,
    RoleConfig,
    SampleConfig,
    TeacherConfig,
    TrainConfig,
)

student = RoleConfig(
    kind="lora", rank=64, alpha=8, lr=5e-5, warmup=500, start_from="runs/sdxl_dmd2_1step/export"
)
# Weights go from node to node and into the critic, so they are alike.
fast = RoleConfig(kind="lora", rank=64, alpha=64, lr=5e-4)

recipe = Recipe(
    output="runs/sdxl_disback_1step",
    teacher=TeacherConfig(
        path="stabilityai/stable-diffusion-xl-base-1.0",
        pipeline_class="StableDiffusionXLPipeline",
        dtype="bfloat16",
        autocast="bfloat16",
        resolution=1024,
        gradient_checkpointing=True,
    ),
    method=DisBack.Config(nodes=10, record_steps=100, backtrack_steps=1000, start=399, guidance_scale=8.0),
    data=DataConfig(prompts="prompts.txt"),
    roles={"student": student, "critic": fast, "node": fast},
    train=TrainConfig(steps=20_000, batch_size=4, accumulate=4, sample_every=250, checkpoint_every=500),
    samples=SampleConfig(count=8, teacher_steps=50, columns=4),
    export=ExportConfig(dtype="float16", kohya=True),
)

if __name__ == "__main__":
    from fewstep import run

    run(recipe)
