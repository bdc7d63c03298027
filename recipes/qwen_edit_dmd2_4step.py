"""Four-step LoRA of Qwen-Image-Edit at 1024 px with DMD2's score difference alone.

    torchrun --nproc_per_node 8 recipes/qwen_edit_dmd2_4step.py --prompts edits.jsonl
    fewstep train qwen_edit_dmd2_4step --smoke          # a minute, a tiny random Qwen-Image-Edit stands in

The table has the columns "prompt" and "reference", an image or a list of up to three. Guidance is the model card's
(true_cfg_scale 4 against a blank negative prompt, read with the same images, with the pipeline's rescaling). All else
is ours, as in ``qwen_image_dmd2_4step``: no discriminator, so that no edited images are needed. Not yet run at scale.
The teacher's licence is Apache 2.0; 2511 and fine-tunes of the same class take --teacher.path. Needs torchvision.
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
    output="runs/qwen_edit_dmd2_4step",
    teacher=TeacherConfig(
        path="Qwen/Qwen-Image-Edit-2509",
        pipeline_class="QwenImageEditPlusPipeline",
        dtype="bfloat16",
        autocast="bfloat16",
        resolution=1024,
        gradient_checkpointing=True,
    ),
    method=DMD2.Config(num_steps=4, guidance_scale=4.0, critic_steps=5, gan_weight=0.0),
    data=DataConfig(prompts="edits.jsonl"),
    roles={"student": lora, "critic": lora},
    train=TrainConfig(steps=10_000, batch_size=1, accumulate=4, sample_every=250, checkpoint_every=500),
    samples=SampleConfig(count=8, teacher_steps=50, columns=4),
    export=ExportConfig(dtype="bfloat16"),
)

if __name__ == "__main__":
    from fewstep import run

    run(recipe)
