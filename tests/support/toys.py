"""Toys of the closed-form tests: small networks, teachers whose score is known, and a trainer around any method."""

import copy
import itertools
import math

import torch
from diffusers import DDPMScheduler
from diffusers.models.embeddings import TimestepEmbedding
from standin import device
from torch import nn

from fewstep.data.batches import Batches
from fewstep.diffusion.cond import Cond
from fewstep.diffusion.denoiser import NetDenoiser
from fewstep.diffusion.rng import Rng
from fewstep.diffusion.schedules import VP, Schedule
from fewstep.process import Process
from fewstep.recipe import RoleConfig, TrainConfig
from fewstep.teachers.analytic import GaussianMixture
from fewstep.training.roles import Role, averaged, build_role
from fewstep.training.sharding import distribute
from fewstep.training.trainer import Trainer

SD = VP.from_scheduler(DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"))
NONE = Cond({})
BATCH = 512


class Rows:
    """As much of a store of encoded prompts or images as micro-batches are made of."""

    def __init__(self, length, **tensors):
        self.length, self.tensors = length, tensors

    def __len__(self):
        return self.length

    def rows(self, index):
        return {name: value[index] for name, value in self.tensors.items()}


class Mlp(nn.Module):
    """A network of ``x (B, dim)``, its time, and a label (-1 is the null one) where there are labels.

    ``smooth`` 8 leaves one turn of its fastest sinusoid over all times, as a prepared teacher has it.
    """

    def __init__(self, width=128, dim=2, labels=0, smooth=1):
        super().__init__()
        self.dim, self.labels = dim, labels
        self.register_buffer("frequency", torch.tensor([1.0, 2, 4, 8]) * math.pi / (1000 * smooth))
        sizes = [dim + 8 + (labels + 1 if labels else 0), width, width, width]
        hidden = [m for a, b in itertools.pairwise(sizes) for m in (nn.Linear(a, b), nn.SiLU())]
        self.layers = nn.Sequential(*hidden, nn.Linear(width, dim))

    def forward(self, x, t, label=None):
        phase = t.float()[:, None] * self.frequency
        inputs = [x, phase.sin(), phase.cos()]
        if self.labels:
            inputs.append(nn.functional.one_hot(label + 1, self.labels + 1).float())
        return self.layers(torch.cat(inputs, 1))


class TimedMlp(nn.Module):
    """The same with its time embedding apart, by the names that diffusers' UNets have."""

    def __init__(self, width=128, dim=2, labels=0):
        super().__init__()
        self.dim, self.labels = dim, labels
        self.entry = nn.Linear(dim + (labels + 1 if labels else 0), width)
        self.time_proj, self.time_embedding = Phases(), TimestepEmbedding(8, width)
        hidden = [m for _ in range(2) for m in (nn.SiLU(), nn.Linear(width, width))]
        self.layers = nn.Sequential(*hidden, nn.SiLU(), nn.Linear(width, dim))

    def forward(self, x, t, label=None):
        if self.labels:
            x = torch.cat([x, nn.functional.one_hot(label + 1, self.labels + 1).float()], 1)
        return self.layers(self.entry(x) + self.time_embedding(self.time_proj(t)))


class Phases(nn.Module):
    def forward(self, t):
        phase = t.float()[:, None] * 2.0 ** torch.arange(4, device=t.device) * (math.pi / 1000)
        return torch.cat([phase.sin(), phase.cos()], 1)


def call(net, x, t, cond):
    return net(x, t, cond["label"]) if net.labels else net(x, t)


def view(net, schedule=SD, prediction="v"):
    """A small network as a denoiser; times are scaled to 0..1000."""
    place = next(net.parameters()).device
    null = Cond({"label": torch.tensor([-1], device=place)}) if net.labels else None
    return NetDenoiser(net, schedule, prediction, call, null)


def energy_distance(x, y):
    return (2 * torch.cdist(x, y).mean() - torch.cdist(x, x).mean() - torch.cdist(y, y).mean()).item()


def per_noise(made, solved, name, reached):
    """How far a student is from the teacher's ODE for the same noise, as a share of that for different noises.

    0 is the ODE, about 1 a student that knows the distribution only (LADD and the score family may be anywhere).
    """
    share = (made - solved).square().mean().sqrt() / (made.roll(1, 0) - solved).square().mean().sqrt()
    print(f"\n| {name} | {reached:.4f} | {share:.3f} |")
    return share.item()


def labels_of(teacher, rng, count):
    """Conditions for ``count`` samples of a closed-form teacher."""
    if teacher.weights.ndim == 1:
        return NONE
    return Cond({"label": (rng.uniform(count) * len(teacher.weights)).long()})


def fit(teacher, net, steps=300, lr=2e-3, prediction="v", seed=0):
    """Fits a network to a closed-form teacher by denoising: what student and critic start from. Frozen after."""
    denoiser, schedule = view(net, teacher.schedule, prediction), teacher.schedule
    optimizer = torch.optim.Adam(net.parameters(), lr=lr)
    for i in range(steps):
        rng = Rng(seed, "fit", i)
        cond = labels_of(teacher, rng, BATCH)
        x0 = teacher.sample(BATCH, rng, cond if len(cond) else None)
        t, eps = schedule.draw_times(rng.uniform(BATCH)), rng.normal_like(x0)
        x_t = schedule.add_noise(x0, eps, t)
        if net.labels:
            dropped = rng.uniform(BATCH) < 0.1
            cond = Cond({"label": torch.where(dropped, -1, cond["label"])})
        error = denoiser.predict(x_t, t, cond) - schedule.convert(eps, x_t, t, "eps", prediction)
        optimizer.param_groups[0]["lr"] = lr * (1 - i / steps)
        optimizer.zero_grad()
        error.square().mean().backward()
        optimizer.step()
    optimizer.zero_grad()
    return net.requires_grad_(False)


def placed(thing, device):
    """A closed-form teacher or a network on a device; itself on the CPU."""
    if device.type == "cpu":
        return thing
    if isinstance(thing, (torch.Tensor, Cond, nn.Module)):
        return copy.deepcopy(thing).to(device)
    if type(thing).__module__.startswith("fewstep.") and not isinstance(thing, Schedule):
        thing = copy.copy(thing)
        vars(thing).update({name: placed(value, device) for name, value in vars(thing).items()})
    return thing


def spread(roles, process):
    """The roles over several processes, or this one."""
    process = process or Process(device=device())
    for role in roles.values():
        distribute(role.module, process)
        role.collect()
    return process


def labelled_mixture():
    """Four labels of two modes each in 16 dimensions, each label with a little of the others'."""
    means = torch.randn(8, 16, generator=torch.Generator().manual_seed(3))
    weights = torch.full((4, 8), 0.01)
    for label in range(4):
        weights[label, 2 * label : 2 * label + 2] = 1
    return GaussianMixture(SD, means, torch.tensor(0.04), weights / weights.sum(1, keepdim=True))


def toy(
    method,
    config,
    teacher,
    net,
    steps=1000,
    batch_size=BATCH,
    real=None,
    accumulate=1,
    prediction="v",
    student=None,
    critic=None,
    labels=None,
    heads=None,
    process=None,
    network=None,
):
    """A trainer of any method on a closed-form teacher; every network starts as a full copy of ``net``.

    Args:
        config: the method's. student, critic: RoleConfigs, "student" for every role of that first name. heads: of
            the method's own modules.
        labels: (N,) conditions the batches are drawn from, for conditional teachers; ``real`` has the first ones.
        process: of several; trained weights are then sharded over them. network: the students' own, if not ``net``.
    """
    dim, place = net.dim, (process or Process(device=device())).device
    teacher, net, network = (placed(thing, place) for thing in (teacher, net, network))
    shared = {"kind": "full", "weight_decay": 0.0, "decay": steps}
    configs = {
        "student": student or RoleConfig(lr=1e-3, ema=0.95, **shared),
        "critic": critic or RoleConfig(lr=2e-3, **shared),
    }
    names = method.networks_for(config)
    students = [n for n in names if n.startswith("student") or n in method.followers]
    roles = {n: build_role(n, net, configs["critic"]) for n in names if n not in students}
    roles |= {n: build_role(n, network or net, configs["student"]) for n in students}
    views = {n: view(r.module, teacher.schedule, prediction) for n, r in roles.items()}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # heads start equal, as in a real run
        method = method(config, teacher, (dim,), **views)
    for role in roles.values():
        role.collect()  # a method may have added to its network
    for name, head in method.heads().items():
        roles[name] = Role(name, head.to(place), heads or RoleConfig(kind="full"))
    conditions = Rows(1000, id=torch.arange(1000)) if labels is None else Rows(len(labels), label=labels)
    method.prepare(conditions)
    process = spread(roles, process)
    captions = None
    if real is not None:
        n = len(real)
        captions = Rows(n, id=5000 + torch.arange(n)) if labels is None else Rows(n, label=labels[:n])
    data = Batches(
        conditions,
        (dim,),
        batch_size=batch_size,
        per_iteration=accumulate * process.world,
        latents=None if real is None else Rows(len(real), latents=real),
        captions=captions,
        device=place,
    )
    train = TrainConfig(steps=steps, batch_size=batch_size, accumulate=accumulate)
    return Trainer(method, roles, data, train, process=process, quiet=True)


def distance(trainer, teacher, count=3000):
    """Energy distance between what the averaged student makes and the teacher's data (all labels alike)."""
    cond = labels_of(teacher, Rng(8), count)
    with averaged(*(role for name, role in trainer.roles.items() if name.startswith("student"))):
        noise = Rng(7).normal(count, teacher.means.shape[1])
        made = trainer.method.student.sample(noise, cond, Rng(6).normal_like)
    return energy_distance(made, teacher.sample(count, Rng(9), cond if len(cond) else None))
