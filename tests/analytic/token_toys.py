"""Autoregressive toys: a known joint law of four tokens as the teacher, and small students of it."""

from types import SimpleNamespace

import torch
from toys import Rows, spread

from fewstep.cond import Cond
from fewstep.data import Batches
from fewstep.rng import Rng
from fewstep.roles import RoleConfig, averaged, build_role
from fewstep.teachers.analytic import KnownJoint
from fewstep.teachers.llamagen import GPT
from fewstep.tokens import CodebookDenoiser
from fewstep.trainer import TrainConfig, Trainer

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
    roles = {}
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
