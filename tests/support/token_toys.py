"""Autoregressive toys: a known joint law of four tokens as the teacher, and small students of it.

python tests/support/token_toys.py dd1      # or dd2, dd2-from-dd1, dd2-codes: the full length, minutes; see LENGTHS
"""

import sys
import time
from types import SimpleNamespace

import torch
from standin import device
from toys import Rows, placed, spread

from fewstep.data.batches import Batches
from fewstep.diffusion.cond import Cond
from fewstep.diffusion.rng import Rng
from fewstep.methods.dd1 import DD1
from fewstep.methods.dd2 import DD2
from fewstep.process import Process
from fewstep.recipe import RoleConfig, TrainConfig
from fewstep.teachers.analytic import KnownJoint
from fewstep.tokens.codes import CodebookDenoiser
from fewstep.tokens.llamagen import GPT
from fewstep.training.roles import averaged, build_role
from fewstep.training.trainer import Trainer

TOKENS, CODES, DIM = 4, 3, 2


def label(rows):
    return Cond({"label": torch.zeros(rows, dtype=torch.long)})


def known_teacher(sharpness=2.5):
    """As much of a teacher as methods are built of: a known joint, and a small random transformer to start from."""
    joint = KnownJoint.random(TOKENS, CODES, Rng("joint"), sharpness)
    codes = 1.2 * torch.tensor([[1.0, 0.2], [-0.6, 0.9], [-0.3, -1.0]])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = GPT(CODES, 48, 2, 4, TOKENS, num_classes=1, multiple_of=16, rotated_condition=True)
    return SimpleNamespace(
        net=net.requires_grad_(False), denoiser=CodebookDenoiser(joint, codes), latent_shape=(TOKENS, DIM)
    )


def known_pairs(teacher, count):
    noise = Rng("pairs").normal(count, TOKENS, DIM)
    return Rows(count, noise=noise, tokens=teacher.denoiser.flow(noise, label(count)))


def token_toy(
    method, config, teacher, steps, batch_size, pairs, student=None, critic=None, accumulate=1, process=None
):
    """A trainer of a method of autoregressive teachers."""
    shared = {"kind": "full", "weight_decay": 0.0, "betas": (0.9, 0.95)}
    configs = {
        "student": student or RoleConfig(lr=2e-3, ema=0.99, warmup=20, decay=steps, **shared),
        "critic": critic or RoleConfig(lr=2e-3, warmup=20, **shared),
    }
    roles, place = {}, (process or Process(device=device())).device
    teacher = SimpleNamespace(**{name: placed(value, place) for name, value in vars(teacher).items()})
    for name in method.networks_for(config):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            roles[name] = build_role(name, method.network(config, teacher, name), configs[name])
    method = method(config, teacher.denoiser, teacher.latent_shape, **{n: r.module for n, r in roles.items()})
    process = spread(roles, process)
    data = Batches(
        Rows(1000, label=torch.zeros(1000, dtype=torch.long)),
        teacher.latent_shape,
        batch_size=batch_size,
        per_iteration=accumulate * process.world,
        pairs=pairs,
        pair_conditions=Rows(len(pairs), label=torch.zeros(len(pairs), dtype=torch.long)),
        device=place,
    )
    return Trainer(
        method,
        roles,
        data,
        TrainConfig(steps=steps, batch_size=batch_size, accumulate=accumulate),
        process=process,
        quiet=True,
    )


@torch.no_grad()
def student_tokens(trainer, teacher, count=40_000, average=True):
    """What the student makes of fresh noise, as nearest codes (N, n)."""
    noise = Rng("fresh").normal(count, *teacher.latent_shape)
    with averaged(*([trainer.roles["student"]] if average else [])):
        made = [trainer.method.student.sample(z, label(len(z)), torch.randn_like) for z in noise.split(5000)]
    return (
        torch.cat(made) @ teacher.denoiser.codes.T - 0.5 * teacher.denoiser.codes.square().sum(-1)
    ).argmax(-1)


# Iterations of the full length, in batches of 256; the tests run a share of them, in batches of 128.
LENGTHS = {"dd1": 4000, "dd2": 6000, "dd2-from-dd1": 2000, "dd2-codes": 1200}
FULL = {"kind": "full", "weight_decay": 0.0}
SMALL = {"head_width": 64, "head_depth": 2}


def student_of_the_joint(name, teacher, share=1.0, batch_size=256):
    """The trainer of a student whose tokens are to have the known joint. Rates and noise levels are ours: a generator
    that moves faster than its critic learns (twice the rate here) collapses now and then, and one that starts near the
    joint drifts off it by what the critic is wrong (at half the critic's updates and copies, from 0.031 to 0.038)."""
    steps = round(share * LENGTHS[name])
    if name == "dd1":
        config = DD1.Config(split=TOKENS, embedding_weight=0.0)
        student = RoleConfig(lr=3e-3, betas=(0.9, 0.95), ema=0.99, warmup=20, decay=steps, **FULL)
        return token_toy(
            DD1, config, teacher, steps, batch_size, known_pairs(teacher, 60_000), student=student
        )
    stages = {"critic_steps": 3, "copies": 4, "critic_copies": 4, "matching": "dmd", **SMALL}
    if name == "dd2":
        config = DD2.Config(initial_share=0.08, **stages)
        student = RoleConfig(
            lr=5e-4, betas=(0.5, 0.99), ema=0.99, warmup=100, decay=round(0.6 * steps), **FULL
        )
        critic = RoleConfig(lr=1.5e-3, betas=(0.9, 0.99), warmup=50, decay=round(0.6 * steps), **FULL)
    elif name == "dd2-codes":  # a map that is barely learned, which leaves something to do
        shares = {"initial_share": 0.1, "regression_share": 0.06, "alignment_share": 0.1}
        config = DD2.Config(generator="codes", regression_rate=5.0, **shares, **stages)
        decay = round(0.3 * steps)
        student = RoleConfig(lr=4e-4, betas=(0.9, 0.99), ema=0.99, warmup=20, decay=decay, **FULL)
        critic = RoleConfig(lr=1.5e-3, betas=(0.9, 0.99), warmup=20, decay=decay, **FULL)
    else:
        shares = {"initial_share": 0.1, "regression_share": 0.5, "alignment_share": 0.1}
        stages |= {"critic_steps": 6, "critic_copies": 8}
        config = DD2.Config(regression_rate=40.0, **shares, **stages)
        student = RoleConfig(
            lr=5e-5, betas=(0.9, 0.99), ema=0.99, warmup=20, decay=round(0.3 * steps), **FULL
        )
        critic = RoleConfig(lr=1e-3, betas=(0.9, 0.99), warmup=20, decay=round(0.3 * steps), **FULL)
    pairs = known_pairs(teacher, 20_000)
    return token_toy(DD2, config, teacher, steps, batch_size, pairs, student=student, critic=critic)


def main(name):
    teacher = known_teacher()
    trainer = student_of_the_joint(name, teacher)
    begin, every = time.process_time(), LENGTHS[name] // 10
    for step in range(1, LENGTHS[name] + 1):
        trainer.iterate()
        if step % every == 0:
            distance = teacher.denoiser.net.total_variation(student_tokens(trainer, teacher))
            print(
                f"{step} iterations, {time.process_time() - begin:.0f} s of a core: {distance:.4f}",
                flush=True,
            )


if __name__ == "__main__":
    main(sys.argv[1])
