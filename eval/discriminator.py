"""What can a discriminator see? Heads on features of a network, or one of their own, against a student at rest.

    python eval/discriminator.py --run runs/emoji_dmd2_1step           # all heads, more than 20 minutes of one core
    python eval/discriminator.py --run runs/emoji_dmd2_1step --only mid_block

Three quarters of the drawings teach, each with both of its captions; the others are held out. Fakes are drawn anew, so
a head that has learned drawings by heart, and not what tells them from fakes, is right on those that taught it and
guesses on the others. Rows go to eval/results/discriminator/ one by one; those that are there already are kept.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fewstep import recipe as recipes
from fewstep.diffusion import objectives
from fewstep.diffusion.cond import Cond
from fewstep.diffusion.discriminator import Discriminator
from fewstep.diffusion.rng import Rng
from fewstep.errors import FewstepError, tell
from fewstep.files import SHARED, check_own, check_writable, write, write_json
from fewstep.methods.verdicts import BANDS, settled, verdicts
from fewstep.process import start
from fewstep.runs.checks import check_data
from fewstep.runs.session import Session
from fewstep.runs.summary import versions

RESULTS = Path(__file__).parent / "results" / "discriminator"
TITLE = "# What can a discriminator see?"
# By hand, when the numbers were there.
CONCLUSION = """## What follows

Behind the noise that DMD2's discriminator is shown as published, all of the schedule, there is hardly anything
to be told: no head is better than 0.55 anywhere. Behind little noise each of them is right on more than half,
at most 0.64, with first blocks or the middle one, of the critic or of the teacher. Told captions do not help. A
thousand and a half drawings do not teach more that holds for others; heads that see the same few of them again
and again learn these by heart (loss 1.06 on 540 drawings and as many samples, and chance on others).

Trainings of `emoji_dmd2_1step`, 1,000 iterations each, one seed; its result is FD 833 \u00b1 10:

| taps | noise | gan_weight | discriminator.lr | right while training | FD |
| --- | --- | --- | --- | --- | --- |
| conv_in, down_blocks.0 | 0 to 0.2 | 1e-2 | 3e-4 | 0.56 to 0.65 | 838 \u00b1 11 |
| conv_in, down_blocks.0 | 0 to 0.2 | 5e-2 | 2e-3 | 0.55 to 0.62 | 829 \u00b1 12 |

