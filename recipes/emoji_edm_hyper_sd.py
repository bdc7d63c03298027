"""One student of 1, 2, 4 and 8 steps of the small EDM with Hyper-SD: segments 8-4-2-1, one network.

    python recipes/emoji_edm_hyper_sd.py                       (or: fewstep train emoji_edm_hyper_sd)

Hardware: two CPU cores, 4 GB of memory. Time and result: ``eval/results/emoji_edm_hyper_sd.json``.
The teacher's row is Heun's 18 steps, 35 calls.
"""

from fewstep.methods.hyper_sd import HyperSD
from fewstep.recipe import (
    DataConfig,
    EvalConfig,
    Recipe,
    RoleConfig,
    SampleConfig,
    TeacherConfig,
    TrainConfig,
)

recipe = Recipe(
    output="runs/emoji_edm_hyper_sd",
    teacher=TeacherConfig(path="builtin:emoji-edm", pipeline_class="EDMPipeline", autocast="auto"),
    method=HyperSD.Config(segments=[8, 4, 2, 1], lengths=[1, 1, 1, 3], noise="fresh"),
    data=DataConfig(prompts="builtin:emoji-groups", images="builtin:emoji-32"),
    roles={"student": RoleConfig(kind="full", lr=5e-4, weight_decay=0.0, warmup=50, decay=200, ema=0.98)},
    train=TrainConfig(steps=900, batch_size=32, log_every=10, sample_every=300, checkpoint_every=300),
    samples=SampleConfig(count=24, teacher_steps=18, columns=12, scale=2),
    evaluation=EvalConfig(
        num=500,
        floor_steps=[1, 2, 4],
        floor_solvers=["ddim", "heun", "dpm++", "search"],
        teacher_steps=18,
        extractor="effnet-lite0@96",
    ),
)

if __name__ == "__main__":
    from fewstep import run

    run(recipe)