So the discriminator leaves chance, and FD is the same. In pixels, where the student's first strokes differ from
drawings more, it does not stay there: `emoji_edm_dmd2_1step` (first blocks, half of the schedule) is right on
0.9, 0.7 and 0.6 of the first three quarters, and FD is 757 \u00b1 7 with it and 773 \u00b1 9 without
(`--method.gan_weight 0`), one run each."""
BATCH, HELD = 24, 24  # HELD: batches


class Head(NamedTuple):
    """Of whose features, and behind how much noise it is taught, as a part of the schedule."""

    taps: tuple[str, ...]
    judge: str = "critic"
    times: tuple[float, float] = (0.0, 1.0)
    lr: float = 3e-4
    conditional: bool = False
    updates: int = 300
    whole: bool = False  # a copy of the network is taught with it; else the network stays the run's


CLEAN = (0.0, 0.2)
FIRST = ("conv_in", "down_blocks.0")
HEADS = {
    "mid_block": Head(("mid_block",)),
    "mid_block, little noise": Head(("mid_block",), times=CLEAN),
    "mid_block of the teacher, little noise": Head(("mid_block",), "teacher", CLEAN),
    "mid_block, conditional, little noise": Head(("mid_block",), times=CLEAN, conditional=True),
    "conv_in": Head(("conv_in",), times=CLEAN),
    "down_blocks.0": Head(("down_blocks.0",), times=CLEAN),
    "conv_in, down_blocks.0": Head(FIRST, times=CLEAN),
    "conv_in, down_blocks.0, all noise": Head(FIRST),
    "conv_in, down_blocks.0, 1e-3": Head(FIRST, times=CLEAN, lr=1e-3),
    "up_blocks.1": Head(("up_blocks.1",), times=CLEAN),
    "mid_block, little noise, 1,200 updates": Head(("mid_block",), times=CLEAN, updates=1200),
    "mid_block of a critic that is taught": Head(("mid_block",), times=CLEAN, whole=True),
    "mid_block of a critic that is taught, 1,200 updates": Head(
        ("mid_block",), times=CLEAN, whole=True, updates=1200
    ),
    "network of its own": Head((), "own", CLEAN, lr=1e-3),
    "network of its own, 1,200 updates": Head((), "own", CLEAN, lr=1e-3, updates=1200),
}


class Block(nn.Module):
    """Residual, of two convolutions; halves what it is given if asked to."""

    def __init__(self, channels: int, wide: int, halve: bool):
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.GroupNorm(8, channels), nn.SiLU(), nn.Conv2d(channels, wide, 3, 1, 1)),
            *(nn.GroupNorm(8, wide), nn.SiLU(), nn.Conv2d(wide, wide, 3, 1, 1)),
        )
        self.skip = nn.Conv2d(channels, wide, 1)
        self.last = nn.AvgPool2d(2) if halve else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        halved: Tensor = self.last(self.skip(x) + self.layers(x))
        return halved


def own_network(channels: int, height: int, width: int, wide: int = 64) -> nn.Module:
    """Latents (B, C, H, W) -> logits (B, 1); 0.6 M weights on 16 x 8 x 8, which know nothing to begin with."""
    blocks = [Block(wide, wide, False), Block(wide, 2 * wide, True), Block(2 * wide, 2 * wide, True)]
    last = [
        nn.GroupNorm(8, 2 * wide),
        nn.SiLU(),
        nn.Flatten(),
        nn.Linear(2 * wide * (height // 4) * (width // 4), 1),
    ]
    return nn.Sequential(nn.Conv2d(channels, wide, 3, 1, 1), *blocks, *last)


class Drawings:
    """Real latents of a run, split by drawing: those of two captions are on one side."""

    def __init__(self, session: Session):
        data: Any = session.trainer.data
        data = getattr(data, "data", data)
        self.latents, self.captions = data.buckets[0].latents, data.captions
        every = self.latents.rows(torch.arange(len(self.latents)))["latents"].flatten(1)
        _, drawing = torch.unique(every, dim=0, return_inverse=True)
        self.held = drawing % 4 == 0

    def some(self, held: bool, rng: Rng) -> tuple[Tensor, Cond]:
        index = torch.nonzero(self.held == held)[:, 0]
        index = index[torch.floor(rng.uniform(BATCH) * len(index)).long()]
        return self.latents.rows(index)["latents"].float(), Cond(self.captions.rows(index))


class Judge:
    """Logits of a head: on features of a frozen network, of a copy that is taught with it, or on latents alone.

    Attributes:
        taught: what the optimizer gets.
    """

    def __init__(self, session: Session, head: Head):
        method: Any = session.method
        self.denoiser = session.teacher.denoiser if head.judge == "teacher" else method.critic
        if head.judge == "own":
            self.net = own_network(*method.latent_shape)
            self.taught = list(self.net.parameters())
            return
        if head.whole:
            self.denoiser = self.denoiser.with_net(copy.deepcopy(self.denoiser.net), self.denoiser.embedded)
        self.denoiser.net.requires_grad_(head.whole)
        self.net = Discriminator(self.denoiser, head.taps, method.latent_shape, head.conditional)
        self.taught = [*self.net.parameters(), *(self.denoiser.net.parameters() if head.whole else ())]

    def logits(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        found: Tensor = (
            self.net.logits(self.denoiser, x_t, t, cond)
            if isinstance(self.net, Discriminator)
            else self.net(x_t)
        )
        return found


def judged(
    session: Session, drawings: Drawings, judge: Judge, head: Head, held: bool, i: int
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Logits and times of a batch of reals, and of fakes."""
    method: Any = session.method
    rng, schedule = Rng("discriminator", held, i), judge.denoiser.schedule
    real, real_cond = drawings.some(held, rng)
    with torch.no_grad():
        fake, cond = method.generate(session.trainer.data.batch(10**6 * (1 + held) + i, 0))
    t = schedule.draw_times(rng.uniform(2 * BATCH), *((0.0, 1.0) if held else head.times))
    both = torch.cat([real, fake])
    x_t = schedule.add_noise(both, rng.normal_like(both), t)
    logits = judge.logits(x_t, t, Cond.cat(real_cond, cond))
    return (logits[:BATCH], t[:BATCH]), (logits[BATCH:], t[BATCH:])


def measured(session: Session, drawings: Drawings, head: Head) -> dict[str, Any]:
    """Accuracies behind each quarter of noise on held-out drawings and fresh fakes, and the loss at the end."""
    torch.manual_seed(0)
    begin = time.perf_counter()
    judge = Judge(session, head)
    optimizer = torch.optim.AdamW(judge.taught, lr=head.lr, weight_decay=0.01)
    losses = []
    for i in range(head.updates):
        real, fake = judged(session, drawings, judge, head, False, i)
        loss = objectives.gan_discriminator(real[0], fake[0])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())
    sums: dict[str, Tensor] = {}
    with torch.no_grad():
        for i in range(HELD):
            both = judged(session, drawings, judge, head, True, i)
            for name, value in verdicts(judge.denoiser.schedule, *both).items():
                sums[name] = sums.get(name, torch.zeros(())) + value
    found = settled(sums)
    return {
        "loss": round(torch.stack(losses[-50:]).mean().item(), 3),
        "accuracy": [round(found[f"discriminator_accuracy_{k + 1}"].item(), 3) for k in range(BANDS)],
        "seconds": round(time.perf_counter() - begin, 1),
    }


def table(result: dict[str, Any]) -> str:
    lines = [
        TITLE,
        "",
        f"Made by `python eval/discriminator.py` with a run of `{result['recipe']}` at step {result['step']}, whose",
        "networks are frozen, but for those that a row says are taught: 300 updates of the heads, or as many as a row",
        f"says, by {BATCH} drawings and {BATCH} samples of the student each. Right: share of verdicts on held-out",
        "drawings and fresh samples, by the noise they are behind (sigma over alpha); 0.50 is chance, and a quarter of",
        f"{2 * HELD * BATCH} verdicts has an error of about 0.03. Loss: at the end, on what teaches; 1.39 is chance.",
        "",
        "| features | loss | right: up to 0.41 | to 1 | to 2.4 | more |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name in (n for n in HEADS if n in result["heads"]):
        row = result["heads"][name]
        lines.append(f"| {name} | {row['loss']:.2f} | {' | '.join(f'{a:.2f}' for a in row['accuracy'])} |")
    return "\n".join([*lines, "", CONCLUSION]) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="of DMD2 or a sibling, with a checkpoint")
    parser.add_argument("--only", nargs="*", default=[], metavar="NAME", help="of heads")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    check_writable(args.out, "--out", record=SHARED)
    kept, told = args.out / "heads.json", args.out / "README.md"
    check_own(kept, '{\n "recipe":', "--out")
    check_own(told, TITLE, "--out")
    recipe = recipes.load(args.run / "recipe.yaml")
    recipe = recipes.override(recipe, [f"--output={args.run}"])
    session = Session(recipe, *check_data(recipe), start("cpu"), begun=True)
    if not session.trainer.restore():
        raise FewstepError(f"--run: {args.run}: no checkpoint; train it first")
    step = session.trainer.progress.iteration
    result: dict[str, Any] = {
        "recipe": Path(recipe.output).name,
        "step": step,
        "versions": versions(),
        "heads": {},
    }
    if kept.exists():
        result = json.loads(kept.read_text())
    drawings = Drawings(session)
    for name, head in HEADS.items():
        if name in result["heads"] or (args.only and name not in args.only):
            continue
        result["heads"][name] = measured(session, drawings, head)
        print(f"{name}: {result['heads'][name]}", flush=True)
        write_json(kept, result)
        write(told, table(result))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except FewstepError as error:
        sys.exit(tell(error))
